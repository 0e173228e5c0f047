"""Episodes of a run's policy as a film (GIF, MP4), or drawn in the terminal: `rl watch RUN`.

Frames go to the file as they are made, so that a long film takes no memory and an interrupted one is whole as far as it goes.
The last frame of an episode shows its final state. A foreign env has begun the next episode by the time it can be asked for a
picture, so there the last frame repeats the one before and says so.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from rl.errors import ConfigError, RunError

FORMATS = (".gif", ".mp4")
MAX_STEPS = 10_000  # of one episode
MIN_WIDTH = 320  # pixels, so that the caption has room: smaller pictures are enlarged
HOLD = 1.0  # seconds that an episode's last frame stays
STRIP = 18  # pixels, height of the caption

_MOVIES = (".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".mp")


class Frame(NamedTuple):
    """One moment of an episode."""

    picture: np.ndarray  # uint8 [H, W, 3]
    episode: int  # from 1
    step: int  # env steps taken in the episode
    reward: float  # of the last of them
    total: float  # return so far
    end: str  # "": the episode goes on; else how it ended


class _Notes(Protocol):
    def message(self, text: str, /) -> None: ...


def watch_run(
    folder: str | Path,
    *,
    episodes: int = 1,
    out: str | Path | None = None,
    ansi: bool = False,
    checkpoint: str = "best",
    seed: int | None = None,
    max_steps: int = MAX_STEPS,
    fps: float = 30,
    display: _Notes | None = None,
) -> Path | str:
    """Film greedy episodes of a run's policy, and return the film's path.

    Args:
        folder: the run.
        out: a .gif or .mp4 file; None for RUN/video/<env>-<step>.gif.
        ansi: draw in the terminal instead, in half blocks of 24-bit colour. Where standard output is no terminal the drawings are
            returned as text; where it is one, a line about the last episode is.
        checkpoint: "best", "last" or a step, as `rl.evaluation.load` takes it.
        seed: of the env; None for the env's default.
        max_steps: env steps after which an episode is left.
        fps: frames per second; at most 50 in a GIF, as viewers slow down faster ones.
        display: takes remarks; None for standard error.

    An interrupt ends the film early: what was filmed is written.

    Raises:
        ConfigError: there is no such folder, `out` cannot be written or is of an unknown kind, or an argument makes no sense; before any
            work.
        ImportError: for an .mp4 without imageio and ffmpeg; before any work.
        RunError: the env has no picture.
        Besides, what `rl.evaluation.load` raises.
    """
    folder = Path(folder)
    if episodes < 1 or max_steps < 1 or not 0 < fps <= 240:
        raise ConfigError(f"episodes and max_steps must be at least 1, fps in (0, 240]; got {episodes}, {max_steps}, {fps}")
    if not folder.is_dir():
        raise ConfigError(f"no run in {str(folder)!r}: there is no such folder")
    if ansi and out is not None:
        raise ConfigError(f"--ansi draws in the terminal and writes no film: leave out out={out}")
    scratch = None if ansi else _check_out(folder / "video" / "film.gif" if out is None else Path(out))
    from rl import evaluation

    try:
        policy = evaluation.load(folder, checkpoint)
        foreign = policy.resolved.env_entry.family == "foreign"
        how: dict[str, Any] = {"render": True} if foreign else {"autoreset": "disabled"}
        if seed is not None:
            how["seed"] = seed
        env = policy.make_env(1, **how)
        try:
            frames = film(policy, env, episodes, max_steps)
            note = display.message if display is not None else lambda text: print(text, file=sys.stderr)
            if scratch is None:
                return _draw(frames, fps, note)
            path = Path(out) if out is not None else folder / "video" / f"{_file_name(env.name)}-{_step(policy, folder, checkpoint)}.gif"
            _write(frames, scratch, env.name, fps, note)
            os.replace(scratch, path)
            return path
        finally:
            env.close()
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def film(policy: Any, env: Any, episodes: int, max_steps: int = MAX_STEPS) -> Iterator[Frame]:
    """Play greedy episodes in env 0 and yield every state, the first and the last included. RunError where there is no picture."""
    stays = getattr(env, "autoreset", "same_step") == "disabled"  # the final state can be seen
    obs = env.reset()
    for episode in range(1, episodes + 1):
        if episode > 1 and stays:
            import torch

            obs = env.reset_envs(torch.ones(1, dtype=torch.bool, device=env.device))
        state, total, end, step = None, 0.0, "", 0
        picture = _picture(env)
        yield Frame(picture, episode, 0, 0.0, 0.0, "")
        while not end:
            act = policy.act(obs, env.action_mask, state)
            result = env.step(act.action)
            obs, state, step = result.obs, act.state, step + 1
            reward = float(result.reward[0])
            total += reward
            boundary = bool(result.terminated[0]) or bool(result.truncated[0])
            if boundary:
                state = None  # a lost life in Atari too: so it was in training
            over = getattr(env, "episode_over", None)
            if boundary and (over is None or bool(over[0])):
                end = "terminated" if bool(result.terminated[0]) else "truncated"
                total = float(env.episode_return[0])  # unclipped
            elif step >= max_steps:
                end = f"left after {max_steps} steps"
            if stays or end not in ("terminated", "truncated"):
                picture = _picture(env)
            else:
                end += " (final state not shown)"
            yield Frame(picture, episode, step, reward, total, end)
        if end.startswith("left") and episode < episodes and not stays:
            obs = env.reset()


def _picture(env: Any) -> np.ndarray:
    try:
        picture = np.asarray(env.render(0))
    except (NotImplementedError, RuntimeError) as error:
        raise RunError(f"nothing to watch: {error}") from error
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, 2)
    if picture.ndim != 3 or picture.shape[2] not in (3, 4) or picture.dtype != np.uint8 or 0 in picture.shape:
        raise RunError(f"nothing to watch: {env.name} draws {picture.dtype} {list(picture.shape)}, not RGB uint8 [H, W, 3]")
    return picture[..., :3]


# --- films ------------------------------------------------------------------------------------------------------------------


def caption(frame: Frame, name: str = "", width: int | None = None) -> str:
    """What stands below the picture; with a width, whole parts are left out until it fits."""
    parts = [
        name, f"episode {frame.episode}" if frame.episode > 1 else "", f"step {frame.step}", f"reward {_number(frame.reward)}",
        f"return {_number(frame.total)}", frame.end,
    ]  # fmt: skip
    for drop in (None, 0, 3, 1):
        if drop is not None:
            parts[drop] = ""
        text = "   ".join(part for part in parts if part)
        if width is None or _font().getlength(text) <= width:
            break
    return text


def with_caption(frame: Frame, name: str = "") -> Image.Image:
    """The picture, enlarged by a whole factor where it is small, above a strip with the caption; even width and height for MP4."""
    height, width, _ = frame.picture.shape
    factor = max(1, -(-MIN_WIDTH // width))
    width, height = width * factor, height * factor
    picture = Image.fromarray(np.ascontiguousarray(frame.picture)).resize((width, height), Image.Resampling.NEAREST)
    image = Image.new("RGB", (width + width % 2, height + height % 2 + STRIP), (24, 24, 28))
    image.paste(picture, (0, 0))
    text = caption(frame, name, width - 10)
    ImageDraw.Draw(image).text((5, image.height - STRIP + 3), text, fill=(240, 240, 240), font=_font())
    return image


def _font() -> Any:
    global _the_font
    if _the_font is None:
        _the_font = ImageFont.load_default()
    return _the_font


_the_font: Any = None


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.4g}"


def _write(frames: Iterator[Frame], path: Path, name: str, fps: float, note: Callable[[str], None]) -> None:
    with open(path, "wb") if path.suffix == ".gif" else contextlib.nullcontext() as file:
        writer = GifWriter(file, fps) if file is not None else _Mp4Writer(path, fps)
        count, ends = 0, []
        try:
            try:
                for frame in frames:
                    writer.add(with_caption(frame, name), HOLD if frame.end else 0.0)
                    count += 1
                    if frame.end:
                        ends.append(frame.end)
            except KeyboardInterrupt:
                if not count:
                    raise
                note(f"interrupted: {count} frames were filmed")
        finally:
            writer.close()
    if any("not shown" in end for end in ends):
        note("the env had begun anew before its final state could be drawn: each episode's last frame repeats the one before")
    if any(end.startswith("left") for end in ends):
        note(f"not every episode ended: {next(end for end in ends if end.startswith('left'))}")


class GifWriter:
    """An animated GIF, one frame at a time.

    Pillow's own keeps all frames in memory until the end. Here it compresses single frames, whose blocks are put together as GIF89a
    says (https://www.w3.org/Graphics/GIF/spec-gif89a.txt). A frame holds only the rectangle that changed, in its own 256 colours.
    """

    def __init__(self, file: Any, fps: float) -> None:
        self._file, self._fps = file, min(fps, 50.0)
        self._last: Image.Image | None = None  # RGB, as added
        self._block: tuple[bytes, bytes] | None = None  # what follows the delay, of the frame that is not written yet
        self._time, self._written = 0.0, 0  # seconds in total; hundredths that the written frames last

    def add(self, image: Image.Image, hold: float = 0.0) -> None:
        """Append an RGB image that stays for a frame's time and `hold` seconds more. All must be of one size."""
        box = (0, 0, *image.size)
        if self._last is None:
            self._file.write(b"GIF89a" + np.array(image.size, "<u2").tobytes() + b"\x70\0\0")  # no global colours
            self._file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")  # repeat for ever
        else:
            box = ImageChops.difference(image, self._last).getbbox()
        if box is not None:  # else the last frame just stays longer
            self._flush()
            self._block = _gif_block(image.crop(box), box[:2])
        self._last = image
        self._time += 1 / self._fps + hold

    def close(self) -> None:
        """Write what is left. The file stays open."""
        if self._last is not None:
            self._flush()
            self._file.write(b"\x3b")

    def _flush(self) -> None:
        if self._block is not None:
            # Delays are whole hundredths of a second: rounding the total keeps the film's speed.
            delay = min(round(100 * self._time) - self._written, 0xFFFF)
            self._written += delay
            self._file.write(b"\x21\xf9\x04\x04" + np.array(delay, "<u2").tobytes() + b"\0\0")  # what is drawn stays
            self._file.write(b"".join(self._block))
            self._block = None


def _gif_block(image: Image.Image, corner: tuple[int, int]) -> tuple[bytes, bytes]:
    """Image descriptor with colours, and compressed pixels, of one picture with its upper left corner there."""
    paletted = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    paletted.save(buffer, "GIF")
    data = buffer.getvalue()
    flags, at = data[10], 13
    colours = b""
    if flags & 0x80:
        colours = data[at : at + (3 << (flags & 7) + 1)]
        at += len(colours)
    while data[at] == 0x21:  # an extension: label, then blocks that tell their own length
        at += 2
        while data[at]:
            at += data[at] + 1
        at += 1
    if data[at] != 0x2C:
        raise RuntimeError("Pillow wrote a GIF of an unknown form")
    if data[at + 9] & 0x80:  # it has its own colours already
        flags = data[at + 9]
        colours = data[at + 10 : at + 10 + (3 << (flags & 7) + 1)]
        start = at + 10 + len(colours)
    else:
        start = at + 10
    place = np.array([*corner, *image.size], "<u2").tobytes()
    interlaced = data[at + 9] & 0x40
    return b"\x2c" + place + bytes([0x80 | interlaced | flags & 7]) + colours, data[start:-1]


class _Mp4Writer:
    def __init__(self, path: Path, fps: float) -> None:
        import imageio.v2 as imageio  # type: ignore[import-not-found]

        self._fps = fps
        self._writer: Any = imageio.get_writer(path, format="FFMPEG", fps=fps, codec="libx264", macro_block_size=2, quality=8)  # type: ignore[arg-type]

    def add(self, image: Image.Image, hold: float = 0.0) -> None:
        for _ in range(1 + round(hold * self._fps)):
            self._writer.append_data(np.asarray(image))

    def close(self) -> None:
        self._writer.close()


# --- where to ---------------------------------------------------------------------------------------------------------------


def _check_out(path: Path) -> Path:
    """A new, empty file beside `path` of the same kind, which shows that the film can be written there."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        near = ".mp4" if suffix in _MOVIES else ".gif"
        hint = f"; did you mean {path.stem + near!r}?" if path.stem else ""
        raise ConfigError(f"out must end in {' or '.join(FORMATS)}, not {str(path)!r}{hint}")
    if suffix == ".mp4":
        _check_mp4()
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder")
    scratch = path.with_name(f".{path.stem}.{os.getpid()}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.touch(exist_ok=False)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    return scratch


def _check_mp4() -> None:
    try:
        import imageio.v2  # type: ignore[import-not-found]  # noqa: F401
        import imageio_ffmpeg  # type: ignore[import-not-found]

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"an .mp4 needs `pip install 'rl-suite[video]'` ({error}); a .gif works without") from None


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _step(policy: Any, folder: Path, checkpoint: str) -> int:
    step = getattr(policy, "env_steps", None)
    if step is None:
        from rl.checkpoint import describe, find

        step = describe(find(folder / "checkpoints", checkpoint)).step
    return int(step)


# --- terminals --------------------------------------------------------------------------------------------------------------


def ansi_picture(picture: np.ndarray, columns: int, lines: int) -> str:
    """The picture in at most `columns` x `lines` characters: each half block shows two pixels, one above the other."""
    height, width, _ = picture.shape
    scale = min(columns / width, 2 * lines / height)
    size = max(1, min(columns, round(width * scale))), 2 * max(1, min(lines, round(height * scale / 2)))
    image = Image.fromarray(np.ascontiguousarray(picture))
    pixels = np.asarray(image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST))
    rows = []
    for top, bottom in zip(pixels[::2].tolist(), pixels[1::2].tolist()):
        row, fore, back = [], None, None
        for upper, lower in zip(top, bottom):
            if upper != fore:  # colours hold until they change: a tenth of the text
                row.append("\x1b[38;2;{};{};{}m".format(*upper))
                fore = upper
            if lower != back:
                row.append("\x1b[48;2;{};{};{}m".format(*lower))
                back = lower
            row.append("▀")
        rows.append("".join(row) + "\x1b[0m")
    return "\n".join(rows)


def _draw(frames: Iterator[Frame], fps: float, note: Callable[[str], None]) -> str:
    """Play the frames on the terminal; or return them as text where there is none."""
    out = sys.stdout
    if not out.isatty():
        columns, lines = _room()
        texts = []
        try:
            texts += (f"{ansi_picture(frame.picture, columns, lines)}\n{caption(frame)}\n" for frame in frames)
        except KeyboardInterrupt:
            note(f"interrupted: {len(texts)} frames were drawn")
        return "\n".join(texts)
    last = None
    try:
        out.write("\x1b[?25l\x1b[2J")  # hide the cursor, clear
        due = time.perf_counter()
        for frame in frames:
            last = frame
            _show(frame, out)
            due = max(due + 1 / fps + (HOLD if frame.end else 0.0), time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))
    except KeyboardInterrupt:
        if last is None:
            raise
    finally:
        out.write("\x1b[0m\x1b[?25h\n")
        out.flush()
    return "" if last is None else caption(last)


def _show(frame: Frame, out: TextIO) -> None:
    columns, lines = _room()
    text = ansi_picture(frame.picture, columns, lines).replace("\n", "\x1b[K\n")  # a smaller picture than the last leaves nothing behind
    out.write(f"\x1b[H{text}\x1b[K\n{caption(frame)[: columns - 1]}\x1b[K\x1b[J")
    out.flush()


def _room() -> tuple[int, int]:
    """Columns and lines for a picture: the terminal's, less the caption's line and one for the prompt."""
    size = shutil.get_terminal_size()
    return max(size.columns, 4), max(size.lines - 2, 2)
