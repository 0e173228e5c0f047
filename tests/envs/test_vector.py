"""The vector driver apart from any env's rules: arguments, errors, threads, conversions (design R7-R9)."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_envs import assert_same, make, random_actions, record

import rl
from rl.errors import ConfigError, UnknownName
from rl.types import VectorEnv

KINDS = ("CartPole", "IdentityMultiDiscrete", "Pendulum")  # one of each kind of action
kinds = pytest.mark.parametrize("name", KINDS)
BACKENDS = ("serial", "threads", "prange", "python")


def snapshot(env):
    return {key: value.clone() for key, value in env.state_dict()["tensors"].items()}


def assert_untouched(env, before):
    """Nothing that matters later has changed; `action` is scratch."""
    for key, value in env.state_dict()["tensors"].items():
        if key != "action":
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("backend", BACKENDS)
@kinds
def test_impossible_action_raises_and_moves_nothing(name, backend):
    n = 6 if backend == "python" else 2100
    env = make(name, n, backend=backend, threads=2)
    env.reset()
    action = random_actions(env, 1)[0]
    env.step(action)
    before = snapshot(env)
    for bad_env in (0, n // 2, n - 1):
        if name == "Pendulum":
            wrong = [float("nan")]
        elif name == "CartPole":
            wrong = [-1, 2, 2**32, -(2**31)]  # the third is 0 when cut to 32 bits
        else:
            wrong = [-1, 4]
        for value in wrong:
            bad = action.clone()
            bad.view(n, -1)[bad_env, -1] = value
            with pytest.raises(ValueError, match=rf"{name}: action .* of env {bad_env} is not in"):
                env.step(bad)
            assert_untouched(env, before)
    env.step(action)  # and it goes on
    env.close()


@pytest.mark.parametrize("backend", ["serial", "threads", "python"])
def test_continuous_actions_are_clipped(backend):
    wild, tame = (make("Pendulum", 4, backend=backend, threads=2) for _ in range(2))
    for env in (wild, tame):
        env.reset()
    action = torch.tensor([[5.0], [-3.0], [float("inf")], [1.0]])
    a, b = wild.step(action), tame.step(action.clamp(-2, 2))
    assert torch.equal(a.obs, b.obs) and torch.equal(a.reward, b.reward)
    assert action.tolist() == [[5.0], [-3.0], [float("inf")], [1.0]]  # what was passed in is left as it was


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_actions_are_type_errors(backend):
    env = make("CartPole", 4, backend=backend, threads=2)
    env.reset()
    before = snapshot(env)
    wrong = [
        torch.zeros(4),
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(5, dtype=torch.int64),
        torch.zeros((4, 1), dtype=torch.int64),
        torch.zeros(4, dtype=torch.complex64),
        torch.zeros(4, dtype=torch.int64, device="meta"),
        np.zeros(4),
        "left",
        None,
    ]
    for action in wrong:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            env.step(action)
        assert "CartPole" in str(caught.value) or not isinstance(action, torch.Tensor), (action, caught.value)
        assert_untouched(env, before)
    pendulum = make("Pendulum", 4, backend=backend, threads=2)
    pendulum.reset()
    for action in (torch.zeros((4, 1), dtype=torch.int64), torch.zeros(4), torch.zeros((4, 2))):
        with pytest.raises(TypeError, match="Pendulum: action must be"):
            pendulum.step(action)


@pytest.mark.parametrize("backend", BACKENDS)
@kinds
def test_convertible_actions_are_converted(name, backend):
    env = make(name, 6, backend=backend, threads=2)
    env.reset()
    start = env.state_dict()
    action = random_actions(env, 1)[0]
    expected = {key: value.clone() for key, value in zip(("obs", "reward"), env.step(action))}
    wide = torch.stack([action, torch.zeros_like(action)], 1)
    doubled = wide[:, 0]
    assert not doubled.is_contiguous()
    if env.action_kind == "continuous":
        forms: list[Any] = [action.double(), action.clone().requires_grad_()]
    else:
        forms = [action.to(torch.int32), action.to(torch.int8)]
    if action.dim() == 2:
        forms.append(action.t().contiguous().t())
    for form in (doubled, *forms, action.numpy(), action.tolist()):
        env.load_state_dict(start)
        out = env.step(form)  # type: ignore[arg-type]
        assert torch.equal(out.obs, expected["obs"]) and torch.equal(out.reward, expected["reward"]), form
    env.close()


@pytest.mark.parametrize("backend", ["serial", "threads", "python"])
@kinds
def test_step_many_equals_a_loop(name, backend):
    loop, many = (make(name, 8, backend=backend, threads=2, time_limit=5, seed=1) for _ in range(2))
    actions = random_actions(loop, 33)
    loop.reset()
    ended = 0
    for action in actions:
        loop.step(action)
        ended += loop.ended or 0
    many.reset()
    assert many.step_many(actions) == ended > 8
    for key, value in loop.state_dict()["tensors"].items():
        if key != "final_obs":
            assert torch.equal(value, many.state_dict()["tensors"][key]), key
    with pytest.raises(TypeError, match="actions must be"):
        many.step_many(actions[:, :4])
    with pytest.raises(TypeError, match="actions must be"):
        many.step_many(actions.to(torch.int16))


def test_step_many_names_row_and_env():
    env = make("CartPole", 4)
    actions = torch.zeros((5, 4), dtype=torch.int64)
    with pytest.raises(RuntimeError, match="reset"):
        env.step_many(actions)
    env.reset()
    actions[3, 2] = 7
    with pytest.raises(ValueError, match=r"action 7 of env 2 .*row 3"):
        env.step_many(actions)


def test_reset_each_gives_every_env_its_own_seed():
    env = make("CartPole", 3)
    seeds = [7, 123456789012345, 7]
    first = env.reset_each(seeds).clone()
    actions = random_actions(env, 60)
    run = record(env, actions, reset=False)
    for k, seed in enumerate(seeds):
        alone = make("CartPole", 1, seed=seed)
        assert torch.equal(alone.reset()[0], first[k])
        assert torch.equal(record(alone, actions[:, k : k + 1].contiguous(), reset=False)["obs"][:, 0], run["obs"][:, k])
    assert torch.equal(first[0], first[2])
    with pytest.raises(ValueError, match="2 seeds for 3 envs"):
        env.reset_each([1, 2])
    with pytest.raises(ValueError, match="seed"):
        env.reset_each([1, 2, -3])


def test_reset_each_with_a_mask_and_without_some_seeds():
    env = make("CartPole", 4, autoreset="disabled", seed=3)
    env.reset()
    for action in random_actions(env, 5):
        env.step(action)
    before = env.obs.clone()
    obs = env.reset_each([9, None, 9, None], torch.tensor([True, True, False, False]))
    assert torch.equal(obs[2:], before[2:])
    assert torch.equal(obs[0], make("CartPole", 1, seed=9).reset()[0])
    assert not torch.equal(obs[1], before[1])
    seeds = env._tensors["seed"][:, 0].to(torch.int64).tolist()
    assert seeds == [9, 3, 3, 3]
    assert int(env._tensors["clock"]) > 5  # the others' stream goes on where it was


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"num_envs": 0}, ValueError, "num_envs"),
        ({"autoreset": "sometimes"}, ValueError, "same_step, next_step, disabled"),
        ({"backend": "gpu"}, ValueError, "serial"),
        ({"backend": "cuda"}, ValueError, "cuda"),
        ({"threads": 0}, ValueError, "threads"),
        ({"time_limit": 0}, ValueError, "time_limit"),
        ({"time_limit": True}, ValueError, "time_limit"),
        ({"time_limit": 2.5}, ValueError, "time_limit"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 1.5}, TypeError, "seed"),
    ],
)
def test_wrong_options_are_named(how, error, words):
    with pytest.raises(error, match=words):
        make("CartPole", **{"num_envs": 2, **how})


def test_step_before_reset_is_an_error():
    env = make("CartPole", 2)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "word"), [({"num_envs": 3}, "num_envs"), ({"autoreset": "disabled"}, "autoreset"), ({"time_limit": 9}, "time_limit")]
)
def test_load_state_dict_of_another_env_is_refused_whole(change, word):
    env = make("CartPole", 2)
    env.reset()
    before = snapshot(env)
    other = make("CartPole", **{"num_envs": 2, **change})
    other.reset(seed=5)
    with pytest.raises(ValueError, match=word):
        env.load_state_dict(other.state_dict())
    wrong = make("CartPole", 2).state_dict()
    wrong["name"] = "Acrobot"
    with pytest.raises(ValueError, match="Acrobot"):
        env.load_state_dict(wrong)
    torn = make("CartPole", 2, seed=9).state_dict()
    torn["tensors"].pop("clock")  # the last of all: nothing may have been written before it was missed
    with pytest.raises(ValueError, match="clock"):
        env.load_state_dict(torn)
    assert_untouched(env, before)


def test_state_dict_moves_between_backends():
    serial, threads = make("Acrobot", 8, seed=3, backend="serial"), make("Acrobot", 8, backend="threads", threads=2)
    actions = random_actions(serial, 20)
    record(serial, actions[:9])
    threads.load_state_dict(serial.state_dict())
    assert_same(record(serial, actions[9:], reset=False), record(threads, actions[9:], reset=False))


def test_a_deep_copy_is_an_env_of_its_own():
    env = make("CartPole", 3, seed=4)
    actions = random_actions(env, 30)
    record(env, actions[:10])
    twin = copy.deepcopy(env)
    here = record(env, actions[10:], reset=False)
    assert_same(here, record(twin, actions[10:], reset=False))
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(env)


def test_injected_states_show_after_refresh():
    env = make("Pendulum", 2)
    env.reset()
    env.state[:] = torch.tensor([[0.0, 1.0], [np.pi / 2, -2.0]])
    torch.testing.assert_close(env.refresh(), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -2.0]]), atol=1e-6, rtol=0)


# -- threads -----------------------------------------------------------------------------------------------------------


def pool_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rl-env-")]


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_number_of_threads_changes_nothing(threads):
    serial = make("CartPole", 4099, seed=6, backend="serial")
    pool = make("CartPole", 4099, seed=6, backend="threads", threads=threads)
    actions = random_actions(serial, 60)
    assert_same(record(serial, actions), record(pool, actions))
    assert len(pool_threads()) == threads - 1
    pool.close()
    assert not pool_threads()


def test_more_threads_than_envs():
    env = make("CartPole", 2, backend="threads", threads=8)
    assert_same(record(env, random_actions(env, 10)), record(make("CartPole", 2), random_actions(env, 10)))
    env.close()


def test_auto_takes_threads_only_where_they_pay():
    assert make("CartPole", 4096, threads=2).backend == "threads"
    assert make("CartPole", 1024, threads=2).backend == "serial"
    assert make("CartPole", 16384).backend == "serial"


def test_idle_pool_burns_no_core_and_wakes():
    env = make("CartPole", 4096, backend="threads", threads=3)
    actions = random_actions(env, 4)
    record(env, actions)
    time.sleep(0.1)  # the helpers give up looking after about 0.1 ms
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    for _ in range(20):  # asleep, awake, half asleep: every step must come back
        env.step(actions[0])
        time.sleep(0.002)
    serial = make("CartPole", 4096)
    record(serial, actions)
    for _ in range(20):
        serial.step(actions[0])
    assert torch.equal(env.obs, serial.obs)
    env.close()


def test_many_envs_leak_no_threads():
    for k in range(30):
        env = make("CartPole", 64, backend="threads", threads=3)
        env.reset()
        env.step(torch.zeros(64, dtype=torch.int64))
        if k % 2:
            env.close()
            env.close()
        del env
    assert not pool_threads()


def test_process_ends_with_a_pool_left_open():
    code = (
        "import torch, rl; env = rl.make_vec('CartPole', 64, backend='threads', threads=2); env.reset(); "
        "env.step(torch.zeros(64, dtype=torch.int64)); print('done')"
    )
    path = os.pathsep.join([str(Path(rl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


# -- make_vec ----------------------------------------------------------------------------------------------------------


def test_make_vec():
    env = rl.make_vec("cartpole", 3, seed=4)
    assert isinstance(env, VectorEnv) and env.num_envs == 3 and env.name == "CartPole"
    assert torch.equal(env.reset(), make("CartPole", 3, seed=4).reset())
    assert rl.make_vec("rl/CartPole-v1", 1, time_limit=None).time_limit is None  # type: ignore[attr-defined]
    assert rl.make_vec("CartPole", options={"time_limit": 9}).time_limit == 9  # type: ignore[attr-defined]
    assert rl.make_vec("CartPole", options={"time_limit": 0}).time_limit is None  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"no option 'time_limt'; did you mean 'time_limit'\?"):
        rl.make_vec("CartPole", time_limt=4)
    with pytest.raises(ConfigError, match="twice"):
        rl.make_vec("CartPole", time_limit=4, options={"time_limit": 4})
    with pytest.raises(UnknownName, match="CartPole"):
        rl.make_vec("CartPol")
    with pytest.raises(ConfigError, match="autoreset"):
        rl.make_vec("gym:CartPole-v1", autoreset="disabled")


def test_importing_the_package_is_light():
    code = "import sys, rl.envs; print([m for m in ('torch', 'numba', 'gymnasium', 'numpy') if m in sys.modules])"
    path = os.pathsep.join([str(Path(rl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_bench_rows():
    from rl.envs.bench import bench_env

    rows = bench_env("Pendulum", batches=(1, 8), backends=("serial", "threads"), seconds=0.02)
    assert [(r["backend"], r["batch"], r["call"]) for r in rows] == [
        ("serial", 1, "step"), ("serial", 1, "step_many"), ("serial", 8, "step"), ("serial", 8, "step_many"),
        ("threads", 1, "step"), ("threads", 8, "step"),
    ]  # fmt: skip
    assert all(0 < r["min"] <= r["median"] <= r["max"] for r in rows)


def test_three_threads_in_a_fresh_process_do_not_wait_for_each_other():
    """The loop of the helpers must be compiled before they enter it side by side."""
    code = (
        "import torch; from rl.envs import make_vec\n"
        "env = make_vec('CartPole', 64, threads=4, backend='threads'); env.reset(1)\n"
        "for _ in range(50): env.step(torch.zeros(64, dtype=torch.int64))\n"
        "env.close(); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr
