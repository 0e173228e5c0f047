"""What an environment file declares: its compiled rules and the shapes they work on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np


@dataclass(frozen=True)
class Spec:
    """One environment's rules, as the drivers in `rl/envs/vector.py` need them.

    The three functions are `rl.kernels.jit.scalar` functions of one env: they never allocate and know nothing of batches,
    time limits, autoreset or Python's random numbers.

    - `reset(state, key)` writes a first state.
    - `step(state, action, key) -> (reward, terminated)` advances it; reward float32, terminated bool. `action` is an int64
      (discrete) or a row (multi-discrete: int64 [n]; continuous: float32 [n], already clipped to the space's bounds).
    - `observe(state, obs)` writes the observation.
    - `legal(state, mask)`, where some action can be illegal, writes a bool per action.
    """

    name: str  # as in the registry, "CartPole"
    reset: Callable[..., Any]
    step: Callable[..., Any]
    observe: Callable[..., Any]
    state_size: int
    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    time_limit: int | None  # env steps after which an episode is truncated; None: never
    state_dtype: Any = np.float32
    legal: Callable[..., Any] | None = None
    render: Callable[[np.ndarray], np.ndarray] | None = None  # state [state_size] -> RGB uint8 [H, W, 3]
    options: dict[str, Any] = field(default_factory=dict)  # keyword options this spec was made with, for `state_dict`
