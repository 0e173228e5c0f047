"""Action distributions: what a policy network's output means. Lean, explicit generators, masks applied before anything else.

Each class takes the network's output for N states; `log_prob` and `entropy` are summed over action dimensions, shape [N].
`torch.distributions` validates and builds objects for every call, which costs more than the arithmetic of a small policy.
"""

import math

import gymnasium
import torch
from torch import Tensor

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_MASKED = -1e8  # finite, so that 0 * log p stays 0 in the entropy


class Categorical:
    """One discrete action: logits [N, A]; mask [N, A] bool marks what is allowed."""

    def __init__(self, logits: Tensor, mask: Tensor | None = None):
        if mask is not None:
            logits = torch.where(mask, logits, _MASKED)
        self.log_probs = torch.log_softmax(logits, -1)  # [N, A]

    def sample(self, generator: torch.Generator) -> Tensor:
        """Actions [N] int64, by the exponential race: argmax p / E with E ~ Exp(1)."""
        race = torch.empty_like(self.log_probs).exponential_(generator=generator)
        return (self.log_probs - race.log_()).argmax(-1)

    def mode(self) -> Tensor:
        return self.log_probs.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum(-1)


class MultiCategorical:
    """n independent discrete actions: logits [N, sum(counts)], mask likewise; actions [N, n] int64."""

    def __init__(self, logits: Tensor, counts: tuple[int, ...], mask: Tensor | None = None):
        masks = mask.split(counts, -1) if mask is not None else [None] * len(counts)
        self.parts = [Categorical(part, m) for part, m in zip(logits.split(counts, -1), masks, strict=True)]

    def sample(self, generator: torch.Generator) -> Tensor:
        return torch.stack([part.sample(generator) for part in self.parts], -1)

    def mode(self) -> Tensor:
        return torch.stack([part.mode() for part in self.parts], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        return torch.stack([part.log_prob(action[..., k]) for k, part in enumerate(self.parts)], -1).sum(-1)

    def entropy(self) -> Tensor:
        return torch.stack([part.entropy() for part in self.parts], -1).sum(-1)


class DiagonalGaussian:
    """Independent normals: mean [N, n], log_std [n] or [N, n]; actions [N, n] float32, unbounded (the env clips them)."""

    def __init__(self, mean: Tensor, log_std: Tensor):
        self.mean, self.log_std = mean, log_std

    def sample(self, generator: torch.Generator) -> Tensor:
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + noise * self.log_std.exp()

    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        scaled = (action - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * scaled * scaled - self.log_std - _HALF_LOG_2PI).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 + _HALF_LOG_2PI).expand_as(self.mean).sum(-1)


Distribution = Categorical | MultiCategorical | DiagonalGaussian


def head_size(space: gymnasium.Space) -> int:
    """How many numbers a policy network has to put out for an action space."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return int(space.n)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return int(space.nvec.sum())
    if isinstance(space, gymnasium.spaces.Box):
        return int(torch.Size(space.shape).numel())
    raise TypeError(f"action space {space} is not supported: use Discrete, MultiDiscrete or Box")


def distribution(space: gymnasium.Space, output: Tensor, log_std: Tensor | None, mask: Tensor | None = None) -> Distribution:
    """The distribution over `space` that a network's output [N, head_size] stands for."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return Categorical(output, mask)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return MultiCategorical(output, tuple(int(n) for n in space.nvec), mask)
    assert log_std is not None
    return DiagonalGaussian(output, log_std)
