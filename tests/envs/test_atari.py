"""Atari preprocessing: on a scripted game whose every frame is known, then on ALE where it is installed."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from rl.envs.atari import AreaResize, AtariPreprocessing, FrameStack, validate
from rl.envs.foreign import ForeignEnvError, make_foreign, resolve_foreign


class Game(gymnasium.Env):
    """A scripted ALE: frame t is filled with t, every frame pays 2, a life is lost at each frame in `deaths`, three lives in all."""

    def __init__(
        self, deaths: tuple[int, ...] = (1000, 2000, 3000), meanings: tuple[str, ...] = ("NOOP", "FIRE", "UP"), cut: int = 0
    ) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255, (8, 8), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(meanings))
        self.deaths, self.meanings, self.cut, self.ale = deaths, meanings, cut, self
        self.games, self.actions = 0, []

    def get_action_meanings(self) -> list[str]:
        return list(self.meanings)

    def lives(self) -> int:
        return 3 - sum(self.t >= death for death in self.deaths)

    def reset(self, **kwargs: Any) -> Any:
        self.t, self.games, self.actions = 0, self.games + 1, []
        return self.frame(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        self.actions.append(int(action))
        return self.frame(), 2.0, self.lives() == 0, self.t == self.cut, {}

    def frame(self) -> np.ndarray:
        return np.full((8, 8), self.t, np.uint8)


def wrap(game: Game, **options: Any) -> AtariPreprocessing:
    return AtariPreprocessing(game, **{"screen_size": None, "noop_max": 0, "fire_reset": False, **options})


class Flicker(Game):
    """Sprites shown on even frames only."""

    def frame(self) -> np.ndarray:
        return np.full((8, 8), 9 if self.t % 2 == 0 else 0, np.uint8)


def test_a_step_skips_frames_adds_rewards_and_takes_the_maximum_of_the_last_two() -> None:
    env = wrap(Flicker(), frame_skip=3, frame_stack=1, clip_reward=False)
    env.reset(seed=0)
    obs, reward, *_ = env.step(2)  # frames 1, 2, 3: the last is dark, the one before bright
    assert reward == 6.0 and obs.shape == (1, 8, 8) and (obs == 9).all()
    assert env.unwrapped.actions == [2, 2, 2]  # type: ignore[attr-defined]
    single = wrap(Flicker(), frame_skip=1, frame_stack=1)
    single.reset(seed=0)
    assert (single.step(0)[0] == 0).all() and (single.step(0)[0] == 9).all()  # one frame only: nothing to take a maximum with


def test_no_pixel_of_two_steps_ago_leaks_into_the_maximum() -> None:
    class Fades(Game):
        def frame(self) -> np.ndarray:
            return np.full((8, 8), 100 - self.t, np.uint8)

    env = wrap(Fades(), frame_skip=4, frame_stack=1)
    env.reset(seed=0)
    assert (env.step(0)[0] == 97).all()  # frames 3 and 4 -> max(97, 96)


def test_rewards_are_clipped_to_their_sign_and_the_score_is_not() -> None:
    class Pays(Game):
        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, [0.0, 7.0, -400.0][self.t - 1], *rest

    env = wrap(Pays(), frame_skip=1)
    env.reset(seed=0)
    assert [(env.step(0)[1], env.raw_reward) for _ in range(3)] == [(0.0, 0.0), (1.0, 7.0), (-1.0, -400.0)]


def test_the_stack_holds_the_last_frames_in_order_and_starts_empty() -> None:
    env = wrap(Game(), frame_skip=1, frame_stack=3)

    def values(obs: np.ndarray) -> list[int]:
        return [int(frame.max()) for frame in obs]

    assert values(env.reset(seed=0)[0]) == [0, 0, 0]
    seen = [env.step(0)[0] for _ in range(120)]
    assert [values(obs) for obs in seen[:3]] == [[0, 0, 1], [0, 1, 2], [1, 2, 3]]
    # Far past the end of the tape; and nothing handed out before has changed.
    assert [values(obs) for obs in seen] == [[max(0, t - 2), max(0, t - 1), t] for t in range(1, 121)]
    assert values(env.reset(seed=0)[0]) == [0, 0, 0] and values(env.step(0)[0]) == [0, 0, 1]


def test_frame_stack_copies_one_frame_a_step() -> None:
    stack = FrameStack(4, (1, 2, 2))
    first, second = stack.push(np.ones((1, 2, 2), np.uint8)), stack.push(np.full((1, 2, 2), 2, np.uint8))
    assert np.shares_memory(first, second)


def test_a_lost_life_is_the_end_to_the_learner_but_not_of_the_game() -> None:
    game = Game(deaths=(4, 8, 12))
    env = wrap(game, frame_skip=2, frame_stack=2)
    env.reset(seed=0)
    env.step(0)
    obs, _, terminated, truncated, _ = env.step(0)
    assert terminated and not truncated and not env.game_over and obs[-1].max() == 4
    obs, _ = env.reset()
    assert game.games == 1 and not env.new_game and obs[-1].max() == 5 and obs[0].max() == 0  # on in the same game, the stack cleared
    flags = []
    while True:
        _, _, terminated, truncated, _ = env.step(0)
        flags.append(env.game_over)
        if terminated and env.game_over:
            break
        if terminated:
            env.reset()
    env.reset()
    assert game.games == 2 and env.new_game and flags.count(True) == 1
    lasting = wrap(Game(deaths=(4, 8, 12)), frame_skip=2, terminal_on_life_loss=False)
    lasting.reset(seed=0)
    assert [lasting.step(0)[2] for _ in range(6)] == [False] * 5 + [True]


def test_a_new_game_can_be_asked_for() -> None:
    game = Game(deaths=(4, 8, 12))
    env = wrap(game)
    env.reset(seed=0)
    env.step(0)
    env.reset(options={"new_game": True})
    assert game.games == 2
    env.reset(seed=3)
    assert game.games == 3


def test_fire_starts_games_and_lives_where_the_game_has_it() -> None:
    game = Game(deaths=(5, 100, 101))
    env = wrap(game, fire_reset=True)
    env.reset(seed=0)
    assert game.actions == [1]
    assert env.step(0)[2] and game.t == 5
    env.reset()
    assert game.actions[-1] == 1 and game.t == 6
    without = Game(meanings=("NOOP", "UP"))
    wrap(without, fire_reset=True).reset(seed=0)
    assert without.actions == []


def test_noops_are_few_and_follow_the_seed() -> None:
    def noops(seed: int, maximum: int = 30) -> int:
        game = Game()
        wrap(game, noop_max=maximum).reset(seed=seed)
        assert set(game.actions) <= {0}
        return game.t

    counts = [noops(seed) for seed in range(300)]
    assert counts == [noops(seed) for seed in range(300)]
    assert min(counts) == 1 and max(counts) == 30 and len(set(counts)) > 25
    assert noops(0, maximum=0) == 0
    game = Game()
    env = wrap(game, noop_max=30)
    starts = []
    for _ in range(5):
        env.reset(options={"new_game": True})
        starts.append(game.t)
    assert len(set(starts)) > 1  # later games draw anew


def test_a_truncated_game_is_truncated() -> None:
    env = wrap(Game(cut=6), frame_skip=4)
    env.reset(seed=0)
    env.step(0)
    _, _, terminated, truncated, _ = env.step(0)
    assert (terminated, truncated, env.game_over, env.raw_reward) == (False, True, True, 4.0)


@pytest.mark.parametrize("size", [(210, 160, 84, 84), (210, 160, 42, 42), (10, 6, 5, 3), (7, 5, 3, 4), (8, 8, 8, 8)])
def test_resize_is_the_area_average(size: tuple[int, int, int, int]) -> None:
    height, width, h, w = size
    image = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    # The naive twin: repeat pixels until both sizes divide, then average blocks.
    fine = np.repeat(np.repeat(image.astype(np.float64), h, axis=0), w, axis=1)
    expected = fine.reshape(h, height, w, width).mean(axis=(1, 3))
    result = AreaResize(*size)(image)
    assert result.dtype == np.uint8 and result.shape == (h, w)
    assert np.abs(result - expected).max() <= 0.5 + 1e-3


def test_wrong_options_are_named() -> None:
    for options, word in [({"frame_skip": 0}, "frame_skip"), ({"screen_size": 400}, "screen_size"), ({"frame_stack": True}, "frame_stack")]:
        with pytest.raises(ValueError, match=word):
            wrap(Game(), **options)
    with pytest.raises(TypeError, match="clip_reward"):
        wrap(Game(), clip_reward="yes")
    with pytest.raises(ValueError, match="obs_type='rgb'"):
        wrap(Game(), grayscale=False)
    with pytest.raises(ValueError, match="NOOP"):
        AtariPreprocessing(Game(meanings=("FIRE", "UP")))
    with pytest.raises(KeyError):
        validate({})


# -- the real thing ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ale() -> None:
    pytest.importorskip("ale_py")


def test_ale_names_and_options(ale: None) -> None:
    factory = resolve_foreign("ALE/Pong-v5", {"frame_stack": 2, "sticky": 0.25, "full_action_space": True})
    assert factory.atari is not None and factory.atari["frame_stack"] == 2 and factory.atari["screen_size"] == 84
    expected = {"full_action_space": True, "frameskip": 1, "repeat_action_probability": 0.25, "obs_type": "grayscale"}
    assert factory.kwargs == expected
    assert resolve_foreign("PongNoFrameskip-v4").atari is not None
    for options, word in [
        ({"frame_skp": 4}, "'frame_skip'"),
        ({"frameskip": 4}, "frame_skip"),
        ({"sticky": 3}, "sticky"),
        ({"frame_skip": "a"}, "frame_skip"),
    ]:
        with pytest.raises(ForeignEnvError, match=word):
            resolve_foreign("ALE/Pong-v5", options)
    with pytest.raises(ForeignEnvError, match="ALE/Pong-v5"):
        resolve_foreign("ALE/Pogn-v5")


def test_breakout_scores_span_the_game_and_not_a_life(ale: None) -> None:
    """The score is the sum over all lives of what the game paid, whether or not the learner's rewards are clipped."""
    env, raw = (make_foreign("ALE/Breakout-v5", 1, seed=1, options={"clip_reward": clip}) for clip in (True, False))
    try:
        assert env.obs.shape == (1, 4, 84, 84) and env.obs.dtype == torch.uint8
        rng = torch.Generator().manual_seed(0)
        lives, clipped, total, length = 0, 0.0, 0.0, 0
        for _ in range(2000):
            action = torch.randint(4, (1,), generator=rng)
            step, raw_step = env.step(action), raw.step(action)
            clipped, total, length = clipped + float(step.reward[0]), total + float(raw_step.reward[0]), length + 1
            assert step.reward[0] == raw_step.reward[0].sign()
            if step.terminated[0] and not env.episode_over[0]:
                lives += 1
                assert env.episode_return[0].isnan() and env.episode_length[0] == 0
                assert (step.obs[0, :3] == 0).all() and (step.obs[0, 3] != 0).any()  # the stack does not reach over lives
                assert (step.final_obs[0, 0] != 0).any()
            elif step.terminated[0]:
                break
        assert lives == 4 and env.episode_length[0] == length and total > 0
        assert env.episode_return[0] == raw.episode_return[0] == total
    finally:
        env.close()
        raw.close()


def test_atari_does_not_depend_on_workers_and_keeps_to_its_time_limit(ale: None) -> None:
    options = {"time_limit": 40, "screen_size": 42, "frame_stack": 2}
    one, two = (make_foreign("ALE/Breakout-v5", 3, seed=7, workers=n, options=options) for n in (1, 2))
    try:
        assert not torch.equal(one.obs[0], one.obs[1])  # other no-ops, another seed
        rng = torch.Generator().manual_seed(0)
        for t in range(1, 121):
            action = torch.randint(4, (3,), generator=rng)
            a, b = one.step(action), two.step(action)
            assert torch.equal(a.obs, b.obs) and torch.equal(a.reward, b.reward) and torch.equal(a.terminated, b.terminated)
            assert a.truncated.all() == (t % 40 == 0)  # in env steps of the game, whatever lives were lost on the way
            if t % 40 == 0:
                assert one.episode_over.all() and one.episode_length.tolist() == [40] * 3
    finally:
        one.close()
        two.close()
