"""An LSTM over [T, B] with memory cleared where episodes begin, forward and backward without autograd's bookkeeping per step.

`nn.LSTM` cannot clear its memory inside a sequence, and calling it step by step costs a millisecond a step to learn from. Here
a step is one matrix product and one compiled pass over the gates. Hochreiter, Schmidhuber 1997, with forget gates (Gers 2000);
gates in torch's order i, f, g, o:

    z = x W_ih' + b_ih + h W_hh' + b_hh     c' = sigmoid(f) c + sigmoid(i) tanh(g)     h' = sigmoid(o) tanh(c')
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl.kernels.fastmath import tanh
from rl.kernels.jit import driver, scalar

_HALF, _ONE = np.float32(0.5), np.float32(1)


def lstm(x: Tensor, state: Tensor, going: Tensor | None, cell: nn.LSTM) -> tuple[Tensor, Tensor]:
    """One layer `cell` over x [T, B, n] from the memory `state` [B, 2, H] (h, c): outputs [T, B, H], memories [T, B, 2, H].

    `going` [T, B] float32 is 0 where a row is the first of an episode: the memory is cleared before it. Gradients flow to x and
    to the weights, not to `state` and not from the memories returned.
    """
    named: dict[str, Any] = dict(cell.named_parameters())
    weight = named["weight_hh_l0"]
    gates = torch.nn.functional.linear(x, named["weight_ih_l0"], named["bias_ih_l0"] + named["bias_hh_l0"])  # [T, B, 4H]
    if x.device.type == "cpu":
        y, states = _Scan.apply(gates, weight, state, going)  # type: ignore[misc]
        return y, states
    return _steps(gates, weight, state, going)


def _steps(gates: Tensor, weight: Tensor, state: Tensor, going: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in torch's own operations, for a GPU (and for the tests)."""
    h, c = state[:, 0], state[:, 1]
    outputs, states = [], []
    for t in range(gates.shape[0]):
        if going is not None:
            keep = going[t].unsqueeze(-1)
            h, c = h * keep, c * keep
        i, f, g, o = (gates[t] + h @ weight.t()).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
        states.append(torch.stack((h, c), 1))
    return torch.stack(outputs), torch.stack(states).detach()


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, state: Tensor, going: Tensor | None) -> tuple[Tensor, Tensor]:
        steps, batch, width = gates.shape[0], gates.shape[1], weight.shape[1]
        z = gates.detach().clone(memory_format=torch.contiguous_format)  # becomes the activated gates
        keep = torch.ones(steps, batch) if going is None else going.contiguous()
        h_in, c_in = torch.empty(steps, batch, width), torch.empty(steps, batch, width)  # after clearing, before the step
        y, c_out = torch.empty(steps, batch, width), torch.empty(steps, batch, width)
        h_in[0], c_in[0] = state[:, 0], state[:, 1]
        arrays = [a.numpy() for a in (z, keep, h_in, c_in, y, c_out)]
        transposed = weight.detach().t()
        _clear(arrays[1], arrays[2], arrays[3], 0)
        for t in range(steps):
            z[t].addmm_(h_in[t], transposed)
            _forward(*arrays, t)
        ctx.save_for_backward(z, weight, keep, h_in, c_in, c_out)
        states = torch.stack((y, c_out), 2)
        ctx.mark_non_differentiable(states)
        return y, states

    @staticmethod
    def backward(ctx: Any, *upper: Tensor) -> Any:
        z, weight, keep, h_in, c_in, c_out = ctx.saved_tensors
        steps, batch, width = h_in.shape
        dy = upper[0].contiguous()
        dz = torch.empty_like(z)
        dh, dc = torch.zeros(batch, width), torch.zeros(batch, width)
        arrays = [a.detach().numpy() for a in (z, keep, c_in, c_out, dy, dz, dh, dc)]
        for t in range(steps - 1, -1, -1):
            _backward(*arrays, t)
            if t > 0:
                torch.mm(dz[t], weight.detach(), out=dh)
                dh.mul_(keep[t].unsqueeze(-1))
        grad_weight = dz.view(-1, 4 * width).t() @ h_in.view(-1, width)
        return dz, grad_weight, None, None


@scalar
def _sigmoid(x):
    return _HALF + _HALF * tanh(_HALF * x)


@driver
def _clear(keep, h_in, c_in, t):
    for b in range(keep.shape[1]):
        for j in range(h_in.shape[2]):
            h_in[t, b, j] *= keep[t, b]
            c_in[t, b, j] *= keep[t, b]


@driver
def _forward(z, keep, h_in, c_in, y, c_out, t):
    """Activate the gates of row t, write its output and memory, and the cleared memory before row t + 1."""
    steps, batch, width = h_in.shape
    for b in range(batch):
        row, before, after, out = z[t, b], c_in[t, b], c_out[t, b], y[t, b]
        for j in range(width):
            row[j] = _sigmoid(row[j])
            row[width + j] = _sigmoid(row[width + j])
            row[2 * width + j] = tanh(row[2 * width + j])
            row[3 * width + j] = _sigmoid(row[3 * width + j])
        for j in range(width):
            c = row[width + j] * before[j] + row[j] * row[2 * width + j]
            after[j] = c
            out[j] = row[3 * width + j] * tanh(c)
        if t + 1 < steps:
            k = keep[t + 1, b]
            for j in range(width):
                h_in[t + 1, b, j] = out[j] * k
                c_in[t + 1, b, j] = after[j] * k


@driver
def _backward(z, keep, c_in, c_out, dy, dz, dh, dc, t):
    """Gradient of the gates of row t; `dh`, `dc` hold what comes from row t + 1, `dc` then what goes to row t - 1."""
    _, batch, width = c_in.shape
    for b in range(batch):
        k = keep[t, b]
        for j in range(width):
            i, f, g, o = z[t, b, j], z[t, b, width + j], z[t, b, 2 * width + j], z[t, b, 3 * width + j]
            up = dy[t, b, j] + dh[b, j]
            squashed = tanh(c_out[t, b, j])
            down = dc[b, j] + up * o * (_ONE - squashed * squashed)
            dz[t, b, j] = down * g * i * (_ONE - i)
            dz[t, b, width + j] = down * c_in[t, b, j] * f * (_ONE - f)
            dz[t, b, 2 * width + j] = down * i * (_ONE - g * g)
            dz[t, b, 3 * width + j] = up * squashed * o * (_ONE - o)
            dc[b, j] = down * f * k
