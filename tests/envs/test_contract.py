"""What every native env in the registry promises (design T6)."""

import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from native_envs import NAMES, assert_same, make, random_actions, record, spec_of

from rl import registry

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
each = pytest.mark.parametrize("name", NAMES)


def short(name):
    """A time limit that cuts episodes off within a short test."""
    return 7 if registry.find_env(name).time_limit is not None else "spec"


def test_all_kinds_of_action_are_here():
    assert {registry.find_env(name).action_kind for name in NAMES} == {"discrete", "multi_discrete", "continuous"}
    assert {"CartPole", "Acrobot", "MountainCar", "MountainCarContinuous", "Pendulum"} <= set(NAMES)


@each
def test_registry_says_what_the_spec_says(name):
    entry, spec = registry.find_env(name), spec_of(name)
    env = make(name, 2)
    assert entry.name == spec.name == env.name == name
    assert entry.time_limit == spec.time_limit == env.time_limit
    assert entry.action_kind == env.action_kind
    assert (entry.observation_kind == "image") == (len(env.single_observation_space.shape or ()) == 3)


@each
def test_shapes_dtypes_spaces(name):
    env = make(name, 5, time_limit=short(name))
    obs = env.reset()
    space = env.single_observation_space
    for action in random_actions(env, 30):
        assert obs.shape == (5, *space.shape) and obs.dtype == torch.float32  # type: ignore[misc]
        assert all(row in space for row in obs.numpy())
        out = env.step(action)
        obs = out.obs
        assert out.reward.shape == out.terminated.shape == out.truncated.shape == (5,)
        assert (out.reward.dtype, out.terminated.dtype, out.truncated.dtype) == (torch.float32, torch.bool, torch.bool)
        assert out.final_obs.shape == obs.shape and out.final_obs.dtype == obs.dtype
        ended = out.terminated | out.truncated
        assert env.ended == int(ended.sum())
        assert all(row in space for row in out.final_obs[ended].numpy())
    assert env.episode_return.dtype == torch.float32 and env.episode_length.dtype == torch.int32


@each
def test_same_seed_same_run_other_seed_other_run(name):
    a, b, c = (make(name, 6, seed=seed, time_limit=short(name)) for seed in (3, 3, 4))
    actions = random_actions(a, 25)
    first = record(a, actions)
    assert_same(first, record(b, actions))
    other = record(c, actions)
    if name == "NeverEnding":
        return  # it has one state
    assert not torch.equal(first["first"], other["first"])
    a.reset(3)
    assert_same(first, record(a, actions, reset=False))
    assert not torch.equal(record(a, actions)["first"], first["first"])  # without a seed the stream goes on
    assert not torch.equal(first["first"][0], first["first"][1])  # and envs differ among themselves


@each
def test_batch_size_and_chunks_change_nothing(name):
    how = {"seed": 11, "time_limit": short(name)}
    whole = make(name, 9, **how)
    actions = random_actions(whole, 25)
    expected = record(whole, actions)
    for k, n in ((0, 1), (1, 4), (5, 4)):
        part = record(make(name, n, first_index=k, **how), actions[:, k : k + n].contiguous())
        for key, value in part.items():
            assert torch.equal(value, expected[key][k : k + n] if key == "first" else expected[key][:, k : k + n]), key


# prange takes long to compile, so one env of each kind of action has to do.
_COMPILED = [(name, "threads") for name in NAMES] + [(name, "prange") for name in ("CartPole", "IdentityMultiDiscrete", "Pendulum")]


@pytest.mark.parametrize(("name", "backend"), _COMPILED)
@pytest.mark.parametrize("autoreset", ["same_step", "next_step", "disabled"])
def test_compiled_backends_agree_exactly(name, backend, autoreset):
    how = {"seed": 5, "time_limit": short(name), "autoreset": autoreset}
    n = 2500  # more than two of the drivers' blocks, and no multiple of one
    serial = make(name, n, backend="serial", **how)
    actions = random_actions(serial, 12)
    other = make(name, n, backend=backend, threads=2, **how)
    assert_same(record(serial, actions), record(other, actions))
    other.close()


