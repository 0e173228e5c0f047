"""gymnax (JAX on the CPU), one jitted, vmapped step per call from Python; XLA's threads are left as they are by default."""

import importlib.metadata

import gymnax
import jax
from worker import GYM_IDS, ROWS, serve


def make(name, batch):
    env, params = gymnax.make(GYM_IDS[name])
    key = jax.random.PRNGKey(0)
    _, state = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(jax.random.split(key, batch), params)
    sample = jax.vmap(jax.vmap(env.action_space(params).sample))
    actions = list(sample(jax.random.split(key, (ROWS, batch))))
    vector = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    @jax.jit
    def step(key, state, action):
        key, part = jax.random.split(key)
        obs, state, *rest = vector(jax.random.split(part, batch), state, action, params)
        return key, state, obs, rest[:-1]  # rewards and flags are computed too, the info is not

    held = [key, state]

    def run(calls):
        key, state = held
        obs = None
        for k in range(calls):
            key, state, obs, _ = step(key, state, actions[k % ROWS])
        jax.block_until_ready(obs)
        held[:] = key, state

    return run, lambda: None


serve({"gymnax": importlib.metadata.version("gymnax"), "jax": jax.__version__}, make)
