"""Gymnasium: `python gymnasium_peer.py KIND`, where KIND is

single: `gym.make` and a loop; sync: SyncVectorEnv; vector: the env's own NumPy vector entry point.
"""

import sys
import warnings

import gymnasium
import numpy as np
from worker import GYM_IDS, ROWS, continuous, discrete, loop, serve

warnings.filterwarnings("ignore")
KIND = sys.argv[1]


def make(name, batch):
    rng = np.random.default_rng(0)
    if KIND == "single":
        if batch != 1:
            raise ValueError("one env only")
        env = gymnasium.make(GYM_IDS[name])
        env.reset(seed=0)
        space = env.action_space
        if hasattr(space, "n"):
            actions = [int(row[0]) for row in discrete(rng, space.n, 1)]
        else:
            actions = [row[0] for row in continuous(rng, space.low, space.high, 1)]

        def run(calls):
            for k in range(calls):
                _, _, terminated, truncated, _ = env.step(actions[k % ROWS])
                if terminated or truncated:
                    env.reset()

        return run, env.close
    envs = gymnasium.make_vec(GYM_IDS[name], num_envs=batch, vectorization_mode="sync" if KIND == "sync" else "vector_entry_point")
    envs.reset(seed=0)
    space = envs.single_action_space
    actions = discrete(rng, space.n, batch) if hasattr(space, "n") else continuous(rng, space.low, space.high, batch)
    return loop(envs.step, actions), envs.close


serve({"gymnasium": gymnasium.__version__, "numpy": np.__version__}, make)
