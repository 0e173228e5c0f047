"""Env steps per second from Python, one thread: ours by batch size, and how many times faster than peers.

    python benchmarks/env_stepping.py                     ours alone
    python benchmarks/env_stepping.py --peers DIR         with the peers found in DIR

CartPole, Acrobot and Pendulum at batch 1, 64, 1024 and 16384, random int64 or float32 actions made beforehand, through `env.step` (and the
fused `step_many`, for which no ratio is given); and 4,096 envs on a pool of two threads against one.

A peer is looked for as DIR/envpool/venv, DIR/jax/venv (gymnax) and DIR/gym/venv (Gymnasium: `gym.make` with a loop, SyncVectorEnv, the
env's own vector entry point). Each has a process of its own (benchmarks/peers/) that sleeps while it is not asked: of all processes one
measures at a time. A repeat measures ours and then each peer, so a ratio is always of neighbours in time, in one run on one machine.
Result: benchmarks/results/env_stepping.json.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from common import made, parser, rate, ratios, save, spread, summary

ENVS = ("CartPole", "Acrobot", "Pendulum")
BATCHES = (1, 64, 1024, 16384)
ROWS = 64  # different rows of actions that are gone through in turn, as in peers/worker.py
POOL_ENVS, POOL_THREADS = 4096, 2
HERE = Path(__file__).resolve().parent

PEERS = {  # name: (folder of its virtual environment, script, arguments)
    "envpool": ("envpool", "envpool_peer.py", ()),
    "gymnax": ("jax", "gymnax_peer.py", ()),
    "gymnasium_single": ("gym", "gymnasium_peer.py", ("single",)),
    "gymnasium_sync": ("gym", "gymnasium_peer.py", ("sync",)),
    "gymnasium_vector": ("gym", "gymnasium_peer.py", ("vector",)),
}
MOST = {"gymnasium_single": 1, "gymnasium_sync": 1024}  # largest batch; SyncVectorEnv steps one env after the other: more say nothing new


class Peer:
    """A peer's process, asked over its pipes."""

    def __init__(self, python: Path, script: str, arguments: tuple[str, ...]):
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        call = [str(python), "-W", "ignore", str(HERE / "peers" / script), *arguments]
        self.process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        self.versions = self._answer()["versions"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a peer's process ended: {self.process.stderr.read()[-2000:]}")
        return json.loads(line)

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


class Ours:
    """One of our envs and actions for it."""

    def __init__(self, name: str, batch: int, threads: int = 1):
        import torch

        from rl.envs import make_vec

        torch.set_num_threads(1)
        self.batch = batch
        self.env: Any = make_vec(name, batch, threads=threads)
        generator = torch.Generator().manual_seed(0)
        space = self.env.single_action_space
        if hasattr(space, "n"):
            self.actions = torch.randint(int(space.n), (ROWS, batch), generator=generator)
        else:
            low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
            self.actions = low + (high - low) * torch.rand((ROWS, batch, *space.shape), generator=generator)
        self.rows = list(self.actions)
        self.env.reset()
        self.step(3)

    def step(self, calls: int) -> None:
        step, rows = self.env.step, self.rows
        for k in range(calls):
            step(rows[k % ROWS])

    def many(self, calls: int) -> None:
        for _ in range(calls):
            self.env.step_many(self.actions)

    def rate(self, seconds: float) -> float:
        return rate(self.step, self.batch, seconds)

    def many_rate(self, seconds: float) -> float:
        return rate(self.many, self.batch * ROWS, seconds)


def one_case(name: str, batch: int, peers: dict[str, Peer], repeats: int, seconds: float) -> dict[str, Any]:
    ours = Ours(name, batch)
    ours.many(1)
    there, skipped = {}, {}
    for peer, process in peers.items():
        if batch > MOST.get(peer, batch):
            continue
        answer = process.ask(do="make", env=name, batch=batch)
        if "skip" in answer:
            skipped[peer] = answer["skip"]
            print(f"{name:<9} batch {batch:>6}  no {peer}: {answer['skip']}")
        else:
            there[peer] = process
    rates: dict[str, list[float]] = {key: [] for key in ("ours", "ours_step_many", *there)}
    for _ in range(repeats):
        rates["ours"].append(ours.rate(seconds))
        for peer, process in there.items():
            rates[peer].append(process.ask(do="measure", seconds=seconds)["rate"])
        rates["ours_step_many"].append(ours.many_rate(seconds))
    ours.env.close()
    for process in there.values():
        process.ask(do="close")
    row = {
        "env": name,
        "batch": batch,
        "steps_per_second": {key: summary(values) for key, values in rates.items()},
        "ratio": {peer: ratios(rates["ours"], rates[peer]) for peer in there},
        "skipped": skipped,
    }
    print(f"{name:<9} batch {batch:>6}  ours {spread(row['steps_per_second']['ours'])}/s", flush=True)
    for peer in there:
        print(f"    {peer:<17} {spread(row['steps_per_second'][peer])}/s   ours / it: {spread(row['ratio'][peer])}", flush=True)
    return row


def pool_case(name: str, repeats: int, seconds: float) -> dict[str, Any]:
    one, two = Ours(name, POOL_ENVS), Ours(name, POOL_ENVS, POOL_THREADS)
    single, pooled = [], []
    for _ in range(repeats):
        single.append(one.rate(seconds))
        pooled.append(two.rate(seconds))
    backend = two.env.backend
    one.env.close()
    two.env.close()
    row = {
        "env": name, "batch": POOL_ENVS, "threads": POOL_THREADS, "backend": backend,
        "one_thread": summary(single), "pool": summary(pooled), "ratio": ratios(pooled, single),
    }  # fmt: skip
    print(f"{name:<9} {POOL_ENVS} envs, {POOL_THREADS} threads / 1: {spread(row['ratio'])}", flush=True)
    return row


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--peers", type=Path, metavar="DIR", help="folder with the peers' virtual environments")
    options.add_argument("--envs", nargs="*", default=list(ENVS))
    options.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--seconds", type=float, default=0.4, help="of one measurement")
    asked = options.parse_args()
    result: dict[str, Any] = {"made": made()}
    peers: dict[str, Peer] = {}
    for name, (folder, script, arguments) in PEERS.items() if asked.peers else ():
        python = asked.peers / folder / "venv" / "bin" / "python"
        if python.exists():
            peers[name] = Peer(python, script, arguments)
            result["made"]["versions"].update({k: v for k, v in peers[name].versions.items() if k not in ("numpy", "gymnasium")})
        else:
            print(f"no {name}: it would be {python}")
    result["peers"] = {name: peer.versions for name, peer in peers.items()}
    try:
        result["cases"] = [one_case(env, batch, peers, asked.repeats, asked.seconds) for env in asked.envs for batch in asked.batches]
    finally:
        for peer in peers.values():
            peer.close()
    result["pool"] = [pool_case(env, asked.repeats, asked.seconds) for env in ("CartPole", "Acrobot")]
    save("env_stepping", result, asked.out)


if __name__ == "__main__":
    main()
