"""Atari preprocessing for one game, NumPy only: what Mnih et al. (2015, Nature, Methods) feed the network.

Runs inside the worker processes of `rl/envs/foreign.py`, between ALE (made with frame skip 1) and the shared memory.

| step | default | meaning |
|---|---|---|
| `frame_skip` | 4 | each action is repeated; rewards are added up |
| max | always | pixel-wise maximum over the last two raw frames of a skip: Atari sprites flicker |
| `grayscale` | True | ALE's own luminance screen; else RGB, channels first |
| `screen_size` | 84 | area-average resize to `[84, 84]` (what OpenCV calls INTER_AREA); None keeps 210 x 160 |
| `frame_stack` | 4 | the last four screens as channels; before the first one of an episode: zeros |
| `noop_max` | 30 | 1..30 raw no-op frames after a game's start, drawn from the env's seed |
| `fire_reset` | True | press FIRE once at the start of a game or life, where the game has that button |
| `terminal_on_life_loss` | True | a lost life is `terminated` to the learner; the game itself goes on |
| `clip_reward` | True | reward -> sign(reward) for the learner |

`raw_reward` and `game_over` after a step tell the truth that clipping and life loss hide; scores are made of those.
"""

from typing import Any, SupportsFloat

import gymnasium
import numpy as np

DEFAULTS: dict[str, Any] = {
    "frame_skip": 4,
    "grayscale": True,
    "screen_size": 84,
    "frame_stack": 4,
    "noop_max": 30,
    "fire_reset": True,
    "terminal_on_life_loss": True,
    "clip_reward": True,
}


def validate(options: dict[str, Any]) -> None:
    """Raise ValueError or TypeError where a preprocessing option (a key of `DEFAULTS`) has an impossible value."""
    for key, least in (("frame_skip", 1), ("frame_stack", 1), ("noop_max", 0)):
        value = options[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key} must be an integer >= {least}, not {value!r}")
    size = options["screen_size"]
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 160):
        raise ValueError(f"screen_size must be an integer in 1..160 (the area average only shrinks), or None for 210 x 160, not {size!r}")
    for key in ("grayscale", "fire_reset", "terminal_on_life_loss", "clip_reward"):
        if not isinstance(options[key], bool):
            raise TypeError(f"{key} must be true or false, not {options[key]!r}")


class AreaResize:
    """Shrinks uint8 [H, W] to uint8 [h, w] by area average, rounded to nearest (ties to even).

    Each output pixel is a weighted sum of at most ceil(H/h)+1 input rows and columns. Those are gathered tap by tap rather than
    multiplied as matrices: faster at this size, and the same sums in the same order on every machine.
    """

    def __init__(self, height: int, width: int, out_height: int, out_width: int) -> None:
        self.rows, row_weights = _taps(height, out_height)
        self.cols, self.col_weights = _taps(width, out_width)
        self.row_weights = row_weights[:, :, None]  # [taps, h, 1]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        x = image.astype(np.float32)  # [H, W]
        y = x.take(self.rows[0], 0) * self.row_weights[0]  # [h, W]
        for index, weight in zip(self.rows[1:], self.row_weights[1:]):
            y += x.take(index, 0) * weight
        z = y.take(self.cols[0], 1) * self.col_weights[0]  # [h, w]
        for index, weight in zip(self.cols[1:], self.col_weights[1:]):
            z += y.take(index, 1) * weight
        return np.rint(z).astype(np.uint8)


