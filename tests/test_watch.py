"""A film shows every state of an episode, the last one included, and is written even when it is cut short."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rl import watch
from rl.errors import ConfigError, RunError
from rl.types import Act, Step
from rl.watch import film, watch_run


def picture(step: int) -> np.ndarray:
    """A grey field in which a red square is at place `step`."""
    out = np.full((20, 40, 3), 90, np.uint8)
    out[8:12, 2 * step : 2 * step + 2] = (220, 30, 30)
    return out


class FakeEnv:
    """Counts steps; an episode ends after `length` of them. Reward is the number of the step."""

    name = "My/Fake:Env"
    num_envs = 1
    device = torch.device("cpu")
    action_mask = None

    def __init__(self, length: int = 5, autoreset: str = "same_step", truncates: bool = False, drawn: Any = picture):
        self.length, self.autoreset, self.truncates, self.drawn = length, autoreset, truncates, drawn
        self.at, self.closed, self.seen = 0, False, []
        self.episode_return = torch.zeros(1)

    def reset(self, seed: int | None = None) -> torch.Tensor:
        self.at = 0
        return torch.zeros(1, 1)

    def reset_envs(self, mask: torch.Tensor) -> torch.Tensor:
        assert mask.tolist() == [True] and self.at == self.length
        return self.reset()

    def step(self, action: torch.Tensor) -> Step:
        assert self.at < self.length, "an ended env was stepped"
        self.at += 1
        over = torch.tensor([self.at == self.length])
        reward = torch.tensor([float(self.at)])
        self.episode_return[0] = 100.0
        if bool(over) and self.autoreset == "same_step":
            self.at = 0
        no = torch.zeros(1, dtype=torch.bool)
        ends = (no, over) if self.truncates else (over, no)
        return Step(torch.full((1, 1), float(self.at)), reward, *ends, torch.zeros(1, 1))

    def render(self, index: int = 0) -> np.ndarray:
        assert index == 0
        return self.drawn(self.at)

    def close(self) -> None:
        self.closed = True


class FakePolicy:
    """Remembers in its recurrent state how often it acted in this episode."""

    env_steps = 1200

    def __init__(self, env: Any, family: str = "classic"):
        self.env, self.asked = env, {}
        self.resolved = types.SimpleNamespace(env_entry=types.SimpleNamespace(family=family))
        self.states: list[Any] = []

    def make_env(self, num_envs: int, **how: Any) -> Any:
        assert num_envs == 1
        self.asked = how
        return self.env

    def act(self, obs: torch.Tensor, mask: Any, state: Any) -> Act:
        self.states.append(state)
        return Act(torch.zeros(1, dtype=torch.int64), (state or 0) + 1, {})


class Notes(list[str]):
    def message(self, text: str, /) -> None:
        self.append(text)


@pytest.fixture
def stub(monkeypatch):
    """Put a policy where `rl.evaluation.load` looks for one."""

    def put(policy: Any) -> list[Any]:
        calls: list[Any] = []

        def load(folder: Path, checkpoint: str) -> Any:
            calls.append((folder, checkpoint))
            return policy

        module = types.ModuleType("rl.evaluation")
        module.load = load  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "rl.evaluation", module)
        monkeypatch.setattr("rl.evaluation", module, raising=False)
        return calls

    return put


def read_gif(path: Path) -> tuple[list[np.ndarray], list[int]]:
    frames, durations = [], []
    with Image.open(path) as image:
        for k in range(getattr(image, "n_frames", 1)):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(int(image.info["duration"]))
    return frames, durations


def places(frames: list[np.ndarray]) -> list[int]:
    """Where the red square is in each frame (the picture is enlarged eightfold)."""
    return [int(np.flatnonzero(np.abs(frame[80].astype(int) - (220, 30, 30)).sum(1) < 30)[0]) // 16 for frame in frames]


# --- what is played ----------------------------------------------------------------------------------------------------------


def test_a_native_env_shows_its_final_state():
    policy = FakePolicy(FakeEnv(autoreset="disabled"))
    frames = list(film(policy, policy.env, 2))
    assert [frame.picture.tolist() for frame in frames] == [picture(step).tolist() for step in [0, 1, 2, 3, 4, 5] * 2]
    assert [(f.episode, f.step, f.reward, f.total) for f in frames[6:]] == [
        (2, 0, 0, 0), (2, 1, 1, 1), (2, 2, 2, 3), (2, 3, 3, 6), (2, 4, 4, 10), (2, 5, 5, 100),
    ]  # fmt: skip
    assert [frame.end for frame in frames[:6]] == [""] * 5 + ["terminated"]
    assert policy.states == [None, 1, 2, 3, 4] * 2  # memory starts anew with the episode


def test_a_foreign_env_repeats_its_last_picture_and_says_so():
    policy = FakePolicy(FakeEnv(truncates=True), "foreign")
    frames = list(film(policy, policy.env, 2))
    assert [frame.picture.tolist() for frame in frames] == [picture(step).tolist() for step in [0, 1, 2, 3, 4, 4] * 2]
    assert frames[5].end == "truncated (final state not shown)" and frames[5].total == 100


def test_a_lost_life_is_not_the_end():
    """Atari: terminated to the learner, but the game goes on until `episode_over`."""

    class Lives(FakeEnv):
        lives = 2

        @property
        def episode_over(self) -> torch.Tensor:
            return torch.tensor([self.lives == 0])

        def step(self, action: torch.Tensor) -> Step:
            result = super().step(action)
            self.lives -= int(result.terminated[0])
            self.episode_return[0] = torch.nan if self.lives else 12.0
            return result

    policy = FakePolicy(Lives(length=3), "foreign")
    frames = list(film(policy, policy.env, 1))
    assert [frame.step for frame in frames] == list(range(7)) and frames[-1].total == 12 and policy.states[3] is None


@pytest.mark.parametrize("autoreset", ["disabled", "same_step"])
def test_an_endless_episode_is_left(autoreset):
    env = FakeEnv(length=100, autoreset=autoreset)
    env.reset_envs = lambda mask: env.reset()
    frames = list(film(FakePolicy(env), env, 2, max_steps=3))
    assert [frame.step for frame in frames] == [0, 1, 2, 3] * 2 and frames[-1].end == "left after 3 steps"
    assert frames[-1].picture.tolist() == picture(3).tolist()


def test_cartpole_falls_on_the_last_frame():
    """With the real env: the last picture is that of a pole beyond its limit, not of the next episode's start."""
    from rl.envs.cartpole import SPEC
    from rl.envs.vector import NativeVecEnv

    env = NativeVecEnv(SPEC, 1, autoreset="disabled", seed=3)
    states = []
    policy = FakePolicy(env)  # always pushes to the left
    for frame in film(policy, env, 2):
        assert SPEC.render is not None and (frame.picture == SPEC.render(env.state[0].numpy())).all()
        states.append((frame.end, abs(float(env.state[0, 2])) > 12 * np.pi / 180, frame.step, frame.total))
    ended = [state for state in states if state[0]]
    assert len(ended) == 2 and all(end == "terminated" and fallen and step == total for end, fallen, step, total in ended)
    assert not any(fallen for end, fallen, _, _ in states if not end)


