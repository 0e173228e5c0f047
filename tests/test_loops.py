"""The on-policy loop with an env and an agent that count: how often, in which order, with what."""

import pytest
import torch
from stubs import CountingAgent, CountingEnv

from rl.loops import LoopState, on_policy
from rl.rollout import Rollout


def parts(lengths=(3, 5), steps=4, **how):
    env, agent = CountingEnv(lengths), CountingAgent(**how)
    env.reset()
    return agent, env, Rollout(env, steps)


def test_steps_updates_and_rows_are_counted():
    agent, env, rollout = parts()
    state = LoopState()
    seen = list(on_policy(agent, env, rollout, 24, state))
    assert [p.env_steps for p in seen] == [8, 16, 24]  # 4 steps of 2 envs
    assert (agent.acted, env.steps, len(agent.batches), env.resets) == (12, 12, 3, 1)
    assert (state.env_steps, state.iterations) == (24, 3)
    assert [p.metrics["train/updates"].item() for p in seen] == [1, 2, 3]
    assert [b.obs[:, 0, 1].tolist() for b in agent.batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]  # no step lost or doubled
    assert [b.last_obs[0, 1].item() for b in agent.batches] == [4, 8, 12]
    assert [b.progress for b in agent.batches] == pytest.approx([0, 1 / 3, 2 / 3])
    assert torch.stack(env.actions)[:, 0].tolist() == [k % 5 for k in range(12)]


def test_what_happened_is_reported_once_and_in_order():
    agent, env, rollout = parts()
    seen = list(on_policy(agent, env, rollout, 24, LoopState()))
    # env 0 ends at steps 3 6 9 12, env 1 at 5 10
    assert [p.episode_lengths.tolist() for p in seen] == [[3], [5, 3], [3, 5, 3]]
    assert [p.episode_returns.tolist() for p in seen] == [[3.0], [5.0, 3.0], [3.0, 5.0, 3.0]]


@pytest.mark.parametrize("total, iterations", [(0, 0), (1, 1), (8, 1), (9, 2), (16, 2)])
def test_the_last_rollout_is_whole(total, iterations):
    agent, env, rollout = parts()
    assert len(list(on_policy(agent, env, rollout, total, LoopState()))) == iterations
    assert len(agent.batches) == iterations and env.steps == 4 * iterations


def test_nothing_happens_before_it_is_asked_for():
    agent, env, rollout = parts()
    loop = on_policy(agent, env, rollout, 24, LoopState())
    assert env.steps == 0
    next(loop)
    assert (env.steps, len(agent.batches)) == (4, 1)


def test_it_goes_on_from_the_state_it_is_given():
    agent, env, rollout = parts(memory=True)
    state = LoopState()
    next(on_policy(agent, env, rollout, 24, state))
    restored = LoopState()
    restored.load_state_dict(state.state_dict())
    assert (restored.env_steps, restored.iterations) == (8, 1) and torch.equal(restored.recurrent, state.recurrent)
    rest = list(on_policy(agent, env, rollout, 24, restored))
    assert [p.env_steps for p in rest] == [16, 24]
    assert agent.batches[1].obs[:, 0, 1].tolist() == [4, 5, 6, 7]
    assert torch.equal(agent.batches[1].first_state, agent.batches[0].last_state)


def test_memory_is_emptied_where_an_episode_ended():
    agent, env, rollout = parts(memory=True)
    list(on_policy(agent, env, rollout, 24, LoopState()))
    handed = [None if s is None else s[:, 0, 0].tolist() for s in agent.states]
    # The age of each env's episode: 3 steps of env 0, 5 of env 1, across the borders of rollouts.
    assert handed == [None, [1, 1], [2, 2], [0, 3], [1, 4], [2, 0], [0, 1], [1, 2], [2, 3], [0, 4], [1, 0], [2, 1]]
    assert agent.batches[0].first_state is None
    assert agent.batches[1].first_state[:, 0, 0].tolist() == [1, 4] and agent.batches[0].last_state[:, 0, 0].tolist() == [1, 4]
    assert agent.batches[1].last_state[:, 0, 0].tolist() == [2, 3]


def test_final_observations_reach_the_agent():
    agent, env, rollout = parts()
    list(on_policy(agent, env, rollout, 24, LoopState()))
    finals = [b.final_obs[b.terminated | b.truncated].tolist() for b in agent.batches]
    assert finals == [[[0, 3, 3]], [[1, 5, 5], [0, 6, 3]], [[0, 9, 3], [1, 10, 5], [0, 12, 3]]]
