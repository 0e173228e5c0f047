"""Storage of T steps of B envs for on-policy learning; preallocated, reused from iteration to iteration."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl.types import Act, Step, VectorEnv


class RolloutBatch(NamedTuple):
    """What `Agent.learn` of an on-policy algorithm gets: views of the storage, valid until the next iteration."""

    obs: Tensor  # [T, B, ...]
    mask: Tensor | None  # [T, B, n] bool
    action: Tensor  # [T, B, ...]
    reward: Tensor  # [T, B] float32
    terminated: Tensor  # [T, B] bool
    truncated: Tensor  # [T, B] bool
    final_obs: Tensor  # [T, B, ...] valid where truncated
    last_obs: Tensor  # [B, ...] the observation after step T
    first_state: Any  # [B, ...] recurrent state before step 0, or None
    last_state: Any  # [B, ...] recurrent state before last_obs, or None
    extras: dict[str, Tensor]  # [T, B, ...] what `act` put aside
    progress: float  # share of the run done when the rollout began, in [0, 1)


class Rollout:
    """T rows of B envs, written in order by a loop."""

    def __init__(self, env: VectorEnv, steps: int):
        self.steps, self.num_envs, self.device = steps, env.num_envs, env.device
        self._data: dict[str, Tensor] = {}
        self._rows: dict[str, tuple[Tensor, ...]] = {}

    def _row(self, name: str, t: int, like: Tensor) -> Tensor:
        rows = self._rows.get(name)
        if rows is None:
            # Untouched pages of `final_obs` cost no memory on the CPU: it is written only where an episode was cut.
            store = self._data[name] = torch.empty((self.steps, *like.shape), dtype=like.dtype, device=self.device)
            if name in ("episode_return", "episode_length"):
                store.zero_()
            rows = self._rows[name] = store.unbind()  # made once: taking a row of a tensor costs more than copying into it
        return rows[t]

    def put_act(self, t: int, obs: Tensor, mask: Tensor | None, act: Act) -> None:
        """Store the moment before step t. To be called before `env.step`, which overwrites `obs`."""
        self._row("obs", t, obs).copy_(obs)
        self._row("action", t, act.action).copy_(act.action)
        if mask is not None:
            self._row("mask", t, mask).copy_(mask)
        for name, value in act.extras.items():
            self._row("extra." + name, t, value).copy_(value)

    def put_step(self, t: int, step: Step, env: VectorEnv) -> None:
        """Store what step t brought."""
        self._row("reward", t, step.reward).copy_(step.reward)
        self._row("terminated", t, step.terminated).copy_(step.terminated)
        self._row("truncated", t, step.truncated).copy_(step.truncated)
        if t == 0:  # made even if no episode ends
            self._row("final_obs", t, step.final_obs)
            self._row("episode_return", t, env.episode_return)
            self._row("episode_length", t, env.episode_length)
        if env.episode_over is not None:
            self._row("episode_over", t, env.episode_over).copy_(env.episode_over)
        # On CUDA nobody knows without waiting whether an episode ended: copy always.
        if getattr(env, "ended", None) != 0:
            self._row("final_obs", t, step.final_obs).copy_(step.final_obs)
            self._row("episode_return", t, env.episode_return).copy_(env.episode_return)
            self._row("episode_length", t, env.episode_length).copy_(env.episode_length)

    def batch(self, last_obs: Tensor, first_state: Any, last_state: Any, progress: float) -> RolloutBatch:
        d = self._data
        extras = {name[6:]: value for name, value in d.items() if name.startswith("extra.")}
        return RolloutBatch(
            d["obs"], d.get("mask"), d["action"], d["reward"], d["terminated"], d["truncated"], d["final_obs"],
            last_obs, first_state, last_state, extras, progress,
        )  # fmt: skip

    def episodes(self) -> tuple[Tensor, Tensor]:
        """Returns and lengths of the episodes that ended, in order of time; on the CPU."""
        ended = self._data.get("episode_over")
        if ended is None:
            ended = self._data["terminated"] | self._data["truncated"]
        return self._data["episode_return"][ended].cpu(), self._data["episode_length"][ended].cpu()

    def not_finite(self) -> list[str]:
        """Which of observations and rewards hold NaN or Inf."""
        wrong = []
        for name in ("obs", "reward"):
            x = self._data[name]
            # A sum is NaN or Inf if a term is; a large finite one that overflows is looked at again.
            if x.is_floating_point() and not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
                wrong.append("observation" if name == "obs" else name)
        return wrong

    def state_dict(self) -> dict[str, Tensor]:
        """All rows, for a dump."""
        return {name: x.clone() for name, x in self._data.items()}
