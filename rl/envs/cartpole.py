"""CartPole: keep a pole upright on a cart by pushing the cart left or right.

Rules of Gymnasium's `CartPole-v1` (`classic_control/cartpole.py`), after Barto, Sutton, Anderson, "Neuronlike Adaptive
Elements That Can Solve Difficult Learning Control Problems", 1983; corrected dynamics by Florian (2007) without friction.

| obs | meaning | unit | first value |
|---|---|---|---|
| 0 | cart position | m | uniform in [-0.05, 0.05] |
| 1 | cart velocity | m/s | same |
| 2 | pole angle from upright | rad | same |
| 3 | pole angular velocity | rad/s | same |

Actions: 0 pushes with 10 N to the left, 1 to the right. Reward: 1 for every step taken, the last one included.
Terminates when |position| > 2.4 m or |angle| > 12 degrees; truncated after 500 steps. Version 1.
"""

import math

import gymnasium
import numpy as np

from rl.envs import rendering
from rl.envs.spec import Spec
from rl.kernels.fastmath import sincos
from rl.kernels.jit import scalar
from rl.kernels.rng import uniform4

_GRAVITY = 9.8  # m/s^2
_MASS_CART = 1.0  # kg
_MASS_POLE = 0.1  # kg
_HALF_LENGTH = 0.5  # m, from hinge to centre of mass
_FORCE = 10.0  # N
_TAU = 0.02  # s, Euler step

GRAVITY = np.float32(_GRAVITY)
FORCE = np.float32(_FORCE)
TAU = np.float32(_TAU)
INV_MASS = np.float32(1.0 / (_MASS_CART + _MASS_POLE))
POLE_MOMENT = np.float32(_MASS_POLE * _HALF_LENGTH)
LENGTH_4_3 = np.float32(_HALF_LENGTH * 4.0 / 3.0)
LENGTH_MASS_RATIO = np.float32(_HALF_LENGTH * _MASS_POLE / (_MASS_CART + _MASS_POLE))
POLE_MOMENT_RATIO = np.float32(_MASS_POLE * _HALF_LENGTH / (_MASS_CART + _MASS_POLE))
X_LIMIT = np.float32(2.4)
ANGLE_LIMIT = np.float32(12 * 2 * math.pi / 360)
SPREAD = np.float32(0.1)
HALF = np.float32(0.5)
ONE = np.float32(1.0)


@scalar
def reset(state, key):
    a, b, c, d = uniform4(key, 0)
    state[0] = (a - HALF) * SPREAD
    state[1] = (b - HALF) * SPREAD
    state[2] = (c - HALF) * SPREAD
    state[3] = (d - HALF) * SPREAD


@scalar
def step(state, action, key):
    x, x_dot, angle, angle_dot = state[0], state[1], state[2], state[3]
    force = FORCE if action == 1 else -FORCE
    sin, cos = sincos(angle)
    temp = force * INV_MASS + POLE_MOMENT_RATIO * angle_dot * angle_dot * sin
    angle_acc = (GRAVITY * sin - cos * temp) / (LENGTH_4_3 - LENGTH_MASS_RATIO * cos * cos)
    x_acc = temp - POLE_MOMENT_RATIO * angle_acc * cos
    x += TAU * x_dot
    x_dot += TAU * x_acc
    angle += TAU * angle_dot
    angle_dot += TAU * angle_acc
    state[0], state[1], state[2], state[3] = x, x_dot, angle, angle_dot
    terminated = (x < -X_LIMIT) | (x > X_LIMIT) | (angle < -ANGLE_LIMIT) | (angle > ANGLE_LIMIT)
    return ONE, terminated


@scalar
def observe(state, obs):
    for k in range(4):
        obs[k] = state[k]


def render(state: np.ndarray) -> np.ndarray:
    canvas = rendering.Canvas(600, 400, x=(-2.4, 2.4), y=(-1.2, 2.0))
    x, angle = float(state[0]), float(state[2])
    top = 0.125
    tip = (x + 2 * _HALF_LENGTH * math.sin(angle), top + 2 * _HALF_LENGTH * math.cos(angle))
    canvas.line((-2.4, 0.0), (2.4, 0.0), 0.012, rendering.DARK)
    canvas.polygon([(x - 0.25, -0.125), (x + 0.25, -0.125), (x + 0.25, top), (x - 0.25, top)], rendering.BLUE)
    canvas.line((x, top), tip, 0.08, rendering.ORANGE)
    canvas.disc((x, top), 0.05, rendering.DARK)
    return canvas.picture()


_HIGH = np.array([4.8, np.inf, 2 * ANGLE_LIMIT, np.inf], np.float32)

SPEC = Spec(
    name="CartPole",
    reset=reset,
    step=step,
    observe=observe,
    state_size=4,
    observation_space=gymnasium.spaces.Box(-_HIGH, _HIGH, dtype=np.float32),
    action_space=gymnasium.spaces.Discrete(2),
    time_limit=500,
    render=render,
)
