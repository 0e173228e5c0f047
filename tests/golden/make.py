"""Write the golden playthroughs, one file per native env: python tests/golden/make.py [NAME]..."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
STEPS, ENVS, SEED = 24, 2, 42


def play(name: str) -> dict[str, Any]:
    """A short run of two envs by a fixed policy, numbers rounded."""
    from rl import registry
    from rl.envs.vector import NativeVecEnv

    env = NativeVecEnv(registry.load(registry.find_env(name).entry), ENVS, seed=SEED, time_limit=15)
    first = env.reset().numpy().copy()
    log: dict[str, list[Any]] = {key: [] for key in ("action", "obs", "reward", "terminated", "truncated", "final_obs")}
    for t in range(STEPS):
        out = env.step(action := _action(env, t))
        ended = (out.terminated | out.truncated).numpy()
        log["action"].append(action.tolist())
        log["obs"].append(_rounded(out.obs))
        log["reward"].append(_rounded(out.reward))
        log["terminated"].append(out.terminated.tolist())
        log["truncated"].append(out.truncated.tolist())
        log["final_obs"].append(_rounded(out.final_obs.numpy() * ended[:, None]))
    return {"name": name, "kind": env.action_kind, "seed": SEED, "first": _rounded(first), **log}


def _rounded(values: Any) -> Any:
    return np.round(np.asarray(values, np.float64), 6).tolist()


def _action(env: Any, t: int) -> Any:
    """Small integers from t and the env's number: no generator whose stream could change."""
    import torch

    mixed = np.arange(ENVS) * 5 + t * t + t // 3
    if env.action_kind == "discrete":
        return torch.from_numpy(mixed % int(env.single_action_space.n))
    if env.action_kind == "multi_discrete":
        nvec = np.asarray(env.single_action_space.nvec)
        return torch.from_numpy((mixed[:, None] + np.arange(len(nvec))) % nvec)
    low, high = env.single_action_space.low, env.single_action_space.high
    return torch.from_numpy((low + (high - low) * ((mixed % 9) / 8)[:, None]).astype(np.float32))


def main() -> None:
    sys.path.insert(0, str(HERE.parents[1]))
    from rl import registry

    names = sys.argv[1:] or [entry.name for entry in registry.envs() if entry.family in ("classic", "test")]
    for name in names:
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in play(name).items()]
        (HERE / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{name}.json")


if __name__ == "__main__":
    main()
