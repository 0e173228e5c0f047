"""Does it learn, on how many seeds, within which budget: `rl train` once per env and seed, judged by its greedy evaluations.

    python benchmarks/learning.py                              all envs of the table below, 10 seeds each
    python benchmarks/learning.py Acrobot Pendulum --jobs 2    only these, two processes at a time
    python benchmarks/learning.py gym:LunarLander-v3 --budget 1e6 --bar 200 --seeds 5

`reached` counts the seeds with some periodic evaluation (100 greedy episodes) at or above the bar within the budget, `final` those whose
last policy, evaluated anew, is. Result: benchmarks/results/learning.json; envs measured before and not now stay in it, each with its own
date and revision.
"""

from concurrent.futures import ThreadPoolExecutor

from common import load, made, parser, save, summary, train

TABLE = {  # env: (budget in env steps, bar in mean evaluation return, seeds out of ten that should reach it)
    "CartPole": (50_000, 475.0, 10),
    "Acrobot": (250_000, -100.0, 8),
    "MountainCar": (1_000_000, -125.0, 8),
    "MountainCarContinuous": (300_000, 85.0, 8),
    "Pendulum": (300_000, -250.0, 8),
    "InvertedPendulum-v5": (300_000, 900.0, 8),
}


def one(env: str, seed: int, budget: int, bar: float, words: list[str]) -> dict:
    told, wall = train(["algo=ppo", f"env={env}", f"seed={seed}", f"total_steps={budget}", *words])
    inside = [e for e in told["evaluations"] if e["env_steps"] <= budget]
    first = next((e["env_steps"] for e in inside if e["mean"] >= bar), None)
    out = {
        "seed": seed, "first_step": first, "final": told["final"]["mean"], "best": max(e["mean"] for e in told["evaluations"]),
        "env_steps": told["env_steps"], "wall_seconds": wall, "learning_seconds": told["learning_seconds"], "notes": told["notes"],
    }  # fmt: skip
    print(f"{env}, seed {seed}: reached at {first}, final {out['final']:.1f}, best {out['best']:.1f}, {wall:.1f} s", flush=True)
    return out


def measure(env: str, budget: int, bar: float, seeds: int, jobs: int, words: list[str]) -> dict:
    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(lambda seed: one(env, seed, budget, bar, words), range(seeds)))
    steps = [run["first_step"] for run in runs if run["first_step"] is not None]
    out = {
        "command": " ".join(["rl train algo=ppo", f"env={env}", "seed=K", f"total_steps={budget}", *words]),
        "budget": budget, "bar": bar, "seeds": seeds, "jobs": jobs,
        "reached": len(steps), "final_at_bar": sum(run["final"] >= bar for run in runs),
        "final": summary(run["final"] for run in runs), "wall_seconds": summary(run["wall_seconds"] for run in runs),
    }  # fmt: skip
    if steps:
        out["first_step"] = summary(steps)
    return out | {"runs": runs}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("envs", nargs="*", help="names as `rl train env=` takes them; none: the whole table")
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--jobs", type=int, default=1, help="processes at a time")
    options.add_argument("--budget", type=float, help="env steps, instead of the table's")
    options.add_argument("--bar", type=float, help="mean return, instead of the table's")
    options.add_argument("--words", nargs="*", default=[], metavar="KEY=VALUE", help="more settings for every run")
    asked = options.parse_args()
    for env in asked.envs:
        if env not in TABLE and (asked.budget is None or asked.bar is None):
            options.error(f"{env} is not in the table: give --budget and --bar")
    told = made()
    result = load("learning", asked.out) or {"envs": {}}
    for env in asked.envs or TABLE:
        budget, bar, needed = TABLE.get(env, (0, 0.0, None))
        budget = int(asked.budget) if asked.budget is not None else budget
        bar = asked.bar if asked.bar is not None else bar
        row = measure(env, budget, bar, asked.seeds, asked.jobs, asked.words)
        result["envs"][env] = {"made": told, "wanted_of_ten": needed, **row}
        print(f"{env}: {row['reached']}/{asked.seeds} reached {bar:g} within {budget:,} steps, {row['final_at_bar']} at the end")
        save("learning", result, asked.out)


if __name__ == "__main__":
    main()
