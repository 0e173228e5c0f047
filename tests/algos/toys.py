"""Small parts for the tests of algorithms: an env of any spaces, and an agent's diary."""

from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from rl.loops import LoopState, on_policy
from rl.rollout import Rollout, RolloutBatch
from rl.types import Act, Step

F32 = np.float32
VECTOR = gymnasium.spaces.Box(F32(-3), F32(3), (5,), np.float32)
IMAGE = gymnasium.spaces.Box(0, 255, (10, 10, 4), np.uint8)
DISCRETE = gymnasium.spaces.Discrete(3)
MULTI = gymnasium.spaces.MultiDiscrete([3, 2])
CONTINUOUS = gymnasium.spaces.Box(F32(-1), F32(1), (2,), np.float32)


class Toy:
    """B envs of random observations and rewards. Env i's episodes last 3 + i % 3 steps and end by turns by a time limit and for good."""

    name, exact_resume = "Toy", True

    def __init__(self, obs_space: gymnasium.Space, action_space: gymnasium.Space, num_envs: int, masked: bool = False, seed: int = 0):
        self.num_envs, self.device = num_envs, torch.device("cpu")
        self.single_observation_space, self.single_action_space = obs_space, action_space
        self.generator = torch.Generator().manual_seed(seed)
        self.masked = masked
        self.action_mask: Tensor | None = None
        self.episode_over: Tensor | None = None
        self.actions: list[tuple[Tensor, Tensor | None]] = []  # taken, and what was allowed
        self.reset()

    def _random(self) -> Tensor:
        space = self.single_observation_space
        shape = (self.num_envs, *(space.shape or ()))
        if space.dtype == np.uint8:
            return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)
        return torch.randn(shape, generator=self.generator) * 2 + 1

    def _new_mask(self) -> None:
        if self.masked:
            n = int(self.single_action_space.n)  # type: ignore[attr-defined]
            mask = torch.rand(self.num_envs, n, generator=self.generator) < 0.5
            mask[torch.arange(self.num_envs), torch.randint(0, n, (self.num_envs,), generator=self.generator)] = True
            self.action_mask = mask

    def reset(self, seed: int | None = None) -> Tensor:
        if seed is not None:
            self.generator.manual_seed(seed)
        self.t = torch.zeros(self.num_envs, dtype=torch.int32)
        self.episode = torch.zeros(self.num_envs, dtype=torch.int32)
        self.episode_return, self.episode_length = torch.zeros(self.num_envs), torch.zeros(self.num_envs, dtype=torch.int32)
        self.sum = torch.zeros(self.num_envs)
        self.obs = self._random()
        self._new_mask()
        return self.obs

    def step(self, action: Tensor) -> Step:
        self.actions.append((action.clone(), None if self.action_mask is None else self.action_mask.clone()))
        reward = torch.randn(self.num_envs, generator=self.generator)
        self.t += 1
        self.sum += reward
        over = self.t >= 3 + torch.arange(self.num_envs) % 3
        terminated, truncated = over & (self.episode % 2 == 1), over & (self.episode % 2 == 0)
        self.episode_return = torch.where(over, self.sum, self.episode_return)
        self.episode_length = torch.where(over, self.t, self.episode_length)
        self.episode = self.episode + over.int()
        self.sum, self.t = self.sum * ~over, self.t * ~over
        final = self._random()
        self.obs = torch.where(over.view(-1, *[1] * (final.dim() - 1)), self._random(), final)
        self._new_mask()
        return Step(self.obs, reward, terminated, truncated, final)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def render(self, index: int = 0) -> Any: ...

    def close(self) -> None: ...


class Diary:
    """An agent that asks another one, and keeps the batches it was given and the figures of every minibatch, [learn][update]."""

    def __init__(self, agent: Any):
        self.agent = agent
        self.batches: list[RolloutBatch] = []
        self.parts: list[list[dict[str, Tensor]]] = []
        self.figures: list[list[Tensor]] = []
        self.metrics: list[dict[str, Tensor]] = []
        if agent.fused is not None:
            agent.fused.update = self._spy(agent.fused.update)
        else:
            agent._update = self._spy(agent._update)

    def _spy(self, update: Any) -> Any:
        def spied(part: dict[str, Tensor], *more: Any) -> Any:
            self.parts[-1].append({name: x.clone() for name, x in part.items()})
            figures, norm = update(part, *more)
            self.figures[-1].append(figures.clone())
            return figures, norm

        return spied

    def act(self, obs: Tensor, mask: Tensor | None = None, state: Any = None, explore: bool = True) -> Act:
        return self.agent.act(obs, mask, state, explore)

    def learn(self, batch: RolloutBatch) -> dict[str, Tensor]:
        copied: dict[str, Any] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch._asdict().items()}
        copied["extras"] = {k: v.clone() for k, v in batch.extras.items()}
        self.batches.append(RolloutBatch(**copied))
        self.parts.append([])
        self.figures.append([])
        self.metrics.append(self.agent.learn(batch))
        return self.metrics[-1]

    def reseed(self, seed: int) -> None:
        raise NotImplementedError

    def begin_episodes(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return self.agent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def live(agent: Any, env: Any, iterations: int = 1, total: int | None = None) -> Diary:
    """Let the agent act and learn in the env through the real loop."""
    diary = Diary(agent)
    rollout = Rollout(env, agent.config.rollout_steps)
    steps = agent.config.rollout_steps * env.num_envs
    for k, _ in enumerate(on_policy(diary, env, rollout, total or steps * iterations, LoopState())):
        if k + 1 == iterations:
            break
    return diary
