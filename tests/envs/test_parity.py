"""Step-by-step agreement with Gymnasium's own envs from injected states (design T5)."""

import gymnasium
import numpy as np
import pytest
import torch
from native_envs import make

PI = np.pi
RTOL = 1e-5
EDGE = 1e-6  # where the float64 reference is this near to a threshold, float32 may fall on its other side
# Transitions per env: N, and half as many again on the ways of policies: more than 10,000.
N = 7000

# Absolute floor of the tolerance by observation: RTOL times this. A sum of terms of size s has, in float32, an error of about
# 1e-7 s however near to 0 it comes out, so relative error means nothing below a fraction of s. Here s is what the observation is
# summed from in one step: 1 for sines and cosines, and the size of the largest term for the others.
SCALE = {
    "CartPole": [1.0, 1.0, 0.2, 1.0],
    "Acrobot": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "MountainCar": [0.1, 0.0025],
    "MountainCarContinuous": [0.1, 0.0025],
    "Pendulum": [1.0, 1.0, 1.0],
}
ID = {
    "CartPole": "CartPole-v1",
    "Acrobot": "Acrobot-v1",
    "MountainCar": "MountainCar-v0",
    "MountainCarContinuous": "MountainCarContinuous-v0",
    "Pendulum": "Pendulum-v1",
}
# Half the states anywhere within the limits (CartPole: and a little outside), half within `NEAR` of a threshold that matters.
RANGE = {
    "CartPole": ([-2.5, -3, -0.22, -3.5], [2.5, 3, 0.22, 3.5]),
    "Acrobot": ([-PI, -PI, -2 * PI, -4.5 * PI], [PI, PI, 2 * PI, 4.5 * PI]),  # half the speed limits: see below
    "MountainCar": ([-1.2, -0.07], [0.6, 0.07]),
    "MountainCarContinuous": ([-1.2, -0.07], [0.6, 0.07]),
    "Pendulum": ([-PI, -8], [PI, 8]),
}
NEAR = {
    "CartPole": [([2.3, -1, -0.05, -1], [2.45, 1, 0.05, 1]), ([-1, -1, -0.225, -1], [1, 1, -0.19, 1])],
    "Acrobot": [([2.0, -0.5, -1, -1], [PI, 0.5, 1, 1])],
    "MountainCar": [([0.42, 0.0], [0.52, 0.07]), ([-1.2, -0.07], [-1.13, 0.0])],
    "MountainCarContinuous": [([0.38, 0.0], [0.47, 0.07]), ([-1.2, -0.07], [-1.13, 0.0])],
    "Pendulum": [([PI - 0.05, -8], [PI, 8]), ([-1, 7.5], [1, 8]), ([7, -8], [90, 8])],  # the last: after turns
}


