"""The disk cache: it hits in a second process, misses after any edit that matters, and never gets in the way."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import rl.kernels.jit
from rl.kernels.jit import address_of, as_pointer, cache_dir, driver, fingerprint, load_acquire, scalar, store_release

ROOT = Path(rl.kernels.jit.__file__).parents[2]

# A small project. Each edit in EDITS changes what exactly one driver of `main.py` computes.
FILES = {
    "pkg/__init__.py": "",
    "pkg/consts.py": """
        import numpy as np

        BY_ATTRIBUTE = np.float32(2.0)
        BY_NAME = np.float32(3.0)
        BY_PATH = np.float32(4.0)
        TABLE = (5.0, 6.0)
        ARRAY = np.array([7.0, 8.0])
        NESTED = 9.0
    """,
    "pkg/helper.py": """
        from pkg import consts
        from rl.kernels.jit import scalar

        @scalar
        def callee(x):
            return x + 10.0

        @scalar
        def reads_constant(x):
            return x + consts.NESTED

        @scalar
        def passed(x):
            return x + 11.0
    """,
    "pkg/factory.py": """
        from rl.kernels.jit import driver, scalar

        def make(step, bonus):
            @driver
            def run(x):
                return step(x) + bonus

            return run

        @scalar
        def step(x):
            return x * 12.0

        @scalar
        def other(x):
            return x * 13.0
    """,
    "main.py": """
        import json
        import sys

        import pkg.consts
        import pkg.helper
        from pkg import consts
        from pkg.consts import ARRAY, BY_NAME
        from pkg.factory import make, other, step
        from pkg.helper import callee, passed
        from rl.kernels.jit import driver

        @driver
        def untouched(x):
            return x * 2.0

        @driver
        def body(x):
            return x * 3.0

        @driver
        def default(x, y=4.0):
            return x * y

        @driver
        def callee_in_another_file(x):
            return callee(x)

        @driver
        def callee_by_path(x):
            return pkg.helper.reads_constant(x)

        @driver
        def constant_by_attribute(x):
            return x * consts.BY_ATTRIBUTE

        @driver
        def constant_by_name(x):
            return x * BY_NAME

        @driver
        def constant_by_path(x):
            return x * pkg.consts.BY_PATH

        @driver
        def constant_tuple(x):
            return x * consts.TABLE[1]

        @driver
        def constant_array(x):
            return x * ARRAY[1]

        @driver
        def applies(f, x):
            return f(x)

        drivers = {f.py_func.__name__: f for f in (
            untouched, body, default, callee_in_another_file, callee_by_path, constant_by_attribute, constant_by_name,
            constant_by_path, constant_tuple, constant_array,
        )}
        drivers["closure_number"] = make(step, 14.0)
        drivers["closure_function"] = make(other, 15.0)
        report = {}
        for name, f in drivers.items():
            value = f(1.0)
            report[name] = [float(value), f._cache.stats["hits"], f._cache.stats["misses"]]
        report["function_as_argument"] = [applies(passed, 1.0), applies._cache.stats["hits"], applies._cache.stats["misses"]]
        print(json.dumps(report))
    """,
}
EDITS = {  # driver: (file, old, new, value before, value after)
    "untouched": None,
    "body": ("main.py", "x * 3.0", "x * 3.5", 3.0, 3.5),
    "default": ("main.py", "y=4.0", "y=4.5", 4.0, 4.5),
    "callee_in_another_file": ("pkg/helper.py", "x + 10.0", "x + 10.5", 11.0, 11.5),
    "callee_by_path": ("pkg/consts.py", "NESTED = 9.0", "NESTED = 9.5", 10.0, 10.5),
    "constant_by_attribute": ("pkg/consts.py", "BY_ATTRIBUTE = np.float32(2.0)", "BY_ATTRIBUTE = np.float32(2.5)", 2.0, 2.5),
    "constant_by_name": ("pkg/consts.py", "BY_NAME = np.float32(3.0)", "BY_NAME = np.float32(3.5)", 3.0, 3.5),
    "constant_by_path": ("pkg/consts.py", "BY_PATH = np.float32(4.0)", "BY_PATH = np.float32(4.5)", 4.0, 4.5),
    "constant_tuple": ("pkg/consts.py", "(5.0, 6.0)", "(5.0, 6.5)", 6.0, 6.5),
    "constant_array": ("pkg/consts.py", "[7.0, 8.0]", "[7.0, 8.5]", 8.0, 8.5),
    "closure_number": ("main.py", "make(step, 14.0)", "make(step, 14.5)", 26.0, 26.5),
    "closure_function": ("pkg/factory.py", "x * 13.0", "x * 13.5", 28.0, 28.5),
    "function_as_argument": ("pkg/helper.py", "x + 11.0", "x + 11.5", 12.0, 12.5),
}
BEFORE = {name: edit[3] if edit else 2.0 for name, edit in EDITS.items()}
AFTER = {name: edit[4] if edit else 2.0 for name, edit in EDITS.items()}


class Project:
    """The files above in a folder of their own, with a cache of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cache = folder / "cache"
        for name, text in FILES.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))

    def start(self, cache: Path | None = None) -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}",
            "RL_CACHE_DIR": str(cache or self.cache),
            "PYTHONDONTWRITEBYTECODE": "1",  # an edit within the clock's resolution must not be hidden by a .pyc
        }
        command = [sys.executable, "-W", "error", str(self.folder / "main.py")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, process: subprocess.Popen) -> dict[str, list]:
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        return json.loads(out)

    def run(self, cache: Path | None = None) -> dict[str, list]:
        return self.finish(self.start(cache))

    def kernels(self) -> list[Path]:
        return sorted((self.cache / "kernels").iterdir())

    def edit(self) -> None:
        for edit in EDITS.values():
            if edit:
                path = self.folder / edit[0]
                text = path.read_text()
                assert text.count(edit[1]) == 1
                path.write_text(text.replace(edit[1], edit[2]))


