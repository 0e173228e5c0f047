"""Identity: say what is shown. Test envs in which only a broken learner fails; one per kind of action.

Own rules, version 0. The observation shows what the answer to it should be; after each answer something new is shown, independent
of everything before. An episode terminates after ten answers (`STEPS`).

| env | shown | observation | action | reward | best return | random return |
|---|---|---|---|---|---|---|
| Identity | one of 4 symbols | one-hot, 4 | Discrete(4) | 1 if right, else 0 | 10 | 2.5 |
| IdentityMultiDiscrete | one of 3 and one of 4 symbols | both one-hot, 7 | MultiDiscrete([3, 4]) | share of right answers | 10 | 2.92 |
| IdentityContinuous | x uniform in [-1, 1] | x | one number a in [-1, 1] | -(a - x)^2 | 0 | -6.67 |

State: the steps taken, then what is shown.
"""

import gymnasium
import numpy as np

from rl.envs import rendering
from rl.envs.spec import Spec
from rl.kernels.jit import scalar
from rl.kernels.rng import randint, uniform

STEPS = np.float32(10.0)
N = np.uint32(4)  # symbols of Identity, and of the second place of IdentityMultiDiscrete
N_FIRST = np.uint32(3)  # symbols of the first place
ZERO = np.float32(0.0)
HALF = np.float32(0.5)
ONE = np.float32(1.0)
TWO = np.float32(2.0)


@scalar
def reset(state, key):
    state[0] = ZERO
    state[1] = np.float32(randint(key, 0, N))


@scalar
def step(state, action, key):
    reward = ONE if np.float32(action) == state[1] else ZERO
    taken = state[0] + ONE
    state[0] = taken
    state[1] = np.float32(randint(key, 0, N))
    return reward, taken >= STEPS


@scalar
def observe(state, obs):
    for k in range(4):
        obs[k] = ONE if np.float32(k) == state[1] else ZERO


@scalar
def reset_multi(state, key):
    state[0] = ZERO
    state[1] = np.float32(randint(key, 0, N_FIRST))
    state[2] = np.float32(randint(key, 1, N))


@scalar
def step_multi(state, action, key):
    first = HALF if np.float32(action[0]) == state[1] else ZERO
    second = HALF if np.float32(action[1]) == state[2] else ZERO
    taken = state[0] + ONE
    state[0] = taken
    state[1] = np.float32(randint(key, 0, N_FIRST))
    state[2] = np.float32(randint(key, 1, N))
    return first + second, taken >= STEPS


@scalar
def observe_multi(state, obs):
    for k in range(3):
        obs[k] = ONE if np.float32(k) == state[1] else ZERO
    for k in range(4):
        obs[3 + k] = ONE if np.float32(k) == state[2] else ZERO


@scalar
def reset_continuous(state, key):
    state[0] = ZERO
    state[1] = uniform(key, 0) * TWO - ONE


@scalar
def step_continuous(state, action, key):
    off = action[0] - state[1]
    taken = state[0] + ONE
    state[0] = taken
    state[1] = uniform(key, 0) * TWO - ONE
    return -off * off, taken >= STEPS


@scalar
def observe_continuous(state, obs):
    obs[0] = state[1]


def _row(canvas: rendering.Canvas, y: float, shown: int, n: int) -> None:
    for k in range(n):
        canvas.disc((k + 0.5, y), 0.35, rendering.ORANGE if k == shown else rendering.PALE)


def render(state: np.ndarray) -> np.ndarray:
    canvas = rendering.Canvas(240, 60, x=(0, 4), y=(0, 1))
    _row(canvas, 0.5, int(state[1]), int(N))
    return canvas.picture()


def render_multi(state: np.ndarray) -> np.ndarray:
    canvas = rendering.Canvas(240, 120, x=(0, 4), y=(0, 2))
    _row(canvas, 1.5, int(state[1]), int(N_FIRST))
    _row(canvas, 0.5, int(state[2]), int(N))
    return canvas.picture()


def render_continuous(state: np.ndarray) -> np.ndarray:
    canvas = rendering.Canvas(240, 60, x=(-1.2, 1.2), y=(-0.3, 0.3))
    canvas.line((-1, 0), (1, 0), 0.02, rendering.GREY)
    canvas.disc((float(state[1]), 0.0), 0.1, rendering.ORANGE)
    return canvas.picture()


SPEC = Spec(
    name="Identity",
    reset=reset,
    step=step,
    observe=observe,
    state_size=2,
    observation_space=gymnasium.spaces.Box(ZERO, ONE, (4,), dtype=np.float32),
    action_space=gymnasium.spaces.Discrete(int(N)),
    time_limit=None,
    render=render,
)

SPEC_MULTI_DISCRETE = Spec(
    name="IdentityMultiDiscrete",
    reset=reset_multi,
    step=step_multi,
    observe=observe_multi,
    state_size=3,
    observation_space=gymnasium.spaces.Box(ZERO, ONE, (7,), dtype=np.float32),
    action_space=gymnasium.spaces.MultiDiscrete([int(N_FIRST), int(N)]),
    time_limit=None,
    render=render_multi,
)

SPEC_CONTINUOUS = Spec(
    name="IdentityContinuous",
    reset=reset_continuous,
    step=step_continuous,
    observe=observe_continuous,
    state_size=2,
    observation_space=gymnasium.spaces.Box(-ONE, ONE, (1,), dtype=np.float32),
    action_space=gymnasium.spaces.Box(-ONE, ONE, (1,), dtype=np.float32),
    time_limit=None,
    render=render_continuous,
)