@each
@pytest.mark.parametrize("autoreset", ["same_step", "next_step", "disabled"])
def test_python_backend_agrees(name, autoreset):
    """Called from Python, compiled helpers return Python floats, so that products of two are in float64: equal but for rounding."""
    how = {"seed": 5, "time_limit": short(name), "autoreset": autoreset}
    serial, python = make(name, 3, backend="serial", **how), make(name, 3, backend="python", **how)
    actions = random_actions(serial, 12)
    assert_same(record(serial, actions), record(python, actions), tolerance=1e-5)


_UNCOMPILED = """
import sys, numpy as np, torch
sys.path[:0] = {paths!r}
from native_envs import NAMES, make, random_actions, record
import numba
assert numba.config.DISABLE_JIT
runs = {{}}
for name in NAMES:
    env = make(name, 3, backend="python", seed=5, time_limit=7)
    runs[name] = record(env, random_actions(env, 12))
torch.save(runs, {out!r})
"""


def test_uncompiled_python_agrees_exactly(tmp_path):
    """The same arithmetic without Numba: float32 throughout, so not a bit may differ."""
    out = str(tmp_path / "runs.pt")
    code = _UNCOMPILED.format(paths=[str(ROOT), str(ROOT / "tests" / "envs")], out=out)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = torch.load(out, weights_only=True)
    for name in NAMES:
        env = make(name, 3, backend="serial", seed=5, time_limit=7)
        assert_same(record(env, random_actions(env, 12)), runs[name])


@each
def test_same_step_final_obs_is_what_disabled_shows(name):
    """Without autoreset the last observation is plainly there; resetting by hand must give the same episodes."""
    how = {"seed": 2, "time_limit": short(name)}
    auto, manual = make(name, 8, **how), make(name, 8, autoreset="disabled", **how)
    auto.reset()
    manual.reset()
    ends = 0
    for action in random_actions(auto, 40):
        out, plain = auto.step(action), manual.step(action)
        ended = out.terminated | out.truncated
        for key in ("reward", "terminated", "truncated"):
            assert torch.equal(getattr(out, key), getattr(plain, key)), key
        assert torch.equal(out.final_obs[ended], plain.obs[ended])
        assert torch.equal(out.obs[~ended], plain.obs[~ended])
        assert torch.equal(auto.episode_return[ended], manual.episode_return[ended])
        ends += int(ended.sum())
        if ended.any():
            # Autoreset draws the new state at the step's own time: set the clock back to it, and on again.
            manual._tensors["clock"] -= 1
            assert torch.equal(manual.reset_envs(ended), out.obs)
    assert ends > 8


@each
def test_next_step_semantics(name):
    """The call after an end ignores its action, gives reward 0 and no flags, and shows the next episode's first observation."""
    env = make(name, 8, autoreset="next_step", time_limit=short(name))
    twin = make(name, 8, autoreset="next_step", time_limit=short(name))
    env.reset()
    twin.reset()
    ended = torch.zeros(8, dtype=torch.bool)
    ends = 0
    for action, other in zip(random_actions(env, 40), random_actions(env, 40, seed=9)):
        mixed = action.clone()
        mixed[ended] = other[ended]  # a different action where it must not matter
        out, same = env.step(action), twin.step(mixed)
        for key in ("obs", "reward", "terminated", "truncated"):
            assert torch.equal(getattr(out, key), getattr(same, key)), key
        assert not out.reward[ended].any() and not (out.terminated | out.truncated)[ended].any()
        assert not env._tensors["elapsed"][ended].any()
        now = out.terminated | out.truncated
        assert torch.equal(out.final_obs[now], out.obs[now])  # the last observation itself is shown
        assert env.ended == int(now.sum())
        ended = now.clone()
        ends += int(now.sum())
    assert ends > 8


