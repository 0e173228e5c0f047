"""How many env steps a second one of our envs makes, by batch size and backend: `rl env bench`."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rl.envs import make_vec

REPEATS = 5  # per row, at least
_ROWS = 16  # different action arrays that are gone through in turn
_WARM_UP = 3  # calls before the clock starts: compilation, caches, the pool's threads


def bench_env(
    name: str,
    batches: Sequence[int] = (1, 64, 1024, 16384),
    backends: Sequence[str] | None = None,
    seconds: float = 1.0,
    *,
    threads: int = 2,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """One row per batch size, backend and way of calling; `seconds` is what a row takes.

    Ways: `step`, a Python loop over `env.step`, and `step_many`, one compiled call for many steps. Random actions are made before. A
    foreign env has one backend, its workers. `threads` is used by the backend "threads" alone. Figures are env steps per second over the
    repeats of a row.
    """
    native = _is_native(name)
    if backends is None:
        backends = ["serial", "threads"] if native else ["workers"]
        if native and torch.cuda.is_available():
            backends = [*backends, "cuda"]
    rows = []
    for backend in backends:
        for batch in batches:
            where = device or ("cuda" if backend == "cuda" else "cpu")
            count = threads if backend == "threads" else 1
            if native:
                env: Any = make_vec(name, batch, backend=backend, threads=count, device=where)
            else:
                env = make_vec(name, batch, device=where)
            try:
                actions = _random_actions(env, batch)
                ways: dict[str, Callable[[int], int]] = {"step": _stepper(env, actions)}
                if hasattr(env, "step_many") and backend in ("serial", "cuda"):
                    ways["step_many"] = _many(env, actions)
                for way, run in ways.items():
                    figures = _measure(run, batch, seconds, env.device)
                    row = {"name": name, "backend": backend, "threads": count, "batch": batch, "call": way}
                    rows.append(row | {key: round(value) for key, value in figures.items()})
            finally:
                env.close()
    return rows


def _is_native(name: str) -> bool:
    from rl import registry

    return registry.find_env(name).family != "foreign"


def _random_actions(env: Any, batch: int) -> torch.Tensor:
    """Actions [_ROWS, B, ...] from a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    space = env.single_action_space
    if hasattr(space, "nvec"):
        columns = [torch.randint(int(n), (_ROWS, batch), generator=generator) for n in space.nvec]
        return torch.stack(columns, -1).to(env.device)
    if hasattr(space, "n"):
        return torch.randint(int(space.n), (_ROWS, batch), generator=generator).to(env.device)
    low, high = torch.from_numpy(space.low).clamp(min=-1e3), torch.from_numpy(space.high).clamp(max=1e3)
    return (low + (high - low) * torch.rand((_ROWS, batch, *space.shape), generator=generator)).float().to(env.device)


def _stepper(env: Any, actions: torch.Tensor) -> Callable[[int], int]:
    rows = list(actions)
    env.reset()

    def run(calls: int) -> int:
        step = env.step
        for k in range(calls):
            step(rows[k % _ROWS])
        return calls

    return run


def _many(env: Any, actions: torch.Tensor) -> Callable[[int], int]:
    env.reset()

    def run(calls: int) -> int:
        chunks = -(-calls // _ROWS)
        for _ in range(chunks):
            env.step_many(actions)
        return chunks * _ROWS

    return run


def _measure(run: Callable[[int], int], batch: int, seconds: float, device: torch.device) -> dict[str, float]:
    def timed(calls: int) -> tuple[float, int]:
        start = time.perf_counter()
        done = run(calls)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, done

    timed(_WARM_UP)
    calls, share = 1, seconds / REPEATS
    elapsed, done = timed(calls)
    while elapsed < share / 4:  # find out how many calls fill a repeat
        calls *= 4
        elapsed, done = timed(calls)
    calls = max(1, round(calls * share / max(elapsed, 1e-9)))
    rates = []
    for _ in range(REPEATS):
        elapsed, done = timed(calls)
        rates.append(done * batch / elapsed)
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
