"""The suite from Python, and the figures it reports in JSON."""

import json
from typing import Any

import numpy as np
import pytest
import torch

import rl
from rl.checkpoint import CheckpointError
from rl.cli import main
from rl.errors import ConfigError

SMALL: dict[str, Any] = dict(algo="ppo", preset="debug", device="cpu", quiet=True, tensorboard=False, total_steps=256, eval_every=128)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short run per kind of policy, made when first asked for."""
    made = {}

    def make(env, **settings):
        key = (env, *sorted(settings.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("runs") / str(len(made))
            rl.train(env=env, run_dir=str(folder), **{**SMALL, **settings})
            made[key] = folder
        return made[key]

    return make


def test_train_returns_what_came_of_it(runs, tmp_path):
    result = rl.train("env=CartPole", "seed=3", run_dir=str(tmp_path / "run"), **SMALL)
    assert (result.algo, result.env, result.seed, result.env_steps) == ("ppo", "CartPole", 3, 256)
    assert result.run == str(tmp_path / "run") and (tmp_path / "run" / "config.yaml").is_file()
    assert result.final["mean"] >= 8 and result.final["episodes"] == 4
    with pytest.raises(ConfigError, match="already holds a run"):
        rl.train(env="CartPole", run_dir=str(tmp_path / "run"), **SMALL)
    with pytest.raises(ConfigError, match="env is given twice"):
        rl.train("env=CartPole", env="Pendulum", **SMALL)


@pytest.mark.parametrize(
    "env, settings, action_shape",
    [
        ("CartPole", {}, ()), ("Pendulum", {}, (1,)), ("IdentityMultiDiscrete", {}, (2,)),
        ("Pendulum", {"normalize_obs": True, "fused": False}, (1,)), ("CartPole", {"lstm_size": 4}, ()),
    ],
)  # fmt: skip
def test_predict_for_one_observation_and_for_a_batch(runs, env, settings, action_shape):
    policy = rl.load(runs(env, **settings))
    vec = policy.make_env(5)
    obs = vec.reset(1).numpy().copy()
    actions, state = policy.predict(obs, deterministic=True)
    assert isinstance(actions, np.ndarray) and actions.shape == (5, *action_shape)
    assert (state is not None) == ("lstm_size" in settings)
    for i in range(5):
        one, _ = policy.predict(obs[i])
        assert np.shape(one) == action_shape
        np.testing.assert_allclose(one, actions[i], rtol=1e-5, atol=1e-6)
        assert policy.action_space.contains(np.asarray(one, policy.action_space.dtype))
    again, _ = policy.predict(torch.from_numpy(obs))
    np.testing.assert_array_equal(again, actions)
    np.testing.assert_array_equal(policy.predict(obs.astype(np.float64))[0], actions)
    with pytest.raises(ValueError, match=r"obs must have shape .* or \(B, \.\.\.\), got"):
        policy.predict(np.zeros((2, 17), np.float32))


def test_deterministic_or_not(runs):
    policy = rl.load(runs("Pendulum"))
    obs = np.repeat(policy.make_env(1).reset(1).numpy(), 200, 0)
    greedy, drawn = policy.predict(obs)[0], policy.predict(obs, deterministic=False)[0]
    assert np.ptp(greedy) == 0 and np.ptp(drawn) > 0.5
    assert np.abs(drawn).max() <= 2.0 == np.abs(drawn).max().round(6)  # clipped to the torque there is


def test_a_policy_with_memory_takes_its_state_back(runs):
    policy = rl.load(runs("CartPole", lstm_size=4))
    obs = policy.make_env(1).reset(1).numpy()[0]
    _, first = policy.predict(obs)
    _, second = policy.predict(obs, first)
    _, fresh = policy.predict(obs)
    assert torch.equal(first, fresh) and not torch.equal(second, first)


def test_masks_reach_the_policy(runs):
    policy = rl.load(runs("Identity"))
    obs = np.eye(4, dtype=np.float32)
    for a in range(4):
        mask = np.zeros((4, 4), bool)
        mask[:, a] = True
        assert (policy.predict(obs, mask=mask)[0] == a).all()
        assert policy.predict(obs[0], mask=mask[0])[0] == a


def test_load_takes_the_checkpoint_asked_for(runs):
    folder = runs("CartPole")
    assert rl.load(folder).env_steps in (128, 256)
    from rl.evaluation import load

    assert load(folder, "last").env_steps == load(folder, 256).env_steps == load(folder, "256").env_steps == 256
    with pytest.raises(CheckpointError, match="no checkpoint 3"):
        load(folder, 3)
    with pytest.raises(ConfigError, match="no run in"):
        rl.load(folder / "nowhere")


def test_a_loaded_policy_is_the_one_that_was_trained(runs):
    """The evaluation at the end, repeated from the files."""
    from rl.evaluation import evaluate, load, stream_seed

    for env, settings in (("CartPole", {}), ("Pendulum", {"normalize_obs": True, "fused": False})):
        folder = runs(env, **settings)
        final = json.loads((folder / "evaluation.json").read_text())["final"]
        policy = load(folder, "last")
        again = evaluate(policy.agent, policy.make_env(4), 4, stream_seed(0, 4, 256), 256)
        assert again.to_json() == final


def test_make_vec():
    env = rl.make_vec("CartPole", 3, seed=5)
    obs = env.reset(5)
    assert obs.shape == (3, 4) and env.num_envs == 3
    step = env.step(torch.zeros(3, dtype=torch.int64))
    assert step.reward.tolist() == [1.0, 1.0, 1.0]
    assert rl.make_vec("CartPole", 2, time_limit=7).time_limit == 7  # type: ignore[attr-defined]


def test_evaluate(runs):
    report = rl.evaluate(runs("CartPole"), episodes=6, seed=2)
    assert (report["episodes"], report["seed"], report["threshold"]) == (6, 2, 475.0)
    assert report == rl.evaluate(runs("CartPole"), episodes=6, seed=2)


def one_object(text):
    assert text.count("\n") == 1 and text.endswith("\n")
    return json.loads(text)


def test_train_prints_one_json_object(tmp_path, capfd):
    words = [f"{k}={v}" for k, v in SMALL.items() if k != "quiet"]
    assert main(["train", "env=CartPole", f"run_dir={tmp_path / 'r'}", *words, "--json"]) == 0
    out, err = capfd.readouterr()
    report = one_object(out)
    assert {"run", "algo", "env", "seed", "env_steps", "wall_seconds", "learning_seconds", "steps_per_second"} <= set(report)
    assert {"final", "best", "threshold", "threshold_step", "threshold_second", "evaluations"} <= set(report)
    assert {"mean", "std", "episodes", "env_steps"} <= set(report["final"]) and {"mean", "std", "episodes"} <= set(report["best"])
    assert report["env_steps"] == 256 and 0 < report["learning_seconds"] <= report["wall_seconds"]
    assert report["steps_per_second"] == pytest.approx(256 / report["learning_seconds"], rel=1e-6)
    assert report["threshold"] == 475.0 and report["threshold_step"] is None and report["threshold_second"] is None
    assert [e["env_steps"] for e in report["evaluations"]] == [128, 256]
    assert "step 256/256" in err
    assert json.loads((tmp_path / "r" / "evaluation.json").read_text())["final"] == report["final"]
    # The one line goes on: resume answers the same.
    assert main(["resume", str(tmp_path / "r"), "total_steps=320", "--json"]) == 0
    assert one_object(capfd.readouterr().out)["env_steps"] == 320


def test_eval_prints_one_json_object(runs, capfd):
    capfd.readouterr()
    assert main(["eval", str(runs("CartPole")), "episodes=5", "--json"]) == 0
    report = one_object(capfd.readouterr().out)
    assert report["episodes"] == 5 and {"mean", "std", "min", "max", "run", "env", "algo", "checkpoint", "env_steps"} <= set(report)


def test_without_json_there_is_a_summary_for_people(tmp_path, capfd):
    words = [f"{k}={v}" for k, v in SMALL.items() if k != "quiet"]
    assert main(["train", "env=CartPole", f"run_dir={tmp_path / 'r'}", *words]) == 0
    out = capfd.readouterr().out
    assert "ppo on CartPole: 256 env steps" in out and "greedy episodes" in out and "threshold 475: not reached" in out
    assert str(tmp_path / "r") in out
