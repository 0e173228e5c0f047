"""The LSTM scan against torch: `nn.LSTM` called step by step, and autograd through torch's own operations."""

import pytest
import torch
from torch import nn

from rl.kernels.lstm import _steps, lstm

STEPS, BATCH, INPUTS, WIDTH = 12, 5, 3, 7


@pytest.fixture
def parts():
    torch.manual_seed(3)
    cell = nn.LSTM(INPUTS, WIDTH)
    x = torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)
    state = torch.randn(BATCH, 2, WIDTH)
    going = (torch.rand(STEPS, BATCH) > 0.25).float()
    assert (going == 0).any(0).all()  # every env begins an episode somewhere
    return cell, x, state, going, torch.randn(STEPS, BATCH, WIDTH)


def by_steps(cell, x, state, going):
    h, c = state[:, 0].unsqueeze(0), state[:, 1].unsqueeze(0)
    outputs, states = [], []
    for t in range(len(x)):
        keep = going[t].view(1, -1, 1)
        y, (h, c) = cell(x[t : t + 1], (h * keep, c * keep))
        outputs.append(y)
        states.append(torch.stack((h[0], c[0]), 1))
    return torch.cat(outputs), torch.stack(states)


def gradients(function, cell, x, weight):
    cell.zero_grad()
    x.grad = None
    y, states = function()
    (y * weight).sum().backward()
    return y.detach(), states.detach(), {name: p.grad.clone() for name, p in [("x", x), *cell.named_parameters()]}


def test_outputs_memories_and_every_gradient_equal_nn_lstm(parts):
    cell, x, state, going, weight = parts
    y, states, grads = gradients(lambda: lstm(x, state, going, cell), cell, x, weight)
    y_ref, states_ref, grads_ref = gradients(lambda: by_steps(cell, x, state, going), cell, x, weight)
    torch.testing.assert_close(y, y_ref, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states, states_ref, rtol=1e-5, atol=1e-6)
    assert set(grads) == {"x", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}
    for name in grads:
        torch.testing.assert_close(grads[name], grads_ref[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_form_for_the_gpu_is_the_same(parts):
    cell, x, state, going, weight = parts
    gates = lambda: nn.functional.linear(x, cell.weight_ih_l0, cell.bias_ih_l0 + cell.bias_hh_l0)  # noqa: E731
    y, states, grads = gradients(lambda: _steps(gates(), cell.weight_hh_l0, state, going), cell, x, weight)
    y_ref, states_ref, grads_ref = gradients(lambda: lstm(x, state, going, cell), cell, x, weight)
    torch.testing.assert_close(y, y_ref, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states, states_ref, rtol=1e-5, atol=1e-6)
    for name in grads:
        torch.testing.assert_close(grads[name], grads_ref[name], rtol=1e-4, atol=1e-5, msg=name)


def test_nothing_before_an_episode_reaches_into_it(parts):
    cell, x, state, going, _ = parts
    going = torch.ones_like(going)
    going[6] = 0
    before, _ = lstm(x, state, going, cell)
    changed = x.detach().clone()
    changed[:6] += 1
    after, _ = lstm(changed, state + 1, going, cell)
    assert torch.equal(before[6:], after[6:]) and not torch.equal(before[:6], after[:6])
