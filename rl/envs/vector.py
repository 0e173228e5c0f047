"""`NativeVecEnv`: B copies of a compiled env, stepped together; torch tensors in and out on the env's device."""

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from rl.envs import drivers as _drivers
from rl.envs.drivers import DISABLED, NEXT_STEP, SAME_STEP, Buffers, action_kind, layouts
from rl.envs.spec import Spec
from rl.types import Step

_MODES = {"same_step": SAME_STEP, "next_step": NEXT_STEP, "disabled": DISABLED}
_BACKENDS = ("auto", "serial", "threads", "prange", "cuda", "python")
_NO_LIMIT = 2**31 - 1
_THREAD_FROM = 2048  # envs per thread below which a second thread loses more than it gains
_CUDA_BLOCK = 256

_TORCH = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.int8): torch.int8,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.uint32): torch.uint32,
    np.dtype(np.uint64): torch.uint64,
    np.dtype(np.bool_): torch.bool,
}


class NativeVecEnv:
    """B copies of one compiled env.

    Args:
        spec: the env's rules.
        num_envs: B.
        device: "cpu" or a CUDA device; where the state lives and all tensors come out.
        seed: everything random follows from it, the same for every batch size, number of threads and backend.
        threads: CPU threads that step envs; used from 2,048 envs per thread upwards.
        backend: "auto" (serial, threads or cuda), or one of "serial", "threads", "prange", "cuda", "python" (slow; for tests).
        autoreset: "same_step" (native: `obs` is the next episode's first, `final_obs` the last one's), "next_step" (the call
            after an end ignores its action and returns the first observation with reward 0) or "disabled" (call
            `reset_envs(mask)` yourself; stepping an ended env goes on from its last state).
        time_limit: steps until truncation; "spec" for the env's own, None for no limit.
        first_index: the first env's number within the seed: envs [k, k + n) of a larger batch are `first_index=k, num_envs=n`.

    Raises:
        ValueError: for a wrong option, naming it; by `step`, for an impossible action.
        TypeError: by `step`, for an action of the wrong dtype, shape or device.

    The tensors returned by `step` are reused by the next `step`.
    """

    exact_resume = True
    episode_over: torch.Tensor | None = None  # every end of an episode is one

    def __init__(
        self,
        spec: Spec,
        num_envs: int,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        threads: int = 1,
        backend: str = "auto",
        autoreset: str = "same_step",
        time_limit: int | str | None = "spec",
        first_index: int = 0,
    ):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if autoreset not in _MODES:
            raise ValueError(f"autoreset must be one of {', '.join(_MODES)}, got {autoreset!r}")
        if backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        limit = spec.time_limit if time_limit == "spec" else time_limit
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit < _NO_LIMIT):
            raise ValueError(f"time_limit must be a number of steps from 1, or None, got {time_limit!r}")
        self._made_with = {
            "device": device, "seed": seed, "threads": threads, "backend": backend, "autoreset": autoreset,
            "time_limit": time_limit, "first_index": first_index,
        }  # fmt: skip
        self.spec = spec
        self.name = spec.name
        self.num_envs = num_envs
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if (self.device.type == "cuda") != (backend == "cuda") and (backend != "auto"):
            raise ValueError(f"backend {backend!r} does not run on device {str(self.device)!r}")
        self.single_observation_space = copy.deepcopy(spec.observation_space)
        self.single_action_space = copy.deepcopy(spec.action_space)
        self.action_kind = action_kind(spec.action_space)
        self.autoreset = autoreset
        self.time_limit = limit
        self.first_index = first_index
        self._seed = 0
        self._mode = _MODES[autoreset]
        self._layouts = layouts(spec)
        self._tensors = {name: self._allocate(layout) for name, layout in self._layouts.items()}
        t = self._tensors
        self._fill_constants()
        self._set_seed(seed)
        self.obs, self.final_obs = t["obs"], t["final_obs"]
        self.episode_return, self.episode_length = t["episode_return"], t["episode_length"]
        self.action_mask = t["mask"] if spec.legal is not None else None
        self.ended: int | None = 0  # episodes ended by the last step; None on CUDA, where asking would wait for the device
        self._out = Step(self.obs, t["reward"], t["terminated"], t["truncated"], self.final_obs)
        self._action_dtype = torch.float32 if self.action_kind == "continuous" else torch.int64
        self._action_shape = torch.Size((num_envs, *self._layouts["action"].shape))
        self._pool = None
        self.backend = self._choose_backend(backend, threads)
        self._begun = False
        if self.backend == "cuda":
            self._init_cuda()
        elif self.backend == "python":
            self._python = _drivers.python_drivers(spec)
            limit = self.time_limit or _NO_LIMIT
            dtype = np.dtype(np.float32 if self.action_kind == "continuous" else np.int64)
            shape = tuple(self._action_shape)

            def advance(action: np.ndarray) -> int:
                if action.dtype != dtype or action.shape != shape:
                    raise TypeError("convert it first")  # as a compiled driver says
                return self._python.step(self._arrays(), action, limit, self._mode)

            self._advance = advance
        else:
            self._init_cpu(threads)

    # -- construction ------------------------------------------------------------------------------------------------

    def _allocate(self, layout: _drivers.Layout) -> torch.Tensor:
        dtype = _TORCH[layout.dtype]
        if not layout.per_env:
            return torch.zeros(layout.shape, dtype=dtype, device=self.device)
        if layout.fortran:
            return torch.zeros((*layout.shape[::-1], self.num_envs), dtype=dtype, device=self.device).permute(
                *range(len(layout.shape), -1, -1)
            )
        return torch.zeros((self.num_envs, *layout.shape), dtype=dtype, device=self.device)

    def _fill_constants(self) -> None:
        space = self.spec.action_space
        if self.action_kind == "continuous":
            self._tensors["low"].copy_(torch.from_numpy(np.asarray(space.low, np.float32)))  # type: ignore[attr-defined]
            self._tensors["high"].copy_(torch.from_numpy(np.asarray(space.high, np.float32)))  # type: ignore[attr-defined]
        else:
            counts = [space.n] if self.action_kind == "discrete" else list(space.nvec)  # type: ignore[attr-defined]
            self._tensors["counts"].copy_(torch.tensor([int(n) for n in counts], dtype=torch.int32))

    def _choose_backend(self, backend: str, threads: int) -> str:
        if backend != "auto":
            return backend
        if self.device.type == "cuda":
            return "cuda"
        return "threads" if threads > 1 and self.num_envs >= _THREAD_FROM * threads else "serial"

    def _init_cpu(self, threads: int) -> None:
        made = _cached_cpu_drivers(self.spec)
        limit = self.time_limit if self.time_limit is not None else _NO_LIMIT
        addresses = [self._tensors[name].data_ptr() for name in Buffers._fields]
        self._table = np.array([self.num_envs, limit, self._mode, *addresses], np.int64)
        self._table_address = self._table.ctypes.data
        self._cpu = made
        address, whole = self._table_address, self.num_envs
        if self.backend == "threads" and threads > 1 and whole > 1:
            from rl.envs.pool import ThreadPool

            self._pool = ThreadPool(made, address, whole, min(threads, whole), self._arrays())
            self._advance = self._pool.step
        elif self.backend == "prange":
            prange = made.prange
            self._advance = lambda action: prange(address, action)
        else:
            step = made.step
            self._advance = lambda action: step(address, action, 0, whole)

    def _init_cuda(self) -> None:
        from rl.envs.cuda import CudaRunner

        self._cuda = CudaRunner(self.spec, self._tensors, self.time_limit or _NO_LIMIT, self._mode, _CUDA_BLOCK)
        self.ended = None

    def _set_seed(self, seed: int) -> None:
        seed = _check_seed(seed)
        self._seed = seed
        words = torch.tensor([seed & 0xFFFFFFFF, seed >> 32], dtype=torch.int64).to(torch.uint32)
        self._tensors["seed"].copy_(words.to(self.device).expand(self.num_envs, 2))
        index = torch.arange(self.first_index, self.first_index + self.num_envs, dtype=torch.int64)
        self._tensors["number"].copy_(index.to(torch.uint32))
        self._tensors["clock"].zero_()

    # -- the env -----------------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> torch.Tensor:
        """Start B new episodes: obs [B, ...]. Without a seed the random stream goes on."""
        if seed is not None:
            self._set_seed(seed)
        self.reset_envs(torch.ones(self.num_envs, dtype=torch.bool, device=self.device))
        return self.obs

    def reset_each(self, seeds: Sequence[int | None], mask: torch.Tensor | None = None) -> torch.Tensor:
        """Start new episodes, env i from `seeds[i]` as if it were the only env of that seed: obs [B, ...].

        Where `mask` [B] bool is not set, the env is left alone; where the seed is None, its own stream goes on. All envs share one
        clock: only when all get a seed does it start anew, and with it all that follows (else just the first state is the seed's).
        """
        if len(seeds) != self.num_envs:
            raise ValueError(f"got {len(seeds)} seeds for {self.num_envs} envs")
        chosen = torch.ones(self.num_envs, dtype=torch.bool) if mask is None else mask.cpu()
        seeded = torch.tensor([s is not None for s in seeds]) & chosen
        for s in seeds:
            _check_seed(s or 0)
        if not seeded.any():
            return self.reset_envs(chosen)
        t = self._tensors
        words = torch.tensor([[(s or 0) & 0xFFFFFFFF, (s or 0) >> 32] for s in seeds], dtype=torch.int64)
        old = t["seed"].cpu().to(torch.int64)
        t["seed"].copy_(torch.where(seeded[:, None], words, old).to(torch.uint32))
        t["number"].copy_(t["number"].cpu().to(torch.int64).masked_fill(seeded, 0).to(torch.uint32))
        clock = t["clock"].clone()
        t["clock"].zero_()
        self.reset_envs(seeded)
        if not seeded.all():
            t["clock"].copy_(clock)
            self.reset_envs(chosen & ~seeded)
        return self.obs

    def reset_envs(self, mask: torch.Tensor) -> torch.Tensor:
        """Start new episodes in the envs where `mask` [B] bool is set; obs [B, ...] of all."""
        if mask.dtype != torch.bool or mask.shape != (self.num_envs,):
            raise TypeError(f"mask must be bool [{self.num_envs}], got {mask.dtype} {list(mask.shape)}")
        flags = mask.to(self.device).contiguous()
        if self.backend == "cuda":
            self._cuda.begin(flags)
        elif self.backend == "python":
            self._python.begin(self._arrays(), flags.numpy())
        else:
            self._cpu.begin(self._table_address, flags.numpy())
        self._begun = True
        return self.obs

    def step(self, action: torch.Tensor) -> Step:
        """Step all envs: action [B] int64, [B, n] int64 or [B, n] float32 (clipped to the action space's bounds)."""
        if not self._begun:
            raise RuntimeError("call reset() before step()")
        if self.backend == "cuda":
            self._cuda.step(self._convert(action))
            return self._out
        try:
            ended = self._advance(action.numpy())
        except (TypeError, AttributeError, RuntimeError):  # not a CPU tensor of the right type: say so, or convert
            ended = self._advance(self._convert(action).numpy())
        if ended < 0:
            self._refuse(action, ended)
        self.ended = ended
        return self._out

    def step_many(self, actions: torch.Tensor) -> int | None:
        """A whole [T, B, ...] array of actions in one compiled call (on CUDA: one launch per step, without waiting); the number
        of episodes ended (None on CUDA).

        Only the last step's tensors remain to be read. For benchmarks and tests.
        """
        shape = tuple(self._action_shape)
        if actions.dim() != len(shape) + 1 or tuple(actions.shape[1:]) != shape or actions.dtype != self._action_dtype:
            wanted = f"{self._action_dtype} [T, {', '.join(map(str, shape))}]"
            raise TypeError(f"actions must be {wanted}, got {actions.dtype} {list(actions.shape)}")
        actions = actions.to(self.device).contiguous()
        if not self._begun:
            raise RuntimeError("call reset() before step_many()")
        if self.backend == "cuda":
            for t in range(len(actions)):
                self._cuda.step(actions[t])
            return None
        if self.backend == "python":
            return sum((self.step(row), self.ended or 0)[1] for row in actions)
        ended = self._cpu.many(self._table_address, actions.numpy())
        if ended < 0:
            row, env = divmod(-1 - ended, self.num_envs)
            raise ValueError(self._impossible(actions[row], env) + f" (row {row})")
        self.ended = ended
        return ended

    def _convert(self, action: Any) -> torch.Tensor:
        if isinstance(action, torch.Tensor):
            if action.device != self.device:
                raise TypeError(f"{self.name}: the env is on {self.device}, the action on {action.device}")
            if action.dtype is self._action_dtype and action.shape == self._action_shape and action.is_contiguous():
                return action.detach()
        tensor = torch.as_tensor(action).detach()
        if self.action_kind == "continuous":
            fits = tensor.dtype.is_floating_point
        else:
            fits = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex and tensor.dtype != torch.bool
        if not fits or tensor.shape != self._action_shape:
            raise TypeError(
                f"{self.name}: action must be {self._action_dtype} {list(self._action_shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        return tensor.to(device=self.device, dtype=self._action_dtype).contiguous()

    def _refuse(self, action: Any, answer: int) -> NoReturn:
        if answer == _drivers.WRONG_SHAPE:
            self._convert(action)  # says what is wrong
        raise ValueError(self._impossible(torch.as_tensor(action), -1 - answer))

    def _impossible(self, action: torch.Tensor, index: int) -> str:
        return f"{self.name}: action {action[index].tolist()} of env {index} is not in {self.spec.action_space}"

    def check_errors(self) -> None:
        """On CUDA, where a kernel cannot raise: ValueError if any step since the last check got an impossible action. Waits."""
        if self.backend == "cuda" and self._cuda.take_error():
            raise ValueError(f"{self.name}: an action was not in {self.spec.action_space}; its env was held still")

    def render(self, index: int = 0) -> np.ndarray:
        """Env `index` as RGB uint8 [H, W, 3]."""
        if self.spec.render is None:
            raise NotImplementedError(f"{self.name} has no picture")
        return self.spec.render(self._tensors["state"][index].cpu().numpy().copy())

    @property
    def state(self) -> torch.Tensor:
        """The envs' states [B, state_size]; writing to it injects states (then call `refresh`)."""
        return self._tensors["state"]

    def refresh(self) -> torch.Tensor:
        """Observations of the present states, after `state` was written to: obs [B, ...]."""
        state, obs = self.state.cpu().numpy(), np.empty((self.num_envs, *self._layouts["obs"].shape), self._layouts["obs"].dtype)
        observe = getattr(self.spec.observe, "py_func", self.spec.observe)
        for i in range(self.num_envs):
            observe(state[i], obs[i])
        self.obs.copy_(torch.from_numpy(obs))
        return self.obs

    def _arrays(self) -> Buffers:
        return Buffers(**{name: tensor.numpy() for name, tensor in self._tensors.items()})

    def state_dict(self) -> dict[str, Any]:
        """All there is to the B envs, copied: tensors by name and the settings they belong to."""
        return {
            "name": self.name,
            "num_envs": self.num_envs,
            "autoreset": self.autoreset,
            "time_limit": self.time_limit,
            "begun": self._begun,
            "tensors": {name: t.clone() for name, t in self._saved().items()},
        }

    def _saved(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in self._tensors.items() if name not in ("low", "high", "counts")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore exactly. ValueError if `state` belongs to another env, batch size, autoreset mode or time limit."""
        for key in ("name", "num_envs", "autoreset", "time_limit"):
            if state[key] != getattr(self, key):
                raise ValueError(f"the saved env has {key}={state[key]!r}, this one {getattr(self, key)!r}")
        tensors = state["tensors"]
        for name, mine in self._saved().items():  # all looked at before the first is written
            if name not in tensors:
                raise ValueError(f"the saved env has no {name}")
            tensor = tensors[name]
            if mine.shape != tensor.shape or mine.dtype != tensor.dtype:
                raise ValueError(f"saved {name} is {tensor.dtype} {list(tensor.shape)}, expected {mine.dtype} {list(mine.shape)}")
        for name, mine in self._saved().items():
            mine.copy_(tensors[name])
        self._begun = bool(state["begun"])

    def __deepcopy__(self, memo: dict[int, Any]) -> "NativeVecEnv":
        # Copying the attributes one by one would give an env whose drivers still move this one's memory.
        other = NativeVecEnv(self.spec, self.num_envs, **self._made_with)
        other.load_state_dict(self.state_dict())
        return other

    def __reduce__(self) -> NoReturn:
        raise TypeError("an env cannot be pickled: make it where it is needed, and carry its state_dict() over")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self.close()

    def __repr__(self) -> str:
        return f"NativeVecEnv({self.name}, num_envs={self.num_envs}, device={str(self.device)!r}, backend={self.backend!r})"


def _check_seed(seed: Any) -> int:
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return int(seed)


_CPU_DRIVERS: dict[int, tuple[Spec, _drivers.CpuDrivers]] = {}


def _cached_cpu_drivers(spec: Spec) -> _drivers.CpuDrivers:
    """One set of drivers per spec object and process: compiling, or even loading, takes a tenth of a second."""
    found = _CPU_DRIVERS.get(id(spec))
    if found is None:
        found = _CPU_DRIVERS[id(spec)] = (spec, _drivers.cpu_drivers(spec))
    return found[1]
