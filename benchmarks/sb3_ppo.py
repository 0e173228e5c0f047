"""Stable-Baselines3's PPO on CartPole with the RL-Zoo's hyperparameters: the opponent of ppo_throughput.py and time_to_skill.py.

RL-Zoo, hyperparams/ppo.yml, CartPole-v1: 8 envs x 32 steps, batch 256, 20 epochs, gamma .98, lambda .8, learning rate linear from
1e-3, clip range linear from .2, no entropy bonus. Not a script of its own.
"""

import time
from collections import deque
from typing import Any

# The same in our words.
SAME_WORDS = (
    "num_envs=8", "rollout_steps=32", "minibatches=1", "epochs=20", "gamma=0.98", "gae_lambda=0.8", "lr=1e-3", "anneal_lr=true",
    "clip=0.2", "anneal_clip=true", "entropy_coef=0", "hidden=[64,64]",
)  # fmt: skip


def run(seed: int, total_steps: int, until: float | None = None) -> dict[str, Any]:
    """One `learn` of `total_steps`, or until the mean of the last 100 training episodes is `until`."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    returns: deque[float] = deque(maxlen=100)

    class Watch(BaseCallback):
        solved = False

        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if "episode" in info:
                    returns.append(info["episode"]["r"])
                    if until is not None and len(returns) == 100 and sum(returns) >= 100 * until:
                        self.solved = True
            return not self.solved

    torch.set_num_threads(1)
    env = make_vec_env("CartPole-v1", n_envs=8, seed=seed)
    model = PPO(
        "MlpPolicy", env, n_steps=32, batch_size=256, n_epochs=20, gamma=0.98, gae_lambda=0.8, ent_coef=0.0,
        learning_rate=lambda left: 1e-3 * left, clip_range=lambda left: 0.2 * left, seed=seed, device="cpu", verbose=0,
    )  # fmt: skip
    watch = Watch() if until is not None else None
    start = time.perf_counter()
    model.learn(total_steps, callback=watch)
    seconds = time.perf_counter() - start
    env.close()
    last = [info["r"] for info in model.ep_info_buffer or ()]
    mean = sum(last) / max(len(last), 1)
    return {"seconds": seconds, "env_steps": model.num_timesteps, "solved": bool(watch and watch.solved), "last_100": mean}
