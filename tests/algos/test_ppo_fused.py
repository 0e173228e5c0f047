"""The hand-derived update of PPO is the one autograd finds: figures, every gradient, and the weights after several steps."""

import itertools
from dataclasses import replace

import gymnasium
import pytest
import torch
from torch import nn
from toys import CONTINUOUS, DISCRETE, IMAGE, MULTI, VECTOR, Toy, live

from rl.algos.ppo import PPO, Config
from rl.algos.ppo_fused import FusedPPO
from rl.kernels.actor_critic import TwinMLP
from rl.optim import FlatAdam

N = 256


def pair(action_space, **changes):
    config = Config(**{"hidden": (24, 16), **changes})
    fused = PPO(VECTOR, action_space, 8, config, seed=1)
    plain = PPO(VECTOR, action_space, 8, replace(config, fused=False), seed=1)
    assert fused.fused is not None and plain.fused is None
    with torch.no_grad():  # away from the nearly uniform beginning, where many terms vanish
        noise = torch.Generator().manual_seed(5)
        for p, q in zip(fused.policy.parameters(), plain.policy.parameters(), strict=True):
            p.add_(0.3 * torch.randn(p.shape, generator=noise))
            q.copy_(p)
    return fused, plain


def sample(agent, masked, generator, n=N):
    """Minibatches as unfriendly as training may make them: ratios far off 1 on both sides, values beyond their clip."""
    obs = torch.randn(n, 5, generator=generator)
    part = {
        "obs": obs,
        "value": torch.randn(n, generator=generator),
        "advantage": torch.randn(n, generator=generator) * 3 + 1,
        "target": torch.randn(n, generator=generator),
    }
    if agent.policy.log_std is None:
        part["action"] = torch.randint(0, 3, (n,), generator=generator)
    else:
        part["action"] = torch.randn(n, 2, generator=generator)
    mask = None
    if masked:
        mask = torch.rand(n, 3, generator=generator) > 0.4
        mask[torch.arange(n), part["action"]] = True
        part["mask"] = mask
    with torch.no_grad():
        log_prob = agent._distribution(agent.policy(obs)[0], mask).log_prob(part["action"])
    part["log_prob"] = log_prob + 0.3 * torch.randn(n, generator=generator)
    return part


CASES = list(itertools.product(("discrete", "masked", "continuous"), (None, 0.5), (True, False), (0.0, 0.01)))


