"""What several test files share."""

import os
import subprocess
import sys
from pathlib import Path

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
