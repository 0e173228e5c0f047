"""The adapter over Gymnasium envs: names, spaces, autoreset, seeds, and what happens when a worker dies, raises or hangs."""

import gc
import importlib.util
import logging
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from rl.envs.foreign import ForeignEnvError, ForeignVecEnv, WorkerError, make_foreign, resolve_foreign
from rl.envs.foreign_worker import seeds_for
from rl.types import VectorEnv

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture
def make(request: pytest.FixtureRequest):
    """make_foreign, closed after the test."""

    def build(*args: Any, **kwargs: Any) -> ForeignVecEnv:
        env = make_foreign(*args, **kwargs)
        request.addfinalizer(env.close)
        return env

    return build


def rollout(env: ForeignVecEnv, steps: int, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    seen = [env.obs.clone()]
    for _ in range(steps):
        actions = torch.randint(2, (64,), generator=rng)[: env.num_envs]
        step = env.step(actions)
        ended = step.terminated | step.truncated
        seen += [step.obs.clone(), step.reward.clone(), step.terminated.clone(), step.truncated.clone(), step.final_obs[ended].clone()]
        seen += [env.episode_return[ended].clone(), env.episode_length[ended].clone()]
    return seen


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- names and options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("CartPol-v1", {}, ["CartPole-v1"]),
        ("gym:lunarlander-v3", {}, ["LunarLander-v3"]),
        ("Hopper-v3", {}, ["retired", "Hopper-v5"]),
        ("foreign_zo:Walk", {}, ["no module 'foreign_zo'", "foreign_zoo"]),
        ("foreign_zoo:Wlak", {}, ["no attribute 'Wlak'", "foreign_zoo:Walk"]),
        ("foreign_zoo:NOT_AN_ENV", {}, ["gymnasium.Env class"]),
        ("collections:OrderedDict", {}, ["does not derive from gymnasium.Env"]),
        ("__main__:Env", {}, ["__main__", "module of its own"]),
        ("CartPole-v1", {"time_limit": -1}, ["time_limit"]),
        ("CartPole-v1", {"clip_reward": 3}, ["clip_reward"]),
    ],
)
def test_wrong_names_and_options_fail_before_any_worker(
    name: str, options: dict, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a worker was started"))
    with pytest.raises(ForeignEnvError) as error:
        make_foreign(name, 1, options=options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("ALE/Pong-v5", "ale_py", "atari"), ("Hopper-v5", "mujoco", "mujoco"), ("gym:LunarLander-v3", "Box2D", "box2d")],
)
def test_a_missing_extra_says_what_to_install(name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *a: None if wanted == package else real(wanted, *a))
    with pytest.raises(ForeignEnvError, match=rf"pip install 'rl-suite\[{extra}\]'"):
        resolve_foreign(name)


def test_a_module_that_needs_another_names_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ForeignEnvError, match="needs surely_not_installed"):
        resolve_foreign("needy:Env")


