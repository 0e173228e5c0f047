"""Encoders: picked by the observation's shape, channels found on either side, pictures scaled once."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from rl.networks import ACTIVATIONS, ConvEncoder, is_image, mlp, orthogonal

torch.set_num_threads(1)


def box(*shape: int, dtype: Any = np.uint8, high: int = 255):
    return gymnasium.spaces.Box(0, high, shape, dtype)


def encoder(space, size=32, seed=0):
    return ConvEncoder(space, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "space, convolutions, channels",
    [
        (box(4, 84, 84), 3, 4),
        (box(84, 84, 4), 3, 4),
        (box(96, 96, 3), 3, 3),
        (box(10, 10, 4, dtype=np.float32, high=1), 2, 4),
        (box(6, 10, 10, dtype=np.float32, high=1), 2, 6),
        (box(7, 7, 3), 2, 3),
        (box(3, 3, 2), 2, 2),
    ],
)
def test_shapes_with_channels_first_or_last(space, convolutions, channels):
    net = encoder(space)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == convolutions and layers[0].in_channels == channels
    obs = torch.as_tensor(np.stack([space.sample() for _ in range(6)]))
    out = net(obs)
    assert out.shape == (6, 32) and out.dtype == torch.float32
    torch.testing.assert_close(net(obs.view(2, 3, *space.shape)), out.view(2, 3, 32))  # rollouts are [T, B, ...]


def test_channels_last_is_the_same_picture_as_channels_first():
    last, first = encoder(box(10, 10, 4)), encoder(box(4, 10, 10))
    obs = torch.randint(0, 256, (5, 10, 10, 4), dtype=torch.uint8)
    torch.testing.assert_close(last(obs), first(obs.permute(0, 3, 1, 2)))


def test_bytes_are_divided_by_255_and_nothing_else_is():
    as_bytes, as_floats = encoder(box(10, 10, 3)), encoder(box(10, 10, 3, dtype=np.float32, high=1))
    obs = torch.randint(0, 256, (4, 10, 10, 3), dtype=torch.uint8)
    torch.testing.assert_close(as_bytes(obs), as_floats(obs.float() / 255))
    flags = encoder(box(10, 10, 3, high=1))  # a byte that is 0 or 1 is a flag, not a shade
    torch.testing.assert_close(flags(obs % 2), as_floats((obs % 2).float()))


def test_a_small_grid_sees_its_edges():
    """Nothing is cut off: a change in any corner reaches the features, and the picture keeps its size."""
    net = encoder(box(5, 5, 2, dtype=np.float32, high=1), size=64)
    blank = torch.zeros(1, 5, 5, 2)
    for i in (0, 4):
        for j in (0, 4):
            marked = blank.clone()
            marked[0, i, j] = 1.0
            assert (net(marked) - net(blank)).abs().max() > 1e-3
    assert net.project[0].in_features == 5 * 5 * 64


def test_the_seed_decides_the_weights():
    a, b, c = (encoder(box(10, 10, 4), seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


def test_what_is_a_picture():
    assert is_image(box(84, 84, 3)) and not is_image(box(128)) and not is_image(box(4, 4)) and not is_image(gymnasium.spaces.Discrete(3))


@pytest.mark.parametrize("gain", [0.01, 2.0**0.5])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_orthogonal_weights(shape, gain):
    layer = orthogonal(nn.Linear(shape[1], shape[0]), gain, torch.Generator().manual_seed(0))
    w = layer.weight.detach()  # type: ignore[union-attr]
    gram = w @ w.T if shape[0] <= shape[1] else w.T @ w
    torch.testing.assert_close(gram, torch.eye(4) * gain**2, rtol=1e-4, atol=1e-5)
    assert not layer.bias.any()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_perceptron_has_its_layers_and_gains(activation):
    net = mlp((5, 16, 8, 3), activation, 0.01, torch.Generator().manual_seed(0))
    linear = [m for m in net if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(5, 16), (16, 8), (8, 3)]
    assert len(net) == 5 and isinstance(net[1], ACTIVATIONS[activation])
    norms = [float(torch.linalg.matrix_norm(m.weight.detach(), 2)) for m in linear]
    assert norms == pytest.approx([2**0.5, 2**0.5, 0.01], rel=1e-4)
    (only,) = mlp((5, 2), activation, 1.0, torch.Generator())
    assert float(torch.linalg.matrix_norm(only.weight.detach(), 2)) == pytest.approx(1.0, rel=1e-4)  # type: ignore[union-attr]
