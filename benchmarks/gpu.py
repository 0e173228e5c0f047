"""Everything that needs a GPU, in one go: stepping, PPO, agreement with the CPU, and the tests marked `gpu`.

    python benchmarks/gpu.py [--quick] [--skip stepping ppo compile agreement tests]

- stepping: CartPole at 2^14 .. 2^20 envs, `step` called from Python with actions that are already on the GPU, and the same recorded as a
  CUDA graph where that works
- ppo: env steps per second of the learning loop at 4,096 .. 65,536 envs, `compile=false` and `compile=true` (CUDA graphs)
- agreement: 200 steps of each resident env on CPU and GPU with the same seed and actions. A GPU contracts a*b+c, so states drift apart
  within an episode: every step starts from the CPU's state, and the difference of that one step is what is bounded.
- tests: pytest -m gpu

Needs torch with CUDA and the extra `cuda`. Result: $OUT/gpu.json where OUT is set, else benchmarks/results/gpu.json. A part that fails is
recorded with its error, the others go on, and the exit status is 1.
"""

import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from common import REPO, LearningLoop, environment, made, parser, save, spread, summary

RESIDENTS = ("CartPole", "Acrobot", "MountainCar", "MountainCarContinuous", "Pendulum")
TOLERANCE = 1e-4  # of one float32 step, relative to max(1, |value|)
RARE = 1e-5  # share of transitions that may differ by more: those at the very limit of a wall or of an episode
AGREEMENT_STEPS, AGREEMENT_ENVS = 200, 4096
ROWS = 16


def actions_for(env: Any, rows: int, generator: Any) -> Any:
    """Random actions [rows, B, ...] on the CPU."""
    import torch

    space = env.single_action_space
    if hasattr(space, "n"):
        return torch.randint(int(space.n), (rows, env.num_envs), generator=generator)
    low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
    return low + (high - low) * torch.rand((rows, env.num_envs, *space.shape), generator=generator)