def test_an_id_that_a_module_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    (tmp_path / "registers.py").write_text("import gymnasium\ngymnasium.register('Zoo/Walk-v0', 'foreign_zoo:Walk', max_episode_steps=4)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    env = make("registers:Zoo/Walk-v0", 1)
    flags = [bool(env.step(torch.zeros(1, dtype=torch.int64)).truncated) for _ in range(4)]
    assert flags == [False, False, False, True]


def test_constructor_errors_reach_the_user() -> None:
    with pytest.raises(WorkerError, match="no licence file"):
        make_foreign("foreign_zoo:Unbuildable", 2)
    with pytest.raises(WorkerError, match="unexpected keyword argument 'colour'"):
        make_foreign("CartPole-v1", 1, options={"colour": "red"})
    with pytest.raises(WorkerError, match="vector env"):
        make_foreign("foreign_zoo:VectorWithoutFinal", 1)
    with pytest.raises(WorkerError, match="reset\\(\\) must return"):
        make_foreign("foreign_zoo:OldReset", 1)


# -- what an agent sees --------------------------------------------------------------------------------------------------------


def test_it_is_a_vector_env_and_matches_gymnasium(make: Any) -> None:
    env: ForeignVecEnv = make("CartPole-v1", 3, seed=5, workers=2)
    conforms: VectorEnv = env  # to the type checker too  # pyright: ignore[reportAssignmentType]
    assert isinstance(conforms, VectorEnv) and env.exact_resume is False and env.action_mask is None
    singles = [gymnasium.make("CartPole-v1") for _ in range(3)]
    expected = np.stack([single.reset(seed=seeds_for(5, i)[0])[0] for i, single in enumerate(singles)])
    np.testing.assert_array_equal(env.reset().numpy(), expected)
    returns, lengths = np.zeros(3), np.zeros(3)
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(200):
        action = rng.integers(0, 2, 3)
        step = env.step(torch.from_numpy(action))
        assert step.reward.dtype == torch.float32 and step.terminated.dtype == torch.bool and env.episode_length.dtype == torch.int32
        for i, single in enumerate(singles):
            obs, reward, terminated, truncated, _ = single.step(action[i])
            returns[i] += float(reward)
            lengths[i] += 1
            assert (step.reward[i], step.terminated[i], step.truncated[i]) == (reward, terminated, truncated)
            if terminated or truncated:
                ended += 1
                np.testing.assert_array_equal(step.final_obs[i].numpy(), obs)
                assert (env.episode_return[i], env.episode_length[i], bool(env.episode_over[i])) == (returns[i], lengths[i], True)
                obs, returns[i], lengths[i] = single.reset()[0], 0, 0
            np.testing.assert_array_equal(step.obs[i].numpy(), obs)
    assert ended > 10


def test_results_do_not_depend_on_the_number_of_workers_nor_on_the_other_envs(make: Any) -> None:
    name = "foreign_zoo:Walk"
    one, three, fewer = make(name, 5, seed=1, workers=1), make(name, 5, seed=1, workers=3), make(name, 2, seed=1)
    a, b, c = rollout(one, 20), rollout(three, 20), rollout(fewer, 20)
    assert same(a, b)
    assert all(torch.equal(x[:2], y) for x, y in zip(a[1::7], c[1::7]))
    assert not torch.equal(a[0][0], a[0][1])  # the envs have seeds of their own
    assert not same(a, rollout(make(name, 5, seed=2, workers=1), 20))


def test_reset_with_a_seed_determines_everything(make: Any) -> None:
    env = make("foreign_zoo:Walk", 2)
    env.reset(seed=9)
    first = rollout(env, 15)
    env.reset()
    assert not same(first, rollout(env, 15))
    env.reset(seed=9)
    assert same(first, rollout(env, 15))


def test_time_limits_truncate_and_never_terminate(make: Any) -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    env = make("foreign_zoo:Walk", 1, options={"time_limit": 5})
    steps = [tuple(map(bool, env.step(zero)[2:4])) for _ in range(5)]
    assert steps == [(False, False)] * 4 + [(False, True)] and env.episode_length[0] == 5
    both = make("foreign_zoo:Walk", 1, options={"time_limit": 7})  # ends by itself in the same step: both are true, and both are said
    assert [tuple(map(bool, both.step(zero)[2:4])) for _ in range(7)][-1] == (True, True)
    pendulum = make("Pendulum-v1", 1, options={"time_limit": 3})
    assert [bool(pendulum.step(torch.zeros(1, 1)).truncated) for _ in range(6)] == [False, False, True] * 2
    free = make("Pendulum-v1", 1, options={"time_limit": 0})
    assert not any(bool(free.step(torch.zeros(1, 1)).truncated) for _ in range(250))


def test_clip_reward_leaves_the_score_alone(make: Any) -> None:
    env = make("foreign_zoo:Walk", 1, options={"clip_reward": True, "length": 4})
    plain = make("foreign_zoo:Walk", 1, options={"length": 4})
    total = 0.0
    for _ in range(4):
        clipped, raw = env.step(torch.ones(1, dtype=torch.int64)), plain.step(torch.ones(1, dtype=torch.int64))
        assert clipped.reward == torch.sign(raw.reward)
        total += float(raw.reward)
    assert env.episode_return.item() == pytest.approx(total, rel=1e-5)


def test_continuous_actions_are_clipped_to_finite_bounds(make: Any) -> None:
    env = make("foreign_zoo:Echo", 1)
    assert env.single_action_space.dtype == np.float32 and env.obs.dtype == torch.float32
    assert env.step(torch.tensor([[-7.0, 1e6]])).obs.tolist() == [[-1.0, 1e6]]
    assert env.step(torch.tensor([[0.25, -3.0]], dtype=torch.float64)).obs.tolist() == [[0.25, -3.0]]


@pytest.mark.parametrize(
    ("options", "action", "obs"),
    [
        ({"action": "multi"}, [2, 3], [2, 3]),
        ({"action": "binary"}, [1, 0], [1, 0]),
        ({"action": "start"}, 2, [7, 7]),
        ({"action": "start", "obs": "discrete"}, 2, [0, 0, 0, 0, 0, 1, 0, 0, 0]),
        ({"obs": "dict"}, [0.5, 4.0], [0.5, 4.0, 0, 0, 1]),
    ],
)
def test_spaces(make: Any, options: dict, action: Any, obs: list[float]) -> None:
    env = make("foreign_zoo:Echo", 1, options=options)
    step = env.step(torch.tensor([action]))
    assert step.obs.tolist() == [obs] and step.obs.dtype == torch.float32
    assert env.single_observation_space.contains(step.obs[0].numpy())
    assert env.single_action_space.shape == np.shape(action)


def test_pictures_stay_uint8(make: Any) -> None:
    env = make("foreign_zoo:Echo", 2, options={"obs": "image"})
    assert env.obs.dtype == torch.uint8 and env.obs.shape == (2, 2, 2, 1) and env.obs.unique().tolist() == [200]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"obs": "sequence"}, "cannot be flattened"), ({"action": "text"}, "not supported"), ({"obs": "wrong"}, "declares")],
)
def test_spaces_that_do_not_fit_are_refused(options: dict, words: str) -> None:
    with pytest.raises(WorkerError, match=words):
        make_foreign("foreign_zoo:Echo", 1, options=options)