def values(report):
    return {name: found[0] for name, found in report.items()}


def hits(report):
    return {name for name, found in report.items() if found[1:] == [1, 0]}


def misses(report):
    return {name for name, found in report.items() if found[1:] == [0, 1]}


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_second_process_hits_and_edits_miss(project):
    first = project.run()
    assert values(first) == BEFORE
    assert misses(first) == set(EDITS)
    assert (project.cache / "kernels").stat().st_mode & 0o077 == 0 or os.name == "nt"  # code is loaded from here: the owner's alone

    second = project.run()
    assert values(second) == BEFORE
    assert hits(second) == set(EDITS)

    project.edit()
    third = project.run()
    assert values(third) == AFTER
    assert hits(third) == {"untouched"}


def test_corrupted_files_are_compiled_anew(project):
    project.run()
    files = project.kernels()
    assert len(files) == len(EDITS)
    for i, path in enumerate(files):
        data = path.read_bytes()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]  # loads, were it not for the checksum
        path.write_bytes([flipped, b"", b"not a pickle", data[:middle]][i % 4])
    again = project.run()
    assert values(again) == BEFORE
    assert misses(again) == set(EDITS)
    assert hits(project.run()) == set(EDITS)  # and mended


def test_unwritable_cache_does_not_fail(project):
    file = project.folder / "a-file"
    file.write_text("in the way of a folder: mkdir fails, for root too")
    report = project.run(cache=file / "cache")
    assert values(report) == BEFORE
    assert misses(report) == set(EDITS)
    assert not project.cache.exists()


def test_processes_racing_for_the_same_files(project):
    racing = [project.start() for _ in range(2)]
    for process in racing:
        assert values(project.finish(process)) == BEFORE
    assert {path.suffix for path in project.kernels()} == {".nbc"}  # no temporary file is left behind
    assert hits(project.run()) == set(EDITS)


# ---- fingerprint, in this process.


def _make(number, step=None):
    def run(x):
        return x * number if step is None else step(x) * number

    return driver(run)


def test_fingerprint_is_of_content():
    assert fingerprint(_make(1.0)) == fingerprint(_make(1.0))
    different = [_make(1.0), _make(2.0), _make(1), _make(True), _make(np.float32(1.0)), _make(np.float64(1.0)), _make("1.0")]
    different += [_make(np.ones(2)), _make(np.zeros(2)), _make(np.ones(2, np.float32)), _make((1.0, 2.0)), _make((1.0, 3.0))]
    prints = [fingerprint(f) for f in different]
    assert len(set(prints)) == len(prints)


def test_fingerprint_reaches_through_dispatchers():
    def step(number):
        return scalar(lambda x: x + number)

    assert fingerprint(_make(1.0, step(1.0))) == fingerprint(_make(1.0, step(1.0)))
    assert fingerprint(_make(1.0, step(1.0))) != fingerprint(_make(1.0, step(2.0)))


def test_fingerprint_sees_compiler_options():
    def run(x):
        return x + 1.0

    assert fingerprint(driver(run)) != fingerprint(driver(run, fastmath=True))


def test_fingerprint_of_globals(monkeypatch):
    before = fingerprint(_reads_global)
    assert fingerprint(_reads_global) == before
    monkeypatch.setitem(globals(), "_GLOBAL", 2.0)
    assert fingerprint(_reads_global) != before


def test_fingerprint_of_a_function_that_calls_itself():
    assert fingerprint(_factorial) == fingerprint(_factorial)
    assert _factorial(5) == 120


_GLOBAL = 1.0


@driver
def _reads_global(x):
    return x * _GLOBAL


@driver
def _factorial(n):
    if n <= 1:
        return 1
    return n * _factorial(n - 1)


# ---- The rest of the module.


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("RL_CACHE_DIR", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("RL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "rl-suite"


def test_division_by_zero_is_infinite():
    @driver
    def divide(x, y):
        return x / y

    assert divide(1.0, 0.0) == np.inf
    assert np.isnan(divide(0.0, 0.0))


def test_addresses():
    import numba

    @driver
    def through_pointer(array, n):
        view = numba.carray(as_pointer(address_of(array)), (n,), np.float64)  # pyright: ignore[reportPrivateImportUsage]
        view[1] = 5.0
        return view.sum()

    array = np.array([1.0, 2.0, 3.0])
    assert through_pointer(array, 3) == 9.0
    assert array[1] == 5.0


def test_atomics():
    @driver
    def swap(flags):
        old = load_acquire(address_of(flags))
        store_release(address_of(flags) + 8, old + 1)
        return old

    flags = np.array([41, 0], np.int64)
    assert swap(flags) == 41
    assert flags.tolist() == [41, 42]
