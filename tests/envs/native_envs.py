"""What the tests of the native envs share."""

from typing import Any

import numpy as np
import torch

from rl import registry
from rl.envs.spec import Spec
from rl.envs.vector import NativeVecEnv

NAMES = [entry.name for entry in registry.envs() if entry.family in ("classic", "test")]


def spec_of(name: str) -> Spec:
    return registry.load(registry.find_env(name).entry)


def make(name: str, num_envs: int, **how: Any) -> NativeVecEnv:
    return NativeVecEnv(spec_of(name), num_envs, **how)


def random_actions(env: NativeVecEnv, steps: int, seed: int = 0) -> torch.Tensor:
    """Actions [T, B, ...] inside the action space."""
    rng = np.random.default_rng(seed)
    space, shape = env.single_action_space, (steps, env.num_envs)
    if env.action_kind == "discrete":
        return torch.from_numpy(rng.integers(0, space.n, shape))  # type: ignore[attr-defined]
    if env.action_kind == "multi_discrete":
        nvec = space.nvec  # type: ignore[attr-defined]
        return torch.from_numpy(rng.integers(0, nvec, (*shape, len(nvec))))
    low, high = space.low, space.high  # type: ignore[attr-defined]
    return torch.from_numpy(rng.uniform(low, high, (*shape, *space.shape)).astype(np.float32))  # type: ignore[misc]


def record(env: NativeVecEnv, actions: torch.Tensor, reset: bool = True) -> dict[str, torch.Tensor]:
    """Everything an env says while it takes `actions` [T, B, ...]: [T, B, ...] each, and the first obs."""
    first = env.reset().clone() if reset else env.obs.clone()
    keys = ("obs", "reward", "terminated", "truncated", "final_obs", "returns", "lengths")
    log: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
    for action in actions:
        out = env.step(action)
        ended = out.terminated | out.truncated
        for key in ("obs", "reward", "terminated", "truncated"):
            log[key].append(getattr(out, key).clone())
        # Elsewhere these may hold anything: they are only promised where an episode ended.
        log["final_obs"].append(torch.where(ended.view(-1, *[1] * (out.obs.dim() - 1)), out.final_obs, 0))
        log["returns"].append(torch.where(ended, env.episode_return, 0))
        log["lengths"].append(torch.where(ended, env.episode_length, 0))
    return {"first": first} | {key: torch.stack(rows) for key, rows in log.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for key in a:
        if tolerance and a[key].dtype.is_floating_point:
            torch.testing.assert_close(a[key], b[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
        else:
            assert torch.equal(a[key], b[key]), key
