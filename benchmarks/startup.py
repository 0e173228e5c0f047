"""How long one waits: `rl --help`, `rl list`, and the first env step of a process beyond its imports.

    python benchmarks/startup.py [--runs 9]

Every run is a fresh process; the file cache is warm. `first_step` is the time from the end of the imports (torch, numba, the env's own
modules) to the end of the first `step`, with the kernel cache empty (`cold`: one run, it compiles) and filled by the process before.
Result: benchmarks/results/startup.json.
"""

import json
import subprocess
import sys
import tempfile
import time

from common import environment, made, parser, rl_command, save, spread, summary

ENVS = ("CartPole", "Acrobot", "MountainCar", "MountainCarContinuous", "Pendulum")

FIRST_STEP = """
import json, sys, time
began = time.perf_counter()
import torch, numba, numpy, gymnasium
import rl.envs.vector
from rl import registry
from rl.envs import make_vec
name = sys.argv[1]
registry.load(registry.find_env(name).entry)
imported = time.perf_counter()
env = make_vec(name, 64)
env.reset(0)
space = env.single_action_space
action = torch.zeros((64, *space.shape), dtype=torch.int64 if hasattr(space, "n") else torch.float32)
env.step(action)
print(json.dumps({"imports": imported - began, "first_step": time.perf_counter() - imported}))
"""


def timed(call: list[str], **env: str) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(call, env=environment(**env), capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--runs", type=int, default=9)
    options.add_argument("--envs", nargs="*", default=list(ENVS))
    asked = options.parse_args()
    result: dict = {"made": made(), "commands": {}, "first_step": {}}
    for words in (["--help"], ["list"]):
        call = [*rl_command(), *words]
        timed(call)
        name = " ".join(["rl", *words])
        result["commands"][name] = summary(timed(call)[0] for _ in range(asked.runs))
        print(f"{name}: {spread(result['commands'][name])} s", flush=True)
    for env in asked.envs:
        with tempfile.TemporaryDirectory(prefix="rl-benchmark-") as cache:
            call = [sys.executable, "-c", FIRST_STEP, env]
            cold = json.loads(timed(call, RL_CACHE_DIR=cache)[1])
            warm = [json.loads(timed(call, RL_CACHE_DIR=cache)[1]) for _ in range(asked.runs)]
        row = {
            "cold": cold["first_step"],
            "warm": summary(run["first_step"] for run in warm),
            "imports": summary(run["imports"] for run in warm),
        }
        result["first_step"][env] = row
        print(f"first step of {env}: {spread(row['warm'])} s warm, {row['cold']:.2f} s cold", flush=True)
    save("startup", result, asked.out)


if __name__ == "__main__":
    main()
