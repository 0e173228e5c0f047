"""Our envs as Gymnasium users meet them: registration, the checker, single and vector views."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from native_envs import NAMES

from rl import registry
from rl.envs import registration
from rl.envs.gymnasium_views import GymEnv, GymVectorEnv

ROOT = Path(__file__).resolve().parents[2]
IDS = [registry.find_env(name).id for name in NAMES]
CLASSIC = [registry.find_env(name).id for name in NAMES if registry.find_env(name).family == "classic"]
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


def test_every_native_env_is_registered_once():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.register_envs()  # again: no "Overriding environment"
    for name, env_id in zip(NAMES, IDS):
        spec = gymnasium.spec(env_id)
        assert spec.max_episode_steps == registry.find_env(name).time_limit
        assert spec.reward_threshold == registry.find_env(name).threshold
        assert EnvSpec.from_json(spec.to_json()) == spec


def test_registration_loads_neither_torch_nor_numba():
    code = (
        "import sys, rl.envs.registration, gymnasium; gymnasium.spec('rl/CartPole-v1'); "
        "print([m for m in ('torch', 'numba') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def messages(env_id, render=True):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(gymnasium.make(env_id).unwrapped, skip_render_check=not render)
    return {str(w.message).partition("WARN: ")[2] or str(w.message) for w in caught}


@pytest.mark.parametrize("env_id", IDS)
def test_checker(env_id):
    """Without warnings, except those about the spaces that Gymnasium's own env of the name has, and gets."""
    found = messages(env_id)
    if env_id in CLASSIC:
        about_spaces = {m for m in messages(env_id.removeprefix("rl/"), render=False) if "A Box" in m or "For Box action" in m}
        found -= about_spaces
    assert not found


@pytest.mark.parametrize("env_id", CLASSIC)
def test_spaces_and_metadata_are_gymnasiums(env_id):
    ours, theirs = gymnasium.make(env_id, render_mode="rgb_array"), gymnasium.make(env_id.removeprefix("rl/"))
    assert ours.action_space == theirs.action_space and ours.observation_space == theirs.observation_space
    assert ours.metadata["render_fps"] == theirs.metadata["render_fps"]
    ours.reset()
    assert ours.render().dtype == np.uint8  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="human"):
        GymEnv(registry.find_env(env_id).name, render_mode="human")


def test_single_env_seeding_and_copies():
    env = GymEnv("CartPole")
    a, _ = env.reset(seed=5)
    kept = a.copy()
    b, *_ = env.step(0)
    c, *_ = env.step(1)
    assert (a == kept).all() and not np.shares_memory(b, c) and not (b == c).all()
    assert (env.reset(seed=5)[0] == kept).all()
    assert not (env.reset()[0] == kept).all()
    assert (GymEnv("CartPole").reset(seed=5)[0] == kept).all()
    assert not (GymEnv("CartPole").reset()[0] == GymEnv("CartPole").reset()[0]).all()  # unseeded: entropy
    with pytest.raises(ValueError, match="low"):
        env.reset(options={"low": 0})
    with pytest.raises(ValueError, match="action 2"):
        env.step(2)
    with pytest.raises(ValueError, match="not an env of this suite"):
        GymEnv("gym:CartPole-v1")


def test_one_time_limit_and_not_two():
    env = gymnasium.make("rl/Pendulum-v1")
    env.reset(seed=0)
    assert [env.step(np.zeros(1, np.float32))[3] for _ in range(200)] == [False] * 199 + [True]
    assert gymnasium.make("rl/Pendulum-v1", max_episode_steps=3).spec.max_episode_steps == 3  # type: ignore[union-attr]
    env = gymnasium.make("rl/Pendulum-v1", max_episode_steps=300)
    env.reset(seed=0)
    assert not any(env.step(np.zeros(1, np.float32))[3] for _ in range(299))  # nothing inside cuts it at 200
    vector = gymnasium.make_vec("rl/Pendulum-v1", num_envs=2, max_episode_steps=4)
    vector.reset(seed=0)
    assert [bool(vector.step(np.zeros((2, 1), np.float32))[3].all()) for _ in range(4)] == [False] * 3 + [True]