def test_action_masks_follow_the_observation(make: Any) -> None:
    env = make("foreign_zoo:Masked", 2, options={"length": 3})
    masks = [env.action_mask.tolist()[0]]
    for _ in range(4):
        env.step(torch.ones(2, dtype=torch.int64))
        masks.append(env.action_mask.tolist()[1])
    assert masks == [[True, False], [True, True], [False, True], [True, False], [True, True]]  # the fourth is after the autoreset
    assert env.action_mask.dtype == torch.bool


def test_wrong_actions_are_the_callers_error_and_cost_no_worker(make: Any) -> None:
    env = make("foreign_zoo:Walk", 2)
    for action, words in [
        (torch.zeros(2, 1, dtype=torch.int64), "shape"),
        (torch.zeros(2), "integer"),
        (torch.tensor([0, 2]), "0..1"),
        (torch.tensor([-1, 0]), "0..1"),
    ]:
        with pytest.raises(ValueError, match=words):
            env.step(action)
    env.step(torch.tensor([0, 1]))
    assert env.restarts == 0


def test_render(make: Any) -> None:
    env = make("foreign_zoo:Walk", 3, workers=2, render=True)
    env.step(torch.zeros(3, dtype=torch.int64))
    assert env.render(2).shape == (4, 6, 3) and env.render(2).max() == 1 and env.render(0).dtype == np.uint8
    with pytest.raises(RuntimeError, match="render=True"):
        make("foreign_zoo:Walk", 1).render()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_gives_what_it_gives_on_the_cpu(make: Any) -> None:
    cpu, gpu = make("foreign_zoo:Masked", 3, seed=2), make("foreign_zoo:Masked", 3, seed=2, device="cuda")
    assert torch.equal(cpu.reset(seed=1), gpu.reset(seed=1).cpu())
    for _ in range(20):
        a, b = cpu.step(torch.ones(3, dtype=torch.int64)), gpu.step(torch.ones(3, dtype=torch.int64, device="cuda"))
        assert all(y.is_cuda and torch.equal(x, y.cpu()) for x, y in zip(a, b))
        assert torch.equal(cpu.action_mask, gpu.action_mask.cpu()) and torch.equal(cpu.episode_return, gpu.episode_return.cpu())


