"""PPO's loss and its derivative written out, for small networks on the CPU; the same numbers as `ppo.loss` under autograd.

With p = softmax(z), l = log p, N samples and A the advantage (normalised per minibatch if so configured):

    d L_policy / d l_a = -A r / N   where the unclipped term is the lesser, else 0
    d l_a / d z_j = [j = a] - p_j          d H / d z_j = -p_j (l_j + H)
    d l / d mu = (a - mu) / sigma^2        d l / d log sigma = ((a - mu) / sigma)^2 - 1        d H / d log sigma = 1

Tests compare every gradient with autograd's.
"""

from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from rl.kernels.actor_critic import TwinMLP
from rl.kernels.jit import driver, scalar
from rl.optim import FlatAdam

_HALF_LOG_2PI = np.float32(0.9189385332046727)
_ONE, _ZERO, _HALF = np.float32(1), np.float32(0), np.float32(0.5)
_MASKED = -1e8


class FusedPPO:
    """Acting and one update step of a `ppo.PPO` whose networks `TwinMLP` can evaluate."""

    def __init__(self, actor: nn.Sequential, critic: nn.Sequential, log_std: nn.Parameter | None, optimizer: FlatAdam, config: Any):
        self.net = TwinMLP(actor, critic, optimizer.param, optimizer.grad)
        self.optimizer, self.config = optimizer, config
        self.log_std = log_std.detach() if log_std is not None else None
        self.log_std_grad = log_std.grad if log_std is not None else None
        self._value_clip = np.float32(config.value_clip if config.value_clip is not None else np.inf)

    @staticmethod
    def fits(policy: Any, action_space: gymnasium.Space) -> bool:
        kind = isinstance(action_space, gymnasium.spaces.Discrete | gymnasium.spaces.Box)
        flat = isinstance(policy.encoder, nn.Identity)
        return kind and flat and policy.lstm is None and TwinMLP.fits(policy.actor, policy.critic)

    def act(self, obs: Tensor, mask: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled actions, their log-probabilities [B] and values [B]; new tensors."""
        output, value = self.net.forward(obs)
        log_prob = torch.empty(obs.shape[0])
        if self.log_std is not None:
            action = torch.empty_like(output).normal_(generator=generator)
            _gaussian_act(output.numpy(), self.log_std.numpy(), action.numpy(), log_prob.numpy())
        else:
            if mask is not None:
                output.masked_fill_(~mask, _MASKED)
            race = torch.empty_like(output).exponential_(generator=generator)
            action = torch.empty(obs.shape[0], dtype=torch.int64)
            _categorical_act(output.numpy(), race.numpy(), action.numpy(), log_prob.numpy())
        return action, log_prob, value[:, 0].clone()

    def greedy(self, obs: Tensor, mask: Tensor | None) -> Tensor:
        """The distribution's mode for each observation; a new tensor."""
        output = self.net.forward(obs)[0]
        if self.log_std is not None:
            return output.clone()
        if mask is not None:
            output.masked_fill_(~mask, _MASKED)
        return output.argmax(-1)

    def value(self, obs: Tensor) -> Tensor:
        return self.net.forward(obs)[1][:, 0].clone()

    def update(self, part: dict[str, Tensor], clip: float) -> tuple[Tensor, Tensor]:
        """One gradient step on a minibatch of contiguous tensors; the figures of `ppo.loss` and the gradient's norm."""
        c = self.config
        obs = part["obs"]
        output, value = self.net.forward(obs)
        grad_output, grad_value = torch.empty_like(output), torch.empty_like(value)
        figures = torch.empty(6)
        shared = (
            value.numpy(), part["log_prob"].numpy(), part["value"].numpy(), part["advantage"].numpy(), part["target"].numpy(),
            np.float32(clip), self._value_clip, np.float32(c.value_coef), np.float32(c.entropy_coef), c.normalize_advantage,
            grad_output.numpy(), grad_value.numpy(), figures.numpy(),
        )  # fmt: skip
        if self.log_std is not None:
            assert self.log_std_grad is not None
            _gaussian_loss(output.numpy(), self.log_std.numpy(), part["action"].numpy(), self.log_std_grad.numpy(), *shared)
        else:
            if "mask" in part:
                output.masked_fill_(~part["mask"], _MASKED)
            _categorical_loss(output.numpy(), part["action"].numpy(), *shared)
        self.net.backward(obs, grad_output, grad_value)
        return figures, self.optimizer.step(c.max_grad_norm)


@scalar
def _log_sum_exp(row):
    top = row[0]
    for j in range(1, row.size):
        top = max(top, row[j])
    total = _ZERO
    for j in range(row.size):
        total += np.exp(row[j] - top)
    return top + np.log(total)


@driver
def _categorical_act(logits, race, action, log_prob):
    """argmax p / E, the same race as `Categorical.sample`."""
    for i in range(logits.shape[0]):
        norm = _log_sum_exp(logits[i])
        best, at = np.float32(-np.inf), 0
        for j in range(logits.shape[1]):
            score = logits[i, j] - norm - np.log(race[i, j])
            if score > best:
                best, at = score, j
        action[i] = at
        log_prob[i] = logits[i, at] - norm


@driver
def _gaussian_act(mean, log_std, action, log_prob):
    """`action` holds standard normal noise and becomes the action."""
    for i in range(mean.shape[0]):
        total = _ZERO
        for j in range(mean.shape[1]):
            noise = action[i, j]
            action[i, j] = mean[i, j] + noise * np.exp(log_std[j])
            total -= _HALF * noise * noise + log_std[j] + _HALF_LOG_2PI
        log_prob[i] = total


@scalar
def _moments(x, wanted):
    """Mean and 1 / (std + 1e-8) of x, or 0 and 1."""
    if not wanted or x.size < 2:
        return _ZERO, _ONE
    total = 0.0
    for i in range(x.size):
        total += x[i]
    mean = total / x.size
    square = 0.0
    for i in range(x.size):
        square += (x[i] - mean) ** 2
    return np.float32(mean), np.float32(1.0 / (np.sqrt(square / (x.size - 1)) + 1e-8))


@scalar
def _sample(i, new_log_prob, old_log_prob, advantage, clip, figures, inverse):
    """The policy term of sample i: d total / d log_prob; adds to the figures."""
    log_ratio = new_log_prob - old_log_prob[i]
    ratio = np.exp(log_ratio)
    clipped = min(max(ratio, _ONE - clip), _ONE + clip)
    free, held = advantage * ratio, advantage * clipped
    off = abs(ratio - _ONE)
    figures[0] -= min(free, held) * inverse
    figures[3] += (ratio - _ONE - log_ratio) * inverse
    figures[4] += inverse if off > clip else _ZERO
    figures[5] = max(figures[5], off)
    return _ZERO if free > held else -advantage * ratio * inverse  # a NaN is on neither side: it has to get through


@scalar
def _value_sample(i, value, old_value, target, value_clip, value_coef, grad_value, figures, inverse):
    error = value[i, 0] - target[i]
    change = value[i, 0] - old_value[i]
    held = old_value[i] + min(max(change, -value_clip), value_clip) - target[i]
    if value_clip < np.float32(np.inf) and held * held > error * error:
        figures[1] += _HALF * held * held * inverse
        grad_value[i, 0] = value_coef * held * inverse if abs(change) < value_clip else _ZERO
    else:
        figures[1] += _HALF * error * error * inverse
        grad_value[i, 0] = value_coef * error * inverse


@driver
def _categorical_loss(
    logits, action, value, old_log_prob, old_value, advantage, target, clip, value_clip, value_coef, entropy_coef, normalize,
    grad_logits, grad_value, figures,
):  # fmt: skip
    mean, scale = _moments(advantage, normalize)
    inverse = np.float32(1.0 / advantage.size)
    figures[:] = _ZERO
    for i in range(advantage.size):
        norm = _log_sum_exp(logits[i])
        entropy = _ZERO
        for j in range(logits.shape[1]):
            log_p = logits[i, j] - norm
            entropy -= np.exp(log_p) * log_p
        figures[2] += entropy * inverse
        a = action[i]
        upper = _sample(i, logits[i, a] - norm, old_log_prob, (advantage[i] - mean) * scale, clip, figures, inverse)
        for j in range(logits.shape[1]):
            log_p = logits[i, j] - norm
            p = np.exp(log_p)
            grad_logits[i, j] = upper * ((_ONE if j == a else _ZERO) - p) + entropy_coef * inverse * p * (log_p + entropy)
        _value_sample(i, value, old_value, target, value_clip, value_coef, grad_value, figures, inverse)


@driver
def _gaussian_loss(
    mean_action, log_std, action, grad_log_std, value, old_log_prob, old_value, advantage, target, clip, value_clip, value_coef,
    entropy_coef, normalize, grad_mean, grad_value, figures,
):  # fmt: skip
    mean, scale = _moments(advantage, normalize)
    inverse = np.float32(1.0 / advantage.size)
    figures[:] = _ZERO
    entropy = _ZERO
    for j in range(log_std.size):
        entropy += log_std[j] + _HALF + _HALF_LOG_2PI
        grad_log_std[j] = -entropy_coef
    figures[2] = entropy
    for i in range(advantage.size):
        log_prob = _ZERO
        for j in range(log_std.size):
            z = (action[i, j] - mean_action[i, j]) * np.exp(-log_std[j])
            log_prob -= _HALF * z * z + log_std[j] + _HALF_LOG_2PI
        upper = _sample(i, log_prob, old_log_prob, (advantage[i] - mean) * scale, clip, figures, inverse)
        for j in range(log_std.size):
            shrink = np.exp(-log_std[j])
            z = (action[i, j] - mean_action[i, j]) * shrink
            grad_mean[i, j] = upper * z * shrink
            grad_log_std[j] += upper * (z * z - _ONE)
        _value_sample(i, value, old_value, target, value_clip, value_coef, grad_value, figures, inverse)
