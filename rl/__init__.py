"""Reinforcement learning in one suite: compiled vector environments and readable algorithms behind one command.

    result = rl.train(algo="ppo", env="CartPole", seed=1)
    agent = rl.load(result.run)
    action, _ = agent.predict(obs, deterministic=True)

Importing `rl` imports nothing else: each function fetches what it needs when it is called.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from rl.types import VectorEnv

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load", "make_vec", "resume", "train"]


def train(*words: str, quiet: bool = False, **settings: Any) -> Any:
    """Train, exactly as `rl train` does: `rl.train("algo=ppo", env="CartPole", lr=3e-4)`. Returns a `rl.trainer.Result`.

    An env's own options are given as `env_options={"time_limit": 300}`.
    """
    from rl import config, display, trainer

    resolved = config.resolve(_merge(words, settings))
    with display.make_display("quiet" if quiet else "auto", resolved.common.total_steps) as shown:
        return trainer.run_train(resolved, shown)


def resume(run: "str | os.PathLike[str]", *words: str, quiet: bool = False, **settings: Any) -> Any:
    """Go on with a run exactly where its last checkpoint left it. Returns a `rl.trainer.Result`."""
    from pathlib import Path

    from rl import config, display, trainer

    overrides = _merge(words, settings)
    resolved = config.read_run(run, overrides)  # type: ignore[arg-type]
    with display.make_display("quiet" if quiet else "auto", resolved.common.total_steps) as shown:
        return trainer.run_resume(Path(run), overrides, shown)


def evaluate(run: "str | os.PathLike[str]", episodes: int = 100, seed: int | None = None, checkpoint: str = "best") -> dict[str, Any]:
    """Evaluate a run's policy without exploration, as `rl eval` does."""
    from pathlib import Path

    from rl import evaluation

    return evaluation.evaluate_run(Path(run), episodes, seed, checkpoint)


def load(run: "str | os.PathLike[str]") -> Any:
    """A run's trained policy; `.predict(obs, deterministic=True)` acts with it."""
    from pathlib import Path

    from rl import evaluation

    return evaluation.load(Path(run))


def make_vec(name: str, num_envs: int = 1, **how: Any) -> "VectorEnv":
    """Many envs of this name side by side, torch tensors in and out; `how` as `rl.envs.make_vec` has it."""
    from rl import envs

    return envs.make_vec(name, num_envs, **how)


def _merge(words: tuple[str, ...], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Words and keyword settings as one mapping."""
    if not words:
        return dict(settings)
    from rl.errors import ConfigError
    from rl.words import split

    merged: dict[str, Any] = dict(split(words))
    for key, value in settings.items():
        if key in merged:
            raise ConfigError(f"{key} is given twice")
        merged[key] = value
    return merged
