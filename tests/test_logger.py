"""metrics.csv, TensorBoard events and the progress display."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as slow_crc32c

from rl.display import Display, LiveDisplay, PlainDisplay, duration, make_display, number
from rl.events import Crc32c
from rl.logger import RunLogger


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_crc_of_known_messages_and_against_tensorboards():
    crc = Crc32c()
    assert crc(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    assert crc(b"\xff" * 32) == 0x62A8AB43
    for n in (4, 5, 8, 100, 777, 31):  # shorter after longer too
        message = os.urandom(n)
        assert crc(message) == slow_crc32c(message)


def test_rows_reach_both_files_and_columns_grow(tmp_path):
    with RunLogger(tmp_path) as log:
        log.log(100, {"rollout/ep_rew_mean": 20.5, "time/fps": 1000})
        log.log(200, {"rollout/ep_rew_mean": 1 / 3})
        log.log(300, {"eval/mean_reward": float("nan"), "time/fps": 1e300, "rollout/ep_rew_mean": -float("inf")})
        log.log(2**40, {"time/fps": 1})
    found = rows(tmp_path)
    assert list(found[0]) == ["step", "rollout/ep_rew_mean", "time/fps", "eval/mean_reward"]
    assert found[0] == {"step": "100", "rollout/ep_rew_mean": "20.5", "time/fps": "1000.0", "eval/mean_reward": ""}
    assert float(found[1]["rollout/ep_rew_mean"]) == 1 / 3  # exactly
    assert [row["step"] for row in found] == ["100", "200", "300", str(2**40)]
    events = scalars(tmp_path)
    assert events["time/fps"] == [(100, 1000.0), (300, float("inf")), (2**40, 1.0)]
    assert [step for step, _ in events["rollout/ep_rew_mean"]] == [100, 200, 300]
    assert events["rollout/ep_rew_mean"][0][1] == 20.5
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no scratch file stays


def test_resume_forgets_later_rows_in_both_files(tmp_path):
    with RunLogger(tmp_path) as log:
        for step in (100, 200, 300, 400):
            log.log(step, {"a": float(step)})
    with RunLogger(tmp_path, resume_at=200) as log:
        assert [row["step"] for row in rows(tmp_path)] == ["100", "200"]
        log.log(300, {"a": -300.0, "b": 1.0})
    assert [(row["step"], row["a"], row["b"]) for row in rows(tmp_path)] == [
        ("100", "100.0", ""),
        ("200", "200.0", ""),
        ("300", "-300.0", "1.0"),
    ]
    assert scalars(tmp_path)["a"] == [(100, 100.0), (200, 200.0), (300, -300.0)]
    with RunLogger(tmp_path, resume_at=0) as log:
        log.log(100, {"a": 7.0})
    assert scalars(tmp_path)["a"] == [(100, 7.0)] and len(rows(tmp_path)) == 1


def test_resume_survives_a_line_cut_short(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a,b\n10,1.0,2.0\n20,3.0")
    with RunLogger(tmp_path, tensorboard=False, resume_at=50) as log:
        log.log(60, {"b": 5.0})
    assert rows(tmp_path) == [{"step": "10", "a": "1.0", "b": "2.0"}, {"step": "60", "a": "", "b": "5.0"}]


def test_without_tensorboard_there_are_no_events(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as log:
        log.log(1, {"a": 1.0})
        log.sync()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_killed_process_loses_no_row(tmp_path):
    program = (
        "import sys; from rl.logger import RunLogger; log = RunLogger(sys.argv[1])\n"
        "for i in range(50): log.log(i, {'a': float(i)})\n"
        "print('done', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"done\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(rows(tmp_path)) == 50 and len(scalars(tmp_path)["a"]) == 50


def test_a_row_is_cheap(tmp_path):
    metrics = {f"train/some_metric_{i}": float(i) for i in range(12)}
    with RunLogger(tmp_path) as log:
        log.log(0, metrics)
        cost = min(_seconds(lambda: [log.log(i, metrics) for i in range(200)]) / 200 for _ in range(5))
    assert cost < 300e-6  # about 40 microseconds on an idle core; TensorBoard's own writer alone takes 150


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# --- display ----------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Stands for time.perf_counter: goes on only when told, so that nothing depends on this machine."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("rl.display.time.perf_counter", lambda: self.now)


def test_the_mode_and_the_stream_choose_the_display():
    assert type(make_display("quiet", 10, Terminal())) is Display
    assert type(make_display("auto", 10, Terminal())) is LiveDisplay
    assert type(make_display("json", 10, Terminal())) is LiveDisplay
    assert type(make_display("plain", 10, Terminal())) is PlainDisplay
    assert type(make_display("auto", 10, io.StringIO())) is PlainDisplay


def test_plain_lines_are_few_and_include_the_first_and_the_last(monkeypatch):
    clock, stream = Clock(monkeypatch), io.StringIO()
    fetched = []
    with make_display("plain", 1000, stream) as display:
        for i in range(1, 101):  # 20 seconds, a call every 0.2
            clock.now += 0.2
            display.update(10 * i, lambda i=i: fetched.append(i) or {"return": 123.456, "loss": 0.01234})
        display.message("a worker was restarted")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 10/1,000 (1%)") and lines[-1].startswith("step 1,000/1,000 (100%)")
    assert lines[-2] == "a worker was restarted"
    assert 5 <= len(lines) <= 7 and len(fetched) == len(lines) - 1  # figures are fetched only when they are shown
    assert "50 steps/s" in lines[1] and "return 123.5" in lines[1] and "loss 0.0123" in lines[1] and "s left" in lines[1]


def test_the_live_bar_is_refreshed_at_most_eight_times_a_second_and_ends_complete(monkeypatch):
    clock, stream = Clock(monkeypatch), Terminal()
    shown = []
    with make_display("auto", 400, stream) as display:
        for i in range(1, 401):  # two seconds of 200 iterations a second
            clock.now += 0.005
            display.update(i, lambda i=i: shown.append(i) or {"return": float(i)})
    assert 14 <= len(shown) <= 18 and shown[-1] == 400
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back
    text = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", stream.getvalue())
    assert "100%  400/400 steps  200.0/s  0 s left\nreturn 400" in text


def test_a_slow_refresh_makes_refreshes_rarer(monkeypatch):
    clock = Clock(monkeypatch)
    display = make_display("auto", None, Terminal())
    refreshes = []

    def slow():
        refreshes.append(clock.now)
        clock.now += 0.005  # each refresh takes 5 ms, so every 0.5 s is the most that stays below 1 %
        return {}

    for i in range(2000):
        clock.now += 0.001
        display.update(i, slow)
    display.close()
    assert len(refreshes) <= 6  # 5 in the two seconds and the last one


def test_a_failure_is_not_hidden_by_the_display():
    def broken():
        raise ZeroDivisionError

    for stream in (io.StringIO(), Terminal()):
        with pytest.raises(KeyboardInterrupt), make_display("auto", 10, stream) as display:
            display.update(1, {})
            display.update(2, broken)
            raise KeyboardInterrupt
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_a_closed_stream_does_not_stop_the_run():
    stream = io.StringIO()
    display = make_display("plain", 10, stream)
    stream.close()
    display.update(1, {})
    display.message("nobody reads this")
    display.close()


@pytest.mark.parametrize("mode", ["quiet", "plain", "auto"])
def test_an_update_between_refreshes_costs_next_to_nothing(mode):
    display = make_display(mode, 10**9, Terminal())
    display.update(0, {})
    cost = min(_seconds(lambda: [display.update(i, {}) for i in range(1000)]) / 1000 for _ in range(3))
    display.close()
    assert cost < 50e-6  # 1 % of an iteration at 200 a second


def test_numbers_and_durations():
    assert [number(value) for value in (35123.4, 231.24, 0.01234, 500.0, 1.2e-5, float("nan"), -0.5, "x")] == [
        "35,123", "231.2", "0.0123", "500", "1.2e-05", "nan", "-0.5", "x",
    ]  # fmt: skip
    assert [duration(value) for value in (7.4, 59.4, 185, 7810)] == ["7 s", "59 s", "3:05 min", "2:10 h"]
