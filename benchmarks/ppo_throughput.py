"""Env steps per second of a PPO learning loop on CartPole, fixed number of steps: ours against Stable-Baselines3.

    python benchmarks/ppo_throughput.py [--steps 200000] [--repeats 3]

Needs stable-baselines3 (it is in the extra `test`). Three ways, in turn, one torch thread, in one process: Stable-Baselines3 at the
RL-Zoo's hyperparameters, ours at the same, ours at our preset. The learning loop alone on all sides: no evaluation, no checkpoints.
Result: benchmarks/results/ppo_throughput.json; the ratios are of runs that followed each other.
"""

import sb3_ppo
from common import LearningLoop, made, parser, ratios, save, spread, summary


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=200_000, help="env steps of a run")
    options.add_argument("--repeats", type=int, default=3)
    asked = options.parse_args()
    told = made("stable-baselines3")

    def ours(seed: int, steps: int, *words: str) -> dict:
        return LearningLoop(["algo=ppo", "env=CartPole", "device=cpu", f"seed={seed}", f"total_steps={steps}", *words]).run()

    ways = {
        "sb3": lambda seed, steps: sb3_ppo.run(seed, steps),
        "ours_same": lambda seed, steps: ours(seed, steps, *sb3_ppo.SAME_WORDS),
        "ours_preset": lambda seed, steps: ours(seed, steps),
    }
    for way in ways.values():
        way(0, min(4_000, asked.steps))  # compilation and caches
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for repeat in range(asked.repeats):
        for name, way in ways.items():
            done = way(repeat, asked.steps)
            done["steps_per_second"] = done["env_steps"] / done["seconds"]
            runs[name].append(done)
            told_rate = f"{done['steps_per_second']:>10,.0f} steps/s"
            print(f"{repeat + 1}/{asked.repeats}  {name:<12}  {told_rate}  last 100: {done['last_100']:.0f}", flush=True)
    rates = {name: [run["steps_per_second"] for run in done] for name, done in runs.items()}
    result = {
        "made": told,
        "env": "CartPole",
        "steps": asked.steps,
        "steps_per_second": {name: summary(values) for name, values in rates.items()},
        "ratio_same": ratios(rates["ours_same"], rates["sb3"]),
        "ratio_preset": ratios(rates["ours_preset"], rates["sb3"]),
        "runs": runs,
    }
    for name in ("ratio_same", "ratio_preset"):
        print(f"{name}: {spread(result[name])}")
    save("ppo_throughput", result, asked.out)


if __name__ == "__main__":
    main()