@pytest.mark.parametrize("kind, value_clip, normalize, entropy", CASES)
def test_figures_gradients_and_weights_equal_autograds(kind, value_clip, normalize, entropy):
    space = CONTINUOUS if kind == "continuous" else DISCRETE
    changes = dict(value_clip=value_clip, normalize_advantage=normalize, entropy_coef=entropy)
    fused, plain = pair(space, value_coef=0.7, max_grad_norm=0.5, log_std_init=-0.3, **changes)
    g = torch.Generator().manual_seed(11)
    for agent in (fused, plain):
        agent.optimizer.set_lr(1e-3)
    for _ in range(5):
        part = sample(plain, kind == "masked", g)
        figures, norm = fused.fused.update(part, 0.2)  # type: ignore[union-attr]
        wanted, wanted_norm = plain.update(part)
        torch.testing.assert_close(figures, wanted, rtol=1e-4, atol=1e-5)
        assert 0.05 < float(figures[4]) < 0.95  # both branches of the clip were taken
        assert float(norm) == pytest.approx(float(wanted_norm), rel=1e-4)
        for (name, p), q in zip(fused.policy.named_parameters(), plain.policy.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            scale = float(q.grad.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=2e-5 * max(scale, 1.0), msg=name)
    for (name, p), q in zip(fused.policy.named_parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5, msg=name)


def test_a_wrong_gradient_would_be_seen():
    """The tolerance above is small against what the terms are worth."""
    base, other = pair(DISCRETE, entropy_coef=0.0), pair(DISCRETE, entropy_coef=0.01)
    part = sample(base[1], False, torch.Generator().manual_seed(11))
    base[0].fused.update(part, 0.2)  # type: ignore[union-attr]
    other[0].fused.update(part, 0.2)  # type: ignore[union-attr]
    off = (base[0].optimizer.grad - other[0].optimizer.grad).abs().max()
    assert off > 1e-4


@pytest.mark.parametrize("kind", ["discrete", "masked", "continuous"])
def test_acting_equals_the_distribution(kind):
    space = CONTINUOUS if kind == "continuous" else DISCRETE
    fused, plain = pair(space, log_std_init=-0.5)
    g = torch.Generator().manual_seed(3)
    obs = torch.randn(500, 5, generator=g)
    mask = None
    if kind == "masked":
        mask = torch.rand(500, 3, generator=g) > 0.5
        mask[:, 1] = True
    for agent in (fused, plain):
        agent.generator.manual_seed(8)
    got, wanted = fused.act(obs, mask), plain.act(obs, mask)
    torch.testing.assert_close(got.action, wanted.action, rtol=1e-5, atol=1e-5)  # the same draws, for the same seed
    torch.testing.assert_close(got.extras["log_prob"], wanted.extras["log_prob"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.extras["value"], wanted.extras["value"], rtol=1e-4, atol=1e-5)
    dist = plain._distribution(plain.policy(obs)[0], mask)
    torch.testing.assert_close(got.extras["log_prob"], dist.log_prob(got.action), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.act(obs, mask, explore=False).action, dist.mode(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused._values(obs, None), plain._values(obs, None), rtol=1e-4, atol=1e-5)
    if mask is not None:
        assert mask.gather(1, got.action.unsqueeze(1)).all()


def test_what_acting_returns_is_not_overwritten_by_the_next_call():
    """The networks write into memory of their own."""
    for space in (DISCRETE, CONTINUOUS):
        agent = pair(space)[0]
        first = agent.act(torch.randn(8, 5))
        greedy = agent.act(torch.randn(8, 5), explore=False)
        kept = [x.clone() for x in (first.action, first.extras["log_prob"], first.extras["value"], greedy.action)]
        agent.act(torch.randn(8, 5))
        agent.act(torch.randn(8, 5), explore=False)
        agent._values(torch.randn(8, 5), None)
        for x, y in zip((first.action, first.extras["log_prob"], first.extras["value"], greedy.action), kept, strict=True):
            assert torch.equal(x, y)


def test_where_it_is_used_and_where_not():
    def uses(obs_space: gymnasium.Space = VECTOR, action_space: gymnasium.Space = DISCRETE, **changes):
        return PPO(obs_space, action_space, 8, Config(features=16, **changes)).fused is not None

    assert uses() and uses(action_space=CONTINUOUS) and uses(hidden=(8,)) and uses(hidden=(8, 4, 2))
    assert not uses(fused=False) and not uses(activation="relu") and not uses(lstm_size=4) and not uses(action_space=MULTI)
    assert not uses(obs_space=IMAGE) and not uses(hidden=())


@pytest.mark.parametrize("hidden", [(8,), (12, 8), (10, 6, 4)])
def test_the_networks_equal_torch_at_every_depth(hidden):
    agent = PPO(VECTOR, CONTINUOUS, 8, Config(hidden=hidden), seed=2)
    assert agent.fused is not None
    for n in (1, 7, 64):
        x = torch.randn(n, 5)
        up, up_value = torch.randn(n, 2), torch.randn(n, 1)
        output, value = (y.clone() for y in agent.fused.net.forward(x))
        torch.testing.assert_close(output, agent.policy.actor(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value, agent.policy.critic(x), rtol=1e-5, atol=1e-6)
        agent.optimizer.zero_grad()
        ((agent.policy.actor(x) * up).sum() + (agent.policy.critic(x) * up_value).sum()).backward()
        wanted = agent.optimizer.grad.clone()
        for name, p in agent.policy.named_parameters():
            if name != "log_std":
                p.grad.fill_(7.0)  # type: ignore[union-attr]
        agent.fused.net.forward(x)
        agent.fused.net.backward(x, up, up_value)  # writes, does not add
        torch.testing.assert_close(agent.optimizer.grad, wanted, rtol=1e-4, atol=1e-5)


def test_twins_of_different_widths_do_not_fit():
    def net(*sizes: int, act: type[nn.Module] = nn.Tanh):
        return nn.Sequential(nn.Linear(3, sizes[0]), act(), nn.Linear(sizes[0], sizes[1]))

    assert TwinMLP.fits(net(8, 2), net(8, 1))
    assert not TwinMLP.fits(net(8, 2), net(4, 1))
    assert not TwinMLP.fits(net(8, 2, act=nn.ReLU), net(8, 1, act=nn.ReLU))
    assert not TwinMLP.fits(nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 1)))


@pytest.mark.parametrize("space", [DISCRETE, CONTINUOUS])
def test_whole_runs_agree(space):
    """Rollouts, epochs and normalisers included: three iterations on, the weights are the same but for rounding."""
    ends = []
    for fused in (True, False):
        config = Config(rollout_steps=8, hidden=(16,), normalize_obs=True, normalize_reward=True, anneal_lr=False, lr=1e-3, fused=fused)
        agent = PPO(VECTOR, space, 8, config, seed=4)
        live(agent, Toy(VECTOR, space, 8), iterations=3)
        ends.append(torch.cat([p.detach().flatten() for p in agent.policy.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)


def test_not_a_number_reaches_the_weights():
    for space in (DISCRETE, CONTINUOUS):
        agent = pair(space)[0]
        part = sample(agent, False, torch.Generator().manual_seed(1))
        part["advantage"][3] = float("nan")
        figures, norm = agent.fused.update(part, 0.2)  # type: ignore[union-attr]
        assert torch.isnan(figures[0]) and torch.isnan(norm)
        assert torch.isnan(agent.optimizer.param).any()


def test_the_optimiser_and_the_networks_share_memory():
    agent = pair(DISCRETE)[0]
    assert isinstance(agent.fused, FusedPPO) and isinstance(agent.optimizer, FlatAdam)
    with torch.no_grad():
        agent.optimizer.param.zero_()
    assert all(float(p.detach().abs().max()) == 0 for p in agent.policy.parameters())
    assert float(agent.fused.value(torch.ones(2, 5)).abs().max()) == 0
