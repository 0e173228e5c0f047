"""MountainCarContinuous: MountainCar with a throttle, where force costs reward.

Rules of Gymnasium 1.4's `MountainCarContinuous-v0` (`classic_control/continuous_mountain_car.py`), after Moore 1990 and Arnaud de
Broissia's continuous version. One difference: the cost is that of the clipped force, Gymnasium charges for what the actor asked.

| obs | meaning | unit | first value |
|---|---|---|---|
| 0 | position along the track, in [-1.2, 0.6] | 1 | uniform in [-0.6, -0.4] |
| 1 | velocity, in [-0.07, 0.07] | 1/step | 0 |

Action: one force in [-1, 1], clipped, worth 0.0015 per step^2. Reward: -0.1 force^2 for every step, and 100 for the one that reaches
the flag. Running into the left end stops the car. Terminates at position 0.45; truncated after 999 steps. Version 0.
"""

import gymnasium
import numpy as np

from rl.envs import mountain_car
from rl.envs.mountain_car import LEFT, MAX_SPEED, ONE, RIGHT, ZERO, drive, observe, reset
from rl.envs.spec import Spec
from rl.kernels.jit import scalar

GOAL = np.float32(0.45)
POWER = np.float32(0.0015)
PRIZE = np.float32(100.0)
COST = np.float32(0.1)


@scalar
def step(state, action, key):
    force = action[0]
    position, velocity = drive(state[0], state[1], force * POWER)
    state[0], state[1] = position, velocity
    terminated = (position >= GOAL) & (velocity >= ZERO)
    return (PRIZE if terminated else ZERO) - COST * force * force, terminated


def render(state: np.ndarray) -> np.ndarray:
    return mountain_car.render(state, goal=float(GOAL))


_LOW, _HIGH = np.array([LEFT, -MAX_SPEED], np.float32), np.array([RIGHT, MAX_SPEED], np.float32)

SPEC = Spec(
    name="MountainCarContinuous",
    reset=reset,
    step=step,
    observe=observe,
    state_size=2,
    observation_space=gymnasium.spaces.Box(_LOW, _HIGH, dtype=np.float32),
    action_space=gymnasium.spaces.Box(-ONE, ONE, (1,), dtype=np.float32),
    time_limit=999,
    render=render,
)
