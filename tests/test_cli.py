"""The command: what it prints where, its exit status, and how soon it answers. The work behind it is faked here."""

import importlib
import json
import math
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import rl
from rl import cli
from rl.config import create_run_folder
from rl.errors import ConfigError, RunError

FAKE = ("algo=fake_algo:Fake", "env=CartPole")


@dataclass
class Result:
    folder: Path

    def to_json(self):
        return {"run": str(self.folder), "steps": np.int64(7), "mean": float("nan"), "std": np.float32(0.5)}

    def summary(self):
        return f"trained in {self.folder}"


@dataclass
class Finding:
    level: str
    wrong: str


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Fake modules in place of those that do the work; `work.calls` is what they were asked, `work.act` what they do then."""
    monkeypatch.chdir(tmp_path)
    calls: list = []
    work = types.SimpleNamespace(calls=calls, act=lambda folder: None)

    def run_train(resolved, display):
        calls.append(("train", resolved.to_dict()))
        create_run_folder(resolved)
        print("noise of a library")
        os.write(1, b"noise of a worker process\n")
        display.update(10, {"return": 1.0})
        work.act(resolved.folder)
        return Result(resolved.folder)

    def run_resume(folder, overrides, display):
        calls.append(("resume", folder, overrides, display.total_steps))
        work.act(folder)
        return Result(folder)

    def fake(name, **functions):
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
        package, _, leaf = name.rpartition(".")  # where an earlier test has imported the real one, the package knows it too
        monkeypatch.setattr(importlib.import_module(package), leaf, module, raising=False)

    def record(name, answer):
        def function(*args, **kwargs):
            calls.append((name, args, kwargs))
            return answer() if callable(answer) else answer

        return function

    work.findings = [Finding("warn", "ignores its seed")]
    fake("rl.trainer", run_train=run_train, run_resume=run_resume)
    fake("rl.evaluation", evaluate_run=record("eval", {"mean": 475.25, "episodes": 5}), load=record("load", "agent"))
    fake("rl.watch", watch_run=record("watch", "video.gif"))
    checks = {name: record(name, lambda: work.findings) for name in ("check_env", "check_vector_env")}
    fake("rl.envs.check", **checks)
    monkeypatch.setattr("rl.envs.make_vec", record("make_vec", "a vector env"), raising=False)
    fake("rl.envs.bench", bench_env=record("bench", [{"batch": 1, "backend": "serial", "steps_per_s": 1e6}]))
    return work


@pytest.fixture
def a_run(work):
    """The folder of a finished fake run."""
    assert cli.main(["train", *FAKE, "run_dir=old", "-q"]) == 0
    work.calls.clear()
    return "old"


# --- train and resume -------------------------------------------------------------------------------------------------------


def test_train_passes_the_words_and_reports(work, capsys):
    assert cli.main(["train", *FAKE, "lr=0.5", "run_dir=mine"]) == 0
    shown = capsys.readouterr()
    assert work.calls[0][1]["lr"] == 0.5
    assert shown.out.splitlines()[-1] == "trained in mine" and "step 10/50,000" in shown.err and "step" not in shown.out


def test_json_stands_alone_on_standard_output(work, capfd):
    assert cli.main(["train", *FAKE, "run_dir=mine", "--json"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out) == {"run": "mine", "steps": 7, "mean": None, "std": 0.5}  # NaN is not JSON
    assert "noise of a library" in shown.err and "noise of a worker process" in shown.err and "step 10" in shown.err
    print("back")
    assert capfd.readouterr().out == "back\n"


def test_quiet_shows_no_progress(work, capsys):
    assert cli.main(["train", *FAKE, "-q"]) == 0
    shown = capsys.readouterr()
    assert "step" not in shown.out + shown.err and "trained" not in shown.out


def test_a_dry_run_shows_every_setting_with_its_source_and_writes_nothing(work, capsys):
    assert cli.main(["train", *FAKE, "lr=0.5", "--dry-run"]) == 0
    lines = {line.split()[0]: line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()}
    assert lines["lr"].split() == ["0.5", "command", "line"] and lines["gamma"].split() == ["0.98", "preset", "CartPole"]
    assert lines["hidden"].split() == ["[64,64]", "default"]
    assert cli.main(["train", *FAKE, "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["hidden"] == [64, 64] and shown["sources"]["num_envs"] == "preset CartPole"
    assert not work.calls and os.listdir() == []


def test_resume(work, a_run, capsys):
    assert cli.main(["resume", a_run, "total_steps=2e5"]) == 0
    assert work.calls == [("resume", Path("old"), {"total_steps": "2e5"}, 200_000)]
    assert capsys.readouterr().out == "trained in old\n"


# --- the smaller commands ---------------------------------------------------------------------------------------------------


def test_eval(work, a_run, capsys):
    assert cli.main(["eval", a_run, "episodes=1e1", "seed=3", "checkpoint=last", "--json"]) == 0
    assert work.calls == [("eval", (Path("old"), 10, 3, "last"), {})]
    assert json.loads(capsys.readouterr().out) == {"mean": 475.25, "episodes": 5}
    assert cli.main(["eval", a_run]) == 0
    assert work.calls[1] == ("eval", (Path("old"), 100, None, "best"), {})
    assert "475.25" in capsys.readouterr().out


def test_watch(work, a_run, capsys):
    assert cli.main(["watch", a_run, "out=a.mp4", "checkpoint=2e4"]) == 0
    assert cli.main(["watch", a_run, "--ansi", "episodes=2"]) == 0
    assert work.calls == [
        ("watch", (Path("old"),), {"ansi": False, "episodes": 1, "out": Path("a.mp4"), "checkpoint": "20000"}),
        ("watch", (Path("old"),), {"ansi": True, "episodes": 2}),
    ]
    assert capsys.readouterr().out.splitlines()[-1] == "video.gif"


def test_env_check(work, capsys):
    assert cli.main(["env", "check", "gym:CartPole-v1", "wind=0.5", "env.deep=true"]) == 0
    assert work.calls == [("check_env", ("gym:CartPole-v1", {"wind": 0.5, "deep": True}), {})]
    out = capsys.readouterr().out
    assert "ignores its seed" in out and out.endswith("gym:CartPole-v1: ok\n")
    work.findings[0].level = "fail"
    assert cli.main(["env", "check", "cartpole", "length=2", "--json"]) == 1
    name, (make,), _ = work.calls[1]  # one of ours is checked as the vector env that it is
    assert name == "check_vector_env" and make() == "a vector env"
    assert work.calls[2] == ("make_vec", ("CartPole", 1), {"options": {"length": 2}})
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"env": "CartPole", "ok": False, "findings": [{"level": "fail", "wrong": "ignores its seed"}]}


def test_env_bench(work, capsys):
    assert cli.main(["env", "bench", "CartPole", "batch=1,64", "backend=serial,cuda", "seconds=0.5"]) == 0
    assert cli.main(["env", "bench", "CartPole", "--json"]) == 0
    assert work.calls == [
        ("bench", ("CartPole", [1, 64], ["serial", "cuda"], 0.5), {}),
        ("bench", ("CartPole", [1, 64, 1024, 16384], None, 1.0), {}),
    ]
    table, shown = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert table.splitlines()[0].split() == ["batch", "backend", "steps_per_s"]
    assert json.loads(shown)["results"] == [{"batch": 1, "backend": "serial", "steps_per_s": 1e6}]


def test_list(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "proximal policy optimisation" in out and "MountainCarContinuous" in out and "475" in out
    assert cli.main(["list", "algos"]) == 0
    assert "two-link arm" not in capsys.readouterr().out
    assert cli.main(["list", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in shown["envs"]} >= {"CartPole", "Pendulum"} and "debug" in shown["algos"][0]["presets"]
    assert cli.main(["list", "envs", "--json"]) == 0
    assert "algos" not in json.loads(capsys.readouterr().out)


# --- what goes wrong --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        (["train"], "algo is missing"),
        (["train", "algo=ppq", "env=CartPole"], "did you mean 'ppo'"),
        (["train", *FAKE, "learning_rate=1"], "did you mean 'lr'"),
        (["train", *FAKE, "--lr", "3e-4"], "write lr=3e-4"),
        (["train", *FAKE, "-lr", "3e-4"], "write lr=3e-4"),
        (["train", *FAKE, "lr", "3e-4"], "write lr=3e-4"),
        (["train", *FAKE, "--total-steps=100"], "write total_steps=100"),
        (["resume"], "Missing argument 'RUN'"),
        (["resume", "nowhere"], "no run in 'nowhere'"),
        (["resume", "old", "env=Acrobot"], "env is fixed"),
        (["resume", "old", "learning_rate=1"], "did you mean 'lr'"),
        (["eval", "nowhere"], "no run in 'nowhere'"),
        (["eval", "old", "episodes=x"], "episodes must be a whole number, not 'x'"),
        (["eval", "old", "episodes=0"], "episodes must be at least 1"),
        (["eval", "old", "episode=5"], "did you mean 'episodes'"),
        (["eval", "old", "checkpoint=lats"], "did you mean 'last'"),
        (["watch", "old", "out=film.avi"], "must end in .gif or .mp4"),
        (["env", "bench", "CartPole", "batch=1,x"], "batch must be a whole number, not 'x'"),
        (["env", "bench", "CartPole", "seconds=-1"], "seconds must be a number above 0"),
        (["env", "check", "CartPol"], "did you mean 'CartPole'"),
        (["list", "algo"], "'algo' is not one of"),
        (["trian"], "No such command 'trian'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_words_are_status_2_without_a_traceback(work, a_run, capsys, words, says):
    capsys.readouterr()
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert says in shown.err and "Traceback" not in shown.err and shown.out == "" and not work.calls


@pytest.mark.parametrize(
    "error, status, says, traceback",
    [
        (RunError("NaN in the loss, three times"), 1, "error: NaN in the loss", False),
        (ImportError("Atari needs ale-py: pip install 'rl-suite[atari]'"), 1, "pip install", False),
        (ImportError("no module x"), 1, "This is a bug", True),
        (ZeroDivisionError("oh"), 1, "This is a bug", True),
        (ConfigError("too late, but still words"), 2, "too late", False),
    ],
)
def test_failures_while_working(work, capsys, error, status, says, traceback):
    def fail(folder):
        raise error

    work.act = fail
    assert cli.main(["train", *FAKE, "-q", "--json"]) == status
    shown = capsys.readouterr()
    assert says in shown.err and ("Traceback" in shown.err) == traceback and shown.out == ""


def test_an_interrupt_says_how_to_go_on(work, capsys):
    def interrupt(folder):
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "step_000000000100").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    work.act = interrupt
    assert cli.main(["train", *FAKE, "run_dir=mine"]) == 130
    assert "`rl resume mine` goes on" in capsys.readouterr().err
    assert cli.main(["resume", "mine"]) == 130
    assert "`rl resume mine` goes on" in capsys.readouterr().err

    def early(folder):
        raise KeyboardInterrupt

    work.act = early
    assert cli.main(["train", *FAKE, "run_dir=other"]) == 130
    assert "`rl resume other` begins again" in capsys.readouterr().err


# --- Python's side ----------------------------------------------------------------------------------------------------------


def test_the_same_from_python(work):
    result = rl.train("algo=fake_algo:Fake", env="CartPole", hidden=(8, 8), run_dir="mine", env_options={"time_limit": 9}, quiet=True)
    assert result.folder == Path("mine")
    assert work.calls[0][1]["hidden"] == [8, 8] and work.calls[0][1]["env.time_limit"] == 9
    rl.resume("mine", total_steps=60_000, quiet=True)
    assert work.calls[1] == ("resume", Path("mine"), {"total_steps": 60_000}, 60_000)
    assert rl.load("mine") == "agent" and rl.evaluate("mine")["mean"] == 475.25
    with pytest.raises(ConfigError, match="twice"):
        rl.train("lr=1", lr=2)
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        rl.train(algo="fake_algo:Fake", env="CartPole", learning_rate=1)


# --- how soon it answers ----------------------------------------------------------------------------------------------------

HEAVY = ("torch", "numba", "gymnasium", "numpy", "omegaconf", "rich", "tensorboard")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["list"], ["list", "--json"]])
def test_light_commands_import_nothing_heavy(rl_process, words):
    done = rl_process(*words, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "rl.cli" in imported  # the list is what it should be
    assert not imported & set(HEAVY)


def test_light_commands_are_quick(rl_process):
    import time

    def seconds(*words):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert rl_process(*words).returncode == 0
            times.append(time.perf_counter() - start)
        return min(times)

    # The bars are 0.25 and 0.35 s on an idle machine; tests share theirs, so twice that is the alarm.
    assert seconds("--help") < 0.5 and seconds("list") < 0.7


def test_version_and_import(rl_process):
    assert rl_process("--version").stdout.strip() == f"rl-suite, version {rl.__version__}"
    pyproject = (Path(rl.__file__).parent.parent / "pyproject.toml").read_text()
    assert f'version = "{rl.__version__}"' in pyproject


def test_a_process_of_its_own(rl_process, tmp_path):
    done = rl_process("train", *FAKE, "learning_rate=1", "--json")
    assert (done.returncode, done.stdout) == (2, "") and "did you mean 'lr'" in done.stderr
    done = rl_process("train", *FAKE, "--dry-run", "--json")
    assert done.returncode == 0 and math.isclose(json.loads(done.stdout)["settings"]["lr"], 1e-3)
    assert os.listdir(tmp_path) == []
