"""`compile=true`: the same numbers as without. On the CPU through torch.compile, on CUDA through graphs."""

import shutil

import gymnasium
import numpy as np
import pytest
import torch

from rl.algos.ppo import PPO, Config
from rl.envs import make_vec
from rl.loops import LoopState, on_policy
from rl.rollout import Rollout

SPACE = gymnasium.spaces.Box(-1, 1, (5,), np.float32)


def minibatch(device, size=64):
    random = torch.Generator().manual_seed(1)
    return {
        "obs": torch.randn(size, 5, generator=random), "action": torch.randint(0, 3, (size,), generator=random),
        "log_prob": -torch.rand(size, generator=random), "value": torch.randn(size, generator=random),
        "advantage": torch.randn(size, generator=random), "target": torch.randn(size, generator=random),
    } if device == "cpu" else {name: x.to(device) for name, x in minibatch("cpu", size).items()}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_updates_equal_eager_ones_on_the_cpu():
    config = Config(fused=False, hidden=(16, 16))
    plain, compiled = (PPO(SPACE, gymnasium.spaces.Discrete(3), 8, config, seed=2, compile=c) for c in (False, True))
    assert compiled._forward is not compiled.policy
    for _ in range(3):
        seen, norm = plain.update(minibatch("cpu"))
        seen_compiled, norm_compiled = compiled.update(minibatch("cpu"))
        torch.testing.assert_close(seen_compiled, seen, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm_compiled, norm, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(plain.policy.parameters(), compiled.policy.parameters(), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("lstm_size", [0, 8])
def test_graphed_runs_equal_eager_ones_on_the_gpu(lstm_size):
    """Five iterations of the real loop; minibatches of two sizes, since 8 envs (96 samples) do not part evenly by 5."""
    config = Config(rollout_steps=12, epochs=2, minibatches=5, hidden=(16, 16), lstm_size=lstm_size, normalize_obs=True)
    ends = []
    for graphs in (False, True):
        env = make_vec("CartPole", 8, seed=5, device="cuda")
        env.reset(5)
        agent = PPO(env.single_observation_space, env.single_action_space, 8, config, seed=2, device="cuda", compile=graphs)
        list(on_policy(agent, env, Rollout(env, 12), 5 * 96, LoopState(), graphs))
        ends.append([p.detach().clone() for p in agent.policy.parameters()])
    for eager, graphed in zip(*ends, strict=True):
        torch.testing.assert_close(graphed, eager, rtol=1e-3, atol=1e-4)
