"""PPO: proximal policy optimisation with clipping.

Schulman, Wolski, Dhariwal, Radford, Klimov, "Proximal Policy Optimization Algorithms", arXiv:1707.06347, 2017.

    r = pi(a|s) / pi_old(a|s)                                           ratio
    L_policy = -mean min(r A, clip(r, 1 - eps, 1 + eps) A)              eq. 7
    L_value  = mean 1/2 (V(s) - R)^2,   R = A_GAE + V_old               eq. 9, GAE: arXiv:1506.02438 eq. 16
    L = L_policy + c_v L_value - c_e H[pi]

What decides whether it works is in Huang et al., "The 37 Implementation Details of Proximal Policy Optimization" (ICLR blog
track, 2022); numbers below are theirs.

Deviations from the paper:
1. Advantages are normalised per minibatch (detail 7); the global gradient norm is clipped (11); orthogonal initialisation (2);
   Adam's epsilon is 1e-5 (3).
2. An episode cut by a time limit is bootstrapped from the value of its last observation; their code, and the paper's, treats
   it as a termination.
3. Value clipping (9) is off by default: Engstrom et al. 2020 and Andrychowicz et al. 2021 find no benefit.
4. Running statistics of observations and rewards change between rollouts, not within one, so that the first minibatch of the
   first epoch has a ratio of exactly 1.
"""

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from rl.algos.ppo_fused import FusedPPO
from rl.distributions import Distribution, distribution, head_size
from rl.kernels.actor_critic import TwinMLP
from rl.kernels.lstm import lstm
from rl.kernels.returns import gae
from rl.networks import ACTIVATIONS, ConvEncoder, is_image, mlp
from rl.normalize import RewardNorm, RunningNorm
from rl.optim import FlatAdam
from rl.rollout import RolloutBatch
from rl.types import Act


@dataclass(frozen=True)
class Config:
    """Hyperparameters; counts are env steps unless a unit is named."""

    rollout_steps: int = 128
    """Steps of each env between two updates, env steps per env."""
    epochs: int = 4
    """Passes over a rollout, count."""
    minibatches: int = 4
    """Parts a rollout is shuffled into for each epoch, count; with an LSTM it is the envs that are parted."""
    lr: float = 2.5e-4
    """Adam's learning rate."""
    anneal_lr: bool = True
    """Lower the learning rate linearly to 0 over the run."""
    gamma: float = 0.99
    """Discount factor per env step."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """Epsilon of the policy's clipping, a ratio."""
    anneal_clip: bool = False
    """Lower the clipping range linearly to 0 over the run."""
    value_clip: float | None = None
    """Clip the value's change to this much per update, in units of value; none: no clipping."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Largest global norm of a gradient."""
    target_kl: float | None = None
    """Stop an update's epochs once the mean KL divergence from the old policy exceeds 1.5 times this, nats; none: never."""
    normalize_advantage: bool = True
    """Give advantages mean 0 and standard deviation 1 in every minibatch."""
    normalize_obs: bool = False
    """Scale vector observations by their running mean and standard deviation."""
    normalize_reward: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers, for policy and value each (vectors), units."""
    activation: str = "tanh"
    """Nonlinearity between layers: tanh, relu, silu, elu, gelu."""
    features: int = 512
    """Width of the layer behind the convolutions (pictures), units."""
    lstm_size: int = 0
    """Width of an LSTM between encoder and heads, units; 0: no memory."""
    log_std_init: float = 0.0
    """First logarithm of the standard deviation of continuous actions."""
    fused: bool = True
    """Small tanh networks on the CPU: use the loss's derivative written out by hand, five times faster than autograd."""

    def __post_init__(self) -> None:
        wrong = [
            (self.rollout_steps < 1, "rollout_steps must be at least 1"),
            (self.epochs < 1, "epochs must be at least 1"),
            (self.minibatches < 1, "minibatches must be at least 1"),
            (not self.lr >= 0, "lr must be 0 or more"),
            (not 0 <= self.gamma <= 1, "gamma must be in [0, 1]"),
            (not 0 <= self.gae_lambda <= 1, "gae_lambda must be in [0, 1]"),
            (not self.clip > 0, "clip must be above 0"),
            (self.value_clip is not None and not self.value_clip > 0, "value_clip must be above 0, or null"),
            (not self.value_coef >= 0, "value_coef must be 0 or more"),
            (not self.entropy_coef >= 0, "entropy_coef must be 0 or more"),
            (not self.max_grad_norm > 0, "max_grad_norm must be above 0"),
            (self.target_kl is not None and not self.target_kl > 0, "target_kl must be above 0, or null"),
            (any(width < 1 for width in self.hidden), "every width in hidden must be at least 1"),
            (self.activation not in ACTIVATIONS, f"activation must be one of {', '.join(ACTIVATIONS)}"),
            (self.features < 1, "features must be at least 1"),
            (self.lstm_size < 0, "lstm_size must be 0 or more"),
        ]
        for broken, rule in wrong:
            if broken:
                raise ValueError(rule)


