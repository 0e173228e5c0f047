"""Every algorithm in every env of ours that it can act in, through the command, shrunk by `preset=debug`."""

import csv
import json

import pytest
import torch

from rl import registry
from rl.cli import main

torch.set_num_threads(1)

ALGOS = [entry for entry in registry._ALGOS if entry.loop == "on_policy" or not entry.needs_dataset]
PAIRS = [
    (algo.name, env.name)
    for algo in ALGOS
    for env in registry._RESIDENTS
    if env.action_kind in algo.action_kinds and env.observation_kind in algo.observation_kinds and env.players in algo.players
]
VARIANTS = [
    ("CartPole", "lstm_size=8 minibatches=2 epochs=1"),
    ("Pendulum", "lstm_size=8 normalize_obs=true normalize_reward=true"),
    ("Acrobot", "fused=false target_kl=0.01 value_clip=0.2 entropy_coef=0.01"),
    ("MountainCar", "normalize_obs=true activation=relu hidden=[8,8,8] anneal_lr=false anneal_clip=true"),
    ("MountainCarContinuous", "log_std_init=-1 minibatches=1 max_grad_norm=10 value_coef=1"),
    ("CartPole", "num_envs=1 rollout_steps=64 minibatches=3 normalize_advantage=false"),
    ("CartPole", "env.time_limit=9 env_threads=2 threads=2 log_every=512 keep=1"),
]


def run(folder, capfd, *words):
    status = main(["train", "preset=debug", "device=cpu", "tensorboard=false", f"run_dir={folder}", "--json", *words])
    out, err = capfd.readouterr()
    assert status == 0, err
    torch.set_num_threads(1)
    return json.loads(out)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_there_are_pairs():
    assert {env for _, env in PAIRS} == {entry.name for entry in registry._RESIDENTS} and len(PAIRS) >= 9


@pytest.mark.parametrize("algo, env", PAIRS)
def test_it_trains_and_reports(algo, env, tmp_path, capfd):
    # An untrained policy takes 999 steps over an episode of MountainCarContinuous.
    report = run(tmp_path / "run", capfd, f"algo={algo}", f"env={env}", "total_steps=512", "eval_every=256", "env.time_limit=50")
    assert report["env_steps"] >= 512 and report["final"]["episodes"] == 4
    assert report["final"]["length"] <= 50
    written = rows(tmp_path / "run")
    assert int(written[-1]["step"]) == report["env_steps"]
    for name in ("config.yaml", "evaluation.json", "checkpoints"):
        assert (tmp_path / "run" / name).exists()
    assert main(["eval", str(tmp_path / "run"), "episodes=2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["episodes"] == 2


@pytest.mark.parametrize("env, words", VARIANTS)
def test_variants_of_ppo(env, words, tmp_path, capfd):
    report = run(tmp_path / "run", capfd, "algo=ppo", f"env={env}", "total_steps=512", "eval_every=512", "eval_episodes=2", *words.split())
    assert report["env_steps"] >= 512
    assert main(["resume", str(tmp_path / "run"), f"total_steps={report['env_steps'] + 128}", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["env_steps"] > report["env_steps"]


def test_what_ppo_cannot_do_is_said_before_any_work(tmp_path, capfd):
    cases = ((["minibatches=1000"], "minibatches=1000 does not fit 64 samples"), (["lstm_size=8", "minibatches=5"], "does not fit 4 envs"))
    for words, says in cases:
        assert main(["train", "preset=debug", "device=cpu", "algo=ppo", "env=CartPole", f"run_dir={tmp_path / 'run'}", *words]) == 2
        assert says in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_foreign_env(tmp_path, capfd):
    """Gymnasium's own CartPole, in a worker process."""
    words = ["algo=ppo", "env=gym:CartPole-v1", "total_steps=256", "eval_every=256", "num_envs=2", "env.workers=1"]
    report = run(tmp_path / "run", capfd, *words)
    assert report["env_steps"] == 256 and report["env"] == "gym:CartPole-v1"
    assert main(["resume", str(tmp_path / "run"), "total_steps=320"]) == 0
    err = capfd.readouterr().err
    assert "gym:CartPole-v1 cannot be restored: its envs begin new episodes" in err
