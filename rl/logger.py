"""What a run measures, row by row: `metrics.csv` and TensorBoard events in the run's folder. The x axis is env steps.

Tags are Stable-Baselines3's where it has one, so that charts of both can be laid over each other: `rollout/ep_rew_mean`,
`rollout/ep_len_mean`, `time/fps`, `train/policy_gradient_loss`, `train/value_loss`, `train/entropy_loss`, `train/approx_kl`,
`train/clip_fraction`, `train/explained_variance`, `train/learning_rate`, `eval/mean_reward`, `eval/mean_ep_length`.
"""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

METRICS = "metrics.csv"
_STEP = "step"


class RunLogger:
    """Writes the rows of one run; each has reached the operating system when `log` returns, so a killed process loses none."""

    def __init__(self, folder: str | Path, tensorboard: bool = True, resume_at: int | None = None) -> None:
        """With `resume_at`, what the folder says of later steps is forgotten, as the run is about to measure it again."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / METRICS
        self._columns = [_STEP]
        self._known = {_STEP}
        rows: list[dict[str, str]] = []
        if resume_at is not None and self.path.exists():
            rows = [row for row in self._read() if int(row[_STEP]) <= resume_at]
        # The final evaluation of a run that was finished, or killed right after it, comes once more: it is not written twice.
        self._again = (resume_at, [{k: v for k, v in row.items() if v and k != _STEP} for row in rows if int(row[_STEP]) == resume_at])
        self._file: IO[str] = self._rewrite(rows)
        self._events = None
        if tensorboard:
            from rl.events import EventFile

            self._events = EventFile(self.folder, None if resume_at is None else resume_at + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row at `step` env steps: numbers by tag. A tag never seen before adds a column."""
        values = {tag: float(value) for tag, value in metrics.items()}
        if step == self._again[0] and {tag: repr(value) for tag, value in values.items()} in self._again[1]:
            return
        if not self._known.issuperset(values):
            self._widen([tag for tag in values if tag not in self._known])
        cells = [repr(values[tag]) if tag in values else "" for tag in self._columns[1:]]
        self._file.write(",".join([str(step), *cells]) + "\n")  # line-buffered: one write to the system a row
        if self._events is not None:
            self._events.scalars(step, values)

    def flush(self) -> None:
        """Hand everything to the operating system (`log` has done so already)."""
        self._file.flush()

    def sync(self) -> None:
        """Everything so far is on the disk when this returns: for the moment before a checkpoint refers to it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.sync()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _read(self) -> list[dict[str, str]]:
        """The rows on disk, and their columns into `_columns`; a line cut short by a crash is left out."""
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.reader(file)
            header = next(reader, [_STEP])
            if header[:1] != [_STEP]:
                return []
            rows = [row for row in reader if len(row) == len(header) and row[0].isdigit()]
        self._columns, self._known = header, set(header)
        return [dict(zip(header, row)) for row in rows]

    def _widen(self, tags: list[str]) -> None:
        self._file.close()
        rows = self._read()
        self._columns = [*self._columns, *tags]
        self._known.update(tags)
        self._file = self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> IO[str]:
        """Replace the file whole, by renaming, and open it for more rows."""
        scratch = self.path.with_name(f".{METRICS}.{os.getpid()}")
        with open(scratch, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, self.path)
        return open(self.path, "a", buffering=1, newline="", encoding="utf-8")
