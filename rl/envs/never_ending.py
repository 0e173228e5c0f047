"""NeverEnding: reward 1 for ever, whatever one does. A test env for what a learner does at a time limit.

Own rules, version 0. Observation: one constant, 1; the time is not in it. Actions: 0, 1, without effect. Reward: 1 for every step.
Never terminates; truncated after 20 steps. So the value of the one state there is is 1 / (1 - gamma), and a learner that takes a
truncation for an end learns at most (1 - gamma^20) / (1 - gamma).
"""

import gymnasium
import numpy as np

from rl.envs import rendering
from rl.envs.spec import Spec
from rl.kernels.jit import scalar

ONE = np.float32(1.0)


@scalar
def reset(state, key):
    state[0] = ONE


@scalar
def step(state, action, key):
    return ONE, False


@scalar
def observe(state, obs):
    obs[0] = state[0]


def render(state: np.ndarray) -> np.ndarray:
    canvas = rendering.Canvas(60, 60, x=(-1, 1), y=(-1, 1))
    canvas.disc((0.0, 0.0), 0.7, rendering.ORANGE)
    return canvas.picture()


SPEC = Spec(
    name="NeverEnding",
    reset=reset,
    step=step,
    observe=observe,
    state_size=1,
    observation_space=gymnasium.spaces.Box(-ONE, ONE, (1,), dtype=np.float32),
    action_space=gymnasium.spaces.Discrete(2),
    time_limit=20,
    render=render,
)
