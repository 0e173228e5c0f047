"""What is said about a policy: greedy episodes in an env of its own, with seeds of its own; and how a run is loaded to act."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl import checkpoint as _checkpoint
from rl import registry
from rl.config import Resolved, read_run
from rl.envs import make_vec
from rl.errors import ConfigError, RunError
from rl.types import Act, VectorEnv

NATIVE_PARALLEL = 1024  # envs at most side by side in an evaluation
FOREIGN_PARALLEL = 8
_NO_END = 1_000_000  # steps of one evaluation after which its env is said never to end


@dataclass(frozen=True)
class Evaluation:
    """Greedy returns over whole episodes, unclipped."""

    env_steps: int  # of training before it
    mean: float
    std: float  # over episodes
    min: float
    max: float
    episodes: int
    length: float  # mean, env steps

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stream_seed(seed: int, *stream: int) -> int:
    """An independent 63-bit seed for one use of a run's seed: (1,) training env, (2,) agent, (3, step) evaluations, ..."""
    return int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0] >> 1)


@torch.no_grad()
def evaluate(agent: Any, env: VectorEnv, episodes: int, seed: int, env_steps: int = 0) -> Evaluation:
    """Play `episodes` greedy episodes and say how they went.

    Every env plays a fixed share of the episodes: to take the first to end would favour short ones.

    Raises:
        RunError: when an episode does not end within a million steps.
    """
    quota = torch.full((env.num_envs,), episodes // env.num_envs)
    quota[: episodes % env.num_envs] += 1
    quota = quota.to(env.device)
    played = torch.zeros_like(quota)
    returns: list[Tensor] = []
    lengths: list[Tensor] = []
    left = episodes
    obs, state = env.reset(seed), None
    for _ in range(_NO_END):
        act = agent.act(obs, env.action_mask, state, explore=False)
        step = env.step(act.action)
        obs, state = step.obs, act.state
        if getattr(env, "ended", None) != 0:  # None on CUDA: only a look at the flags can tell
            over = step.terminated | step.truncated
            counted = (over if env.episode_over is None else env.episode_over) & (played < quota)
            returns.append(env.episode_return[counted].clone())
            lengths.append(env.episode_length[counted].clone())
            played += counted
            left -= len(returns[-1])
            if state is not None:
                state = state * (~over).view(-1, *[1] * (state.dim() - 1))
            if left <= 0:
                break
    else:
        raise RunError(f"{env.name}: {left} of {episodes} evaluation episodes did not end within {_NO_END:,} steps; set env.time_limit")
    score = torch.cat(returns).double().cpu().numpy()
    length = torch.cat(lengths).double().mean().item()
    return Evaluation(env_steps, float(score.mean()), float(score.std()), float(score.min()), float(score.max()), len(score), float(length))


def evaluation_env(resolved: Resolved, episodes: int, device: str | torch.device, **options: Any) -> VectorEnv:
    """An env to evaluate in: the run's own, apart from the one it trains in."""
    native = resolved.env_entry.family != "foreign"
    num_envs = min(episodes, NATIVE_PARALLEL if native else FOREIGN_PARALLEL)
    if resolved.env_entry.subfamily == "atari":
        options = {"terminal_on_life_loss": False, **options}  # a help in learning; the score is the whole game's
    return make_vec(resolved.env_entry.name, num_envs, device=device, **{**options, **resolved.common.env_options})


def build_agent(resolved: Resolved, env: VectorEnv, num_envs: int, device: str | torch.device) -> Any:
    """The run's agent, new, for envs like `env`. ConfigError where the algorithm cannot act there."""
    cls = registry.load(resolved.algo_entry.entry)
    common = resolved.common
    try:
        return cls(
            env.single_observation_space, env.single_action_space, num_envs, resolved.algo,
            seed=stream_seed(common.seed, 2), device=device, compile=common.compile,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ConfigError(f"algo={common.algo} with env={common.env}: {error}") from error


class Policy:
    """A trained agent with all that belongs to it, ready to act."""

    def __init__(self, resolved: Resolved, agent: Any, env_steps: int, device: torch.device):
        self.resolved, self.agent, self.env_steps, self.device = resolved, agent, env_steps, device

    def make_env(self, num_envs: int = 1, **options: Any) -> VectorEnv:
        """The env it was trained in, `num_envs` side by side."""
        return make_vec(self.resolved.env_entry.name, num_envs, device=self.device, **{**self.resolved.common.env_options, **options})

    def act(self, obs: Tensor, mask: Tensor | None = None, state: Any = None, deterministic: bool = True) -> Act:
        """Actions for a batch of observations [B, ...] on the policy's device."""
        return self.agent.act(obs, mask, state, explore=not deterministic)

    def predict(self, obs: Any, state: Any = None, mask: Any = None, deterministic: bool = True) -> tuple[np.ndarray, Any]:
        """(action, next recurrent state) for one observation or a batch, as NumPy; like Stable-Baselines3's `predict`.

        Args:
            obs: array or tensor, of the observation space's shape or with a batch dimension in front.
            state: what the last call returned, for policies with memory; None at an episode's start.
            mask: bool, allowed actions, where the env has illegal ones.

        Raises:
            ValueError: if obs has another shape.
        """
        space = self.agent_space
        array = torch.as_tensor(np.asarray(obs) if not isinstance(obs, Tensor) else obs, device=self.device)
        if array.dtype == torch.float64:
            array = array.float()
        single = tuple(array.shape) == tuple(space.shape or ())
        if not single and tuple(array.shape[1:]) != tuple(space.shape or ()):
            raise ValueError(f"obs must have shape {tuple(space.shape or ())} or (B, ...), got {tuple(array.shape)}")
        batch = array.unsqueeze(0) if single else array
        allowed = None if mask is None else torch.as_tensor(mask, dtype=torch.bool, device=self.device).view(len(batch), -1)
        act = self.act(batch, allowed, state, deterministic)
        action = act.action.cpu().numpy()
        if hasattr(self.action_space, "low"):
            action = np.clip(action, self.action_space.low, self.action_space.high)
        return (action[0] if single else action), act.state

    @property
    def agent_space(self) -> Any:
        return self.agent.obs_space

    @property
    def action_space(self) -> Any:
        return self.agent.action_space


def load(run: str | Path, checkpoint: str | int = "best", device: str = "cpu") -> Policy:
    """The policy of a run's folder. `checkpoint`: "best", "last" or env steps.

    Raises:
        ConfigError: no run there. CheckpointError: no such checkpoint, or it is damaged.
    """
    resolved = read_run(run)
    state, meta = _checkpoint.load(Path(run) / "checkpoints", checkpoint)
    env = evaluation_env(resolved, 1, "cpu")
    try:
        agent = build_agent(resolved, env, resolved.common.num_envs, device)
    finally:
        env.close()
    try:
        agent.load_state_dict(state["agent"])
        env_steps = int(meta["env_steps"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise RunError(f"the checkpoint does not fit the run's configuration: {error!r}") from error
    return Policy(resolved, agent, env_steps, torch.device(device))


def evaluate_run(run: str | Path, episodes: int = 100, seed: int | None = None, checkpoint: str | int = "best") -> dict[str, Any]:
    """Evaluate a run's checkpoint over fresh episodes, for `rl eval`."""
    policy = load(run, checkpoint)
    torch.set_num_threads(policy.resolved.common.threads)
    env = evaluation_env(policy.resolved, episodes, policy.device)
    try:
        chosen = stream_seed(policy.resolved.common.seed, 5) if seed is None else seed
        result = evaluate(policy.agent, env, episodes, chosen, policy.env_steps)
    finally:
        env.close()
    entry = policy.resolved.env_entry
    return {
        "run": str(run), "algo": policy.resolved.common.algo, "env": policy.resolved.common.env, "checkpoint": str(checkpoint),
        **result.to_json(), "threshold": entry.threshold, "seed": chosen,
    }  # fmt: skip
