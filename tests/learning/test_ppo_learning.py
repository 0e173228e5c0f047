"""What PPO's presets promise, over several seeds (issue 2, bar 1). Minutes: `pytest -m learning`.

A claim reads: within `steps` env steps, at least `k` of `n` seeds reach a mean evaluation return of `bar`. Two things count as
reaching it: an evaluation during training of at least 100 greedy episodes, and, as converged runs may collapse, the best checkpoint
evaluated again on other seeds. A bar that only the luckiest of twenty evaluations reaches is thereby not reached.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import pytest

pytestmark = [pytest.mark.learning, pytest.mark.timeout(7200)]


class Claim(NamedTuple):
    env: str
    bar: float  # mean evaluation return
    steps: int  # env steps
    k: int
    n: int  # seeds
    words: tuple[str, ...] = ()


CLAIMS = (
    Claim("CartPole", 475, 50_000, 10, 10),
    Claim("Acrobot", -100, 250_000, 8, 10),
    Claim("MountainCar", -125, 1_000_000, 8, 10),
    Claim("Pendulum", -250, 300_000, 8, 10),
    Claim("MountainCarContinuous", 85, 300_000, 8, 10),
)
SLACK = 0.02  # of the distance between the bar and 0, for the second evaluation: another hundred episodes


def outcome(claim: Claim, seed: int, folder: str) -> dict:
    """One run; in a process of its own."""
    import rl

    words = (f"env={claim.env}", f"seed={seed}", f"total_steps={claim.steps}", f"run_dir={folder}", *claim.words)
    result = rl.train("algo=ppo", "device=cpu", "tensorboard=false", "stop_at_threshold=false", *words, quiet=True)
    reached = [e["env_steps"] for e in result.evaluations if e["mean"] >= claim.bar]
    again = rl.evaluate(folder, episodes=100, checkpoint="best")
    return {
        "seed": seed,
        "best": result.best["mean"] if result.best else None,
        "first_step": reached[0] if reached else None,
        "final": result.final["mean"] if result.final else None,
        "again": again["mean"],
        "steps": result.env_steps,
    }


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.env)
def test_the_preset_reaches_its_bar(claim, tmp_path):
    workers = int(os.environ.get("RL_TEST_PROCESSES", "1"))
    folders = [str(tmp_path / str(seed)) for seed in range(claim.n)]
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            rows = list(pool.map(outcome, [claim] * claim.n, range(claim.n), folders))
    else:
        rows = [outcome(claim, seed, folder) for seed, folder in enumerate(folders)]
    table = "\n".join(str(row) for row in rows)
    print(f"\n{claim.env} >= {claim.bar} within {claim.steps:,}:\n{table}")
    least = claim.bar - SLACK * abs(claim.bar)
    good = [row for row in rows if row["first_step"] is not None and row["first_step"] <= claim.steps and row["again"] >= least]
    assert all(row["steps"] < claim.steps * 1.1 for row in rows), table
    assert len(good) >= claim.k, f"{len(good)} of {claim.n} seeds, {claim.k} claimed\n{table}"


def test_the_presets_are_those_of_the_table():
    """The claims are about `rl train algo=ppo env=X total_steps=N`, with nothing else said."""
    from rl.algos.ppo import PRESETS

    for claim in CLAIMS:
        assert claim.env in PRESETS, f"no preset for {claim.env}"
        assert claim.words == ()
