"""Small Gymnasium envs for the tests of the adapters: well-behaved, treacherous and broken ones. Light: workers import this."""

import os
import signal
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Walk(gymnasium.Env):
    """A random walk: obs [position, steps], reward = position drawn from np_random; ends (terminated) after `length` steps."""

    def __init__(self, length: int = 7, render_mode: str | None = None) -> None:
        self.length, self.render_mode = length, render_mode
        self.observation_space: spaces.Space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space: spaces.Space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.x = 0, self.np_random.standard_normal()
        return self.see(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        self.x += self.np_random.standard_normal() + float(np.sum(action))
        return self.see(), self.x, self.t >= self.length, False, {}

    def see(self) -> Any:
        return np.array([self.x, self.t])

    def render(self) -> Any:
        return np.full((4, 6, 3), self.t, np.uint8)


class Treacherous(Walk):
    """Action 1 kills, raises or hangs, as `how` says; `always`: every action does."""

    def __init__(self, how: str = "raise", always: bool = False) -> None:
        super().__init__(length=50)
        self.how, self.always = how, always

    def step(self, action: Any) -> Any:
        if action == 1 or self.always:
            if self.how == "raise":
                raise RuntimeError("the dice fell off the table")
            if self.how == "exit":
                os._exit(3)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        return super().step(0)


class Unbuildable(Walk):
    def __init__(self) -> None:
        raise OSError("no licence file")


class Masked(Walk):
    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)[0], {"action_mask": np.array([1, 0], np.int8)}

    def step(self, action: Any) -> Any:
        return *super().step(action)[:4], {"action_mask": np.array([self.t % 2, 1], np.int8)}


class Echo(gymnasium.Env):
    """Observes the last action it was given, through the spaces asked for."""

    def __init__(self, action: str = "box", obs: str = "box") -> None:
        low, high = np.array([-1.0, -np.inf]), np.array([1.0, np.inf])
        self.action_space = {
            "box": spaces.Box(low, high, dtype=np.float64),
            "multi": spaces.MultiDiscrete([3, 4]),
            "binary": spaces.MultiBinary(2),
            "start": spaces.Discrete(3, start=5),
            "text": spaces.Text(5),
        }[action]
        self.observation_space = {
            "box": spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "discrete": spaces.Discrete(9, start=2),
            "dict": spaces.Dict(a=spaces.Box(-9, 9, (2,), np.float64), b=spaces.Discrete(3)),
            "image": spaces.Box(0, 255, (2, 2, 1), np.uint8),
            "sequence": spaces.Sequence(spaces.Discrete(3)),
            "wrong": spaces.Box(-1, 1, (3,), np.float32),
        }[obs]
        self.kind = obs

    def see(self, action: Any) -> Any:
        a = np.broadcast_to(np.asarray(action, np.float64), (2,))
        if self.kind == "discrete":
            return int(a[0])
        if self.kind == "dict":
            return {"a": a.copy(), "b": 2}
        if self.kind == "image":
            return np.full((2, 2, 1), 200, np.uint8)
        return a.copy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self.see(2), {}

    def step(self, action: Any) -> Any:
        return self.see(action), 3.5, False, False, {}


def make_walk(length: int = 3) -> Walk:
    return Walk(length)


def unannotated(length: int = 3):  # what os.system looks like
    return Walk(length)


NOT_AN_ENV = 3


# -- one mistake each, for `rl env check` ------------------------------------------------------------------------------------


class LostFinal(Walk):
    """Resets itself where an episode ends and returns the new episode's first observation."""

    def step(self, action: Any) -> Any:
        _, reward, terminated, truncated, info = super().step(1)
        obs = self.reset()[0] if terminated else self.see()
        return obs, reward, terminated, truncated, info


class HiddenFinal(Walk):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"terminal_observation": obs} if terminated else {}


class IgnoresSeed(Walk):
    def reset(self, **kwargs: Any) -> Any:
        return super().reset()


class SameForEverySeed(Walk):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=None if seed is None else 1)


class Nondeterministic(Walk):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward + os.urandom(1)[0], terminated, truncated, info


class StaleState(Walk):
    """What the last episode left behind changes the next one."""

    left = 0

    def step(self, action: Any) -> Any:
        self.left += 1
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward + self.left, terminated, truncated, info


class MergedLimit(Walk):
    """Terminates at what is a time limit by its own name."""

    def __init__(self) -> None:
        super().__init__(length=25)
        self.max_steps = 25


class MergedQuietly(Walk):
    def __init__(self) -> None:
        super().__init__(length=25)


class MergedInInfo(Walk):
    def step(self, action: Any) -> Any:
        return *super().step(action)[:4], {"TimeLimit.truncated": self.t >= self.length}


class OutOfBounds(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-0.5, 3.0, (2,), np.float64)


class WrongDtype(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)


class WrongShape(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)


class NanReward(Walk):
    def step(self, action: Any) -> Any:
        obs, _, terminated, truncated, info = super().step(action)
        return obs, float("nan"), terminated, truncated, info


class ArrayReward(Walk):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, np.array([reward]), terminated, truncated, info


class IntFlags(Walk):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, int(terminated), truncated, info


class OldStep(Walk):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, _, info = super().step(action)
        return obs, reward, terminated, info


class OldReset(Walk):
    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)[0]


class Aliasing(Walk):
    """Hands out its own state array, and goes on writing into it."""

    def see(self) -> Any:
        if not hasattr(self, "state"):
            self.state = np.zeros(2)
        self.state[:] = self.x, self.t
        return self.state


class Raises(Walk):
    def step(self, action: Any) -> Any:
        raise ZeroDivisionError("in the third wheel")


class Endless(Walk):
    def __init__(self) -> None:
        super().__init__(length=10**9)


class VectorWithoutFinal(gymnasium.vector.VectorEnv):
    def __init__(self) -> None:
        self.num_envs, self.t = 2, 0
        self.single_observation_space, self.single_action_space = spaces.Box(0, 9, (1,)), spaces.Discrete(2)
        self.observation_space, self.action_space = spaces.Box(0, 9, (2, 1)), spaces.MultiDiscrete([2, 2])

    def reset(self, **kwargs: Any) -> Any:
        return np.zeros((2, 1), np.float32), {}

    def step(self, actions: Any) -> Any:
        self.t += 1
        return np.zeros((2, 1), np.float32), np.zeros(2), np.full(2, self.t % 5 == 0), np.zeros(2, bool), {}


class LostPendulum(gymnasium.Wrapper):
    """Resets itself like LostFinal, but its fresh episodes may begin nearly anywhere."""

    def __init__(self) -> None:
        super().__init__(gymnasium.make("Pendulum-v1"))

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return self.env.reset()[0] if truncated else obs, reward, terminated, truncated, info
