"""The CUDA side of `NativeVecEnv`: launches on torch's current stream, no host synchronisation, usable in a CUDA graph."""

from typing import Any

import numpy as np
import torch

from rl.envs.drivers import Buffers, cuda_functions
from rl.envs.spec import Spec

_COMPILED: dict[int, tuple[Spec, tuple[Any, Any, Any]]] = {}


def _kernels(spec: Spec) -> tuple[Any, Any, Any]:
    if id(spec) not in _COMPILED:
        try:
            from numba import cuda
        except ImportError as error:
            raise ImportError("envs on CUDA need numba-cuda: pip install 'rl-suite[cuda]'") from error
        made = cuda_functions(spec)
        _COMPILED[id(spec)] = (spec, tuple(cuda.jit(f) for f in made))  # type: ignore[attr-defined]
    return _COMPILED[id(spec)][1]


class CudaRunner:
    """Kernels of one spec bound to one env's tensors."""

    def __init__(self, spec: Spec, tensors: dict[str, torch.Tensor], limit: int, mode: int, block: int):
        self._step, self._tick, self._begin = _kernels(spec)
        self._tensors = tensors  # keeps the memory behind the views alive
        self.errors = torch.zeros(1, dtype=torch.int32, device=tensors["clock"].device)
        self._views = Buffers(**{name: device_array(t) for name, t in tensors.items()})
        self._clock = self._views.clock
        self._error_view = device_array(self.errors)
        self._limit, self._mode = np.int32(limit), np.int64(mode)
        num_envs = tensors["reward"].shape[0]
        self._grid, self._block = (num_envs + block - 1) // block, block

    def step(self, action: torch.Tensor) -> None:
        stream = current_stream(action.device)
        self._step[self._grid, self._block, stream](self._views, device_array(action), self._limit, self._mode, self._error_view)
        self._tick[1, 1, stream](self._clock)

    def begin(self, flags: torch.Tensor) -> None:
        stream = current_stream(flags.device)
        self._begin[self._grid, self._block, stream](self._views, device_array(flags))
        self._tick[1, 1, stream](self._clock)

    def take_error(self) -> bool:
        found = bool(self.errors.item())
        self.errors.zero_()
        return found


def device_array(tensor: torch.Tensor) -> Any:
    """`tensor` as Numba sees it: no copy, no synchronisation (NumPy's view of a CPU tensor, for the simulator)."""
    if tensor.device.type != "cuda":
        return tensor.numpy()
    from numba import cuda

    return cuda.as_cuda_array(tensor.detach(), sync=False)  # type: ignore[attr-defined]


def current_stream(device: torch.device) -> Any:
    """torch's current stream as a Numba stream (0, the default one, under the simulator)."""
    if device.type != "cuda":
        return 0
    from numba import cuda

    return cuda.external_stream(torch.cuda.current_stream(device).cuda_stream)  # type: ignore[attr-defined]
