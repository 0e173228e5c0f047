"""Progress while a command works: a live Rich bar on a terminal, plain lines elsewhere, nothing when asked to be quiet.

Everything goes to standard error, so that `--json` leaves one object alone on standard output. Rich is imported only for a
terminal. `update` may be called thousands of times a second: between two refreshes it costs one look at the clock, and the
pause after a refresh is at least a hundred times what that refresh cost, so that showing a run takes less than 1 % of it.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

Mode = Literal["auto", "plain", "quiet", "json"]
Fields = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


def make_display(mode: Mode = "auto", total_steps: int | None = None, stream: TextIO | None = None) -> "Display":
    """The display for this mode. "json" shows what "auto" does: both keep to standard error."""
    stream = stream or sys.stderr
    if mode == "quiet" or stream is None:
        return Display(total_steps)
    if mode in ("auto", "json") and stream.isatty():
        return LiveDisplay(total_steps, stream)
    return PlainDisplay(total_steps, stream)


class Display:
    """Shows nothing; the others say how. `total_steps` may be set later, by who knows it."""

    interval = math.inf  # least seconds between two refreshes

    def __init__(self, total_steps: int | None = None) -> None:
        self.total_steps = total_steps
        self._next = -math.inf
        self._step = 0
        self._pending: Fields | None = None  # given, but not shown yet
        self._seen: deque[tuple[float, int]] = deque(maxlen=64)  # (seconds, env steps) at refreshes, for the rate

    def update(self, step: int, fields: Fields) -> None:
        """`step` env steps are done. `fields` are figures by name, or a function that fetches them when they are to be shown."""
        self._step, self._pending = step, fields
        now = time.perf_counter()
        if now >= self._next:
            self._refresh(now)

    def message(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Show what was held back, and leave the terminal as it was."""

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._pending = None  # fetching figures from what has just failed could hide the failure
        self.close()

    def _refresh(self, now: float) -> None:
        fields, self._pending = self._pending, None
        self._seen.append((now, self._step))
        self._show(fields() if callable(fields) else fields or {})
        took = time.perf_counter() - now
        self._next = now + max(self.interval, min(1.0, 100 * took))  # the first refresh may be slow; do not fall silent over it

    def _show(self, fields: Mapping[str, Any]) -> None: ...

    def _rate(self) -> float | None:
        """Env steps per second over the last refreshes."""
        (then, before), (now, step) = self._seen[0], self._seen[-1]
        return (step - before) / (now - then) if now > then and step > before else None

    def _time_left(self) -> str:
        rate = self._rate()
        if rate is None or self.total_steps is None:
            return "?"
        return duration(max(0, self.total_steps - self._step) / rate)


class PlainDisplay(Display):
    """A line every five seconds, and the first and the last."""

    interval = 5.0

    def __init__(self, total_steps: int | None, stream: TextIO) -> None:
        super().__init__(total_steps)
        self._stream = stream

    def message(self, text: str) -> None:
        self._write(text)

    def close(self) -> None:
        if self._pending is not None:
            self._refresh(time.perf_counter())

    def _show(self, fields: Mapping[str, Any]) -> None:
        parts = [f"step {self._step:,}"]
        if self.total_steps:
            parts[0] += f"/{self.total_steps:,} ({min(1.0, self._step / self.total_steps):.0%})"
        rate = self._rate()
        if rate is not None:
            parts.append(f"{number(rate)} steps/s")
            parts.append(f"{self._time_left()} left")
        parts += [f"{name} {number(value)}" for name, value in fields.items()]
        self._write("  ".join(parts))

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads any more (a closed pipe or terminal): no reason to stop a run
            pass


class LiveDisplay(Display):
    """A bar that is redrawn in place. Rich's refresh thread stays off: it would compete with the run for the interpreter."""

    interval = 1 / 8

    def __init__(self, total_steps: int | None, stream: TextIO) -> None:
        super().__init__(total_steps)
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text = Text
        self._live = Live(console=Console(file=stream), auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._started = False

    def message(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._pending is not None:
            self._refresh(time.perf_counter())
        if self._started:
            self._live.stop()
            self._started = False

    def _show(self, fields: Mapping[str, Any]) -> None:
        if not self._started:
            self._live.start()
            self._started = True
        self._live.update(self._render(fields), refresh=True)

    def _render(self, fields: Mapping[str, Any]) -> Any:
        text = self._text(no_wrap=False)
        if self.total_steps:
            width = 30
            done = min(1.0, self._step / self.total_steps)
            full = round(width * done)
            text.append("━" * full, "green").append("━" * (width - full), "bright_black").append(f" {done:4.0%}  ")
            text.append(f"{self._step:,}/{self.total_steps:,} steps  ")
        else:
            text.append(f"{self._step:,} steps  ")
        rate = self._rate()
        if rate is not None:
            text.append(f"{number(rate)}/s  ", "cyan").append(f"{self._time_left()} left")
        if fields:
            text.append("\n")
            for name, value in fields.items():
                text.append(f"{name} ", "dim").append(f"{number(value)}  ", "bold")
        return text


def number(value: Any) -> str:
    """A figure in few characters: 35,100  231.2  0.0184  1.2e-05."""
    if isinstance(value, str):
        return value
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in words: 7 s, 3:05 min, 2:10 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return f"{minutes}:{round(seconds) % 60:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