# -- accidents -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"), [("raise", "dice fell off"), ("exit", "exit status 3"), ("kill", "SIGKILL"), ("hang", "no answer in time")]
)
def test_a_lost_worker_is_replaced_and_the_run_goes_on(make: Any, caplog: pytest.LogCaptureFixture, how: str, words: str) -> None:
    def run() -> tuple[ForeignVecEnv, list[torch.Tensor]]:
        env = make("foreign_zoo:Treacherous", 4, workers=2, seed=3, options={"how": how}, hang_timeout=1.0 if how == "hang" else 60.0)
        seen = []
        none = torch.zeros(4, dtype=torch.int64)
        env.step(none)
        before = env.obs.clone()
        with caplog.at_level(logging.WARNING, "rl.envs"):
            step = env.step(torch.tensor([0, 1, 0, 0]))  # env 0 steps, env 1 kills the worker of both; 2 and 3 live elsewhere
        assert step.truncated.tolist() == [True, True, False, False] and not step.terminated.any()
        assert step.reward[1] == 0 and step.reward[0] != 0
        assert torch.equal(step.final_obs[1], before[1])  # what was last known of it
        assert step.final_obs[0, 1] == 2 and step.obs[:, 1].tolist() == [0, 0, 2, 2]  # the steps of the episodes, old and new
        assert not env.episode_over[:2].any() and env.episode_return[:2].isnan().all()  # an episode broken off counts in no score
        for _ in range(3):
            seen.append(env.step(none).obs.clone())
        assert env.restarts == 1
        return env, seen

    assert words in (run() and caplog.text)
    if how == "raise":
        assert same(run()[1], run()[1])  # deterministic, with accidents too
        fresh = make("foreign_zoo:Treacherous", 4, workers=2, seed=3)
        assert not torch.equal(fresh.obs[0], run()[0].obs[0])


def test_a_worker_that_always_fails_is_an_error_in_the_end(make: Any) -> None:
    env = make("foreign_zoo:Treacherous", 1, options={"always": True})
    with pytest.raises(WorkerError, match=r"(?s)failed 11 times.*dice fell off"):
        for _ in range(20):
            env.step(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="closed"):
        env.step(torch.zeros(1, dtype=torch.int64))


def test_a_worker_killed_from_outside_between_steps(make: Any) -> None:
    env = make("foreign_zoo:Walk", 2, workers=2)
    env.step(torch.zeros(2, dtype=torch.int64))
    env._workers[0].process.kill()
    step = env.step(torch.zeros(2, dtype=torch.int64))
    assert step.truncated.tolist() == [True, False] and env.restarts == 1 and env.state_dict()["env_restarts"] == [1, 0]


def test_state_resumes_with_new_episodes(make: Any) -> None:
    env = make("foreign_zoo:Walk", 2, seed=4)
    first = env.obs.clone()
    for _ in range(3):
        env.step(torch.zeros(2, dtype=torch.int64))
    state = env.state_dict()
    a, b = make("foreign_zoo:Walk", 2), make("foreign_zoo:Walk", 2)
    a.load_state_dict(state)
    b.load_state_dict(state)
    assert a.steps == 6 and a.seed == 4 and a.state_dict() == state
    assert torch.equal(a.reset(), b.obs) and not torch.equal(a.obs, first)
    with pytest.raises(ValueError, match="of 2 envs"):
        make("foreign_zoo:Walk", 3).load_state_dict(state)