# --- films -------------------------------------------------------------------------------------------------------------------


def test_a_gif_of_a_run(tmp_path, stub):
    policy = FakePolicy(FakeEnv(autoreset="disabled"))
    calls = stub(policy)
    path = watch_run(tmp_path, episodes=2, seed=7, fps=30, checkpoint="last")
    assert path == tmp_path / "video" / "My-Fake-Env-1200.gif" and calls == [(tmp_path, "last")]
    assert policy.asked == {"autoreset": "disabled", "seed": 7} and policy.env.closed
    frames, durations = read_gif(Path(path))
    assert places(frames) == [0, 1, 2, 3, 4, 5] * 2
    assert frames[0].shape == (160 + watch.STRIP, 320, 3)
    for step, frame in zip([0, 1, 2, 3, 4, 5] * 2, frames):
        expected = picture(step).repeat(8, 0).repeat(8, 1).astype(int)
        assert np.abs(frame[:160] - expected).max() <= 8
        assert (frame[160:] > 200).any()  # there is a caption
    assert sum(durations) == pytest.approx(1000 * (12 / 30 + 2), abs=10) and durations[5] > 1000 and durations[:3] == [30, 40, 30]
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # type: ignore[union-attr]


def test_a_foreign_run_is_drawn_on_demand(tmp_path, stub):
    policy, notes = FakePolicy(FakeEnv(), "foreign"), Notes()
    stub(policy)
    path = watch_run(tmp_path, out=tmp_path / "new" / "film.GIF", display=notes)
    assert policy.asked == {"render": True} and path == tmp_path / "new" / "film.GIF"
    assert places(read_gif(Path(path))[0]) == [0, 1, 2, 3, 4, 4] and "repeats the one before" in notes[0]


