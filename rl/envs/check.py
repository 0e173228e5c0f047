"""What `rl env check ENV` says: the mistakes of an environment that training would not notice, and only suffer from.

Every check works on a `Probe` (four callables' worth of one env) or on recorded `Episode`s, so the same checks serve a Gymnasium env
(`check_env`) and anything that implements `rl.types.VectorEnv` (`check_vector_env`).
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import gymnasium
import numpy as np

from rl.envs.foreign_names import resolve_foreign
from rl.envs.foreign_worker import Factory, build, load, observation_codec

EPISODES = 8  # to see how episodes end
MAX_STEPS = 20_000  # over all of those
MAX_SECONDS = 15.0
ROLLOUT = 100  # steps compared where two rollouts should agree
LIMIT_NAMES = ("max_episode_steps", "_max_episode_steps", "max_steps", "time_limit", "horizon", "episode_length", "max_episode_length")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with an env. `level` "fail": it would train wrongly; "warn": it may."""

    check: str
    level: Literal["fail", "warn"]
    wrong: str
    seen: str
    mend: str

    def __str__(self) -> str:
        return f"{self.level.upper()} {self.check}: {self.wrong}\n  seen: {self.seen}\n  mend: {self.mend}"


@dataclass
class Probe:
    """One env, as the checks need it. `reset(seed)` -> (obs, info); `step(action)` -> (obs, reward, terminated, truncated, info)."""

    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    reset: Callable[[int | None], Any]
    step: Callable[[Any], Any]
    close: Callable[[], None]
    time_limit: int | None = None  # of a TimeLimit wrapper around it
    declared: dict[str, int] | None = None  # numbers by which the env itself may mean a time limit


@dataclass
class Episode:
    """A recorded episode. `obs` [d] features (see `features`), one entry more than `rewards`; no flag is set where it was cut."""

    obs: list[np.ndarray]
    rewards: list[float]
    terminated: bool
    truncated: bool
    info: dict[str, Any]  # of the last step

    @property
    def length(self) -> int:
        return len(self.rewards)


