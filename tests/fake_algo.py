"""An algorithm in outline: what `rl/config.py` needs of one, without torch."""

from dataclasses import dataclass
from typing import Any, Literal

from rl.registry import AlgoEntry


@dataclass(frozen=True)
class Config:
    """Fields of every type that a Config may have."""

    lr: float = 3e-4
    """Step size of the optimiser."""
    rollout_steps: int = 128
    """Env steps per env between updates."""
    gamma: float = 0.99
    """Discount per env step."""
    entropy_coef: float = 0.0
    """Weight of the entropy."""
    hidden: tuple[int, ...] = (64, 64)
    """Width of each hidden layer, units."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Non-linearity."""
    target_kl: float | None = None
    """Stop an update's epochs beyond this divergence, nats."""
    max_updates: int | None = 5
    """Updates at most."""
    anneal: bool = True
    """Let the step size go to 0."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, not {self.gamma}")


class Fake:
    """Takes discrete actions only."""

    ENTRY = AlgoEntry("fake", "fake_algo:Fake", "on_policy", ("discrete",), ("vector",))


class Anything:
    """Says nothing about itself."""


PRESETS: dict[str, dict[str, Any]] = {
    "CartPole": dict(lr=1e-3, gamma=0.98, num_envs=16, total_steps=50_000),
    "class:classic": dict(lr=2e-3),
    "class:mujoco": dict(lr=4e-3),
    "class:foreign": dict(lr=5e-3),
    "debug": dict(rollout_steps=8, hidden=(8,)),
    "wide": dict(hidden=(512, 512), gamma=0.9),
    "broken": dict(learning_rat=1.0),
}
