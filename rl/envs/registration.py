"""The suite's own envs in Gymnasium's registry: `rl/CartPole-v1` and so on, alone or as a vector.

Gymnasium calls `register_envs` at its import, through the entry point `gymnasium.envs`; importing this module does the same, and
a second time does nothing. Neither torch nor numba is imported before an env is made.
"""

from gymnasium.envs.registration import register, registry

from rl import registry as suite

__all__ = ["register_envs"]


def register_envs() -> None:
    """Tell Gymnasium about every native env that it does not know yet."""
    # Not `suite.envs()`: that would import other packages in the middle of Gymnasium's own import.
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
