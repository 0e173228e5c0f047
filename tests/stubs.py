"""An env and an agent that only count: what a loop does with them can be written down beforehand."""

from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rl.rollout import RolloutBatch
from rl.types import Act, Step


class CountingEnv:
    """Env b's observation is [b, steps taken in all, step of the episode]; its episodes last `lengths[b]` steps, reward 1 each.

    Odd envs terminate, even ones are truncated. As the real ones do, it reuses its buffers.
    """

    name, exact_resume, episode_over = "Counting", True, None

    def __init__(self, lengths: tuple[int, ...], masked: bool = False):
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.num_envs, self.device = len(lengths), torch.device("cpu")
        self.single_observation_space: gymnasium.Space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.single_action_space: gymnasium.Space = gymnasium.spaces.Discrete(5)
        self.action_mask: Tensor | None = torch.ones(self.num_envs, 5, dtype=torch.bool) if masked else None
        b = self.num_envs
        self.obs, self.final_obs, self.reward = torch.zeros(b, 3), torch.zeros(b, 3), torch.ones(b)
        self.terminated, self.truncated = torch.zeros(b, dtype=torch.bool), torch.zeros(b, dtype=torch.bool)
        self.episode_return, self.episode_length = torch.zeros(b), torch.zeros(b, dtype=torch.int32)
        self.episode_over: Tensor | None = None
        self.steps, self.resets = 0, 0
        self.ended: int | None = 0
        self.actions: list[Tensor] = []

    def _see(self) -> None:
        self.obs[:, 0], self.obs[:, 1], self.obs[:, 2] = torch.arange(self.num_envs), self.steps, self.age
        if self.action_mask is not None:
            self.action_mask.fill_(True)
            self.action_mask[:, self.steps % 4 + 1] = False

    def reset(self, seed: int | None = None) -> Tensor:
        self.resets += 1
        self.age = torch.zeros(self.num_envs, dtype=torch.int32)
        self._see()
        return self.obs

    def step(self, action: Tensor) -> Step:
        self.actions.append(action.clone())
        self.steps += 1
        self.age += 1
        over = self.age >= self.lengths
        odd = torch.arange(self.num_envs) % 2 == 1
        self.terminated.copy_(over & odd)
        self.truncated.copy_(over & ~odd)
        self._see()
        self.final_obs.fill_(-7.0)
        self.final_obs[over] = self.obs[over]
        self.episode_return.copy_(torch.where(over, self.age.float(), -7.0))
        self.episode_length.copy_(torch.where(over, self.age, -7))
        self.age[over] = 0
        self.ended = int(over.sum())
        self._see()
        return Step(self.obs, self.reward, self.terminated, self.truncated, self.final_obs)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def render(self, index: int = 0) -> Any: ...

    def close(self) -> None: ...


class CountingAgent:
    """Its action is the number of the call modulo 5. With memory, the memory counts the steps since it was empty."""

    def __init__(self, memory: bool = False):
        self.memory = memory
        self.acted = 0
        self.states: list[Any] = []  # handed to `act`
        self.batches: list[RolloutBatch] = []

    def act(self, obs: Tensor, mask: Tensor | None = None, state: Any = None, explore: bool = True) -> Act:
        self.states.append(None if state is None else state.clone())
        action = torch.full((len(obs),), self.acted % 5)
        extras = {"value": obs[:, 1] * 10, "log_prob": torch.zeros(len(obs))}
        self.acted += 1
        if not self.memory:
            return Act(action, None, extras)
        return Act(action, (torch.zeros(len(obs), 2, 1) if state is None else state) + 1, extras)

    def learn(self, batch: RolloutBatch) -> dict[str, Tensor]:
        copied: dict[str, Any] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch._asdict().items()}
        copied["extras"] = {k: v.clone() for k, v in batch.extras.items()}
        self.batches.append(RolloutBatch(**copied))
        return {"train/updates": torch.tensor(float(len(self.batches)))}

    def reseed(self, seed: int) -> None:
        raise NotImplementedError

    def begin_episodes(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