@pytest.mark.parametrize("mode", ["vector_entry_point", "sync"])
def test_make_vec(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make_vec("rl/CartPole-v1", num_envs=3, vectorization_mode=mode)
        assert isinstance(env, GymVectorEnv if mode == "vector_entry_point" else SyncVectorEnv)
        assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP and env.num_envs == 3
        obs, _ = env.reset(seed=4)
        assert obs.shape == (3, 4) and obs in env.observation_space
        obs, reward, terminated, truncated, infos = env.step(env.action_space.sample())
        assert reward.dtype == np.float64 and terminated.dtype == truncated.dtype == bool and infos == {}
        env.close()


def sync(env_id, n, mode, limit=None):
    def one():
        return gymnasium.make(env_id, **({} if limit is None else {"max_episode_steps": limit}))

    return SyncVectorEnv([one for _ in range(n)], autoreset_mode=mode)


def same_infos(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            same_infos(a[key], b[key])
        elif a[key].dtype == object:
            for x, y in zip(a[key], b[key]):
                np.testing.assert_array_equal(x, y, err_msg=key)
        else:
            assert a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]), key


@pytest.mark.parametrize("env_id", IDS)
def test_next_step_vector_equals_a_sync_vector(env_id):
    """Bit for bit, resets included: an env's clock ticks once a call in both."""
    limit = 25 if gymnasium.spec(env_id).max_episode_steps else None
    how: dict[str, Any] = {} if limit is None else {"max_episode_steps": limit}
    ours, theirs = gymnasium.make_vec(env_id, num_envs=3, **how), sync(env_id, 3, AutoresetMode.NEXT_STEP, limit)
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    ours.action_space.seed(1)
    first: Any = ours.reset(seed=9)[0]
    assert np.array_equal(first, theirs.reset(seed=9)[0])
    ends = 0
    for _ in range(300):
        action = ours.action_space.sample()
        a, b = ours.step(action), theirs.step(action)
        for x, y in zip(a[:4], b[:4]):
            assert np.array_equal(x, y) and x.dtype == y.dtype
        same_infos(a[4], b[4])
        ends += int((a[2] | a[3]).sum())
    assert ends > 10


class Follow(gymnasium.Wrapper):
    """A single env that, when it is reset without a seed, starts where env `index` of a vector has just started."""

    leader: Any = None
    index = 0

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        if seed is None:
            native = self.unwrapped.native  # type: ignore[attr-defined]
            native.state.copy_(self.leader.native.state[self.index : self.index + 1])  # type: ignore[attr-defined]
            obs = native.refresh().numpy()[0].copy()
        return obs, info


@pytest.mark.parametrize("mode", MODES)
def test_vector_equals_a_sync_vector_in_every_mode(mode):
    """1,000 steps of CartPole. The draws of a reset differ (envs of a batch share a clock), so the single envs take over the
    first states of new episodes; everything else must be equal."""
    n = 4
    ours = GymVectorEnv("CartPole", n, max_episode_steps=30, autoreset_mode=mode)
    theirs = sync("rl/CartPole-v1", n, mode, 30)
    for k in range(n):
        theirs.envs[k] = follow = Follow(theirs.envs[k])
        follow.leader, follow.index = ours, k
    assert np.array_equal(ours.reset(seed=2)[0], theirs.reset(seed=2)[0])
    rng = np.random.default_rng(0)
    ends = truncations = 0
    for t in range(1000):
        state = ours.native.state[:, 2].numpy() + ours.native.state[:, 3].numpy()
        action = np.where(rng.random(n) < 0.7, state > 0, rng.integers(0, 2, n)).astype(np.int64)  # lives long enough to be truncated
        a, b = ours.step(action), theirs.step(action)
        for k, (x, y) in enumerate(zip(a[:4], b[:4])):
            assert np.array_equal(x, y) and x.dtype == y.dtype, (t, k)
        same_infos(a[4], b[4])
        ended = a[2] | a[3]
        ends, truncations = ends + int(ended.sum()), truncations + int((a[3] & ~a[2]).sum())
        if mode == AutoresetMode.DISABLED and ended.any():
            x, y = ours.reset(options={"reset_mask": ended}), theirs.reset(options={"reset_mask": ended})
            assert np.array_equal(x[0], y[0]) and x[1] == y[1]
    assert ends > 50 and truncations > 5