def stepping(quick: bool) -> list[dict[str, Any]]:
    import torch

    from rl.envs import make_vec

    rows = []
    for power in (14, 17, 20) if quick else range(14, 21):
        batch = 2**power
        env: Any = make_vec("CartPole", batch, device="cuda")
        env.reset(0)
        actions = list(actions_for(env, ROWS, torch.Generator().manual_seed(0)).cuda())

        def many(calls: int, env: Any = env, actions: Any = actions) -> None:
            for k in range(calls):
                env.step(actions[k % ROWS])

        ways: dict[str, Any] = {"step": (many, 1)}
        try:
            many(3)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                many(ROWS)

            def replay(calls: int, graph: Any = graph) -> None:
                for _ in range(calls):
                    graph.replay()

            ways["graph"] = (replay, ROWS)
        except Exception as error:
            print(f"no graph at {batch} envs: {error}")
        for way, (call, steps) in ways.items():
            rates = []
            call(3)
            torch.cuda.synchronize()
            calls = max(1, 2000 // steps)
            for _ in range(3 if quick else 7):
                start = time.perf_counter()
                call(calls)
                torch.cuda.synchronize()
                rates.append(calls * steps * batch / (time.perf_counter() - start))
            rows.append({"envs": batch, "call": way, "steps_per_second": summary(rates)})
            print(f"stepping {batch:>8} envs, {way:<5}: {spread(rows[-1]['steps_per_second'])}/s", flush=True)
        env.check_errors()
        env.close()
    return rows


def ppo(quick: bool, compile: bool) -> list[dict[str, Any]]:
    rows = []
    for envs in (4096, 65536) if quick else (4096, 16384, 65536):
        words = ["algo=ppo", "env=CartPole", "device=cuda", f"num_envs={envs}", "rollout_steps=32", "epochs=4", "minibatches=4",
                 f"compile={str(compile).lower()}"]  # fmt: skip
        iterations = 10 if quick else 30
        runs = []
        for repeat in range(3):
            start = time.perf_counter()
            loop = LearningLoop([*words, f"seed={repeat}", f"total_steps={envs * 32 * (iterations + 5)}"])
            for _ in range(5):  # compilation and capture
                next(loop.loop)
            begun, warm_up = loop.state.env_steps, time.perf_counter() - start
            done = loop.run()
            runs.append((done["env_steps"] - begun) / done["seconds"])
            print(f"ppo {envs} envs, compile={compile}: {runs[-1]:,.0f}/s (warm-up {warm_up:.1f} s)", flush=True)
        rows.append({"envs": envs, "compile": compile, "steps_per_second": summary(runs), "last_warm_up_seconds": warm_up})
    return rows


def agreement(quick: bool) -> dict[str, Any]:
    import torch

    from rl.envs import make_vec

    out: dict[str, Any] = {}
    envs = 256 if quick else AGREEMENT_ENVS
    for name in RESIDENTS:
        cpu: Any = make_vec(name, envs, seed=7)
        gpu: Any = make_vec(name, envs, seed=7, device="cuda")
        first = float(close(cpu.reset(7), gpu.reset(7).cpu()).max())
        worst, flags, beyond = {"state": 0.0, "obs": 0.0, "final_obs": 0.0, "reward": 0.0}, 0, 0
        for action in actions_for(cpu, AGREEMENT_STEPS, torch.Generator().manual_seed(1)):
            gpu.load_state_dict(cpu.state_dict())
            a, b = cpu.step(action), gpu.step(action.cuda())
            ended, flagged = a.terminated | a.truncated, b.terminated.cpu() | b.truncated.cpu()
            flags += int(((a.terminated != b.terminated.cpu()) | (a.truncated != b.truncated.cpu())).sum())
            same = ended == flagged  # one at the very limit may fall on one side only
            over = torch.zeros(envs, dtype=torch.bool)
            pairs = [(what, getattr(a, what), getattr(b, what)) for what in ("obs", "final_obs", "reward")]
            for what, x, y in [("state", cpu.state, gpu.state), *pairs]:
                apart = close(x, y.cpu()).where(same & ended if what == "final_obs" else same, 0.0)
                worst[what] = max(worst[what], float(apart.max()))
                over |= apart > TOLERANCE
            beyond += int(over.sum())
        gpu.check_errors()
        compared = AGREEMENT_STEPS * envs
        within = first <= TOLERANCE and flags + beyond <= RARE * compared
        out[name] = {
            "transitions": compared, "worst": {"reset": first, **worst}, "flags_that_differ": flags,
            "beyond_tolerance": beyond, "within": within,
        }  # fmt: skip
        print(f"agreement {name}: {'within' if within else 'NOT within'} {TOLERANCE:g}: {out[name]}", flush=True)
        cpu.close()
        gpu.close()
    return {"tolerance": TOLERANCE, "envs": out}


def close(a: Any, b: Any) -> Any:
    """Largest difference of each env [B], relative to max(1, |a|); NaN and Inf count as that."""
    a, b = a.double().flatten(1) if a.dim() > 1 else a.double()[:, None], b.double().flatten(1) if b.dim() > 1 else b.double()[:, None]
    return ((a - b).abs() / a.abs().clamp(min=1.0)).nan_to_num(float("inf")).amax(1)


def tests(quick: bool) -> dict[str, Any]:
    call = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(call, cwd=REPO, env=environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-30:]))
    return {"status": done.returncode, "summary": lines[-1] if lines else "", "within": done.returncode == 0}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    options.add_argument("--skip", nargs="*", default=[], choices=["stepping", "ppo", "compile", "agreement", "tests"])
    asked = options.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is false; nothing was measured", file=sys.stderr)
        return 3
    told = made("numba-cuda", "triton")
    told["machine"]["gpu"] = torch.cuda.get_device_name()
    result: dict[str, Any] = {"made": told}
    parts = {
        "agreement": lambda: agreement(asked.quick),
        "stepping": lambda: stepping(asked.quick),
        "ppo": lambda: ppo(asked.quick, False),
        "compile": lambda: ppo(asked.quick, True),
        "tests": lambda: tests(asked.quick),
    }
    out = asked.out or (Path(os.environ["OUT"]) / "gpu.json" if os.environ.get("OUT") else None)
    failed = []
    for name, part in parts.items():
        if name in asked.skip:
            continue
        try:
            result[name] = part()
        except Exception as error:
            traceback.print_exc()
            result[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            failed.append(name)
        save("gpu", result, out)  # after every part: a later one may take the process down
    wrong = [name for name, row in result.get("agreement", {}).get("envs", {}).items() if not row["within"]]
    if not result.get("tests", {"within": True}).get("within", False):
        failed.append("tests")
    if failed or wrong:
        print(f"failed: {', '.join([*failed, *wrong])}", file=sys.stderr)
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
