"""The suite's own envs as Gymnasium knows envs: one at a time (`GymEnv`) or side by side (`GymVectorEnv`), NumPy in and out.

Both hand out copies: nothing they return is written to later. For learning with torch use `rl.make_vec`, which copies nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rl import registry
from rl.envs.spec import Spec
from rl.envs.vector import NativeVecEnv

__all__ = ["GymEnv", "GymVectorEnv"]

_FPS = {"Acrobot": 15, "CartPole": 50}  # the rest 30, as Gymnasium's
_MODES = {
    AutoresetMode.NEXT_STEP: "next_step",
    AutoresetMode.SAME_STEP: "same_step",
    AutoresetMode.DISABLED: "disabled",
}


def _spec(name: str) -> Spec:
    entry = registry.find_env(name)
    if entry.family == "foreign":
        raise ValueError(f"{name} is not an env of this suite: ask Gymnasium for it")
    return registry.load(entry.entry)


def _metadata(spec: Spec) -> dict[str, Any]:
    return {"render_modes": ["rgb_array"], "render_fps": _FPS.get(spec.name, 30)}


def _check_render_mode(spec: Spec, render_mode: str | None) -> str | None:
    if render_mode is not None and (render_mode != "rgb_array" or spec.render is None):
        raise ValueError(f"{spec.name}: render_mode must be {'rgb_array or ' if spec.render else ''}None, not {render_mode!r}")
    return render_mode


def _check_options(options: Mapping[str, Any] | None) -> None:
    if options:
        raise ValueError(f"reset knows no option {next(iter(options))!r}")


class GymEnv(gymnasium.Env):
    """One env of ours. It knows no time limit: `gymnasium.make` puts its TimeLimit wrapper around it.

    A seed given to `reset` determines everything until the next seed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012  # gymnasium.make looks at the class

    def __init__(self, name: str = "CartPole", render_mode: str | None = None):
        spec = _spec(name)
        self.metadata = _metadata(spec)
        self.render_mode = _check_render_mode(spec, render_mode)
        self.native = NativeVecEnv(spec, 1, autoreset="disabled", time_limit=None)
        self.observation_space = self.native.single_observation_space
        self.action_space = self.native.single_action_space
        self._obs = self.native.obs.numpy()[0]  # views of what the kernel writes
        self._action = np.zeros(tuple(self.native._action_shape), np.float32 if self.native.action_kind == "continuous" else np.int64)
        self._given = torch.from_numpy(self._action)
        self._seeded = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        _check_options(options)
        if seed is None and not self._seeded:
            seed = int(self.np_random.integers(2**63))
        self.native.reset(seed)
        self._seeded = True
        return self._obs.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        # Gymnasium's samples are int64 or float32 already; anything else that fits the space is converted by the assignment.
        self._action[0] = action
        out = self.native.step(self._given)
        return self._obs.copy(), out.reward.item(), out.terminated.item(), False, {}  # type: ignore[return-value]

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        if self.render_mode is None:
            gymnasium.logger.warn("render() was called on an env made without render_mode; use render_mode='rgb_array'")
            return None
        return self.native.render()

    def close(self) -> None:
        self.native.close()


class GymVectorEnv(gymnasium.vector.VectorEnv):
    """Many envs of ours, with the time limit inside; what `gymnasium.make_vec("rl/...")` makes.

    `reset(seed=s)` gives env i the seed s + i, as Gymnasium's own vectors do, and a list one for each. Autoreset is next-step unless
    `autoreset_mode` says otherwise. In the mode disabled, `reset(options={"reset_mask": bool [num_envs]})` starts those envs anew;
    stepping an env that ended is then an error.
    """

    def __init__(
        self,
        name: str = "CartPole",
        num_envs: int = 1,
        *,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        threads: int = 1,
    ):
        spec = _spec(name)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = _metadata(spec) | {"autoreset_mode": self.autoreset_mode}
        self.render_mode = _check_render_mode(spec, render_mode)
        limit = None if max_episode_steps in (None, -1) else max_episode_steps
        self.native = NativeVecEnv(spec, num_envs, autoreset=_MODES[self.autoreset_mode], time_limit=limit, threads=threads)
        self.num_envs = num_envs
        self.single_observation_space = self.native.single_observation_space
        self.single_action_space = self.native.single_action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._ended = np.zeros(num_envs, bool)
        self._seeded = False

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        _check_options(options)
        if mask is not None:
            mask = self._read_mask(mask)
        if seed is None and not self._seeded:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0] >> np.uint64(1))
        if isinstance(seed, int | np.integer):
            seeds: Sequence[int | None] = [int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = [None] * self.num_envs if seed is None else list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"got {len(seeds)} seeds for {self.num_envs} envs")
        if not self._seeded and None in seeds:
            drawn = np.random.SeedSequence().generate_state(self.num_envs, np.uint64) >> np.uint64(1)
            seeds = [int(drawn[i]) if s is None else s for i, s in enumerate(seeds)]
        obs = self.native.reset_each(seeds, None if mask is None else torch.from_numpy(mask))
        self._seeded = True
        self._ended[slice(None) if mask is None else mask] = False
        return obs.numpy().copy(), {}

    def _read_mask(self, mask: Any) -> np.ndarray:
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError(f"reset_mask must be a NumPy array of bools, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != (self.num_envs,):
            raise ValueError(f"reset_mask must have shape ({self.num_envs},), got {mask.shape}")
        if not mask.any():
            raise ValueError("reset_mask asks for no env")
        return mask

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        disabled = self.autoreset_mode == AutoresetMode.DISABLED
        if disabled and self._ended.any():
            ended = np.flatnonzero(self._ended).tolist()
            raise AssertionError(f"envs {ended} have ended: reset them with options={{'reset_mask': ...}} before the next step")
        if not isinstance(actions, torch.Tensor):
            actions = torch.from_numpy(np.ascontiguousarray(actions))
        native = self.native
        out = native.step(actions)
        terminated, truncated = out.terminated.numpy().copy(), out.truncated.numpy().copy()
        infos: dict[str, Any] = {}
        if native.ended:
            if disabled:
                self._ended = terminated | truncated
            elif self.autoreset_mode == AutoresetMode.SAME_STEP:
                infos = self._final_infos(terminated | truncated)
        # As Gymnasium's vectors: rewards are float64.
        return out.obs.numpy().copy(), out.reward.numpy().astype(np.float64), terminated, truncated, infos

    def _final_infos(self, ended: np.ndarray) -> dict[str, Any]:
        final = self.native.final_obs.numpy()
        kept = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(ended):
            kept[i] = final[i].copy()
        return {"final_obs": kept, "_final_obs": ended, "final_info": {}, "_final_info": ended.copy()}

    def render(self) -> tuple[np.ndarray, ...] | None:
        if self.render_mode is None:
            gymnasium.logger.warn("render() was called on an env made without render_mode; use render_mode='rgb_array'")
            return None
        return tuple(self.native.render(i) for i in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        self.native.close()