def states(name, rng, n):
    parts = [rng.uniform(*RANGE[name], (n // 2, len(RANGE[name][0])))]
    near = NEAR[name]
    for k, box in enumerate(near):
        parts.append(rng.uniform(*box, (n // 2 * (k + 1) // len(near) - n // 2 * k // len(near), len(box[0]))))
    return np.concatenate(parts).astype(np.float32)


def actions(env, rng, n):
    if isinstance(env.action_space, gymnasium.spaces.Discrete):
        return rng.integers(0, env.action_space.n, n)
    return rng.uniform(env.action_space.low, env.action_space.high, (n, *env.action_space.shape)).astype(np.float32)


def reference(env, state, action):
    """Gymnasium's answer in float64: state after, obs, reward, terminated."""
    env.state = state.astype(np.float64)
    if hasattr(env, "steps_beyond_terminated"):
        env.steps_beyond_terminated = None
    obs, reward, terminated, _, _ = env.step(action.astype(np.float64) if np.ndim(action) else action)
    return np.asarray(env.state, np.float64), obs.astype(np.float64), float(reward), terminated


def distance_to_threshold(name, state, before, action):
    """How far the reference's new state is from where a flag, or a jump in the state, turns over."""
    if name == "CartPole":
        return min(abs(abs(state[0]) - 2.4), abs(abs(state[2]) - 12 * 2 * PI / 360))
    if name == "Acrobot":
        return abs(-np.cos(state[0]) - np.cos(state[0] + state[1]) - 1.0)
    if name.startswith("MountainCar"):
        goal, force = (0.5, (action - 1) * 0.001) if name == "MountainCar" else (0.45, float(action[0]) * 0.0015)
        velocity = np.clip(before[1] + force - 0.0025 * np.cos(3 * before[0]), -0.07, 0.07)
        flag = min(abs(state[0] - goal), abs(velocity)) if state[0] > goal - EDGE else abs(state[0] - goal)
        return min(flag, abs(before[0] + velocity + 1.2))  # the wall at -1.2 takes the speed away at once
    return np.inf if abs(abs((before[0] + PI) % (2 * PI) - PI) - PI) > EDGE else 0.0  # Pendulum: where the angle jumps


def ours(name, start, action):
    env = make(name, len(start), autoreset="disabled", time_limit=None)
    env.reset()
    env.state[:, : start.shape[1]] = torch.from_numpy(start)
    out = env.step(torch.from_numpy(action))
    return out.obs.numpy().astype(np.float64), out.reward.numpy().astype(np.float64), out.terminated.numpy()


def compare(name, start, action, scale=None):
    """Assert agreement on all transitions; return the errors in units of the tolerance."""
    gym = gymnasium.make(ID[name]).unwrapped
    gym.reset(seed=0)
    obs, reward, terminated = ours(name, start, action)
    worst, excluded = 0.0, 0
    for i in range(len(start)):
        state, ref_obs, ref_reward, ref_terminated = reference(gym, start[i], action[i])
        if distance_to_threshold(name, state, start[i].astype(np.float64), action[i]) < EDGE:
            excluded += 1
            continue
        allowed = RTOL * np.maximum(np.abs(ref_obs), SCALE[name] if scale is None else scale[i])
        where = f"{name} from {start[i]} by {action[i]}"
        assert (np.abs(obs[i] - ref_obs) <= allowed).all(), f"{where}: {obs[i]} is not {ref_obs}"
        assert abs(reward[i] - ref_reward) <= RTOL * max(1.0, abs(ref_reward)), f"{where}: reward {reward[i]} is not {ref_reward}"
        assert bool(terminated[i]) == ref_terminated, f"{where}: terminated"
        worst = max(worst, float((np.abs(obs[i] - ref_obs) / allowed).max()))
    assert excluded < 0.001 * len(start) or excluded <= 1, f"{excluded} of {len(start)} were too near to a threshold to compare"
    assert terminated.any() == (name != "Pendulum")  # both answers were seen
    return worst


@pytest.mark.parametrize("name", ID)
def test_one_step_from_injected_states(name):
    rng = np.random.default_rng(1)
    start = states(name, rng, N)
    compare(name, start, actions(gymnasium.make(ID[name]), rng, N))


@pytest.mark.parametrize("name", ID)
def test_one_step_from_states_that_policies_visit(name):
    """A push with the motion pumps energy into every one of these envs, so this goes where learnt policies go."""
    rng = np.random.default_rng(2)
    env = make(name, 64, time_limit=200)
    env.reset(seed=3)
    velocity = {"CartPole": 3, "Acrobot": 3}.get(name, 1)
    begun, taken = [], []
    for _ in range(160):
        state = env.state.numpy().copy()
        action = actions(gymnasium.make(ID[name]), rng, 64) if not begun else random_like(rng, taken[-1], env)
        with_motion = np.sign(state[:, velocity])
        pump = rng.random(64) < 0.8
        if action.ndim == 2:
            bound = env.single_action_space.high[0]  # type: ignore[attr-defined]
            action[pump, 0] = (with_motion * bound)[pump]
        else:
            top = int(env.single_action_space.n) - 1  # type: ignore[attr-defined]
            action[pump] = np.where(with_motion > 0, top, 0)[pump]
        begun.append(state)
        taken.append(action)
        env.step(torch.from_numpy(action))
    chosen = rng.permutation(160 * 64)[: N // 2]
    start, action = np.concatenate(begun)[chosen], np.concatenate(taken)[chosen]
    gym = gymnasium.make(ID[name]).unwrapped
    start = start[:, : len(RANGE[name][0])]
    assert len(np.unique(start, axis=0)) > N // 4
    if name == "Acrobot":
        assert np.abs(start[:, 3]).max() > 10  # rad/s: the pumping worked
    compare(name, start, action)
    gym.close()


def random_like(rng, action, env):
    if action.ndim == 2:
        high = env.single_action_space.high  # type: ignore[attr-defined]
        return rng.uniform(-high, high, action.shape).astype(np.float32)
    return rng.integers(0, int(env.single_action_space.n), action.shape)


def test_acrobot_at_full_speed():
    """Up to the speed limits, which no policy comes near to, the Runge-Kutta step itself amplifies: what half a unit in the last
    place of the float32 state does to the exact answer can exceed 1e-5. There the error must be a small multiple of that."""
    rng = np.random.default_rng(3)
    n = 1500
    high = np.array([PI, PI, 4 * PI, 9 * PI])
    start = rng.uniform(-high, high, (n, 4)).astype(np.float32)
    action = rng.integers(0, 3, n)
    gym = gymnasium.make("Acrobot-v1").unwrapped
    gym.reset(seed=0)
    obs, reward, terminated = ours("Acrobot", start, action)
    over = excluded = 0
    for i in range(n):
        state, ref_obs, ref_reward, ref_terminated = reference(gym, start[i], action[i])
        error = np.abs(obs[i] - ref_obs) / np.maximum(np.abs(ref_obs), 1.0)
        if error.max() > RTOL:
            over += 1
            shift = 0.0
            for k in range(4):
                moved = start[i].astype(np.float64)
                moved[k] += np.spacing(start[i][k]) / 2
                shift = max(shift, float(np.abs(reference(gym, moved, action[i])[1] - ref_obs).max()))
            assert np.abs(obs[i] - ref_obs).max() < 20 * shift, (start[i], obs[i], ref_obs)
        if abs(-np.cos(state[0]) - np.cos(state[0] + state[1]) - 1.0) < 1e-4:
            excluded += 1
        else:
            assert bool(terminated[i]) == ref_terminated and reward[i] == ref_reward
    assert over < 0.02 * n and excluded < 0.005 * n


@pytest.mark.parametrize("name", ID)
def test_whole_episodes_end_alike(name):
    """From one start by the same actions: the same flags at the same steps, time limit included."""
    entry = ID[name]
    gym = gymnasium.make(entry)
    limit = gym.spec.max_episode_steps  # type: ignore[union-attr]
    rng = np.random.default_rng(4)
    episodes = 3
    env = make(name, episodes, autoreset="disabled")
    env.reset(seed=5)
    assert env.time_limit == limit
    # Constant actions: chaotic motion would pull float32 and float64 apart. Left, none, right; and CartPole's ends by itself.
    if env.action_kind == "continuous":
        script = np.array([[-0.3], [0.0], [0.3]], np.float32)
    else:
        script = np.array([0, 1 % int(env.single_action_space.n), int(env.single_action_space.n) - 1])  # type: ignore[attr-defined]
    started = env.state.numpy().copy()
    flags = []
    for _ in range(limit + 1):  # type: ignore[operator]
        out = env.step(torch.from_numpy(script))
        flags.append(np.stack([out.terminated.numpy().copy(), out.truncated.numpy().copy()], 1))
    ended_by_time = 0
    for i in range(episodes):
        gym.reset(seed=int(rng.integers(1000)))
        gym.unwrapped.state = started[i].astype(np.float64)  # type: ignore[attr-defined]
        for t in range(limit):  # type: ignore[arg-type]
            _, _, terminated, truncated, _ = gym.step(script[i])
            assert (terminated, truncated) == tuple(flags[t][i]), (name, i, t)
            if terminated or truncated:
                ended_by_time += truncated
                break
        else:
            pytest.fail("no end")
    assert ended_by_time == (0 if name == "CartPole" else 3)
