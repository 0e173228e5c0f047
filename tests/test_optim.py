"""The flat Adam against torch's own, and what it owes the run: NaN must not vanish, state must come back."""

import pytest
import torch
from torch import nn

from rl.optim import FlatAdam


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_fifty_steps_equal_torchs_adam_and_clipping(max_norm):
    ours, theirs = net(), net()
    mine = FlatAdam(ours, 1e-3, eps=1e-5)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-3, eps=1e-5)
    g = torch.Generator().manual_seed(1)
    clipped = 0
    for k in range(50):
        x, y = torch.randn(32, 4, generator=g), torch.randn(32, 3, generator=g) * (3 if k % 2 else 0.3)
        lr = 1e-2 * (1 - k / 50)
        mine.set_lr(lr)
        mine.zero_grad()
        (ours(x) - y).square().mean().backward()
        norm = mine.step(max_norm)
        adam.param_groups[0]["lr"] = lr
        adam.zero_grad()
        (theirs(x) - y).square().mean().backward()
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        adam.step()
        clipped += int(wanted > max_norm)
        assert float(norm) == pytest.approx(float(wanted), rel=1e-4)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert (0 < clipped < 50) == (max_norm == 0.5)


def test_parameters_and_gradients_are_views_of_one_tensor_in_the_order_asked_for():
    module = net()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    last = module[2]
    optimizer = FlatAdam(module, 1e-3, 1e-8, order=(last.bias, last.weight))  # type: ignore[arg-type]
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])
    assert optimizer.param.numel() == sum(p.numel() for p in module.parameters())
    assert torch.equal(optimizer.param[:3], before["2.bias"])
    assert torch.equal(optimizer.param[3 : 3 + 48], before["2.weight"].flatten())
    module(torch.ones(1, 4)).sum().backward()
    assert torch.equal(optimizer.grad[:3], torch.ones(3))
    module(torch.ones(1, 4)).sum().backward()
    assert torch.equal(optimizer.grad[:3], torch.full((3,), 2.0))  # backward adds
    optimizer.zero_grad()
    assert all(not p.grad.any() for p in module.parameters())  # type: ignore[union-attr]


def test_the_first_step_has_the_length_of_the_learning_rate():
    """m / sqrt(v) is the gradient's sign at step 1: with bias correction the weights move by lr."""
    module = nn.Linear(1, 1, bias=False)
    start = float(module.weight.detach())
    optimizer = FlatAdam(module, 0.25, eps=1e-12)
    optimizer.grad.fill_(-3.0)
    assert float(optimizer.step(1e9)) == pytest.approx(3.0)
    assert float(module.weight.detach()) == pytest.approx(start + 0.25, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 37, -1])
def test_not_a_number_reaches_the_weights(value, where):
    """Clipping by min(1, max_norm / norm) could turn it into a step of length 0 that nobody sees."""
    module = net()
    optimizer = FlatAdam(module, 1e-3, 1e-5)
    optimizer.grad.fill_(0.1)
    optimizer.grad[where] = value
    assert not torch.isfinite(optimizer.step(0.5))
    assert not torch.isfinite(optimizer.param).all()


def test_the_state_comes_back_bit_equal():
    def steps(optimizer, seed):
        g = torch.Generator().manual_seed(seed)
        for _ in range(5):
            optimizer.grad.copy_(torch.randn(optimizer.grad.shape, generator=g))
            optimizer.step(0.5)

    a, b = net(), net()
    first = FlatAdam(a, 1e-2, 1e-5)
    steps(first, 1)
    saved, weights = first.state_dict(), {k: v.clone() for k, v in a.state_dict().items()}
    steps(first, 2)
    second = FlatAdam(b, 1e-2, 1e-5)
    b.load_state_dict(weights)
    second.load_state_dict(saved)
    assert saved["steps"] == 5  # and not changed by what came after
    steps(second, 2)
    assert torch.equal(first.param, second.param)
    assert torch.equal(first.exp_avg_sq, second.exp_avg_sq)
    assert second.state_dict()["steps"] == 10


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="float32"):
        FlatAdam(net().double(), 1e-3, 1e-5)
    saved = FlatAdam(nn.Linear(2, 2), 1e-3, 1e-5).state_dict()
    with pytest.raises(ValueError, match="saved exp_avg"):
        FlatAdam(net(), 1e-3, 1e-5).load_state_dict(saved)
