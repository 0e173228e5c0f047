"""`kill -9` at any moment, `rl resume`, and the weights are those of a run that nobody disturbed - in real processes.

Starting a process that imports torch takes seconds. So one process imports everything and then only forks: a child runs the
command as `python -m rl` would, and is killed for real, from outside or at an exact moment by its own hand. One test starts real
commands.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rl
from rl import checkpoint
from rl.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["algo=ppo", "preset=debug", "device=cpu", "tensorboard=false", "total_steps=1024", "eval_every=256", "num_envs=4", "keep=2"]
KINDS = {
    "discrete-fused": ["env=CartPole", "checkpoint_seconds=0"],
    "continuous-normalised": ["env=Pendulum", "normalize_obs=true", "normalize_reward=true", "checkpoint_seconds=0", "env.time_limit=30"],
    "lstm": ["env=CartPole", "lstm_size=4", "checkpoint_seconds=0", "epochs=1"],
    "rare-checkpoints": ["env=IdentityContinuous", "normalize_reward=true", "fused=false", "checkpoint_seconds=1e6"],
}

# Runs the command in a forked child for every line of standard input: {"words": [...], "moment": [name, count] | null, "log": path}.
# It answers with the child's process id at once, and with its status when it has ended.
NURSERY = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import rl.cli, rl.trainer, rl.checkpoint, rl.evaluation, rl.algos.ppo, rl.display, rl.envs.vector, rl.envs.foreign

def die_at(name, count):
    owner, attribute = {
        "learn": (rl.algos.ppo.PPO, "learn"), "act": (rl.algos.ppo.PPO, "act"), "evaluate": (rl.trainer, "evaluate"),
        "write": (rl.checkpoint, "_write_tensors"),
        "manifest": (rl.checkpoint, "_write_manifest"), "put": (rl.checkpoint, "_put"), "rotate": (rl.checkpoint, "_rotate"),
        "discard": (rl.checkpoint, "_discard"), "log": (rl.logger.RunLogger, "log"), "result": (rl.trainer, "write_json"),
    }[name.split(":")[0]]
    before = not name.endswith(":after")
    real, left = getattr(owner, attribute), [count]
    def mortal(*args, **kwargs):
        left[0] -= 1
        if before and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, attribute, mortal)

# Children inherit what is compiled and loaded.
warm = ["algo=ppo", "preset=debug", "device=cpu", "tensorboard=false", "total_steps=64", "eval_every=64", "num_envs=4", "-q"]
for k, words in enumerate((["env=CartPole"], ["env=Pendulum", "normalize_obs=true", "normalize_reward=true"], ["env=IdentityContinuous"])):
    assert rl.cli.main(["train", *warm, *words, f"run_dir={sys.argv[1]}/{k}"]) == 0

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if order["moment"]:
            die_at(*order["moment"])
        os._exit(rl.cli.main(order["words"]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    def __init__(self, folder: Path):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.log = folder / "log"
        words = [sys.executable, "-c", NURSERY, str(folder)]
        self.process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(self, *words: str, moment=None) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"words": words, "moment": moment, "log": str(self.log)}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())

    def run(self, *words: str, moment=None) -> int:
        self.begin(*words, moment=moment)
        return self.end()

    def said(self) -> str:
        return self.log.read_text()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


@pytest.fixture
def command(nursery):
    """The nursery, with an empty log."""
    nursery.log.write_text("")
    return nursery


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    """The folder of an uninterrupted run of a kind."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole") / kind
            nursery.log.write_text("")
            assert nursery.run("train", *SMALL, *KINDS[kind], f"run_dir={made[kind]}", "-q") == 0, nursery.said()
        return made[kind]

    return folder


def flat(tree, path=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{path}/{key}").items()}
    return {path: tree}


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if v and not k.startswith("time/")} for row in csv.DictReader(file)]