def test_the_caption_leaves_out_what_does_not_fit():
    frame = watch.Frame(picture(0), 2, 35, -0.5, 1234.5678, "terminated")
    assert watch.caption(frame, "CartPole") == "CartPole   episode 2   step 35   reward -0.5   return 1235   terminated"
    assert watch.caption(frame, "A very long name of an env " * 3, 310).startswith("episode 2   step 35")
    assert watch.caption(frame, "CartPole", 10) == "step 35   return 1235   terminated"


def test_gif_writer_agrees_with_pillow_on_noise(tmp_path):
    """Random pictures of many colours and sizes of change, and unchanged ones: what is read back is near what was written."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (37, 53, 3), np.uint8)]
    for k in range(12):
        image = images[-1].copy()
        y, x, size = rng.integers(0, 37), rng.integers(0, 53), int(rng.integers(0, 30)) * (k != 5)
        image[y : y + size, x : x + size] = rng.integers(0, 256, (1, 1, 3)) if k % 2 else rng.integers(0, 256, 3)
        images.append(image)
    with open(tmp_path / "a.gif", "wb") as file:
        writer = watch.GifWriter(file, 20)
        for image in images:
            writer.add(Image.fromarray(image))
        writer.close()
    frames, durations = read_gif(tmp_path / "a.gif")
    assert sum(durations) == 13 * 50 and len(frames) <= 12 and 100 in durations  # the unchanged one makes its neighbour last
    assert np.abs(frames[0].astype(int) - images[0]).mean() < 16  # 256 colours for 2,000
    assert np.abs(frames[-1].astype(int) - images[-1]).mean() < 16


def test_an_mp4(tmp_path, stub):
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    policy = FakePolicy(FakeEnv(autoreset="disabled", drawn=lambda at: picture(at)[:-1]))  # an odd height too
    stub(policy)
    path = watch_run(tmp_path, out=tmp_path / "a.mp4", fps=10)
    reader = imageio.get_reader(path)
    frames = [np.asarray(frame) for frame in reader]
    reader.close()
    assert len(frames) == 6 + 10 and frames[0].shape == (152 + watch.STRIP, 320, 3)
    squares = [int(np.argmax(frame[80, :, 0].astype(int) - frame[80, :, 1])) // 16 for frame in frames]
    assert squares == [0, 1, 2, 3, 4, 5] + [5] * 10


def test_an_interrupt_writes_what_was_filmed(tmp_path, stub):
    class Interrupted(FakeEnv):
        def step(self, action: torch.Tensor) -> Step:
            if self.at == 3:
                raise KeyboardInterrupt
            return super().step(action)

    policy, notes = FakePolicy(Interrupted(autoreset="disabled")), Notes()
    stub(policy)
    path = watch_run(tmp_path, display=notes)
    assert places(read_gif(Path(path))[0]) == [0, 1, 2, 3] and notes == ["interrupted: 4 frames were filmed"] and policy.env.closed


# --- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"out": "a.avi"}, r"out must end in \.gif or \.mp4, not 'a\.avi'; did you mean 'a\.mp4'\?"),
        ({"out": "a.png"}, "did you mean 'a.gif'"),
        ({"out": "film"}, "did you mean 'film.gif'"),
        ({"out": "."}, "out must end in"),
        ({"out": "folder.gif"}, "is a folder"),
        ({"out": "file/a.gif"}, "cannot write file/a.gif: (Not a directory|File exists)"),
        ({"ansi": True, "out": "a.gif"}, "leave out out=a.gif"),
        ({"episodes": 0}, "episodes"),
        ({"fps": 0}, "fps"),
        ({"folder": "nowhere"}, "no run in 'nowhere'"),
    ],
)
def test_errors_before_any_work(tmp_path, monkeypatch, stub, how, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.gif").mkdir()
    (tmp_path / "file").write_text("")
    calls = stub(None)
    with pytest.raises(ConfigError, match=words):
        watch_run(**{"folder": ".", **how})
    assert calls == [] and sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.gif"]


def test_an_mp4_without_the_extra(tmp_path, monkeypatch, stub):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    calls = stub(None)
    with pytest.raises(ImportError, match=r"pip install 'rl-suite\[video\]'.*\.gif works without"):
        watch_run(tmp_path, out=tmp_path / "a.mp4")
    assert calls == [] and list(tmp_path.iterdir()) == []


def no_picture(at: int) -> np.ndarray:
    raise NotImplementedError("Fake has no picture")


@pytest.mark.parametrize(
    ("drawn", "words"), [(no_picture, "Fake has no picture"), (lambda at: np.zeros((3, 3, 3)), r"draws float64 \[3, 3, 3\]")]
)
def test_an_env_without_pictures(tmp_path, stub, drawn, words):
    policy = FakePolicy(FakeEnv(drawn=drawn))
    stub(policy)
    with pytest.raises(RunError, match=f"nothing to watch: .*{words}"):
        watch_run(tmp_path)
    assert policy.env.closed and list((tmp_path / "video").iterdir()) == []


# --- terminals ---------------------------------------------------------------------------------------------------------------


def decode(text: str) -> np.ndarray:
    """What a terminal shows of half blocks: RGB [2 * lines, columns, 3]."""
    rows = []
    for line in text.split("\n"):
        fore, back, top, bottom = None, None, [], []
        for layer, colour, block in re.findall(r"\x1b\[(38|48);2;([\d;]+)m|(▀)", line):
            if block:
                top.append(fore)
                bottom.append(back)
            elif layer == "38":
                fore = [int(part) for part in colour.split(";")]
            else:
                back = [int(part) for part in colour.split(";")]
        rows += [top, bottom]
    return np.array(rows)


def test_half_blocks_show_the_picture():
    image = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
    assert (decode(watch.ansi_picture(image, 17, 6)) == image).all()
    assert decode(watch.ansi_picture(image, 9, 40)).shape == (6, 9, 3)  # as wide as there is room, and in proportion
    assert decode(watch.ansi_picture(image, 200, 3)).shape[0] == 6
    flat = np.full((100, 100, 3), 7, np.uint8)
    assert (decode(watch.ansi_picture(flat, 10, 10)) == 7).all() and len(watch.ansi_picture(flat, 10, 10)) < 600


def test_ansi_without_a_terminal_is_text(tmp_path, stub, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "12")
    policy = FakePolicy(FakeEnv(autoreset="disabled"))
    stub(policy)
    text = watch_run(tmp_path, ansi=True)
    assert isinstance(text, str) and list(tmp_path.iterdir()) == []
    frames = text.split("\n\n")
    assert len(frames) == 6 and "step 5   reward 5   return 100   terminated" in frames[-1]
    assert (decode(frames[3].rpartition("\n")[0]) == picture(3)).all()


def test_ansi_on_a_terminal_is_played(tmp_path, stub, monkeypatch, capsys):
    policy = FakePolicy(FakeEnv(autoreset="disabled"))
    stub(policy)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(watch, "HOLD", 0.0)
    last = watch_run(tmp_path, ansi=True, fps=240)
    shown = capsys.readouterr().out
    assert last == "step 5   reward 5   return 100   terminated"
    assert shown.count("\x1b[H") == 6 and shown.startswith("\x1b[?25l") and shown.endswith("\x1b[?25h\n")  # the cursor is back
