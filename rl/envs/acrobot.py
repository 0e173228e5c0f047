"""Acrobot: swing the free end of a two-link arm above a line; only the joint between the links has a motor.

Rules of Gymnasium 1.4's `Acrobot-v1` (`classic_control/acrobot.py`), dynamics "book": Sutton, Barto, "Reinforcement Learning",
first edition, section 11.3, after Sutton, "Generalization in Reinforcement Learning", NIPS 1995. One Runge-Kutta step of fourth order
per env step, no noise on the torque.

| state | meaning | unit | first value |
|---|---|---|---|
| 0 | angle of link 1, from hanging straight down | rad, in [-pi, pi) | uniform in [-0.1, 0.1] |
| 1 | angle of link 2, from the direction of link 1 | rad, in [-pi, pi) | same |
| 2 | angular velocity of link 1, at most 4 pi | rad/s | same |
| 3 | angular velocity of link 2, at most 9 pi | rad/s | same |

Observation: cos and sin of state 0, cos and sin of state 1, state 2, state 3. Actions: 0, 1, 2 apply -1, 0, +1 N m to the joint between
the links. Reward: -1 for every step, 0 for the one that reaches the goal. Terminates when the free end is more than 1 m above the
fixed joint; truncated after 500 steps. Version 1.
"""

import math

import gymnasium
import numpy as np

from rl.envs import rendering
from rl.envs.spec import Spec
from rl.kernels.fastmath import sincos, wrap_angle
from rl.kernels.jit import scalar
from rl.kernels.rng import uniform4

_LENGTH = 1.0  # m, of each link
_MASS = 1.0  # kg, of each link
_CENTRE = 0.5  # m, from a link's joint to its centre of mass
_INERTIA = 1.0  # kg m^2, of each link
_GRAVITY = 9.8  # m/s^2
_DT = 0.2  # s

# The mass matrix is [[D1 + 2 COUPLING cos b, D2 + COUPLING cos b], [D2 + COUPLING cos b, D2]], b the second angle.
COUPLING = np.float32(_MASS * _LENGTH * _CENTRE)
D1 = np.float32(_MASS * _CENTRE**2 + _MASS * (_LENGTH**2 + _CENTRE**2) + 2 * _INERTIA)
D2 = np.float32(_MASS * _CENTRE**2 + _INERTIA)
WEIGHT_1 = np.float32((_MASS * _CENTRE + _MASS * _LENGTH) * _GRAVITY)
WEIGHT_2 = np.float32(_MASS * _CENTRE * _GRAVITY)
DT = np.float32(_DT)
DT_2 = np.float32(_DT / 2)
DT_6 = np.float32(_DT / 6)
MAX_VEL_1 = np.float32(4 * math.pi)
MAX_VEL_2 = np.float32(9 * math.pi)
SPREAD = np.float32(0.2)
HALF = np.float32(0.5)
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
TWO = np.float32(2.0)


@scalar
def reset(state, key):
    a, b, c, d = uniform4(key, 0)
    state[0] = (a - HALF) * SPREAD
    state[1] = (b - HALF) * SPREAD
    state[2] = (c - HALF) * SPREAD
    state[3] = (d - HALF) * SPREAD


@scalar
def accelerations(a, b, va, vb, torque):
    """Angular accelerations of both links at angles a, b and velocities va, vb."""
    sin_a, cos_a = sincos(a)
    sin_b, cos_b = sincos(b)
    d1 = D1 + TWO * COUPLING * cos_b
    d2 = D2 + COUPLING * cos_b
    # The reference has cos(x - pi/2) where this has sin(x).
    phi2 = WEIGHT_2 * (sin_a * cos_b + cos_a * sin_b)
    phi1 = WEIGHT_1 * sin_a + phi2 - COUPLING * sin_b * vb * (vb + TWO * va)
    ratio = d2 / d1
    acc_b = (torque + ratio * phi1 - COUPLING * sin_b * va * va - phi2) / (D2 - d2 * ratio)
    acc_a = -(d2 * acc_b + phi1) / d1
    return acc_a, acc_b


@scalar
def step(state, action, key):
    a, b, va, vb = state[0], state[1], state[2], state[3]
    torque = np.float32(action) - ONE
    # Runge-Kutta: p, q are the velocities at each of the four points, r, s the accelerations.
    r1, s1 = accelerations(a, b, va, vb, torque)
    p2, q2 = va + DT_2 * r1, vb + DT_2 * s1
    r2, s2 = accelerations(a + DT_2 * va, b + DT_2 * vb, p2, q2, torque)
    p3, q3 = va + DT_2 * r2, vb + DT_2 * s2
    r3, s3 = accelerations(a + DT_2 * p2, b + DT_2 * q2, p3, q3, torque)
    p4, q4 = va + DT * r3, vb + DT * s3
    r4, s4 = accelerations(a + DT * p3, b + DT * q3, p4, q4, torque)
    a = wrap_angle(a + DT_6 * (va + TWO * p2 + TWO * p3 + p4))
    b = wrap_angle(b + DT_6 * (vb + TWO * q2 + TWO * q3 + q4))
    va = va + DT_6 * (r1 + TWO * r2 + TWO * r3 + r4)
    vb = vb + DT_6 * (s1 + TWO * s2 + TWO * s3 + s4)
    state[0], state[1] = a, b
    state[2] = min(max(va, -MAX_VEL_1), MAX_VEL_1)
    state[3] = min(max(vb, -MAX_VEL_2), MAX_VEL_2)
    sin_a, cos_a = sincos(a)
    sin_b, cos_b = sincos(b)
    terminated = sin_a * sin_b - cos_a * cos_b - cos_a > ONE  # -cos a - cos(a + b), the free end's height
    return ZERO if terminated else -ONE, terminated


@scalar
def observe(state, obs):
    sin_a, cos_a = sincos(state[0])
    sin_b, cos_b = sincos(state[1])
    obs[0], obs[1], obs[2], obs[3] = cos_a, sin_a, cos_b, sin_b
    obs[4], obs[5] = state[2], state[3]


def render(state: np.ndarray) -> np.ndarray:
    canvas = rendering.Canvas(400, 400, x=(-2.3, 2.3), y=(-2.3, 2.3))
    a, b = float(state[0]), float(state[0] + state[1])
    elbow = (math.sin(a), -math.cos(a))
    tip = (elbow[0] + math.sin(b), elbow[1] - math.cos(b))
    canvas.line((-2.3, 1.0), (2.3, 1.0), 0.03, rendering.GREY)
    canvas.line((0.0, 0.0), elbow, 0.2, rendering.BLUE)
    canvas.line(elbow, tip, 0.2, rendering.ORANGE)
    for joint in ((0.0, 0.0), elbow):
        canvas.disc(joint, 0.07, rendering.DARK)
    return canvas.picture()


_HIGH = np.array([1, 1, 1, 1, MAX_VEL_1, MAX_VEL_2], np.float32)

SPEC = Spec(
    name="Acrobot",
    reset=reset,
    step=step,
    observe=observe,
    state_size=4,
    observation_space=gymnasium.spaces.Box(-_HIGH, _HIGH, dtype=np.float32),
    action_space=gymnasium.spaces.Discrete(3),
    time_limit=500,
    render=render,
)
