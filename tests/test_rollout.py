"""The store of T steps of B envs: every row in its place, final observations where episodes were cut, episodes in order of time."""

import torch
from stubs import CountingAgent, CountingEnv

from rl.rollout import Rollout
from rl.types import Act


def fill(env, steps, rollout=None, agent=None):
    rollout = rollout or Rollout(env, steps)
    agent = agent or CountingAgent()
    for t in range(steps):
        act = agent.act(env.obs, env.action_mask)
        rollout.put_act(t, env.obs, env.action_mask, act)
        rollout.put_step(t, env.step(act.action), env)
    return rollout


def ready(*lengths, **how):
    env = CountingEnv(lengths, **how)
    env.reset()
    return env


def test_rows_hold_what_was_seen_done_and_received():
    env = ready(3, 5)
    batch = fill(env, 6).batch(env.obs, None, None, 0.25)
    assert batch.obs[..., 0].tolist() == [[0.0, 1.0]] * 6
    assert batch.obs[:, 0, 1].tolist() == [0, 1, 2, 3, 4, 5]  # not the buffer's last content six times over
    assert batch.obs[..., 2].tolist() == [[0, 0], [1, 1], [2, 2], [0, 3], [1, 4], [2, 0]]
    assert batch.action.tolist() == [[t % 5] * 2 for t in range(6)]
    assert batch.action.dtype == torch.int64 and batch.reward.shape == (6, 2)
    assert batch.truncated[:, 0].tolist() == [False, False, True, False, False, True] and not batch.truncated[:, 1].any()
    assert batch.terminated[:, 1].tolist() == [False] * 4 + [True, False] and not batch.terminated[:, 0].any()
    assert batch.extras["value"].tolist() == [[10.0 * t] * 2 for t in range(6)] and set(batch.extras) == {"value", "log_prob"}
    assert batch.last_obs[:, 1].tolist() == [6, 6] and batch.progress == 0.25 and batch.mask is None


def test_final_observations_are_those_of_the_episode_that_ended():
    env = ready(3, 5)
    batch = fill(env, 6).batch(env.obs, None, None, 0.0)
    ended = batch.terminated | batch.truncated
    # [env, steps in all, age]: its age is the episode's length, while obs shows the next episode's age 0
    assert batch.final_obs[ended].tolist() == [[0, 3, 3], [1, 5, 5], [0, 6, 3]]


def test_episodes_come_in_order_of_time():
    env = ready(3, 5, 2)
    returns, lengths = fill(env, 6).episodes()
    assert lengths.tolist() == [2, 3, 2, 5, 3, 2]
    assert returns.tolist() == [2.0, 3.0, 2.0, 5.0, 3.0, 2.0]


class Lives(CountingEnv):
    """Every second end is only a lost life: to be learnt from, not to be counted."""

    def step(self, action):
        step = super().step(action)
        over = step.terminated | step.truncated
        self.lost = getattr(self, "lost", torch.zeros(self.num_envs, dtype=torch.int32)) + over.int()
        self.episode_over = over & (self.lost % 2 == 0)
        return step


def test_only_whole_games_are_counted():
    env = Lives((2, 3))
    env.episode_over = torch.zeros(2, dtype=torch.bool)
    env.reset()
    rollout = fill(env, 8)
    assert rollout.episodes()[1].tolist() == [2, 3, 2]  # at steps 4, 6, 8 and not at 2, 3, 6
    batch = rollout.batch(env.obs, None, None, 0.0)
    assert int((batch.terminated | batch.truncated).sum()) == 6


def test_a_rollout_is_used_again_and_forgets_the_last_one():
    env = ready(4, 9)
    rollout = fill(env, 6)
    assert rollout.episodes()[1].tolist() == [4]
    first = rollout.batch(env.obs, None, None, 0.0).obs
    fill(env, 6, rollout)
    assert rollout.episodes()[1].tolist() == [4, 9, 4]
    assert rollout.batch(env.obs, None, None, 0.0).obs.data_ptr() == first.data_ptr()
    assert first[:, 0, 1].tolist() == [6, 7, 8, 9, 10, 11]


def test_without_an_end_there_are_no_episodes():
    env = ready(100, 100)
    rollout = fill(env, 3)
    assert [len(x) for x in rollout.episodes()] == [0, 0]
    assert rollout.batch(env.obs, None, None, 0.0).final_obs.shape == (3, 2, 3)


def test_an_env_that_cannot_say_whether_something_ended():
    """On CUDA `ended` is None, foreign envs may not have it: rows are then always copied."""
    env = ready(3, 5)
    rollout, agent = Rollout(env, 6), CountingAgent()
    for t in range(6):
        rollout.put_act(t, env.obs, None, agent.act(env.obs))
        step = env.step(torch.zeros(2, dtype=torch.int64))
        env.ended = None
        rollout.put_step(t, step, env)
    batch = rollout.batch(env.obs, None, None, 0.0)
    assert batch.final_obs[batch.terminated | batch.truncated].tolist() == [[0, 3, 3], [1, 5, 5], [0, 6, 3]]


def test_masks_are_those_of_the_moment():
    env = ready(3, 5, masked=True)
    batch = fill(env, 6).batch(env.obs, None, None, 0.0)
    assert batch.mask is not None and batch.mask.dtype == torch.bool
    assert [row[0].tolist().index(False) for row in batch.mask] == [t % 4 + 1 for t in range(6)]


def test_what_is_not_finite_is_named():
    env = ready(3, 5)
    rollout = fill(env, 6)
    assert rollout.not_finite() == []
    obs, reward = rollout._data["obs"], rollout._data["reward"]
    obs[2, 1, 0] = float("nan")
    assert rollout.not_finite() == ["observation"]
    reward[0, 0] = float("inf")
    assert rollout.not_finite() == ["observation", "reward"]
    obs[2, 1, 0] = 1e38
    obs[3, 1, 0] = 3e38  # their sum overflows, they do not
    assert rollout.not_finite() == ["reward"]
    reward[0, 0], reward[1, 1] = 0.0, float("nan")
    assert rollout.not_finite() == ["reward"]


def test_a_dump_is_a_copy():
    env = ready(3, 5)
    rollout = fill(env, 6)
    dump = rollout.state_dict()
    rollout._data["reward"].fill_(9.0)
    assert float(dump["reward"].max()) == 1.0
    assert {"obs", "action", "reward", "terminated", "truncated", "final_obs", "extra.value"} <= set(dump)


def test_pictures_and_several_actions_keep_shape_and_type():
    env = ready(3, 5)
    rollout = Rollout(env, 2)
    obs = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    rollout.put_act(0, obs, None, Act(torch.tensor([[1, 2], [3, 4]]), None, {}))
    assert rollout._data["obs"].shape == (2, 2, 4, 4, 3) and rollout._data["obs"].dtype == torch.uint8
    assert rollout._data["action"].shape == (2, 2, 2) and rollout._data["action"].dtype == torch.int64
    assert torch.equal(rollout._data["obs"][0], obs)
