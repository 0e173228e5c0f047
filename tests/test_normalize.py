"""Running statistics against NumPy over everything seen, and a reward normaliser against a loop over single envs."""

import numpy as np
import pytest
import torch

from rl.normalize import RewardNorm, RunningNorm


def test_mean_and_variance_of_chunks_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    norm, seen = RunningNorm((3,)), []
    for n in (1, 7, 1, 64, 500):
        chunk = rng.normal([1e3, 0.0, -5.0], [0.1, 1.0, 20.0], (n, 2, 3)).astype(np.float32)
        seen.append(chunk.reshape(-1, 3))
        norm.update(torch.from_numpy(chunk))
        whole = np.concatenate(seen).astype(np.float64)
        np.testing.assert_allclose(norm.mean.numpy(), whole.mean(0), rtol=1e-9)
        np.testing.assert_allclose(norm.var.numpy(), whole.var(0), rtol=1e-7, atol=1e-12)
        assert float(norm.count) == len(whole)
    x = np.concatenate(seen)[:50]
    wanted = np.clip((x - whole.mean(0)) / np.sqrt(whole.var(0) + 1e-8), -10, 10)
    # float32, and 1e3 before it is shifted: three digits less
    np.testing.assert_allclose(norm(torch.from_numpy(x)).numpy(), wanted, rtol=1e-3, atol=2e-3)


def test_using_it_does_not_change_it_and_updating_does():
    norm = RunningNorm((2,))
    norm.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    first = norm(torch.tensor([[3.0, 2.0]]))
    assert first.tolist() == [pytest.approx([2.0, 0.0], abs=1e-5)]  # mean 1 2, deviation 1 2
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    norm.update(torch.tensor([[10.0, 10.0]]))
    assert not torch.equal(norm(torch.tensor([[3.0, 2.0]])), first)


def test_outliers_are_clipped_and_integers_taken():
    norm = RunningNorm((1,))
    norm.update(torch.tensor([[0], [2]], dtype=torch.uint8))
    assert norm(torch.tensor([[1e9], [-1e9], [1.0]])).flatten().tolist() == [10.0, -10.0, 0.0]
    assert norm(torch.tensor([[2]], dtype=torch.uint8)).dtype == torch.float32


def test_what_never_changes_does_not_explode():
    norm = RunningNorm((1,))
    norm.update(torch.full((5, 1), 7.0))
    assert float(norm(torch.tensor([[7.0]]))) == 0.0
    assert torch.isfinite(norm(torch.tensor([[8.0]]))).all()


def test_the_state_comes_back():
    norm, other = RunningNorm((2,)), RunningNorm((2,))
    norm.update(torch.randn(20, 2) * 3 + 5)
    other(torch.zeros(1, 2))  # what it has worked out before must not survive
    other.load_state_dict(norm.state_dict())
    x = torch.randn(4, 2)
    assert torch.equal(norm(x), other(x))
    norm.update(x)
    other.update(x)
    assert torch.equal(norm.var, other.var)


def naive(rewards, boundaries, gamma):
    """Env by env, step by step, over all rollouts: the discounted returns so far, and the scaled rewards of each rollout."""
    so_far = np.zeros(rewards[0].shape[1])
    returns, scaled = [], []
    for reward, boundary in zip(rewards, boundaries, strict=True):
        for t in range(len(reward)):
            for b in range(reward.shape[1]):
                so_far[b] = reward[t, b] + gamma * so_far[b]
                returns.append(so_far[b])
                if boundary[t, b]:
                    so_far[b] = 0.0
        scaled.append(np.clip(reward / np.sqrt(np.var(returns) + 1e-8), -10, 10))
    return scaled, so_far


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99])
def test_rewards_against_a_naive_loop_over_several_rollouts(gamma):
    rng = np.random.default_rng(1)
    rewards = [rng.normal(-3, 2, (12, 5)).astype(np.float32) for _ in range(4)]
    boundaries = [rng.random((12, 5)) < 0.2 for _ in range(4)]
    assert boundaries[0][-1].any() and not boundaries[0][-1].all()  # the carry into the next rollout matters in both ways
    wanted, so_far = naive(rewards, boundaries, gamma)
    norm = RewardNorm(5, gamma)
    for reward, boundary, expected in zip(rewards, boundaries, wanted, strict=True):
        got = norm(torch.from_numpy(reward), torch.from_numpy(boundary))
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.carry.numpy(), so_far, rtol=1e-4, atol=1e-5)
    saved = norm.state_dict()
    assert {"carry", "returns.mean", "returns.var", "returns.count"} <= set(saved)


def test_the_mean_of_rewards_stays():
    """Only divided: a constant reward keeps its sign."""
    norm = RewardNorm(2, 0.9)
    out = norm(torch.full((30, 2), -4.0), torch.zeros(30, 2, dtype=torch.bool))
    assert (out < 0).all() and torch.equal(out, out[0, 0].expand(30, 2))
