"""MountainCar: a car too weak for the hill must rock back and forth to reach the flag.

Rules of Gymnasium 1.4's `MountainCar-v0` (`classic_control/mountain_car.py`), after Moore, "Efficient Memory-Based Learning for Robot
Control", 1990. The valley's floor is at position -pi/6 = -0.52.

| obs | meaning | unit | first value |
|---|---|---|---|
| 0 | position along the track, in [-1.2, 0.6] | 1 | uniform in [-0.6, -0.4] |
| 1 | velocity, in [-0.07, 0.07] | 1/step | 0 |

Actions: 0 accelerates to the left, 1 does not, 2 to the right (0.001 per step^2). Reward: -1 for every step. Running into the left end
stops the car. Terminates at position 0.5; truncated after 200 steps. Version 0.
"""

import math
from functools import cache

import gymnasium
import numpy as np

from rl.envs import rendering
from rl.envs.spec import Spec
from rl.kernels.fastmath import sincos
from rl.kernels.jit import scalar
from rl.kernels.rng import uniform

LEFT = np.float32(-1.2)
RIGHT = np.float32(0.6)
GOAL = np.float32(0.5)
MAX_SPEED = np.float32(0.07)
FORCE = np.float32(0.001)
GRAVITY = np.float32(0.0025)
THREE = np.float32(3.0)
ONE = np.float32(1.0)
ZERO = np.float32(0.0)
START = np.float32(-0.6)
SPREAD = np.float32(0.2)


@scalar
def reset(state, key):
    state[0] = START + uniform(key, 0) * SPREAD
    state[1] = ZERO


@scalar
def drive(position, velocity, push):
    """Where the car is after one step with acceleration `push`, and how fast."""
    velocity = velocity + (push - GRAVITY * sincos(THREE * position)[1])
    velocity = min(max(velocity, -MAX_SPEED), MAX_SPEED)
    position = min(max(position + velocity, LEFT), RIGHT)
    velocity = ZERO if (position == LEFT) & (velocity < ZERO) else velocity
    return position, velocity


@scalar
def step(state, action, key):
    position, velocity = drive(state[0], state[1], (np.float32(action) - ONE) * FORCE)
    state[0], state[1] = position, velocity
    return -ONE, (position >= GOAL) & (velocity >= ZERO)


@scalar
def observe(state, obs):
    obs[0], obs[1] = state[0], state[1]


def _height(x):
    return np.sin(3 * x) * 0.45 + 0.55


@cache
def _scenery(goal: float) -> rendering.Canvas:
    canvas = rendering.Canvas(600, 400, x=(-1.2, 0.6), y=(-0.01, 1.19))
    track = np.linspace(-1.2, 0.6, 150)
    canvas.fill_below(track, _height(track), rendering.PALE)
    canvas.polyline(np.stack([track, _height(track)], 1), 0.012, rendering.DARK)
    foot = float(_height(goal))
    canvas.line((goal, foot), (goal, foot + 0.16), 0.01, rendering.DARK)
    canvas.polygon([(goal, foot + 0.16), (goal, foot + 0.1), (goal + 0.06, foot + 0.13)], rendering.ORANGE)
    return canvas


def render(state: np.ndarray, goal: float = float(GOAL)) -> np.ndarray:
    canvas = _scenery(goal).copy()
    x = float(state[0])
    slope = math.atan(3 * 0.45 * math.cos(3 * x))
    along, up = np.array([math.cos(slope), math.sin(slope)]), np.array([-math.sin(slope), math.cos(slope)])
    here = np.array([x, _height(x)])
    outline = ((-0.065, 0.03), (0.065, 0.03), (0.065, 0.055), (0.03, 0.085), (-0.03, 0.085), (-0.065, 0.055))
    canvas.polygon([here + a * along + h * up for a, h in outline], rendering.BLUE)
    for side in (-0.035, 0.035):
        canvas.disc(here + side * along + 0.026 * up, 0.02, rendering.DARK)
    return canvas.picture()


_LOW, _HIGH = np.array([LEFT, -MAX_SPEED], np.float32), np.array([RIGHT, MAX_SPEED], np.float32)

SPEC = Spec(
    name="MountainCar",
    reset=reset,
    step=step,
    observe=observe,
    state_size=2,
    observation_space=gymnasium.spaces.Box(_LOW, _HIGH, dtype=np.float32),
    action_space=gymnasium.spaces.Discrete(3),
    time_limit=200,
    render=render,
)
