"""What several test files share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def rl_process(tmp_path):
    """Run the real command in a process of its own, in an empty folder, with the tests' fake modules in reach."""

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, "-m", "rl", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def compile_ptx(monkeypatch) -> Callable[..., str]:
    """`compile_ptx(kernel, signature, cc)`: the PTX of a CUDA kernel. Needs numba-cuda, NVVM and NVRTC, but no GPU."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    from numba import cuda
    from numba.cuda import dispatcher

    def compile_(kernel: Callable, signature, cc: tuple[int, int]) -> str:
        # numba-cuda asks the current device what to compile a callee for, even when the caller was told: answer for it.
        monkeypatch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=cc))
        try:
            ptx, _ = cuda.compile_ptx(kernel, signature, cc=cc)  # pyright: ignore[reportPrivateImportUsage]
        except Exception as error:
            if type(error).__name__ in ("DynamicLibNotFoundError", "NvvmSupportError"):
                pytest.skip(f"no CUDA compiler: {error}")
            raise
        assert f".target sm_{cc[0]}{cc[1]}" in ptx
        return ptx

    return compile_
