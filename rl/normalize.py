"""Running statistics that are part of an agent: saved in checkpoints, frozen in evaluation, updated before they are used."""

import torch
from torch import Tensor, nn

from rl.kernels.returns import discounted_returns


class RunningNorm(nn.Module):
    """Mean and variance of all vectors seen, by the parallel update of Chan, Golub, LeVeque (1979), in float64.

    `prior` samples of variance 1 count in the scale: a number that is the same in all first states (a velocity) would otherwise
    be blown up to the clipping range as soon as it moves.
    """

    mean: Tensor
    var: Tensor
    count: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0, epsilon: float = 1e-8, prior: float = 0.0):
        super().__init__()
        self.clip, self.epsilon, self.prior = clip, epsilon, prior
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        # What `forward` uses, in float32 and always in the same place: a CUDA graph may have recorded where.
        self.register_buffer("shift", torch.zeros(shape), persistent=False)
        self.register_buffer("scale", torch.ones(shape), persistent=False)
        self.empty = True  # nothing seen yet; known without asking the device

    @torch.no_grad()
    def update(self, batch: Tensor) -> None:
        """Take in `batch` [..., *shape]."""
        rows = batch.reshape(-1, *self.mean.shape).double()
        n = float(rows.shape[0])
        var, mean = torch.var_mean(rows, 0, correction=0)
        total = self.count + n
        delta = mean - self.mean
        self.var.mul_(self.count).add_(var * n).add_(delta * delta * (self.count * n / total)).div_(total)
        self.mean.add_(delta * (n / total))
        self.count.copy_(total)
        self.empty = False
        self._refresh()

    def _refresh(self) -> None:
        self.shift.copy_(self.mean)
        self.scale.copy_(torch.rsqrt(self.var + self.epsilon + self.prior / (1.0 + self.count)))

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean) / std, clipped to [-clip, clip], float32."""
        return ((x - self.shift) * self.scale).clamp(-self.clip, self.clip)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.empty = not bool(self.count > 0)
        self._refresh()


class RewardNorm(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return; the mean stays (OpenAI baselines' VecNormalize)."""

    carry: Tensor

    def __init__(self, num_envs: int, gamma: float, clip: float = 10.0):
        super().__init__()
        self.gamma, self.clip = gamma, clip
        self.returns = RunningNorm(())
        self.register_buffer("carry", torch.zeros(num_envs))  # discounted return so far, 0 where an episode just began

    @torch.no_grad()
    def forward(self, reward: Tensor, boundary: Tensor) -> Tensor:
        """Take in the rewards [T, B] of a rollout and scale them; `boundary` [T, B] marks ends of episodes."""
        # R_t = r_t + gamma (1 - boundary_{t-1}) R_{t-1} is the backward recursion of `discounted_returns` with time reversed.
        discount = torch.full_like(reward, self.gamma)
        discount[1:] *= ~boundary[:-1]
        bootstrap = torch.zeros_like(reward)
        bootstrap[-1] = self.carry
        none = torch.zeros_like(boundary)
        returns = discounted_returns(reward.flip(0), discount.flip(0), none, bootstrap).flip(0)
        self.carry.copy_(returns[-1] * ~boundary[-1])
        self.returns.update(returns)
        return (reward * self.returns.scale).clamp(-self.clip, self.clip)
