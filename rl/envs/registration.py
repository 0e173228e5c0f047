"""The suite's own envs in Gymnasium's registry: `rl/CartPole-v1` and so on, alone or as a vector.

Importing this module registers them (Gymnasium 1.x has no entry point for it); so does `gymnasium.make` when it is given the
module's name, "rl.envs.registration:rl/CartPole-v1". Neither torch nor numba is imported before an env is made.
"""

from gymnasium.envs.registration import register, registry

from rl import registry as suite

__all__ = ["register_envs"]


def register_envs() -> None:
    """Tell Gymnasium about every native env that it does not know yet."""
    # Not `suite.envs()`: others register their envs with Gymnasium themselves.
    for entry in suite._RESIDENTS:
        if entry.players == 1 and entry.id not in registry:
            register(
                id=entry.id,
                entry_point="rl.envs.gymnasium_views:GymEnv",
                vector_entry_point="rl.envs.gymnasium_views:GymVectorEnv",
                reward_threshold=entry.threshold,
                max_episode_steps=entry.time_limit,  # the TimeLimit wrapper's for one env, the kernel's for a vector
                kwargs={"name": entry.name},
            )


register_envs()
