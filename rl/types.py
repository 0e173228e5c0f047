"""The words every part of the suite shares: what an env returns, what an agent is, what a loop yields.

Shapes: B envs side by side, T time steps. All tensors of an env or agent live on its device.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import gymnasium
    import torch

    Tensor = torch.Tensor
else:
    Tensor = Any


class Step(NamedTuple):
    """What one step of B envs returns.

    The tensors are the env's own buffers: the next `step` overwrites them. Copy what has to last.
    """

    obs: Tensor  # [B, ...] what to act on next; after an episode's end already the next episode's first observation
    reward: Tensor  # [B] float32, as learning sees it (an adapter may have clipped it)
    terminated: Tensor  # [B] bool, the task ended: no value lies beyond
    truncated: Tensor  # [B] bool, a time limit cut the episode: bootstrap from final_obs
    final_obs: Tensor  # [B, ...] the last observation of the episode; valid only where terminated | truncated


@runtime_checkable
class VectorEnv(Protocol):
    """B envs stepped together, SAME_STEP autoreset, torch tensors in and out.

    `episode_return` and `episode_length` are those of the episode that just ended, in unclipped reward and env steps; valid
    only where the last step's terminated | truncated.
    """

    name: str
    num_envs: int
    device: "torch.device"
    single_observation_space: "gymnasium.Space"
    single_action_space: "gymnasium.Space"
    obs: Tensor  # [B, ...] what to act on now; the buffer that `reset` and `step` return
    episode_return: Tensor  # [B] float32
    episode_length: Tensor  # [B] int32
    action_mask: Tensor | None  # [B, n] bool, legal actions for the current obs; None where every action is legal
    episode_over: Tensor | None  # [B] bool, where not every end counts (Atari's lost lives): whether the game itself ended
    exact_resume: bool  # whether load_state_dict restores the env exactly

    def reset(self, seed: int | None = None) -> Tensor:
        """Start B new episodes and return obs [B, ...]. With a seed, everything that follows is determined by it."""
        ...

    def step(self, action: Tensor) -> Step:
        """Take one step: action [B] int64, [B, n] int64 (multi-discrete) or [B, ...] float32 (continuous, clipped to bounds)."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def render(self, index: int = 0) -> Any:
        """Env `index` as an RGB picture, uint8 [H, W, 3]."""
        ...

    def close(self) -> None: ...


class Act(NamedTuple):
    """What an agent answers to an observation."""

    action: Tensor  # [B, ...] as `VectorEnv.step` takes it
    state: Any  # recurrent state for the next call, or None
    extras: dict[str, Tensor]  # [B, ...] what `learn` will want to know of this moment (log_prob, value, ...)


class Agent(Protocol):
    """One algorithm with its networks and optimisers. A loop calls it; it knows neither env nor files."""

    def act(self, obs: Tensor, mask: Tensor | None = None, state: Any = None, explore: bool = True) -> Act: ...

    def learn(self, batch: Any) -> dict[str, Tensor]: ...

    def reseed(self, seed: int) -> None:
        """Go on with other random numbers."""
        ...

    def begin_episodes(self) -> None:
        """All envs have been reset from outside."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Progress(NamedTuple):
    """What a loop yields after every iteration."""

    env_steps: int  # env steps taken since the run began, over all envs
    metrics: dict[str, Any]  # 0-d tensors or numbers, by name ("train/policy_loss")
    episode_returns: Tensor  # [n] float32, of the episodes that ended in this iteration, in order of time
    episode_lengths: Tensor  # [n] int32


Loop = Iterator[Progress]