class _Broken(Exception):
    """The env failed so badly that recording cannot go on."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


# -- entries -----------------------------------------------------------------------------------------------------------------


def check_env(name: str, options: dict[str, Any] | None = None) -> list[Finding]:
    """Check a foreign env in this process, as `make_foreign(name, ..., options=options)` would use it. No findings: it is fit.

    Raises ForeignEnvError where the name or the options are wrong. An env that cannot be made is a finding.
    """
    factory = resolve_foreign(name, options)
    try:
        vector = _gym_vector_env(factory)
        if vector is not None:
            return check_gym_vector(vector)
        return check_probe(lambda: gym_probe(factory))
    except Exception as error:
        return [_raised("making the env", error)]


def check_vector_env(make: Callable[[], Any]) -> list[Finding]:
    """Check an implementation of `rl.types.VectorEnv`. `make()` must give a new one with `num_envs=1` each time."""
    return check_probe(lambda: vector_probe(make()))


def check_probe(make: Callable[[], Probe]) -> list[Finding]:
    """All checks. `make()` must give a new, independent env each time. At most one finding of each kind and level."""
    found: dict[tuple[str, str], Finding] = {}

    def note(findings: list[Finding]) -> None:
        for finding in findings:
            found.setdefault((finding.check, finding.level), finding)

    probe = make()
    try:
        sketch = features(probe.observation_space)
        note(check_seeding(make))
        episodes = record_episodes(probe, sketch, note)
        firsts = [episode.obs[0] for episode in episodes]
        until = time.monotonic() + MAX_SECONDS / 3
        while len(firsts) < 40 and time.monotonic() < until:
            firsts.append(sketch(_reset(probe, len(firsts))[0]))
        note(check_final_obs(np.stack(firsts), episodes))
        note(check_flags(episodes, probe.time_limit, probe.declared or {}))
    except _Broken as broken:
        note([broken.finding])
    except Exception as error:
        note([_raised("checking", error)])
    finally:
        probe.close()
    return list(found.values())


def gym_probe(factory: Factory) -> Probe:
    """A Probe over the Gymnasium env that a Factory makes."""
    env = build(factory)
    if factory.time_limit:
        env = gymnasium.wrappers.TimeLimit(env, factory.time_limit)
    wrapper, limit = env, None
    while isinstance(wrapper, gymnasium.Wrapper):
        if isinstance(wrapper, gymnasium.wrappers.TimeLimit):
            limit = wrapper._max_episode_steps
        wrapper = wrapper.env
    declared = {name: getattr(wrapper, name, None) for name in LIMIT_NAMES}
    declared = {name: value for name, value in declared.items() if isinstance(value, int) and not isinstance(value, bool) and value > 1}
    return Probe(env.observation_space, env.action_space, lambda seed: env.reset(seed=seed), env.step, env.close, limit, declared)


def vector_probe(env: Any) -> Probe:
    """A Probe over a `rl.types.VectorEnv` with one env: where an episode ends, its observation is `final_obs`."""
    import torch

    if env.num_envs != 1:
        raise ValueError(f"a probe needs a vector env of one env, not {env.num_envs}")

    def reset(seed: int | None) -> Any:
        return env.reset(seed)[0].cpu().clone().numpy(), {}

    def step(action: Any) -> Any:
        result = env.step(torch.as_tensor(np.asarray(action)[None], device=env.device))
        ended = bool(result.terminated[0] | result.truncated[0])
        obs = (result.final_obs if ended else result.obs)[0].cpu().clone().numpy()
        return obs, float(result.reward[0]), bool(result.terminated[0]), bool(result.truncated[0]), {}

    return Probe(env.single_observation_space, env.single_action_space, reset, step, env.close)


# -- recording, and what can be said of a single answer ------------------------------------------------------------------------


def features(space: gymnasium.Space) -> Callable[[Any], np.ndarray]:
    """A function from observations to float32 [d] with d <= 256: the flattened numbers, or for pictures 64 random sums of them.

    Thousands of pictures would fill the memory, and telling them apart takes no more than that.
    """
    encode, size = observation_codec(space)[1], int(np.prod(observation_codec(space)[0].shape))
    if size <= 256:
        return lambda obs: np.array(encode(obs), np.float32).ravel()
    stride = -(-size // 200_000)
    weights = np.random.default_rng(0).standard_normal((64, -(-size // stride)), np.float32)
    return lambda obs: weights @ np.asarray(encode(obs), np.float32).ravel()[::stride]


def record_episodes(probe: Probe, sketch: Callable[[Any], np.ndarray], note: Callable[[list[Finding]], None]) -> list[Episode]:
    """Up to EPISODES episodes with random actions; every answer is checked on the way. Raises _Broken where the env cannot go on."""
    episodes: list[Episode] = []
    steps, until = 0, time.monotonic() + MAX_SECONDS
    probe.action_space.seed(0)
    while len(episodes) < EPISODES and steps < MAX_STEPS and time.monotonic() < until:
        obs, info = _reset(probe, 1000 + len(episodes))
        note(check_observation(probe.observation_space, obs, "reset"))
        copy = _copy(obs)
        episode = Episode([sketch(obs)], [], False, False, info)
        while not (episode.terminated or episode.truncated) and steps < MAX_STEPS and time.monotonic() < until:
            before = obs
            obs, reward, terminated, truncated, info = _step(probe, probe.action_space.sample())
            steps += 1
            note(check_observation(probe.observation_space, obs, f"step {episode.length + 1}"))
            note(check_reward(reward) + check_flag_types(terminated, truncated))
            note(check_aliasing(before, copy))
            copy = _copy(obs)
            episode.obs.append(sketch(obs))
            episode.rewards.append(float(np.asarray(reward, np.float64).ravel()[0]) if reward is not None else np.nan)
            episode.terminated, episode.truncated, episode.info = bool(terminated), bool(truncated), info
        episodes.append(episode)
    if not any(e.terminated or e.truncated for e in episodes):
        wrong = "no episode ended, so how the env ends episodes could not be checked"
        seen = f"{steps} steps with random actions"
        note([Finding("never ends", "warn", wrong, seen, "set time_limit=N, or accept that episodes are endless")])
    return episodes


def check_signature(answer: Any, of: Literal["reset", "step"]) -> list[Finding]:
    """reset() -> (obs, info); step() -> (obs, reward, terminated, truncated, info)."""
    size = 2 if of == "reset" else 5
    if isinstance(answer, tuple) and len(answer) == size and isinstance(answer[-1], dict):
        return []
    seen = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else f"a {type(answer).__name__}"
    if isinstance(answer, tuple) and len(answer) == size:
        seen += f" whose last entry is a {type(answer[-1]).__name__}"
    if of == "reset":
        return [Finding("signature", "fail", "reset() must return (obs, info dict)", seen, "return obs, {} from reset()")]
    mend = "return obs, reward, terminated, truncated, info; an old `done` is terminated, unless a time limit set it: then truncated"
    return [Finding("signature", "fail", "step() must return (obs, reward, terminated, truncated, info dict)", seen, mend)]


def check_observation(space: gymnasium.Space, obs: Any, when: str) -> list[Finding]:
    """Inside the declared space: kind, shape, dtype, bounds."""
    if space.contains(obs):
        return []
    seen = f"{type(obs).__name__} {obs!r:.80} at {when}"
    mend = f"return members of {space}, or declare the space that the env really has"
    if isinstance(space, gymnasium.spaces.Box):
        array = np.asarray(obs)
        if not isinstance(obs, np.ndarray):
            seen, mend = f"a {type(obs).__name__} at {when}", "return a NumPy array"
        elif array.shape != space.shape:
            seen = f"shape {list(array.shape)}, declared {list(space.shape)}, at {when}"
        elif not np.can_cast(array.dtype, space.dtype):  # type: ignore[arg-type]
            seen = f"dtype {array.dtype}, declared {space.dtype}, at {when}"
            mend = f"return obs.astype(np.{space.dtype}), or declare dtype=np.{array.dtype}"
        else:
            bad = np.argwhere(~((array >= space.low) & (array <= space.high)))[0]
            at = tuple(int(k) for k in bad)
            seen = f"obs{list(at)} = {array[at]} outside [{space.low[at]}, {space.high[at]}], at {when}"
    return [Finding("observation", "fail", "an observation lies outside the declared observation space", seen, mend)]


def check_reward(reward: Any) -> list[Finding]:
    """A finite number."""
    mend = "return float(reward)"
    if (isinstance(reward, np.ndarray) and reward.ndim > 0) or not isinstance(reward, (Real, np.number, np.ndarray)):
        seen = f"{type(reward).__name__} {reward!r:.60}"
        return [Finding("reward", "fail", "the reward is not a number", seen, mend)]
    if not np.isfinite(float(reward)):  # pyright: ignore[reportArgumentType]
        return [Finding("reward", "fail", "the reward is not finite", repr(reward), "find the division or logarithm that made it")]
    return []


def check_flag_types(terminated: Any, truncated: Any) -> list[Finding]:
    """Both flags are booleans: anything else (None, an array, a number) is likely something else in the wrong place."""
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, (bool, np.bool_)):
            seen = f"{name} is a {type(flag).__name__}: {flag!r:.60}"
            return [Finding("flags", "fail", "terminated and truncated must be booleans", seen, f"return bool({name})")]
    return []


def check_aliasing(handed_out: Any, copy: Any) -> list[Finding]:
    """An array once returned must stay as it was: `copy` was taken when the env handed it out."""
    if isinstance(handed_out, np.ndarray) and not np.array_equal(handed_out, copy, equal_nan=handed_out.dtype.kind == "f"):
        wrong = "the env changes an observation that it has already returned"
        seen = "the array of one step held other numbers after the next step"
        mend = "return self.state.copy(): this suite copies at once, other code (a plain list of transitions) would store wrong data"
        return [Finding("aliasing", "warn", wrong, seen, mend)]
    return []


# -- what takes whole rollouts -------------------------------------------------------------------------------------------------


def check_seeding(make: Callable[[], Probe]) -> list[Finding]:
    """Same seed and actions -> same rollout, in the same env and in a new one; another seed -> another rollout, if anything varies."""
    probe, other = make(), make()
    try:
        probe.action_space.seed(0)
        actions = [probe.action_space.sample() for _ in range(ROLLOUT)]
        first, again = _rollout(probe, 7, actions), _rollout(probe, 7, actions)
        elsewhere = _rollout(other, 7, actions)
        for where, rollout in (("in the same env", again), ("in a new env", elsewhere)):
            at = _differ(first, rollout)
            if at == 0:
                wrong = "the env ignores its seed: two resets with the same seed begin differently"
                seen = f"reset(seed=7) twice, {where}: {_short(first[0][0])} and {_short(rollout[0][0])}"
                mend = "call super().reset(seed=seed) and draw all randomness from self.np_random, none from np.random or random"
                return [Finding("seed", "fail", wrong, seen, mend)]
            if at is not None:
                wrong = "the env is not deterministic under the same seed and actions"
                gap = np.abs(
                    np.asarray(features(probe.observation_space)(first[at][0])) - features(probe.observation_space)(rollout[at][0])
                )
                seen = f"reset(seed=7) and {ROLLOUT} equal actions, {where}: the rollouts part at step {at} (obs by {gap.max():.2g})"
                mend = "draw all randomness from self.np_random (no np.random, random, clock, set order, threads), and reset all state"
                return [Finding("determinism", "fail", wrong, seen, mend)]
        if all(_differ(first, _rollout(probe, seed, actions)) is None for seed in (8, 9, 10)):
            fresh = make()
            try:
                free = [_rollout(fresh, None, actions) for _ in range(4)]
            finally:
                fresh.close()
            if any(_differ(free[0], rollout) is not None for rollout in free[1:]):
                wrong = "every seed gives the same rollout, though the env is random without one"
                seen = f"seeds 7, 8, 9 and 10: {ROLLOUT} equal steps; four resets without a seed: different ones"
                mend = "use the seed's value: self.np_random after super().reset(seed=seed)"
                return [Finding("seed", "warn", wrong, seen, mend)]
        return []
    finally:
        probe.close()
        other.close()


def check_final_obs(firsts: np.ndarray, episodes: list[Episode]) -> list[Finding]:
    """The last observation belongs to the episode that ended, not to the next.

    `firsts` [n, d]: observations of fresh resets. An env that resets itself at the end returns one of those there. Told from envs that
    legitimately end where they begin: the observation before must lie elsewhere, or the last step be a leap.
    """
    check, mend = "final observation", "return the last observation of the episode that ended; the caller resets the env"
    ended = [episode for episode in episodes if episode.terminated or episode.truncated]
    for episode in ended:
        for key in ("final_obs", "final_observation", "terminal_observation"):
            if key in episode.info:
                wrong = "the env resets itself: it hides the last observation in info and returns the next episode's first"
                return [Finding(check, "fail", wrong, f"info[{key!r}] at an episode's end", mend)]
    if len(ended) < 3:
        return []
    low, high = firsts.min(axis=0), firsts.max(axis=0)
    slack = 0.25 * (high - low) + 1e-6 * (1 + np.abs(high))

    def fresh(obs: np.ndarray) -> bool:
        return bool(((obs >= low - slack) & (obs <= high + slack)).all())

    last_fresh = np.mean([fresh(episode.obs[-1]) for episode in ended])
    before_fresh = np.mean([fresh(episode.obs[-2]) for episode in ended])
    steps = [np.linalg.norm(b - a) for episode in ended for a, b in zip(episode.obs[:-2], episode.obs[1:-1])]
    usual = np.quantile(steps, 0.95) if steps else np.inf
    leaps = np.mean([np.linalg.norm(episode.obs[-1] - episode.obs[-2]) > 3 * usual for episode in ended])
    if last_fresh >= 0.9 and (before_fresh <= 0.5 or leaps >= 0.6):
        wrong = "final observations are lost: the env returns the next episode's first observation where an episode ends"
        seen = (
            f"{len(ended)} episodes: {last_fresh:.0%} of the last observations look like a fresh reset, "
            f"{before_fresh:.0%} of those just before; {leaps:.0%} of the last steps are leaps"
        )
        return [Finding(check, "fail", wrong, seen, mend)]
    return []


def check_flags(episodes: list[Episode], time_limit: int | None, declared: dict[str, int]) -> list[Finding]:
    """A time limit is `truncated`, never `terminated`. `declared`: attributes by which the env itself may hold a limit."""
    check = "terminated/truncated"
    mend = "at a time limit set truncated=True and terminated=False (learning then bootstraps from the last observation)"
    for episode in episodes:
        if episode.terminated and episode.info.get("TimeLimit.truncated"):
            wrong = "a time limit is reported as terminated"
            return [Finding(check, "fail", wrong, "terminated=True with info['TimeLimit.truncated']=True", mend)]
    limits = {**declared, **({"TimeLimit": time_limit} if time_limit else {})}
    for name, limit in limits.items():
        reached = [episode for episode in episodes if episode.length == limit and (episode.terminated or episode.truncated)]
        if len(reached) >= 3 and all(episode.terminated for episode in reached):
            wrong = "terminated and truncated are merged: the env terminates exactly at its time limit"
            seen = f"{len(reached)} episodes of exactly {name} = {limit} steps, all with terminated=True"
            return [Finding(check, "fail", wrong, seen, mend)]
    ended = [episode for episode in episodes if episode.terminated or episode.truncated]
    lengths = {episode.length for episode in ended}
    if len(ended) >= 5 and len(lengths) == 1 and min(lengths) > 20 and all(e.terminated and not e.truncated for e in ended):
        wrong = "every episode terminates after the same number of steps, which looks like a time limit reported as terminated"
        seen = f"{len(ended)} episodes of random actions, all terminated after {min(lengths)} steps"
        return [Finding(check, "warn", wrong, seen, mend + "; if the task itself ends there, this is right as it is")]
    return []


def check_gym_vector(env: gymnasium.vector.VectorEnv) -> list[Finding]:
    """A vector env where a single one is wanted; says so, and whether it loses final observations besides."""
    mend = "name the class or factory of the single env: the suite vectorises it itself"
    findings = [Finding("single env", "fail", "this makes a vector env, which cannot be used here", type(env).__name__, mend)]
    try:
        mode = env.metadata.get("autoreset_mode")
        env.reset(seed=0)
        env.action_space.seed(0)
        for step in range(1, 2001):
            _, _, terminated, truncated, info = env.step(env.action_space.sample())
            if not np.any(np.asarray(terminated) | np.asarray(truncated)):
                continue
            waits = mode in (gymnasium.vector.AutoresetMode.NEXT_STEP, gymnasium.vector.AutoresetMode.DISABLED)
            if not waits and "final_obs" not in info:
                wrong = "final observations are lost: the vector env resets at the end of an episode without info['final_obs']"
                seen = f"an episode ended at step {step}; autoreset_mode {mode}, info has {sorted(info) or 'nothing'}"
                mend = "put the last observations into info['final_obs'] (AutoresetMode.SAME_STEP), or reset at the next step (NEXT_STEP)"
                findings.append(Finding("final observation", "fail", wrong, seen, mend))
            break
    except Exception as error:
        findings.append(_raised("stepping the vector env", error))
    finally:
        env.close()
    return findings


# -- helpers -------------------------------------------------------------------------------------------------------------------


def _gym_vector_env(factory: Factory) -> Any:
    if factory.target is None:
        return None
    made = load(factory.target)(**factory.kwargs)
    if isinstance(made, gymnasium.vector.VectorEnv):
        return made
    if hasattr(made, "close"):
        made.close()
    return None


def _reset(probe: Probe, seed: int | None) -> Any:
    try:
        answer = probe.reset(seed)
    except Exception as error:
        raise _Broken(_raised(f"reset(seed={seed})", error)) from error
    if wrong := check_signature(answer, "reset"):
        raise _Broken(wrong[0])
    return answer


def _step(probe: Probe, action: Any) -> Any:
    try:
        answer = probe.step(action)
    except Exception as error:
        raise _Broken(_raised(f"step({action!r:.60})", error)) from error
    if wrong := check_signature(answer, "step"):
        raise _Broken(wrong[0])
    return answer


def _raised(doing: str, error: Exception) -> Finding:
    place = traceback.extract_tb(error.__traceback__)[-1]
    seen = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    return Finding("raises", "fail", f"{doing} raised an exception", seen, "run the env by itself and mend the exception")


def _rollout(probe: Probe, seed: int | None, actions: list[Any]) -> list[Any]:
    """The answers to a list of actions, going on with a plain reset() where an episode ends."""
    obs, _ = _reset(probe, seed)
    answers: list[Any] = [(_copy(obs),)]
    for action in actions:
        obs, reward, terminated, truncated, _ = _step(probe, action)
        answers.append((_copy(obs), reward, terminated, truncated))
        if terminated or truncated:
            obs, _ = _reset(probe, None)
            answers[-1] += (_copy(obs),)
    return answers


def _differ(one: list[Any], two: list[Any]) -> int | None:
    """The first step at which two rollouts differ (0: their first observations), or None."""
    return next((k for k, (a, b) in enumerate(zip(one, two)) if not _same(a, b)), None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    x, y = np.asarray(a), np.asarray(b)
    return bool(np.array_equal(x, y, equal_nan=x.dtype.kind == "f" and y.dtype.kind == "f"))


def _copy(obs: Any) -> Any:
    if isinstance(obs, dict):
        return {key: _copy(value) for key, value in obs.items()}
    if isinstance(obs, tuple):
        return tuple(map(_copy, obs))
    return obs.copy() if isinstance(obs, np.ndarray) else obs


def _short(obs: Any) -> str:
    text = np.array2string(np.asarray(obs), precision=3, threshold=6) if isinstance(obs, np.ndarray) else repr(obs)
    return text if len(text) <= 80 else text[:77] + "..."