def assert_same(folder, wanted):
    ours, theirs = (checkpoint.load(f / "checkpoints", "last")[0] for f in (folder, wanted))
    for part in ("agent", "env", "loop"):
        a, b = flat(ours[part]), flat(theirs[part])
        assert a.keys() == b.keys()
        for name in a:
            same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
            assert same, f"{part}{name}"
    assert {"/policy/actor.0.weight", "/optimizer/exp_avg/actor.0.weight", "/optimizer/exp_avg_sq/critic.0.bias", "/generator"} <= set(
        flat(ours["agent"])
    )
    for key in ("returns", "lengths", "evaluations", "next_eval"):
        assert ours["run"][key] == theirs["run"][key], key
    assert rows(folder) == rows(wanted)  # none lost, none twice
    mine, whole = (json.loads((f / "evaluation.json").read_text()) for f in (folder, wanted))
    for key in ("env_steps", "final", "best", "evaluations"):
        assert mine[key] == whole[key], key
    best = [checkpoint.describe(checkpoint.find(f / "checkpoints", "best")).step for f in (folder, wanted)]
    assert best[0] == best[1]


MOMENTS = [
    # What happens when it dies for the nth time that ..., in the first process, in the resumed one, ...
    ("discrete-fused", [("learn", 1)]),  # before the first checkpoint
    ("discrete-fused", [("learn", 7), ("act", 40)]),
    ("discrete-fused", [("write", 3)]),
    ("discrete-fused", [("write:after", 3), ("manifest:after", 2)]),
    ("discrete-fused", [("put:after", 5), ("rotate", 1)]),
    ("discrete-fused", [("discard", 2), ("discard:after", 1)]),
    ("discrete-fused", [("evaluate", 2), ("evaluate:after", 1)]),
    ("discrete-fused", [("log", 9), ("log:after", 3)]),
    ("discrete-fused", [("result", 1), ("log", 1)]),  # all is done but for the last file; then the final evaluation comes again
    ("continuous-normalised", [("learn:after", 6), ("put:after", 3), ("evaluate", 1)]),
    ("lstm", [("act", 90), ("write:after", 4)]),
    ("rare-checkpoints", [("learn", 3), ("evaluate", 2), ("learn", 9)]),
]


@pytest.mark.parametrize("kind, moments", MOMENTS, ids=lambda x: x if isinstance(x, str) else "-".join(m[0] for m in x))
def test_killed_at_an_exact_moment(command, undisturbed, tmp_path, kind, moments):
    folder = tmp_path / "run"
    words = ["train", *SMALL, *KINDS[kind], f"run_dir={folder}", "-q"]
    for moment in moments:
        assert command.run(*words, moment=moment) == -signal.SIGKILL, command.said()
        words = ["resume", str(folder), "-q"]
    assert command.run(*words) == 0, command.said()
    assert_same(folder, undisturbed(kind))


