"""What the measuring scripts share: the machine, the clock, summaries, and the file a measurement ends up in.

Every result is benchmarks/results/<name>.json: `made` says where, when and by which command it was measured, the rest is the script's.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
if str(REPO) not in sys.path:  # so that `python benchmarks/x.py` measures this tree, installed or not
    sys.path.insert(0, str(REPO))


def made(*packages: str) -> dict[str, Any]:
    """Machine, versions, git revision, date and command of a measurement."""
    from rl.record import describe_machine, package_version

    told = describe_machine(())
    versions = told["versions"] | {name: package_version(name) for name in packages}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": command(),
        "git": told["git"],
        "versions": versions,
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory and how busy the machine is; no names and no addresses."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    out: dict[str, Any] = {"cpu": model, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        out["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if hasattr(os, "getloadavg"):
        out["load_before"] = round(os.getloadavg()[0], 2)
    return out


def command() -> str:
    """The command line with absolute paths cut to their last part: a result says nothing of where it was made."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the option every script has."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--out", type=Path, help="file to write instead of benchmarks/results/<name>.json")
    return out


def save(name: str, result: Mapping[str, Any], out: Path | None = None) -> Path:
    """Write a result, whole or not at all."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)
    print(f"written: {path}")
    return path


def load(name: str, out: Path | None = None) -> dict[str, Any] | None:
    """A result measured before, or None."""
    path = out or RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def rounded(value: Any) -> Any:
    """Floats to five significant digits, all through a tree."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {str(key): rounded(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    return value


def summary(values: Iterable[float]) -> dict[str, Any]:
    """Minimum, median, maximum and number of repeats."""
    values = list(values)
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "repeats": len(values)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Summary of the ratios of repeats that were measured one right after the other."""
    return summary(a / b for a, b in zip(above, below, strict=True))


def spread(values: Mapping[str, Any], digits: str = ".3g") -> str:
    """A summary as "median (min-max)"."""
    return f"{values['median']:{digits}} ({values['min']:{digits}}-{values['max']:{digits}})"


def rate(call: Callable[[int], None], units: int, seconds: float, least: int = 1) -> float:
    """Units per second of `call(n)`, n chosen so that it takes about `seconds`; `call(n)` does n * units."""
    calls = max(least, 1)
    while True:
        start = time.perf_counter()
        call(calls)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds / 2:
            return calls * units / elapsed
        calls = max(calls + 1, int(calls * min(16.0, 0.9 * seconds / max(elapsed, 1e-9))))


def rl_command() -> list[str]:
    """The installed command beside this Python, or the module where there is none."""
    script = Path(sys.executable).with_name("rl")
    return [str(script)] if script.exists() else [sys.executable, "-m", "rl"]


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that runs this tree."""
    path = os.pathsep.join(part for part in (str(REPO), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path, **more}


def merged(words: Sequence[str]) -> list[str]:
    """KEY=VALUE words of which a later one wins over an earlier one."""
    return list({word.partition("=")[0]: word for word in words}.values())


def train(words: Sequence[str], **env: str) -> tuple[dict[str, Any], float]:
    """`rl train WORDS --json` in a process and a folder of its own: its JSON object, and the wall seconds of the process."""
    with tempfile.TemporaryDirectory(prefix="rl-benchmark-") as folder:
        call = [*rl_command(), "train", *merged(words), f"run_dir={folder}/run", "--json", "-q"]
        start = time.perf_counter()
        done = subprocess.run(call, cwd=folder, env=environment(**env), capture_output=True, text=True, stdin=subprocess.DEVNULL)
        wall = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(['rl', 'train', *words])} ended with status {done.returncode}:\n{done.stderr.strip()}")
    return json.loads(done.stdout), wall


class LearningLoop:
    """Our PPO on a native env without anything around it: no evaluation, checkpoint, log file or display.

    Like Stable-Baselines3's `learn`, it keeps the returns of the last 100 training episodes.
    """

    def __init__(self, words: Sequence[str]):
        from collections import deque

        import torch

        from rl.config import resolve
        from rl.envs import make_vec
        from rl.evaluation import build_agent, stream_seed
        from rl.loops import LoopState, on_policy
        from rl.rollout import Rollout

        with tempfile.TemporaryDirectory(prefix="rl-benchmark-") as folder:  # nothing is written, but the name must be free
            resolved = resolve(merged([*words, f"run_dir={folder}/run"]))
        c = resolved.common
        device = torch.device("cuda" if c.device.startswith("cuda") else "cpu")
        torch.set_num_threads(c.threads)
        self.resolved, self.state = resolved, LoopState()
        self.env = make_vec(c.env, c.num_envs, seed=stream_seed(c.seed, 1), device=device, threads=c.env_threads, **c.env_options)
        agent = build_agent(resolved, self.env, c.num_envs, device)
        rollout = Rollout(self.env, resolved.algo.rollout_steps)
        self.env.reset(stream_seed(c.seed, 1))
        graphs = c.compile and device.type == "cuda"
        self.loop = on_policy(agent, self.env, rollout, c.total_steps, self.state, graphs)
        self.returns: Any = deque(maxlen=100)

    def run(self, until: float | None = None) -> dict[str, Any]:
        """Learn to the end, or until the mean of the last 100 training episodes is `until`: seconds, steps, whether it got there."""
        start = time.perf_counter()
        solved = False
        for progress in self.loop:
            for value in progress.episode_returns.tolist():
                self.returns.append(value)
                solved |= until is not None and len(self.returns) == 100 and sum(self.returns) >= 100 * until
            if solved:
                break
        if self.env.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.env.close()
        mean = sum(self.returns) / max(len(self.returns), 1)
        return {"seconds": seconds, "env_steps": self.state.env_steps, "solved": solved, "last_100": mean}
