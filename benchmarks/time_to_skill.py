"""How long it takes to master CartPole: the whole command, and the learning loop against Stable-Baselines3.

    python benchmarks/time_to_skill.py [--seeds 10] [--loop-seeds 5] [--steps 100000] [--words KEY=VALUE ...]

(a) `process`: wall time of `rl train algo=ppo env=CartPole stop_at_threshold=true` as a process, from start to exit, imports and
    evaluations included, one seed after another; one run before warms the kernel cache.
(b) `loop`: the learning loop alone until the mean return of the last 100 TRAINING episodes is 475 (so at least 47,500 steps), ours with
    our preset, then Stable-Baselines3 with the RL-Zoo's hyperparameters (needs stable-baselines3, in the extra `test`), in turn, one torch
    thread. Both have `--steps` to get there, over which their schedules run; a seed that does not is counted and left out of the ratio.
Result: benchmarks/results/time_to_skill.json.
"""

import sb3_ppo
from common import LearningLoop, made, parser, ratios, save, spread, summary, train

BAR = 475.0


def whole_process(seeds: int, words: list[str]) -> dict:
    base = ["algo=ppo", "env=CartPole", "stop_at_threshold=true", *words]
    train([*base, "seed=0"])
    runs = []
    for seed in range(seeds):
        told, wall = train([*base, f"seed={seed}"])
        runs.append(
            {"seed": seed, "wall_seconds": wall, "learning_seconds": told["learning_seconds"], "env_steps": told["env_steps"],
             "threshold_step": told["threshold_step"], "threshold_second": told["threshold_second"], "final": told["final"]["mean"]}
        )  # fmt: skip
        where = f"reached at step {told['threshold_step']}, final {told['final']['mean']:.0f}"
        print(f"process, seed {seed}: {wall:.2f} s, {where}", flush=True)
    reached = [run for run in runs if run["threshold_step"] is not None]
    out = {"command": " ".join(["rl train", *base]), "reached": len(reached), "seeds": seeds, "runs": runs}
    if reached:
        out["wall_seconds"] = summary(run["wall_seconds"] for run in runs)
        out["threshold_step"] = summary(run["threshold_step"] for run in reached)
        out["threshold_second"] = summary(run["threshold_second"] for run in reached)
    return out


def learning_loop(seeds: int, steps: int, words: list[str]) -> dict:
    def ours(seed: int, until: float | None, steps: int) -> dict:
        base = ["algo=ppo", "env=CartPole", "device=cpu", f"seed={seed}", f"total_steps={steps}"]
        return LearningLoop([*base, *words]).run(until)

    ours(0, None, 4_000)
    sb3_ppo.run(0, 4_000)
    runs: dict[str, list[dict]] = {"ours": [], "sb3": []}
    for seed in range(seeds):
        for name, done in (("ours", ours(seed, BAR, steps)), ("sb3", sb3_ppo.run(seed, steps, BAR))):
            runs[name].append({"seed": seed, **done})
            how = "" if done["solved"] else f", not reached: {done['last_100']:.0f}"
            print(f"loop, seed {seed}: {name:<5} {done['seconds']:.2f} s, {done['env_steps']:,} steps{how}", flush=True)
    out: dict = {"bar": BAR, "steps": steps, "seeds": seeds, "runs": runs}
    for name, done in runs.items():
        solved = [run for run in done if run["solved"]]
        out[name] = {"solved": len(solved)}
        if solved:
            out[name]["seconds"] = summary(run["seconds"] for run in solved)
            out[name]["env_steps"] = summary(run["env_steps"] for run in solved)
    both = [(a["seconds"], b["seconds"]) for a, b in zip(runs["ours"], runs["sb3"], strict=True) if a["solved"] and b["solved"]]
    if both:
        out["ratio"] = ratios([b for _, b in both], [a for a, _ in both])
    return out


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=10, help="seeds of (a); 0: leave it out")
    options.add_argument("--loop-seeds", type=int, default=5, help="seeds of (b); 0: leave it out")
    options.add_argument("--steps", type=int, default=100_000, help="env steps that (b) may take")
    options.add_argument("--words", nargs="*", default=[], metavar="KEY=VALUE", help="settings of ours besides the preset's")
    asked = options.parse_args()
    result: dict = {"made": made("stable-baselines3")}
    if asked.seeds:
        result["process"] = whole_process(asked.seeds, asked.words)
        if "wall_seconds" in result["process"]:
            print(f"process: {spread(result['process']['wall_seconds'])} s, {result['process']['reached']}/{asked.seeds} reached")
    if asked.loop_seeds:
        result["loop"] = learning_loop(asked.loop_seeds, asked.steps, asked.words)
        if "ratio" in result["loop"]:
            print(f"loop: SB3's seconds / ours: {spread(result['loop']['ratio'])}")
    save("time_to_skill", result, asked.out)


if __name__ == "__main__":
    main()
