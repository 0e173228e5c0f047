"""Pendulum: swing a rod up and keep it there with a motor too weak to lift it at once.

Rules of Gymnasium 1.4's `Pendulum-v1` (`classic_control/pendulum.py`, no publication named there), g = 10.

| state | meaning | unit | first value |
|---|---|---|---|
| 0 | angle from upright, within 8 dt of [-pi, pi) | rad | uniform in [-pi, pi] |
| 1 | angular velocity, in [-8, 8] | rad/s | uniform in [-1, 1] |

Observation: cos and sin of the angle, velocity. Action: one torque in [-2, 2] N m, clipped. Reward, of the state before the step:
-(angle^2 + 0.1 velocity^2 + 0.001 torque^2), the angle in [-pi, pi). Never terminates; truncated after 200 steps. Version 1.

The angle is brought back to [-pi, pi) at every step (Gymnasium lets it grow): after many turns float32 would lose its digits.
"""

import math

import gymnasium
import numpy as np

from rl.envs import rendering
from rl.envs.spec import Spec
from rl.kernels.fastmath import sincos, wrap_angle
from rl.kernels.jit import scalar
from rl.kernels.rng import uniform4

_GRAVITY = 10.0  # m/s^2
_MASS = 1.0  # kg
_LENGTH = 1.0  # m
_DT = 0.05  # s

DT = np.float32(_DT)
MAX_SPEED = np.float32(8.0)  # rad/s
MAX_TORQUE = np.float32(2.0)  # N m
PULL = np.float32(3 * _GRAVITY / (2 * _LENGTH))  # rad/s^2 of a horizontal rod
TWIST = np.float32(3 / (_MASS * _LENGTH**2))  # rad/s^2 per N m
COST_SPEED = np.float32(0.1)
COST_TORQUE = np.float32(0.001)
HALF = np.float32(0.5)
TWO = np.float32(2.0)
TWO_PI = np.float32(2 * math.pi)


@scalar
def reset(state, key):
    a, b, _, _ = uniform4(key, 0)
    state[0] = (a - HALF) * TWO_PI
    state[1] = (b - HALF) * TWO


@scalar
def step(state, action, key):
    angle, velocity, torque = wrap_angle(state[0]), state[1], action[0]
    cost = angle * angle + COST_SPEED * velocity * velocity + COST_TORQUE * torque * torque
    velocity = velocity + (PULL * sincos(angle)[0] + TWIST * torque) * DT
    velocity = min(max(velocity, -MAX_SPEED), MAX_SPEED)
    state[0], state[1] = angle + velocity * DT, velocity
    return -cost, False


@scalar
def observe(state, obs):
    sin, cos = sincos(state[0])
    obs[0], obs[1], obs[2] = cos, sin, state[1]


def render(state: np.ndarray) -> np.ndarray:
    canvas = rendering.Canvas(400, 400, x=(-1.4, 1.4), y=(-1.4, 1.4))
    angle = float(state[0])
    canvas.line((0.0, 0.0), (-math.sin(angle), math.cos(angle)), 0.2, rendering.ORANGE)
    canvas.disc((0.0, 0.0), 0.06, rendering.DARK)
    return canvas.picture()


_HIGH = np.array([1, 1, MAX_SPEED], np.float32)

SPEC = Spec(
    name="Pendulum",
    reset=reset,
    step=step,
    observe=observe,
    state_size=2,
    observation_space=gymnasium.spaces.Box(-_HIGH, _HIGH, dtype=np.float32),
    action_space=gymnasium.spaces.Box(-MAX_TORQUE, MAX_TORQUE, (1,), dtype=np.float32),
    time_limit=200,
    render=render,
)
