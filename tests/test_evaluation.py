"""Evaluations: fair to long episodes, in an env and with seeds of their own, and without a trace in the agent."""

from typing import Any

import numpy as np
import pytest
import torch
from stubs import CountingAgent, CountingEnv

import rl
from rl.config import resolve
from rl.evaluation import build_agent, evaluate, evaluation_env, stream_seed
from rl.types import Act


class Always:
    """Acts the same whatever it sees; keeps what it was asked."""

    def __init__(self) -> None:
        self.explored: list[bool] = []

    def act(self, obs: Any, mask: Any = None, state: Any = None, explore: bool = True) -> Act:
        self.explored.append(explore)
        return Act(torch.zeros(len(obs), dtype=torch.int64), None, {})


@pytest.mark.parametrize("episodes, wanted", [(4, [2, 2, 20, 20]), (6, [2, 2, 2, 2, 20, 20]), (2, [2, 20]), (3, [2, 2, 20])])
def test_every_env_plays_its_share(episodes, wanted):
    """Episodes of 2 and of 20 steps side by side: the first n to end would be ten times as many short ones."""
    env = CountingEnv((2, 20) if episodes < 6 else (2, 2, 20))
    result = evaluate(Always(), env, episodes, seed=0, env_steps=77)
    assert result.mean == pytest.approx(np.mean(wanted)) and result.length == pytest.approx(np.mean(wanted))
    assert result.std == pytest.approx(np.std(wanted))
    assert (result.min, result.max, result.episodes, result.env_steps) == (2, 20, episodes, 77)


def test_lost_lives_do_not_count_as_games():
    class Lives(CountingEnv):
        def step(self, action):
            step = super().step(action)
            over = step.terminated | step.truncated
            self.lives = getattr(self, "lives", torch.zeros(2, dtype=torch.int32)) + over.int()
            self.episode_over = over & (self.lives % 3 == 0)
            self.episode_length.copy_(self.lives)  # to be told apart
            return step

    env = Lives((2, 5))
    env.episode_over = torch.zeros(2, dtype=torch.bool)
    result = evaluate(Always(), env, 4, seed=0)
    assert (result.episodes, result.length) == (4, (3 + 6 + 3 + 6) / 4)


def test_it_acts_greedily_and_resets_with_its_seed():
    class Seeded(CountingEnv):
        seeds: list[Any] = []  # noqa: RUF012

        def reset(self, seed=None):
            self.seeds.append(seed)
            return super().reset(seed)

    agent = Always()
    evaluate(agent, Seeded((2, 3)), 4, seed=123)
    assert Seeded.seeds == [123] and agent.explored and not any(agent.explored)


def test_memory_is_emptied_where_an_episode_ended():
    agent = CountingAgent(memory=True)
    env = CountingEnv((2, 3))
    evaluate(agent, env, 4, seed=0)
    assert [None if s is None else s[:, 0, 0].tolist() for s in agent.states] == [None, [1, 1], [0, 2], [1, 0], [0, 1], [1, 2]]


def test_an_env_that_never_ends_is_named(monkeypatch):
    monkeypatch.setattr("rl.evaluation._NO_END", 50)
    with pytest.raises(RuntimeError, match=r"Counting: 1 of 2 evaluation episodes did not end within 50 steps; set env\.time_limit"):
        evaluate(Always(), CountingEnv((2, 1000)), 2, seed=0)


def test_streams_of_seeds_are_apart():
    seeds = {stream_seed(s, *stream) for s in range(20) for stream in ((1,), (2,), (3, 0), (3, 1000), (4, 1000), (5,), (6, 1))}
    assert len(seeds) == 140 and all(0 <= s < 2**63 for s in seeds)
    assert stream_seed(1, 3, 5) == stream_seed(1, 3, 5)


def test_the_seed_decides_and_the_number_of_envs_follows_from_the_episodes(tmp_path):
    resolved = resolve({"algo": "ppo", "env": "CartPole", "preset": "debug", "device": "cpu", "run_dir": str(tmp_path / "r")})
    env = evaluation_env(resolved, 7, "cpu")
    assert env.num_envs == 7 and evaluation_env(resolved, 3000, "cpu").num_envs == 1024
    agent = build_agent(resolved, env, 4, "cpu")
    first = evaluate(agent, env, 7, seed=1)
    assert first == evaluate(agent, env, 7, seed=1)
    assert first == evaluate(agent, rl.make_vec("CartPole", 7, seed=99), 7, seed=1)
    assert any(evaluate(agent, env, 7, seed=s) != first for s in (2, 3, 4))


def test_it_leaves_no_trace_in_the_agent(tmp_path):
    resolved = resolve({
        "algo": "ppo", "env": "Pendulum", "preset": "debug", "device": "cpu", "run_dir": str(tmp_path / "r"), "normalize_obs": True,
        "normalize_reward": True, "env.time_limit": 10,
    })  # fmt: skip
    env = evaluation_env(resolved, 5, "cpu")
    assert env.time_limit == 10  # type: ignore[attr-defined]
    agent = build_agent(resolved, env, 4, "cpu")
    agent.obs_norm.update(torch.randn(10, 3))
    before = {k: v.clone() for k, v in agent.obs_norm.state_dict().items()}
    noise = agent.generator.get_state()
    evaluate(agent, env, 5, seed=1)
    assert all(torch.equal(v, before[k]) for k, v in agent.obs_norm.state_dict().items())
    assert torch.equal(agent.generator.get_state(), noise)