# -- processes -----------------------------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Any, seconds: float = 8.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def test_close_ends_the_workers_and_may_be_called_again() -> None:
    env = make_foreign("foreign_zoo:Walk", 2, workers=2)
    pids = [worker.process.pid for worker in env._workers if worker.process]
    obs = env.obs
    env.close()
    env.close()
    assert not any(map(alive, pids)) and obs.isfinite().all()  # what was handed out stays readable
    other = make_foreign("foreign_zoo:Walk", 1)
    pid = other._workers[0].process.pid  # type: ignore[union-attr]
    del other
    gc.collect()
    assert wait_for(lambda: not alive(pid))


SCRIPT = """
import sys, os, time, signal
from rl.envs.foreign import make_foreign
import torch
env = make_foreign("foreign_zoo:Treacherous", 2, workers=2, options={"how": "hang"})
env.step(torch.zeros(2, dtype=torch.int64))
print(*[w.process.pid for w in env._workers], flush=True)
"""


def script(tail: str, tmp_path: Path) -> subprocess.Popen:
    (tmp_path / "unguarded.py").write_text(SCRIPT + tail)  # no `if __name__ == "__main__"`, as people write
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(tmp_path / "unguarded.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_a_script_that_just_ends_leaves_nothing_and_says_nothing(tmp_path: Path) -> None:
    out, err = (process := script("", tmp_path)).communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert wait_for(lambda: not any(alive(int(pid)) for pid in out.split()))


def test_workers_do_not_outlive_a_killed_parent_even_in_a_hung_step(tmp_path: Path) -> None:
    process = script("env.step(torch.ones(2, dtype=torch.int64))\n", tmp_path)
    assert process.stdout is not None and process.stderr is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(1.5)  # into the step that hangs
    assert len(pids) == 2 and all(map(alive, pids))
    process.kill()
    process.wait()  # not communicate: a worker left over would hold the pipes open
    process.stdout.close()
    process.stderr.close()
    assert wait_for(lambda: not any(map(alive, pids)))


def test_ctrl_c_is_the_parents_to_decide(tmp_path: Path) -> None:
    """Interrupted in the middle of a step, the parent may still go on with the same workers."""
    tail = """
for worker in env._workers:
    os.kill(worker.process.pid, signal.SIGINT)
signal.signal(signal.SIGALRM, lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    while True:
        env.step(torch.zeros(2, dtype=torch.int64))
except KeyboardInterrupt:
    pass
for _ in range(100):
    env.step(torch.zeros(2, dtype=torch.int64))
assert env.restarts == 0
"""
    _, err = (process := script(tail, tmp_path)).communicate(timeout=60)
    assert process.returncode == 0, err


def test_an_interrupted_steps_answers_are_not_taken_for_the_next_ones(make: Any) -> None:
    env = make("foreign_zoo:Walk", 2, workers=2)
    for worker in env._workers:
        worker.ask(b"s")  # what a KeyboardInterrupt between asking and answering leaves behind
    assert env.step(torch.zeros(2, dtype=torch.int64)).obs[:, 1].tolist() == [2, 2]
    readable, _, _ = select.select([worker.sock for worker in env._workers], [], [], 0.3)
    assert readable == []


def test_workers_stay_light() -> None:
    """A worker that imports torch or numba starts in seconds; whatever `rl` and `rl.envs` import, it must not be those."""
    code = "import sys, rl.envs.foreign_worker, rl.envs.atari; print([m for m in ('torch', 'numba') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parents[1], check=True)
    assert result.stdout.strip() == "[]"


def test_only_what_says_that_it_makes_an_env_is_called() -> None:
    """A name may stand in a stranger's config.yaml."""
    with pytest.raises(ForeignEnvError, match=r"function system must say that it makes an env"):
        resolve_foreign("os:system", {"command": "true"})
    with pytest.raises(ForeignEnvError, match="must say that it makes an env"):
        resolve_foreign("foreign_zoo:unannotated")
    assert resolve_foreign("foreign_zoo:make_walk").target is not None