@pytest.mark.parametrize("kind", ["discrete-fused", "continuous-normalised", "lstm"])
def test_killed_at_random_moments(command, undisturbed, tmp_path, kind):
    """From outside, wherever it happens to be; the second time in a process that had been resumed."""
    folder = tmp_path / "run"
    wanted = undisturbed(kind)
    chance = random.Random(kind)
    words = ["train", *SMALL, *KINDS[kind], f"run_dir={folder}", "-q"]
    for row in (4, 9):
        child = command.begin(*words)
        until = time.monotonic() + 60
        while not (folder / "metrics.csv").exists() or len(rows(folder)) < row:
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(chance.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert command.end() in (-signal.SIGKILL, 0), command.said()  # it may have been quicker
        words = ["resume", str(folder), "-q"]
    assert command.run(*words) == 0, command.said()
    assert_same(folder, wanted)


def test_the_comparison_would_notice(undisturbed, tmp_path):
    """One bit of one weight."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("discrete-fused"), folder)
    assert_same(folder, undisturbed("discrete-fused"))
    state, meta = checkpoint.load(folder / "checkpoints", "last")
    weight = state["agent"]["policy"]["actor.0.weight"]
    weight.view(torch.int32)[0, 0] += 1
    checkpoint.save(folder / "checkpoints", meta["env_steps"], state, meta=meta, keep=2)
    with pytest.raises(AssertionError, match=r"agent/policy/actor\.0\.weight"):
        assert_same(folder, undisturbed("discrete-fused"))


def test_before_the_first_checkpoint_it_begins_again_and_says_so(command, undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert command.run("train", *SMALL, *KINDS["rare-checkpoints"], f"run_dir={folder}", moment=("learn", 2)) == -9
    assert not (folder / "checkpoints").exists()
    assert command.run("resume", str(folder)) == 0
    assert "stopped before its first checkpoint: beginning again from step 0" in command.said()
    assert_same(folder, undisturbed("rare-checkpoints"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "manifest", "pickle"])
def test_a_damaged_checkpoint_is_skipped_with_a_message(command, undisturbed, tmp_path, damage):
    folder = tmp_path / "run"
    kind = "discrete-fused"
    assert command.run("train", *SMALL, *KINDS[kind], f"run_dir={folder}", "-q", moment=("learn", 12)) == -9
    older, newest = (checkpoint.list_checkpoints(folder / "checkpoints")[k] for k in (-2, -1))
    tensors = newest / checkpoint.TENSORS
    if damage == "truncated":
        os.truncate(tensors, tensors.stat().st_size // 2)
    elif damage == "flipped":
        data = bytearray(tensors.read_bytes())
        data[-5] ^= 1
        tensors.write_bytes(bytes(data))
    elif damage == "manifest":
        (newest / checkpoint.MANIFEST).write_text("{}")
    else:  # a stranger's pickle in its place
        import pickle

        tensors.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert command.run("resume", str(folder)) == 0, command.said()
    assert f"skipped a damaged checkpoint, {newest}:" in command.said()
    assert not (tmp_path / "exploded").exists()
    assert_same(folder, undisturbed(kind))
    assert older.name < newest.name


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_without_any_sound_checkpoint_it_says_so(command, tmp_path):
    folder = tmp_path / "run"
    assert command.run("train", *SMALL, *KINDS["discrete-fused"], f"run_dir={folder}", "-q", moment=("learn", 4)) == -9
    paths = checkpoint.list_checkpoints(folder / "checkpoints")
    for path in paths:
        os.truncate(path / checkpoint.TENSORS, 10)
    assert command.run("resume", str(folder)) == 1
    said = command.said()
    assert "no good checkpoint in" in said and all(path.name in said for path in paths) and "Traceback" not in said
    for path in paths:
        assert path.exists()


def test_a_checkpoint_of_another_network_is_refused(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed("discrete-fused"), folder)
    with pytest.raises(RunError, match="the checkpoint does not fit this run's configuration"):
        rl.resume(folder, hidden=(32, 32), quiet=True)


def test_a_foreign_env_says_that_it_restarts(command, tmp_path):
    folder = tmp_path / "run"
    words = [*SMALL[:4], "env=gym:CartPole-v1", "env.workers=1", "total_steps=256", "eval_every=256", "checkpoint_seconds=0"]
    assert command.run("train", *words, f"run_dir={folder}", moment=("learn", 3)) == -9, command.said()
    step = checkpoint.describe(checkpoint.find(folder / "checkpoints", "last")).step
    assert command.run("resume", str(folder)) == 0, command.said()
    assert "gym:CartPole-v1 cannot be restored: its envs begin new episodes (the agent goes on exactly)" in command.said()
    steps = [int(row["step"]) for row in rows(folder) if "train/value_loss" in row]
    assert steps == list(range(64, 257, 64)) and 0 < step < 256


def test_real_commands_killed_from_outside(undisturbed, tmp_path):
    """The whole way round, without any help: `python -m rl train`, kill -9, `python -m rl resume`."""
    folder, env = tmp_path / "run", {**os.environ, "PYTHONPATH": str(ROOT)}
    train = [sys.executable, "-m", "rl", "train", *SMALL, *KINDS["discrete-fused"], f"run_dir={folder}", "-q"]
    process = subprocess.Popen(train, env=env, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 240
    while not checkpoint.list_checkpoints(folder / "checkpoints"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resume = [sys.executable, "-m", "rl", "resume", str(folder), "--json"]
    done = subprocess.run(resume, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["env_steps"] == 1024
    assert_same(folder, undisturbed("discrete-fused"))
