"""Policy and value networks of the small kind - two tanh perceptrons on the same vector - forward and backward without autograd.

For a few thousand weights autograd's bookkeeping costs several times the arithmetic. Here the derivative is written out:
matrix products go through torch into preallocated memory, what lies between them is compiled. Equality with
`torch.autograd` on the same module is a test.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl.kernels.jit import driver


class TwinMLP:
    """Two `nn.Sequential`s of the same hidden widths, Linear and Tanh in turn, evaluated side by side.

    Their parameters have to lie in one flat tensor in the order of `ordered(...)`, so that the first layers of both are one
    matrix and every hidden layer's activations lie next to each other.

    Args:
        actor, critic: the two networks; float32, on the CPU.
        param, grad: the flat tensors in front of which their parameters and gradients lie.
    """

    def __init__(self, actor: nn.Sequential, critic: nn.Sequential, param: Tensor, grad: Tensor):
        self.nets = [[m for m in net if isinstance(m, nn.Linear)] for net in (actor, critic)]
        self.depth = len(self.nets[0]) - 1  # hidden layers
        self.widths = [layer.out_features for layer in self.nets[0][:-1]]
        self.inputs = self.nets[0][0].in_features
        width = self.widths[0]
        # First layers as one: weights [2 width, inputs], bias [2 width].
        split = 2 * width * self.inputs
        self.first = [x.detach()[:split].view(2 * width, self.inputs) for x in (param, grad)]
        self.first_bias = [x.detach()[split : split + 2 * width] for x in (param, grad)]
        self.weights = [[layer.weight.detach() for layer in net] for net in self.nets]
        self.biases = [[layer.bias.detach() for layer in net] for net in self.nets]
        self.weight_grads = [[layer.weight.grad for layer in net] for net in self.nets]
        self.bias_grads = [[layer.bias.grad for layer in net] for net in self.nets]
        self._memory: dict[int, dict[str, Any]] = {}

    @staticmethod
    def fits(actor: nn.Module, critic: nn.Module) -> bool:
        """Whether two networks are of the kind that this class evaluates."""
        shapes = []
        for net in (actor, critic):
            if not isinstance(net, nn.Sequential) or len(net) < 3 or len(net) % 2 == 0:
                return False
            if any(not isinstance(m, nn.Linear if k % 2 == 0 else nn.Tanh) for k, m in enumerate(net)):
                return False
            shapes.append([(m.in_features, m.out_features) for m in net if isinstance(m, nn.Linear)][:-1])
        return shapes[0] == shapes[1]

    @staticmethod
    def ordered(actor: nn.Sequential, critic: nn.Sequential) -> tuple[nn.Parameter, ...]:
        """The parameters that have to lie in front of the flat tensor, in order."""
        a, c = actor[0], critic[0]
        return (a.weight, c.weight, a.bias, c.bias)  # type: ignore[return-value]

    def _buffers(self, n: int) -> dict[str, Any]:
        found = self._memory.get(n)
        if found is None:
            outputs = [net[-1].out_features for net in self.nets]
            if len(self._memory) >= 8:  # numbers of cut episodes differ from rollout to rollout: do not keep memory for each
                self._memory.pop(next(iter(self._memory)))
            found = self._memory[n] = {
                "hidden": [torch.empty(n, 2 * w) for w in self.widths],
                "grads": [torch.empty(n, 2 * w) for w in self.widths],
                "out": [torch.empty(n, k) for k in outputs],
            }
            found["hidden_np"] = [x.numpy() for x in found["hidden"]]
            found["grads_np"] = [x.numpy() for x in found["grads"]]
            for name in ("hidden", "grads"):
                found[name + "_of"] = [[x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]] for x in found[name]]
        return found

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [N, k] and values [N, 1] for x [N, inputs]; overwritten by the next call with the same N."""
        b = self._buffers(x.shape[0])
        hidden = b["hidden"]
        torch.addmm(self.first_bias[0], x, self.first[0].t(), out=hidden[0])
        hidden[0].tanh_()
        for d in range(1, self.depth):
            for k in (0, 1):
                torch.addmm(self.biases[k][d], b["hidden_of"][d - 1][k], self.weights[k][d].t(), out=b["hidden_of"][d][k])
            hidden[d].tanh_()
        for k in (0, 1):
            torch.addmm(self.biases[k][-1], b["hidden_of"][-1][k], self.weights[k][-1].t(), out=b["out"][k])
        return b["out"][0], b["out"][1]

    def backward(self, x: Tensor, grad_output: Tensor, grad_value: Tensor) -> None:
        """Write (not add) the gradients of the last `forward(x)` from those of its outputs, [N, k] and [N, 1]."""
        b = self._buffers(x.shape[0])
        for k, upper in enumerate((grad_output, grad_value)):
            torch.mm(upper.t(), b["hidden_of"][-1][k], out=self.weight_grads[k][-1])
            torch.sum(upper, 0, out=self.bias_grads[k][-1])
            torch.mm(upper, self.weights[k][-1], out=b["grads_of"][-1][k])
        for d in range(self.depth - 1, 0, -1):
            _tanh_backward(b["grads_np"][d], b["hidden_np"][d])
            for k in (0, 1):
                upper = b["grads_of"][d][k]
                torch.mm(upper.t(), b["hidden_of"][d - 1][k], out=self.weight_grads[k][d])
                torch.sum(upper, 0, out=self.bias_grads[k][d])
                torch.mm(upper, self.weights[k][d], out=b["grads_of"][d - 1][k])
        _tanh_backward(b["grads_np"][0], b["hidden_np"][0])
        torch.mm(b["grads"][0].t(), x, out=self.first[1])
        torch.sum(b["grads"][0], 0, out=self.first_bias[1])


@driver
def _tanh_backward(grad, y):
    """grad *= 1 - y^2 for y = tanh(x)."""
    one = np.float32(1)
    g, h = grad.reshape(-1), y.reshape(-1)
    for i in range(np.uint64(g.size)):
        g[i] *= one - h[i] * h[i]
