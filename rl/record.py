"""What a configuration ran on: versions, git revision, machine. Asks package metadata and git, imports nothing heavy."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl import __version__

PACKAGES = ("torch", "numba", "numpy", "gymnasium")


def describe_machine(command: Sequence[str]) -> dict[str, Any]:
    """The `meta` block of a run's `config.yaml`."""
    return {
        "versions": {"rl": __version__, "python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}},
        "git": git_revision(),
        "platform": platform.platform(),
        "command": shlex.join(command),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def package_version(name: str) -> str | None:
    """An installed package's version; torch's own word where it is loaded, as only that names the CUDA build."""
    loaded = getattr(sys.modules.get(name), "__version__", None)
    if loaded is not None:
        return str(loaded)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision(root: Path | None = None) -> dict[str, Any] | None:
    """Revision of the source tree and whether it was changed since; None for an installed package."""
    root = root or Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installation inside somebody's repository is not that repository
        return None
    try:
        git = ["git", "-C", str(root)]
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "dirty": bool(status.strip())}
