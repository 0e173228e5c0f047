"""EnvPool (C++), synchronous, one thread."""

import envpool
import numpy as np
from worker import GYM_IDS, continuous, discrete, loop, serve


def make(name, batch):
    env = envpool.make(GYM_IDS[name], env_type="gymnasium", num_envs=batch, num_threads=1, seed=0)
    env.reset()
    rng = np.random.default_rng(0)
    space = env.action_space
    actions = discrete(rng, space.n, batch, "int32") if hasattr(space, "n") else continuous(rng, space.low, space.high, batch)
    return loop(env.step, actions), env.close


serve({"envpool": envpool.__version__, "numpy": np.__version__}, make)