def _taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `out` equal intervals of [0, size]: the input cells it covers [taps, out] and their shares [taps, out]."""
    edges = np.arange(out + 1) * (size / out)
    first = np.floor(edges[:-1] + 1e-9).astype(np.int64)
    cells = first + np.arange(int(np.ceil(size / out)) + 1)[:, None]
    share = np.minimum(cells + 1, edges[1:]) - np.maximum(cells, edges[:-1])
    share = np.where(share > 1e-9, share, 0.0)
    keep = share.any(axis=1)  # an integer ratio leaves the last tap empty
    return np.minimum(cells, size - 1)[keep], (share / share.sum(axis=0))[keep].astype(np.float32)


class FrameStack:
    """The last k frames [k*c, h, w], as views into a long tape, so that a step copies one frame and not k.

    A view never changes once handed out: at the tape's end a new one is begun with the last k-1 frames.
    """

    def __init__(self, frames: int, frame_shape: tuple[int, int, int], tape: int = 32) -> None:
        self.k, self.shape, self.length = frames, frame_shape, frames + tape
        self.clear()

    def clear(self) -> None:
        self.tape = np.zeros((self.length, *self.shape), np.uint8)
        self.end = self.k - 1  # k-1 black frames stand before an episode's first

    def push(self, frame: np.ndarray) -> np.ndarray:
        """Append a frame [c, h, w] and return the stack [k*c, h, w], the newest frame last."""
        if self.end == self.length:
            tape = np.zeros_like(self.tape)
            tape[: self.k - 1] = self.tape[self.length - self.k + 1 :]
            self.tape, self.end = tape, self.k - 1
        self.tape[self.end] = frame
        self.end += 1
        window = self.tape[self.end - self.k : self.end]
        return window.reshape(-1, *self.shape[1:])


class AtariPreprocessing(gymnasium.Wrapper):
    """The table above, around one ALE env (or anything with its manners) that was made with frame skip 1.

    The env must observe uint8 [H, W] (grayscale) or [H, W, 3], have `get_action_meanings()` and `ale.lives()` on `unwrapped`.
    Observation: uint8 [frame_stack * channels, h, w].

    After `step`: `raw_reward` (float, unclipped, summed over the skip) and `game_over` (the game ended, not just a life); after
    `reset`: `new_game`.
    `reset()` after a lost life goes on in the same game; `reset(seed=...)` or `reset(options={"new_game": True})` starts a new one.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        *,
        frame_skip: int = 4,
        grayscale: bool = True,
        screen_size: int | None = 84,
        frame_stack: int = 4,
        noop_max: int = 30,
        fire_reset: bool = True,
        terminal_on_life_loss: bool = True,
        clip_reward: bool = True,
    ) -> None:
        super().__init__(env)
        options = {key: value for key, value in locals().items() if key in DEFAULTS}
        validate(options)
        shape = env.observation_space.shape
        if shape is None or len(shape) != (2 if grayscale else 3) or env.observation_space.dtype != np.uint8:
            raise ValueError(
                f"the env observes {env.observation_space}, but grayscale={grayscale} needs uint8 "
                + ("[H, W]: make it with obs_type='grayscale'" if grayscale else "[H, W, 3]: make it with obs_type='rgb'")
            )
        self.frame_skip, self.noop_max = frame_skip, noop_max
        self.terminal_on_life_loss, self.clip_reward = terminal_on_life_loss, clip_reward
        raw: Any = env.unwrapped
        meanings = raw.get_action_meanings()
        if noop_max and meanings[0] != "NOOP":
            raise ValueError(f"noop_max={noop_max} needs action 0 to be NOOP; it is {meanings[0]}")
        self.fire = meanings.index("FIRE") if fire_reset and "FIRE" in meanings else None
        self.ale: Any = raw.ale
        height, width = shape[:2]
        out_height, out_width = (height, width) if screen_size is None else (screen_size, screen_size)
        self.resize = None if (out_height, out_width) == (height, width) else AreaResize(height, width, out_height, out_width)
        channels = 1 if grayscale else 3
        self.stack = FrameStack(frame_stack, (channels, out_height, out_width))
        self.observation_space = gymnasium.spaces.Box(0, 255, (frame_stack * channels, out_height, out_width), np.uint8)
        self.rng = np.random.default_rng()
        self.raw_reward = 0.0
        self.game_over = True
        self.new_game = True  # whether the last reset began a game rather than a life
        self.lives = 0
        self._unseen_reward = 0.0  # scored during a reset's own presses: no step for the learner, but part of the score

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a game, or the next life of one that is not over. Returns obs uint8 [frame_stack * channels, h, w] and info."""
        options = dict(options or {})
        new_game = bool(options.pop("new_game", False)) or seed is not None or self.game_over
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        if new_game:
            frame, info = self._new_game(seed, options)
        else:
            # A lost life leaves no frame to begin with: one press (FIRE, or NOOP) brings the next life's first.
            frame, reward, terminated, truncated, info = self.env.step(0 if self.fire is None else self.fire)
            self._unseen_reward = float(reward)
            if terminated or truncated:
                frame, info = self._new_game(None, options)
                new_game = True
        self.game_over, self.new_game = False, new_game
        self.lives = self.ale.lives()
        self.stack.clear()
        return self._observe(frame), info

    def step(self, action: Any) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        """Repeat an action `frame_skip` times. Reward is what the learner sees; `self.raw_reward` what the game gave."""
        total = 0.0
        frame = previous = None
        terminated = truncated = False
        info: dict[str, Any] = {}
        for _ in range(self.frame_skip):
            previous = frame
            frame, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        assert frame is not None
        if previous is not None:
            frame = np.maximum(frame, previous)
        self.raw_reward, self._unseen_reward = total + self._unseen_reward, 0.0
        self.game_over = terminated or truncated
        lives = self.ale.lives()
        if self.terminal_on_life_loss and 0 < lives < self.lives and not truncated:
            terminated = True
        self.lives = lives
        return self._observe(frame), float(np.sign(total)) if self.clip_reward else total, terminated, truncated, info

    def _new_game(self, seed: int | None, options: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        frame, info = self.env.reset(seed=seed, options=options)
        self._unseen_reward = 0.0
        noops = int(self.rng.integers(1, self.noop_max + 1)) if self.noop_max else 0
        for action in [0] * noops + ([] if self.fire is None else [self.fire]):
            frame, reward, terminated, truncated, info = self.env.step(action)
            self._unseen_reward += float(reward)
            if terminated or truncated:
                frame, info = self.env.reset(options=options)
                self._unseen_reward = 0.0
        return frame, info

    def _observe(self, frame: np.ndarray) -> np.ndarray:
        planes = [frame] if frame.ndim == 2 else [frame[..., c] for c in range(3)]
        if self.resize is not None:
            planes = [self.resize(plane) for plane in planes]
        return self.stack.push(np.stack(planes))
