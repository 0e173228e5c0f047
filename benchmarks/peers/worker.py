"""The far end of env_stepping.py, in a peer's own Python: reads one JSON request per line, answers one line each.

    {"do": "make", "env": "CartPole", "batch": 64}   -> {"ok": true} or {"skip": "why"}
    {"do": "measure", "seconds": 0.3}                -> {"rate": env steps per second}
    {"do": "close"}                                  -> {"ok": true}

A peer's script calls `serve(versions, make)`; `make(env, batch)` returns `(run, close)`, where `run(n)` makes n vector steps with actions
made before. Standard library and NumPy only. Between requests the process sleeps.
"""

import json
import os
import sys
import time

ROWS = 64  # different rows of actions that are gone through in turn
GYM_IDS = {"CartPole": "CartPole-v1", "Acrobot": "Acrobot-v1", "Pendulum": "Pendulum-v1"}


def rate(run, batch, seconds):
    calls = 1
    while True:
        start = time.perf_counter()
        run(calls)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds / 2:
            return calls * batch / elapsed
        calls = max(calls + 1, int(calls * min(16.0, 0.9 * seconds / max(elapsed, 1e-9))))


def discrete(rng, n, batch, dtype="int64"):
    return list(rng.integers(0, n, (ROWS, batch)).astype(dtype))


def continuous(rng, low, high, batch):
    return list(rng.uniform(low, high, (ROWS, batch, 1)).astype("float32"))


def loop(step, actions):
    def run(calls):
        for k in range(calls):
            step(actions[k % ROWS])

    return run


def serve(versions, make):
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers

    def answer(**told):
        out.write(json.dumps(told) + "\n")
        out.flush()

    answer(versions=versions)
    run = close = None
    batch = 0
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "make":
            batch = asked["batch"]
            try:
                run, close = make(asked["env"], batch)
                run(2)
            except Exception as error:
                answer(skip=f"{type(error).__name__}: {error}"[:200])
                continue
            answer(ok=True)
        elif asked["do"] == "measure":
            answer(rate=rate(run, batch, asked["seconds"]))
        else:
            if close is not None:
                close()
            run = close = None
            answer(ok=True)