class ActorCritic(nn.Module):
    """Policy and value: separate networks on vectors; shared convolutions on pictures; with an LSTM a shared body."""

    def __init__(self, obs_space: gymnasium.Space, action_space: gymnasium.Space, config: Config, generator: torch.Generator):
        super().__init__()
        self.lstm_size = config.lstm_size
        outputs = head_size(action_space)
        if is_image(obs_space):
            self.encoder = ConvEncoder(obs_space, config.features, generator)  # type: ignore[arg-type]
            width, hidden = config.features, ()
        else:
            width, hidden = int(torch.Size(obs_space.shape or (1,)).numel()), config.hidden
            self.encoder = nn.Flatten(-len(obs_space.shape or (1,))) if obs_space.shape and len(obs_space.shape) > 1 else nn.Identity()
        self.lstm = None
        if config.lstm_size:
            if hidden:
                body = mlp((width, *hidden), config.activation, 2.0**0.5, generator)
                self.encoder = nn.Sequential(self.encoder, body, ACTIVATIONS[config.activation]())
                width = hidden[-1]
            self.lstm = nn.LSTM(width, config.lstm_size)
            for name, weight in self.lstm.named_parameters():
                nn.init.orthogonal_(weight, 1.0, generator=generator) if "weight" in name else nn.init.zeros_(weight)
            width, hidden = config.lstm_size, ()
        # Gain .01: the first policy is nearly uniform (detail 2).
        self.actor = mlp((width, *hidden, outputs), config.activation, 0.01, generator)
        self.critic = mlp((width, *hidden, 1), config.activation, 1.0, generator)
        self.log_std = None
        if isinstance(action_space, gymnasium.spaces.Box):
            self.log_std = nn.Parameter(torch.full((outputs,), config.log_std_init))

    def forward(self, obs: Tensor, state: Tensor | None = None, going: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Policy output [..., head_size], value [...] and the next recurrent state.

        Without an LSTM obs is [N, ...]. With one it is [T, B, ...], `state` [B, 2, H] is the memory before row 0, and `going`
        [T, B] is 0 where a row is the first of an episode; the state returned is that after every row, [T, B, 2, H].
        """
        x = self.encoder(obs)
        states = None
        if self.lstm is not None:
            assert state is not None
            x, states = lstm(x, state, going, self.lstm)
        return self.actor(x), self.critic(x).squeeze(-1), states


def loss(
    log_prob: Tensor, old_log_prob: Tensor, entropy: Tensor, value: Tensor, old_value: Tensor, advantage: Tensor, target: Tensor,
    clip: Tensor, config: Config,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """PPO's loss over N samples, all [N] float32 (`clip` 0-d): the scalar to descend, and six figures [6] to watch.

    The figures: policy loss, value loss, entropy, approximate KL (Schulman's k3: mean (r - 1) - log r), share of clipped
    samples, largest |r - 1|.
    """
    if config.normalize_advantage and advantage.numel() > 1:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    policy = -torch.min(advantage * ratio, advantage * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
    error = (value - target).square()
    if config.value_clip is not None:
        clipped = old_value + (value - old_value).clamp(-config.value_clip, config.value_clip)
        error = torch.max(error, (clipped - target).square())
    value_loss = 0.5 * error.mean()
    mean_entropy = entropy.mean()
    total = policy + config.value_coef * value_loss - config.entropy_coef * mean_entropy
    with torch.no_grad():
        off = (ratio - 1).abs()
        figures = (policy, value_loss, mean_entropy, (ratio - 1 - log_ratio).mean(), (off > clip).float().mean(), off.max())
        return total, torch.stack([f.detach() for f in figures])


# Stable-Baselines3's names where it has one.
FIGURES = ("policy_gradient_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "max_ratio_error")


class PPO:
    """One PPO agent: networks, optimiser, normalisers and its own random numbers."""

    recurrent: bool

    def __init__(
        self, obs_space: gymnasium.Space, action_space: gymnasium.Space, num_envs: int, config: Config, *,
        seed: int = 0, device: str | torch.device = "cpu", compile: bool = False,
    ):  # fmt: skip
        samples = config.rollout_steps * num_envs
        parts = num_envs if config.lstm_size else samples
        if config.minibatches < 1 or parts < config.minibatches:
            what = f"{num_envs} envs" if config.lstm_size else f"{samples} samples (rollout_steps x num_envs)"
            raise ValueError(f"minibatches={config.minibatches} does not fit {what}")
        self.config, self.device = config, torch.device(device)
        self.obs_space, self.action_space = obs_space, action_space
        self.recurrent = config.lstm_size > 0
        self.num_envs = num_envs
        streams = np.random.SeedSequence(seed).generate_state(2, np.uint64)  # first weights and actions: not the same numbers
        init = torch.Generator().manual_seed(int(streams[0] >> 1))
        self.policy = ActorCritic(obs_space, action_space, config, init).to(self.device)
        fused = config.fused and self.device.type == "cpu" and not compile and FusedPPO.fits(self.policy, action_space)
        order = TwinMLP.ordered(self.policy.actor, self.policy.critic) if fused else ()
        self.optimizer = FlatAdam(self.policy, config.lr, eps=1e-5, order=order)
        self.fused = None
        if fused:
            self.fused = FusedPPO(self.policy.actor, self.policy.critic, self.policy.log_std, self.optimizer, config)
        self.image = is_image(obs_space)
        if config.normalize_obs and self.image:
            raise ValueError("normalize_obs=true is for vectors; pictures are divided by 255")
        self.obs_norm = RunningNorm(obs_space.shape or (1,), prior=1.0).to(self.device) if config.normalize_obs else None
        self.reward_norm = RewardNorm(num_envs, config.gamma).to(self.device) if config.normalize_reward else None
        self.generator = torch.Generator(self.device).manual_seed(int(streams[1] >> 1))
        self._clip = torch.tensor(config.clip, device=self.device)
        self._forward: Any = self.policy
        self._update: Any = self.update
        if compile and self.device.type == "cuda":
            from rl.cuda_graphs import GraphedUpdate

            self._update = GraphedUpdate(self.update, self.optimizer.tensors())
        elif compile:
            self._forward = torch.compile(self.policy)

    # -- acting ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Tensor, mask: Tensor | None = None, state: Tensor | None = None, explore: bool = True) -> Act:
        """Actions for obs [B, ...]: sampled when exploring, else the distribution's mode. Continuous ones are not clipped."""
        if self.obs_norm is not None and explore and self.obs_norm.empty:
            self.obs_norm.update(obs)
        if self.fused is not None:
            if not explore:
                return Act(self.fused.greedy(self._normalized(obs), mask), None, {})
            action, log_prob, value = self.fused.act(self._normalized(obs), mask, self.generator)
            return Act(action, None, {"log_prob": log_prob, "value": value})
        extras: dict[str, Tensor] = {}
        if self.recurrent:
            if state is None:
                state = torch.zeros(obs.shape[0], 2, self.config.lstm_size, device=self.device)
            output, value, states = self.policy(self._normalized(obs).unsqueeze(0), state)
            assert states is not None
            output, value, state = output[0], value[0], states[0]
            extras["state"] = states[0]
        else:
            output, value, _ = self.policy(self._normalized(obs))
        dist = self._distribution(output, mask)
        if not explore:
            return Act(dist.mode(), state, {})
        action = dist.sample(self.generator)
        extras["log_prob"], extras["value"] = dist.log_prob(action), value
        return Act(action, state, extras)

    def _normalized(self, obs: Tensor) -> Tensor:
        if self.obs_norm is not None:
            return self.obs_norm(obs)
        return obs if self.image or obs.dtype == torch.float32 else obs.float()  # pictures are converted a minibatch at a time

    def _distribution(self, output: Tensor, mask: Tensor | None) -> Distribution:
        return distribution(self.action_space, output, self.policy.log_std, mask)

    # -- learning ----------------------------------------------------------------------------------------------------

    def learn(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """Several epochs of minibatch updates on one rollout; figures as 0-d tensors, means over the minibatches."""
        c = self.config
        left = 1.0 - batch.progress
        lr = c.lr * left if c.anneal_lr else c.lr
        clip = c.clip * left if c.anneal_clip else c.clip
        self.optimizer.set_lr(lr)
        self._clip.fill_(clip)
        obs = self._normalized(batch.obs)
        boundary = batch.terminated | batch.truncated
        reward = self.reward_norm(batch.reward, boundary) if self.reward_norm is not None else batch.reward
        old_value = batch.extras["value"]
        discount = c.gamma * (~batch.terminated).float()
        advantage = gae(reward, old_value, self._next_values(batch), discount, boundary, c.gae_lambda)
        target = advantage + old_value
        fields: dict[str, Any] = dict(
            obs=obs, action=batch.action, log_prob=batch.extras["log_prob"], value=old_value, advantage=advantage, target=target
        )
        if batch.mask is not None:
            fields["mask"] = batch.mask
        if self.recurrent:
            fields["going"] = torch.cat((torch.ones_like(boundary[:1]), ~boundary[:-1])).float()
        else:
            fields = {name: x.flatten(0, 1) for name, x in fields.items()}
        axis = 1 if self.recurrent else 0  # of what is shuffled: envs with their whole sequence, or single samples
        size = self.num_envs if self.recurrent else advantage.numel()
        figures, updates = torch.zeros(len(FIGURES), device=self.device), 0
        norms = torch.zeros((), device=self.device)
        for _ in range(c.epochs):
            order = torch.randperm(size, generator=self.generator, device=self.device)
            epoch = torch.zeros_like(figures)
            shuffled = {name: x.index_select(axis, order) for name, x in fields.items()}
            parts = {name: x.tensor_split(c.minibatches, axis) for name, x in shuffled.items()}
            if self.recurrent:
                first = batch.first_state
                if first is None:
                    first = torch.zeros(self.num_envs, 2, c.lstm_size, device=self.device)
                parts["memory"] = first.index_select(0, order).tensor_split(c.minibatches)
            for k in range(c.minibatches):
                part = {name: x[k] for name, x in parts.items()}
                seen, norm = self.fused.update(part, clip) if self.fused is not None else self._update(part)
                epoch += seen
                norms += norm
            figures += epoch
            updates += c.minibatches
            if c.target_kl is not None and float(epoch[3]) / c.minibatches > 1.5 * c.target_kl:
                break
        if self.obs_norm is not None:
            self.obs_norm.update(batch.obs)
        metrics: dict[str, Tensor] = dict(zip(FIGURES, figures / updates, strict=True))
        residual = target.var()
        metrics.update(
            grad_norm=norms / updates, explained_variance=1 - (target - old_value).var() / residual.clamp(min=1e-12),
            value=old_value.mean(), learning_rate=torch.tensor(lr), n_updates=torch.tensor(float(updates)),
        )  # fmt: skip
        metrics["entropy_loss"] = -metrics.pop("entropy")
        if self.policy.log_std is not None:
            metrics["std"] = self.policy.log_std.detach().exp().mean()
        return {f"train/{name}": x for name, x in metrics.items()}

    def update(self, part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One gradient step on a minibatch; the loss's figures and the gradient's norm."""
        c = self.config
        output, value, _ = self._forward(part["obs"], part.get("memory"), part.get("going"))
        dist = self._distribution(output, part.get("mask"))
        total, figures = loss(
            dist.log_prob(part["action"]), part["log_prob"], dist.entropy(), value, part["value"], part["advantage"],
            part["target"], self._clip, c,
        )  # fmt: skip
        self.optimizer.zero_grad()
        total.backward()
        return figures, self.optimizer.step(c.max_grad_norm)

    @torch.no_grad()
    def _next_values(self, batch: RolloutBatch) -> Tensor:
        """V of the state after each step [T, B]: of the next row, or of the final observation where an episode was cut."""
        value = batch.extras["value"]
        following = torch.cat((value[1:], self._values(batch.last_obs, batch.last_state).unsqueeze(0)))
        cut = (batch.truncated & ~batch.terminated).nonzero(as_tuple=True)
        if len(cut[0]):
            state = batch.extras["state"][cut] if self.recurrent else None
            following[cut] = self._values(batch.final_obs[cut], state)
        return following

    def _values(self, obs: Tensor, state: Tensor | None) -> Tensor:
        obs = self._normalized(obs)
        if self.fused is not None:
            return self.fused.value(obs)
        if not self.recurrent:
            return self.policy(obs)[1]
        return self.policy(obs.unsqueeze(0), state)[1][0]

    # -- keeping -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "generator_device": self.device.type,
        }
        for name in ("obs_norm", "reward_norm"):
            module = getattr(self, name)
            if module is not None:
                state[name] = module.state_dict()
        return state

    def reseed(self, seed: int) -> None:
        """Go on with other random numbers."""
        self.generator.manual_seed(seed)

    def begin_episodes(self) -> None:
        """All envs have been reset from outside: what was carried along in the running episodes is void."""
        if self.reward_norm is not None:
            self.reward_norm.carry.zero_()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["generator_device"] == self.device.type:
            self.generator.set_state(state["generator"].cpu())
        else:  # the generators of CPU and GPU have nothing in common: a new stream that follows from the old one
            seed = np.random.SeedSequence(state["generator"].cpu().numpy().tolist()).generate_state(1, np.uint64)[0]
            self.generator.manual_seed(int(seed >> 1))
        for name in ("obs_norm", "reward_norm"):
            module = getattr(self, name)
            if module is not None:
                module.load_state_dict(state[name])


PRESETS: dict[str, dict[str, Any]] = {
    "CartPole": dict(
        total_steps=100_000, num_envs=32, rollout_steps=64, epochs=6, minibatches=4, lr=3e-3, normalize_reward=True,
        eval_every=4_000,
    ),
    "Acrobot": dict(total_steps=250_000, num_envs=32, rollout_steps=64, epochs=4, minibatches=8, lr=1e-3, entropy_coef=0.01),
    "MountainCar": dict(
        total_steps=1_000_000, num_envs=64, rollout_steps=64, gae_lambda=0.98, epochs=8, minibatches=8, lr=1e-3,
        normalize_obs=True, normalize_reward=True,
    ),
    "Pendulum": dict(
        total_steps=300_000, num_envs=16, rollout_steps=128, gamma=0.9, epochs=10, minibatches=16, lr=1e-3, normalize_reward=True,
    ),
    "MountainCarContinuous": dict(
        total_steps=300_000, num_envs=16, rollout_steps=256, gamma=0.999, epochs=10, minibatches=16, lr=1e-3,
        normalize_obs=True, normalize_reward=True,
    ),
    "class:test": dict(total_steps=50_000, num_envs=16, rollout_steps=32, lr=1e-3, gamma=0.9),
    # Huang et al. 2022: Atari, and MuJoCo with its 2,048 steps and 64 samples to a minibatch.
    "class:atari": dict(
        total_steps=10_000_000, num_envs=8, rollout_steps=128, epochs=4, minibatches=4, lr=2.5e-4, clip=0.1, entropy_coef=0.01,
        eval_every=100_000, eval_episodes=10, activation="relu",
    ),
    "class:mujoco": dict(
        total_steps=1_000_000, num_envs=8, rollout_steps=256, epochs=10, minibatches=32, lr=3e-4, normalize_obs=True,
        normalize_reward=True, eval_every=20_000, eval_episodes=20,
    ),
    "class:minatar": dict(
        total_steps=10_000_000, num_envs=64, rollout_steps=128, epochs=4, minibatches=8, lr=5e-4, entropy_coef=0.01, features=128,
        eval_every=250_000, eval_episodes=20, activation="relu",
    ),
    "class:foreign": dict(eval_episodes=20),
    "debug": dict(rollout_steps=16, epochs=2, minibatches=2, hidden=(16, 16), features=32),
}  # fmt: skip