@each
def test_disabled_resets_only_what_is_asked(name):
    env = make(name, 6, autoreset="disabled", time_limit=3)
    env.reset()
    actions = random_actions(env, 6)
    for k in range(3):
        out = env.step(actions[k])
    assert out.truncated.all()  # type: ignore[possibly-undefined]
    kept = env.obs.clone()
    mask = torch.tensor([True, False, True, False, False, True])
    obs = env.reset_envs(mask)
    assert torch.equal(obs[~mask], kept[~mask])
    assert not out.truncated[mask].any() and out.truncated[~mask].all()
    assert env._tensors["elapsed"].tolist() == [0, 3, 0, 3, 3, 0]
    if name != "NeverEnding":
        assert not torch.equal(obs[mask], kept[mask])
    out = env.step(actions[3])
    assert out.truncated.tolist() == [False, True, False, True, True, False]
    with pytest.raises(TypeError, match="mask"):
        env.reset_envs(torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask"):
        env.reset_envs(torch.ones(6))


@each
@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
def test_episode_statistics(name, autoreset):
    env = make(name, 7, autoreset=autoreset, time_limit=short(name))
    env.reset()
    total, length, skip = np.zeros(7), np.zeros(7, int), np.zeros(7, bool)
    checked = 0
    for action in random_actions(env, 45):
        out = env.step(action)
        ended = (out.terminated | out.truncated).numpy()
        total += np.where(skip, 0, out.reward.numpy())
        length += ~skip
        np.testing.assert_allclose(env.episode_return.numpy()[ended], total[ended], rtol=1e-5, atol=1e-5)
        assert (env.episode_length.numpy()[ended] == length[ended]).all()
        checked += ended.sum()
        total[ended], length[ended] = 0, 0
        skip = ended & (autoreset == "next_step")
    assert checked > 7


@each
@pytest.mark.parametrize("limit", [1, 5, None])
def test_time_limit(name, limit):
    env = make(name, 4, time_limit=limit)
    env.reset()
    age = np.zeros(4, int)
    for action in random_actions(env, 30):
        out = env.step(action)
        age += 1
        assert (out.truncated.numpy() == (age >= (limit or 10**9))).all()
        age[(out.terminated | out.truncated).numpy()] = 0


@each
def test_saved_state_goes_on_exactly(name):
    how = {"seed": 8, "time_limit": short(name)}
    env, other = make(name, 5, **how), make(name, 5, seed=1, time_limit=short(name))
    actions = random_actions(env, 40)
    record(env, actions[:17])
    saved = env.state_dict()
    expected = record(env, actions[17:], reset=False)
    assert not torch.equal(saved["tensors"]["clock"], env.state_dict()["tensors"]["clock"])  # a copy, not a view
    for target in (env, other):
        target.load_state_dict(saved)
        assert_same(expected, record(target, actions[17:], reset=False))


@each
def test_golden_playthrough(name):
    """A recorded run: fails when the rules change, so that it is done on purpose (write anew: python tests/golden/make.py)."""
    path = GOLDEN / f"{name}.json"
    assert path.exists(), f"no golden playthrough of {name}: run python tests/golden/make.py"
    play = runpy.run_path(str(GOLDEN / "make.py"))["play"]
    kept, now = json.loads(path.read_text()), play(name)
    assert kept.keys() == now.keys()
    for key in ("first", "obs", "reward", "final_obs"):
        np.testing.assert_allclose(now[key], kept[key], rtol=2e-4, atol=2e-4, err_msg=key)
    for key in ("action", "terminated", "truncated"):
        if key == "action" and now["kind"] == "continuous":
            np.testing.assert_allclose(now[key], kept[key], atol=1e-5)
        else:
            assert now[key] == kept[key], key


def test_no_golden_playthrough_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(NAMES)


@each
def test_picture(name):
    env = make(name, 2)
    env.reset()
    first = env.render(0)
    assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 10  # shapes with soft edges, not a blank
    if registry.find_env(name).family == "classic":
        env.state[0, 0] += 0.3
        assert (env.render(0) != first).any()
    assert (env.render(1) == env.render(1)).all()
    env.state[0] = 50.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert env.render(0).shape == first.shape  # out of the picture, still a picture