def test_vector_reset_seeds():
    env = GymVectorEnv("CartPole", 3, autoreset_mode="Disabled")
    a, _ = env.reset(seed=7)
    assert all(np.array_equal(a[k], GymEnv("CartPole").reset(seed=7 + k)[0]) for k in range(3))
    b, _ = env.reset(seed=[9, 7, 8])
    assert np.array_equal(b[1:], a[:2])
    c, _ = env.reset()
    assert not (c == b).all(1).any()
    d, _ = env.reset(seed=[7, None, 7], options={"reset_mask": np.array([True, False, False])})
    assert np.array_equal(d[0], a[0]) and np.array_equal(d[1:], c[1:])
    assert not np.array_equal(GymVectorEnv("CartPole", 2).reset()[0], GymVectorEnv("CartPole", 2).reset()[0])
    assert env.reset(seed=[None, 7, 8])[0].shape == (3, 4)
    with pytest.raises(ValueError, match="2 seeds for 3"):
        env.reset(seed=[1, 2])
    for mask, error in (([True] * 3, TypeError), (np.ones(3), TypeError), (np.ones(2, bool), ValueError), (np.zeros(3, bool), ValueError)):
        with pytest.raises(error, match="reset_mask"):
            env.reset(options={"reset_mask": mask})


def test_disabled_refuses_to_step_an_ended_env():
    env = GymVectorEnv("CartPole", 2, max_episode_steps=2, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    for _ in range(2):
        env.step(np.zeros(2, np.int64))
    with pytest.raises(AssertionError, match="reset_mask"):
        env.step(np.zeros(2, np.int64))
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(AssertionError, match=r"\[1\]"):
        env.step(np.zeros(2, np.int64))
    env.reset(options={"reset_mask": np.array([False, True])})
    env.step(np.zeros(2, np.int64))


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_record_episode_statistics(mode):
    env = RecordEpisodeStatistics(GymVectorEnv("NeverEnding", 3, max_episode_steps=20, autoreset_mode=mode))
    env.reset(seed=0)
    for _ in range(100):
        *_, infos = env.step(np.zeros(3, np.int64))
        if "episode" in infos:
            assert (infos["episode"]["r"] == 20).all() and (infos["episode"]["l"] == 20).all()
    assert env.episode_count in (12, 15)


def test_vector_returns_copies():
    env = GymVectorEnv("CartPole", 2)
    outs = [env.reset(seed=0)[0], *env.step(np.zeros(2, np.int64))[:4]]
    kept = [x.copy() for x in outs]
    for _ in range(30):
        env.step(np.zeros(2, np.int64))
    assert all(np.array_equal(x, y) for x, y in zip(outs, kept))


def test_stable_baselines3_trains():
    sb3 = pytest.importorskip("stable_baselines3")
    env = gymnasium.make("rl/CartPole-v1")
    model = sb3.PPO("MlpPolicy", env, n_steps=500, batch_size=250, n_epochs=2, seed=0, device="cpu")
    model.learn(2000)
    assert model.num_timesteps == 2000
    lengths = [info["l"] for info in model.ep_info_buffer]
    assert len(lengths) > 20 and np.mean(lengths) > 15
