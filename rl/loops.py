"""The loops: who talks to whom while training. A loop takes parts already built, yields after every iteration and knows no algorithm.

Progress, checkpoints, evaluation, time limits and interrupts live around the generator, in `rl/trainer.py`.
"""

from dataclasses import dataclass
from typing import Any

from rl.rollout import Rollout
from rl.types import Agent, Loop, Progress, VectorEnv


@dataclass
class LoopState:
    """Where a loop stands between two iterations; with the agent's and the env's state all that resuming needs."""

    env_steps: int = 0
    iterations: int = 0
    recurrent: Any = None  # [B, ...] the agent's recurrent state, or None

    def state_dict(self) -> dict[str, Any]:
        return {"env_steps": self.env_steps, "iterations": self.iterations, "recurrent": self.recurrent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env_steps, self.iterations = int(state["env_steps"]), int(state["iterations"])
        self.recurrent = state["recurrent"]


def on_policy(agent: Agent, env: VectorEnv, rollout: Rollout, total_steps: int, state: LoopState, graphs: bool = False) -> Loop:
    """Act for `rollout.steps` steps, learn from them, repeat until `total_steps` env steps (over all envs) are reached.

    `env` has been reset or restored: the loop begins at `env.obs`. With `graphs`, for an env on a GPU, all the steps of a
    rollout are recorded as one CUDA graph and replayed.
    """

    def collect(recurrent: Any) -> Any:
        for t in range(rollout.steps):
            act = agent.act(env.obs, env.action_mask, recurrent)
            rollout.put_act(t, env.obs, env.action_mask, act)
            step = env.step(act.action)
            rollout.put_step(t, step, env)
            if act.state is not None:  # a new episode begins with an empty memory
                going = ~(step.terminated | step.truncated)
                recurrent = act.state * going.view(-1, *[1] * (act.state.dim() - 1))
        return recurrent

    if graphs:
        from rl.cuda_graphs import GraphedCollect

        gather: Any = GraphedCollect(collect, [agent.generator])  # type: ignore[attr-defined]
    else:
        gather = collect
    while state.env_steps < total_steps:
        first = state.recurrent
        state.recurrent = gather(first)
        progress = state.env_steps / total_steps
        metrics = agent.learn(rollout.batch(env.obs, first, state.recurrent, progress))
        state.env_steps += rollout.steps * env.num_envs
        state.iterations += 1
        yield Progress(state.env_steps, metrics, *rollout.episodes())
