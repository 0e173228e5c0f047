"""A run as a whole: a pure function of its configuration, with checkpoints, evaluations, thresholds, NaN and interrupts around the loop."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rl
from rl import checkpoint, registry
from rl.display import Display
from rl.errors import RunError
from rl.optim import FlatAdam
from rl.registry import EnvEntry

torch.set_num_threads(1)

SMALL: dict[str, Any] = dict(
    algo="ppo", env="CartPole", preset="debug", device="cpu", quiet=True, tensorboard=False, total_steps=512, eval_every=256,
)  # fmt: skip


@pytest.fixture
def train(tmp_path):
    """rl.train with small settings, each time in a folder of its own."""
    count = iter(range(100))

    def run(**settings):
        folder = tmp_path / f"run{next(count)}"
        return rl.train(**{**SMALL, "run_dir": str(folder), **settings}), folder

    return run


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def timeless(folder):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(folder)]


def last(folder, part="agent"):
    return checkpoint.load(folder / "checkpoints", "last")[0][part]


def flat(tree, path=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{path}/{key}").items()}
    return {path: tree}


def equal(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


# --- a pure function of its configuration -----------------------------------------------------------------------------------


NORMALISED = {"env": "Pendulum", "normalize_obs": True, "normalize_reward": True}


@pytest.mark.parametrize("settings", [{}, NORMALISED, {"lstm_size": 4, "fused": False}])
def test_the_seed_decides_every_bit(train, settings):
    (first, a), (second, b), (_, c) = train(seed=1, **settings), train(seed=1, **settings), train(seed=2, **settings)
    for part in ("agent", "env", "loop"):
        assert equal(last(a, part), last(b, part)), part
    assert not equal(last(a), last(c))
    assert timeless(a) == timeless(b) != timeless(c)
    assert first.final == second.final and first.evaluations == second.evaluations


def test_evaluations_checkpoints_and_logs_do_not_influence_training(train):
    base = {"env": "Pendulum", "normalize_obs": True, "eval_every": 512}
    wanted = last(train(**base)[1])
    others = ({"eval_every": 64}, {"eval_episodes": 9}, {"checkpoint_seconds": 0}, {"log_every": 300}, {"tensorboard": True}, {"keep": 1})
    for changes in others:
        assert equal(last(train(**{**base, **changes})[1]), wanted), changes


def test_threads_of_the_env_do_not_matter(train):
    assert equal(last(train(env_threads=2)[1]), last(train()[1]))


# --- what a run leaves ------------------------------------------------------------------------------------------------------


def test_rows_of_metrics(train):
    _, folder = train()
    steps = [int(row["step"]) for row in rows(folder)]
    iterations = [int(row["step"]) for row in rows(folder) if row["train/value_loss"]]
    assert iterations == list(range(64, 513, 64)) and steps == sorted(steps)
    evaluated = [int(row["step"]) for row in rows(folder) if row["eval/mean_reward"]]
    assert evaluated == [256, 512]
    assert sum(bool(row["eval/final_mean_reward"]) for row in rows(folder)) == 1
    first = rows(folder)[0]
    figures = ("policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction", "explained_variance", "learning_rate")
    for name in (*figures, "grad_norm"):
        float(first[f"train/{name}"])
    assert float(first["time/fps"]) > 0 and float(rows(folder)[-3]["rollout/ep_rew_mean"]) > 8


def test_rows_can_be_fewer(train):
    _, folder = train(log_every=200)
    steps = [int(row["step"]) for row in rows(folder) if row["train/value_loss"]]
    assert steps == [64, 320, 512]  # the first, then every 200 at least, and the last


def test_the_mean_return_is_that_of_the_last_hundred_episodes(train):
    _, folder = train(env="Identity", total_steps=2048, num_envs=4)
    state = checkpoint.load(folder / "checkpoints", "last")[0]["run"]
    assert len(state["returns"]) == len(state["lengths"]) == 100 and set(state["lengths"]) == {10.0}
    mean = [row for row in rows(folder) if row["rollout/ep_rew_mean"]][-1]
    assert float(mean["rollout/ep_rew_mean"]) == pytest.approx(sum(state["returns"]) / 100)


def test_the_result_says_everything(train):
    result, folder = train()
    report = result.to_json()
    assert json.loads((folder / "evaluation.json").read_text()) == report
    assert (report["run"], report["env_steps"], report["seed"]) == (str(folder), 512, 0)
    assert 0 < report["learning_seconds"] < report["wall_seconds"]
    assert report["steps_per_second"] == pytest.approx(512 / report["learning_seconds"])
    for e in (report["final"], report["best"], *report["evaluations"]):
        assert e["min"] <= e["mean"] <= e["max"] and e["episodes"] == 4 and e["std"] >= 0
    assert report["best"]["mean"] == max(e["mean"] for e in report["evaluations"])
    assert report["final"]["env_steps"] == 512 and report["notes"] == {}


def test_checkpoints_rotate_and_the_best_stays(train, monkeypatch):
    scores = {128: 30.0, 256: 90.0, 384: 10.0}
    fake_scores(monkeypatch, scores)
    result, folder = train(total_steps=1024, eval_every=128, checkpoint_seconds=0, keep=2)
    steps = [checkpoint.describe(path).step for path in checkpoint.list_checkpoints(folder / "checkpoints")]
    assert steps == [256, 960, 1024]
    best = checkpoint.describe(checkpoint.find(folder / "checkpoints", "best"))
    assert (best.step, best.score) == (256, 90.0)
    assert (result.best["env_steps"], result.best["mean"]) == (256, 90.0)
    assert rl.load(folder).env_steps == 256


def fake_scores(monkeypatch, scores):
    """Evaluations come out as written here; others at 5."""
    from rl import trainer

    real = trainer.evaluate

    def scored(agent, env, episodes, seed, steps=0):
        from dataclasses import replace

        return replace(real(agent, env, episodes, seed, steps), mean=scores.get(steps, 5.0))

    monkeypatch.setattr(trainer, "evaluate", scored)


def test_the_best_checkpoint_is_the_one_the_result_names(train, monkeypatch):
    """Of equal evaluations the later; also when the clock has not asked for a checkpoint there."""
    fake_scores(monkeypatch, {128: 30.0, 256: 90.0, 384: 90.0, 512: 10.0})
    result, folder = train(eval_every=128, checkpoint_seconds=1e6, keep=1)
    best = checkpoint.describe(checkpoint.find(folder / "checkpoints", "best"))
    assert best.step == result.best["env_steps"] == 384


def test_a_run_shorter_than_its_interval_has_an_evaluation(train):
    result, folder = train(total_steps=64, eval_every=1000)
    assert result.best == result.final and len(result.evaluations) == 1
    assert checkpoint.describe(checkpoint.find(folder / "checkpoints", "best")).step == 64


# --- thresholds -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def easy(monkeypatch):
    """CartPole with a threshold that no policy can miss, and one between."""
    for name, threshold in (("EasyPole", 5.0), ("HardPole", 600.0)):
        entry = EnvEntry(name, "rl.envs.cartpole:SPEC", "classic", "discrete", "vector", time_limit=500, threshold=threshold)
        monkeypatch.setitem(registry._env_table, name.lower(), entry)


def test_it_stops_at_the_threshold_if_asked_to(train, easy):
    result, folder = train(env="EasyPole", stop_at_threshold=True)
    assert result.env_steps == result.threshold_step == 256 and 0 < result.threshold_second <= result.wall_seconds
    assert [checkpoint.describe(p).step for p in checkpoint.list_checkpoints(folder / "checkpoints")] == [256]
    assert result.final["env_steps"] == 256


def test_it_goes_on_otherwise(train, easy):
    result, _ = train(env="EasyPole")
    assert (result.env_steps, result.threshold_step) == (512, 256)
    result, _ = train(env="HardPole", stop_at_threshold=True)
    assert (result.env_steps, result.threshold_step, result.threshold_second) == (512, None, None)


# --- longer runs ------------------------------------------------------------------------------------------------------------


def test_a_finished_run_can_be_made_longer(train):
    _, folder = train()
    result = rl.resume(folder, total_steps=1024, quiet=True)
    assert result.env_steps == 1024
    assert rl.config.read_run(folder).common.total_steps == 1024  # type: ignore[attr-defined]
    steps = [int(row["step"]) for row in rows(folder) if row["train/value_loss"]]
    assert steps == list(range(64, 1025, 64))
    assert [e["env_steps"] for e in result.evaluations] == [256, 512, 768, 1024]


def test_resuming_what_is_finished_changes_nothing(train):
    first, folder = train()
    before, metrics = last(folder), timeless(folder)
    again = rl.resume(folder, quiet=True)
    assert (again.env_steps, again.final, again.evaluations) == (first.env_steps, first.final, first.evaluations)
    assert equal(last(folder), before)
    assert timeless(folder) == metrics  # no row twice


def test_constant_rates_make_a_longer_run_equal_to_one_that_was_long_from_the_start(train):
    settings = {"anneal_lr": False, "eval_every": 256}
    _, folder = train(**settings)
    rl.resume(folder, total_steps=1024, quiet=True)
    assert equal(last(folder), last(train(**settings, total_steps=1024)[1]))


def test_resuming_behind_the_evaluation_that_ended_a_run_learns_nothing_more(train, monkeypatch):
    fake_scores(monkeypatch, {128: 30.0, 256: 480.0, 384: 490.0})
    result, folder = train(eval_every=128, stop_at_threshold=True)
    assert result.env_steps == 256
    before = last(folder)
    again = rl.resume(folder, quiet=True)
    assert again.env_steps == 256 and again.threshold_step == 256
    assert equal(before, last(folder))


# --- NaN and Inf ------------------------------------------------------------------------------------------------------------


class Poisoned:
    """A vector env into whose observation or reward NaN gets at certain steps (counted over all retries)."""

    def __init__(self, env, where, at):
        self.__dict__.update(env=env, where=where, at=at, steps=0)

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, action):
        step = self.env.step(action)
        self.__dict__["steps"] += 1
        if self.at(self.steps):
            (step.obs if self.where == "observation" else step.reward)[1] = float("nan" if self.where == "observation" else "inf")
        return step


class Listening(Display):
    def __init__(self):
        super().__init__()
        self.heard = []

    def message(self, text):
        self.heard.append(text)


@pytest.fixture
def heard(monkeypatch):
    display = Listening()
    monkeypatch.setattr("rl.display.make_display", lambda *args, **kwargs: display)
    return display.heard


def poison(monkeypatch, where, at):
    from rl import trainer

    if where == "gradient":
        real, calls = FlatAdam.step, []

        def step(self, *args):
            calls.append(1)
            if at(len(calls)):
                self.grad[5] = float("nan")
            return real(self, *args)

        monkeypatch.setattr(FlatAdam, "step", step)
        return
    make = trainer.make_vec
    monkeypatch.setattr(trainer, "make_vec", lambda *args, **kwargs: Poisoned(make(*args, **kwargs), where, at))


# 16 steps an iteration, 4 updates: both say "in the fifth iteration", after the checkpoint at 256.
POISONS = [("observation", 70, "observation"), ("reward", 70, "reward"), ("gradient", 18, "train/grad_norm")]


@pytest.mark.parametrize("where, at, named", POISONS)
@pytest.mark.parametrize("saved", [True, False])
def test_one_nan_is_named_dumped_and_rolled_back(train, monkeypatch, heard, where, at, named, saved):
    poison(monkeypatch, where, lambda k: k == at)
    result, folder = train(checkpoint_seconds=0 if saved else 1e6, eval_every=10_000)
    assert result.env_steps == 512 and result.notes == {"rollbacks_after_nan": 1}
    (message,) = heard
    good = 256 if saved else 0
    assert named in message and "at step 320" in message and "not_finite" in message and f"going back to step {good}" in message
    assert all(torch.isfinite(x).all() for x in flat(last(folder)).values() if isinstance(x, torch.Tensor) and x.is_floating_point())
    # The dump can be loaded, and shows it.
    state, meta = checkpoint.load(folder / "not_finite", "last")
    assert meta["env_steps"] == 320 and named in state["what"]
    rollout = state["rollout"]
    if where == "observation":
        assert torch.isnan(rollout["obs"]).any()
    elif where == "reward":
        assert torch.isinf(rollout["reward"]).any()
    else:
        assert any(torch.isnan(x).any() for name, x in flat(state["agent"]).items() if name.startswith("/optimizer/exp_avg/"))
    # Metrics go on, no step twice, nothing but numbers.
    steps = [int(row["step"]) for row in rows(folder) if row["train/value_loss"]]
    assert steps == list(range(64, 513, 64))
    assert not any(value in ("nan", "inf") for row in rows(folder) for name, value in row.items() if name.startswith("train/"))


def test_a_nan_observation_is_named_where_the_env_refuses_the_action_made_from_it(train, monkeypatch, heard):
    """Continuous actions: NaN in, NaN out, and a compiled env raises in the middle of the rollout."""
    poison(monkeypatch, "observation", lambda k: k == 70)
    result, _ = train(env="Pendulum", checkpoint_seconds=0, eval_every=10_000, log_every=300)
    assert result.env_steps == 512 and result.notes == {"rollbacks_after_nan": 1}
    assert len(heard) == 1 and "observation" in heard[0] and "going back to step 256" in heard[0]


def test_after_the_rollback_it_is_another_path(train, monkeypatch, heard):
    """The same random numbers would lead to the same NaN."""
    poison(monkeypatch, "reward", lambda k: k == 70)
    _, folder = train(eval_every=10_000)
    monkeypatch.undo()
    assert not equal(last(folder), last(train(eval_every=10_000)[1]))


@pytest.mark.parametrize("where, named", [("observation", "observation"), ("gradient", "train/grad_norm")])
def test_after_several_times_it_gives_up_with_that_message(train, monkeypatch, heard, where, named, tmp_path):
    first = 70 if where == "observation" else 18
    poison(monkeypatch, where, lambda k: k >= first)
    says = rf"NaN or Inf in .*{named}.* at step .*the batch is in .*not_finite.*Gave up after going back 2 times"
    with pytest.raises(RunError, match=says):
        train(nan_retries=2, checkpoint_seconds=0)
    assert len(heard) == 2
    good = last(tmp_path / "run0")
    assert torch.isfinite(flat(good)["/policy/actor.0.weight"]).all()
    assert checkpoint.load(tmp_path / "run0" / "not_finite", "last")[0]["rollout"]["obs"].shape == (16, 4, 4)


def test_no_retries_means_none(train, monkeypatch, heard):
    poison(monkeypatch, "reward", lambda k: k == 70)
    with pytest.raises(RunError, match="NaN or Inf in reward"):
        train(nan_retries=0)
    assert heard == []


@pytest.mark.parametrize("where, at", [("gradient", 18), ("observation", 70)])
def test_a_checkpoint_never_holds_nan_even_if_rows_are_rare(train, monkeypatch, heard, where, at):
    """What is not logged must not be saved unseen: it would be what the run goes back to."""
    poison(monkeypatch, where, lambda k: k == at)
    result, folder = train(log_every=100_000, checkpoint_seconds=0, keep=100, eval_every=10_000)
    assert result.notes == {"rollbacks_after_nan": 1}
    for path in checkpoint.list_checkpoints(folder / "checkpoints"):
        agent = checkpoint.load(path)[0]["agent"]
        assert torch.isfinite(flat(agent)["/policy/actor.0.weight"]).all(), path


# --- interrupts -------------------------------------------------------------------------------------------------------------


def start(*words):
    """The real command in the background."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.Popen([sys.executable, "-m", "rl", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    words = ["preset=debug", "device=cpu", "tensorboard=false", "total_steps=1e9", "eval_every=1e9"]
    words += ["checkpoint_seconds=1e6", "anneal_lr=false"]
    process = start("train", "algo=ppo", "env=CartPole", f"run_dir={folder}", *words)
    try:
        wait_for(lambda: (folder / "metrics.csv").exists() and len(rows(folder)) > 5, process)
        assert not (folder / "checkpoints").exists()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopping after this iteration" in err and f"rl resume {folder}" in err and "Traceback" not in err and out == ""
    step = checkpoint.describe(checkpoint.find(folder / "checkpoints", "last")).step
    assert step == int(rows(folder)[-1]["step"]) > 0  # nothing that was learnt is lost
    result = rl.resume(folder, total_steps=step + 64, quiet=True)
    assert result.env_steps == step + 64
    steps = [int(row["step"]) for row in rows(folder) if row["train/value_loss"]]
    assert steps == list(range(64, step + 65, 64))


def test_a_second_interrupt_stops_at_once_and_the_first_ends_the_iteration(train, monkeypatch):
    from rl import trainer

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may have been born deaf to it
    seen = []
    real = trainer._Run._account

    def account(self, progress):
        seen.append(progress.env_steps)
        if progress.env_steps == 192:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, progress)

    monkeypatch.setattr(trainer._Run, "_account", account)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 192"):
        train()
    assert seen[-1] == 192
    left = signal.signal(signal.SIGINT, inherited)
    assert left is signal.default_int_handler  # ours is gone


def test_parts_are_closed_whatever_happens(train, monkeypatch):
    from rl import trainer

    closed = []
    real = trainer._Run.close
    monkeypatch.setattr(trainer._Run, "close", lambda self: (closed.append(1), real(self)))
    train()
    monkeypatch.setattr(trainer._Run, "_account", lambda self, progress: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train()
    assert closed == [1, 1]
