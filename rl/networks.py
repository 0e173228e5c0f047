"""Encoders picked from the observation's shape, and the initialisation they share (design R6)."""

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU, "elu": nn.ELU, "gelu": nn.GELU}


def orthogonal(layer: nn.Module, gain: float, generator: torch.Generator) -> nn.Module:
    """Orthogonal weights times `gain`, zero bias (Saxe, McClelland, Ganguli 2013)."""
    nn.init.orthogonal_(layer.weight, gain, generator=generator)  # type: ignore[arg-type]
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def mlp(sizes: tuple[int, ...], activation: str, gain: float, generator: torch.Generator) -> nn.Sequential:
    """Linear layers with `activation` between them; hidden gain sqrt 2, last layer `gain`."""
    layers: list[nn.Module] = []
    for k in range(len(sizes) - 1):
        last = k == len(sizes) - 2
        layers.append(orthogonal(nn.Linear(sizes[k], sizes[k + 1]), gain if last else np.sqrt(2.0), generator))
        if not last:
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


def is_image(space: gymnasium.Space) -> bool:
    """Whether observations are pictures: three dimensions."""
    return isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 3


class ConvEncoder(nn.Module):
    """Pictures to features [N, size].

    84 x 84 and the like: the three layers of Mnih et al. 2015 (Nature DQN). Small grids (under 32 pixels, MinAtar, MiniGrid):
    two 3 x 3 layers. Channels may come first or last: they are the side that is least (uint8 is divided by 255).
    """

    def __init__(self, space: gymnasium.spaces.Box, size: int, generator: torch.Generator):
        super().__init__()
        shape = space.shape
        self.channels_last = shape[2] <= shape[0]
        channels, height, width = (shape[2], shape[0], shape[1]) if self.channels_last else shape
        self.scale = 1.0 / 255.0 if space.dtype == np.uint8 and float(space.high.max()) > 1.0 else 1.0
        gain = np.sqrt(2.0)
        if min(height, width) >= 32:
            layers = [(channels, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)]
        else:
            layers = [(channels, 32, 3, 1), (32, 64, 3, 1)]
        modules: list[nn.Module] = []
        for i, o, kernel, stride in layers:
            # A small grid keeps its size: what happens at its edge matters.
            padding = 0 if stride > 1 or min(height, width) >= 32 else 1
            modules += [orthogonal(nn.Conv2d(i, o, kernel, stride, padding), gain, generator), nn.ReLU()]
        self.convolutions = nn.Sequential(*modules, nn.Flatten())
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, channels, height, width)).shape[1]
        self.project = nn.Sequential(orthogonal(nn.Linear(flat, size), gain, generator), nn.ReLU())

    def forward(self, obs: Tensor) -> Tensor:
        x = obs.float() * self.scale
        if self.channels_last:
            x = x.movedim(-1, -3)
        lead = x.shape[:-3]
        return self.project(self.convolutions(x.reshape(-1, *x.shape[-3:]))).reshape(*lead, -1)
