"""Return and advantage estimators: pure functions of [T, B] tensors, one backward pass over time.

All take the same words (see `rl.types`), float32 except `boundary`:

    reward      [T, B]  r_t
    value       [T, B]  V(obs_t)
    next_value  [T, B]  V of the state that follows: V(final_obs_t) where the episode was truncated, else V(obs_{t+1})
    discount    [T, B]  gamma * ~terminated: no value lies beyond a termination
    boundary    [T, B]  bool, terminated | truncated: what is in row t+1 belongs to another episode

At a boundary the recursion is cut and bootstraps from `next_value`, which `discount` makes nothing of at a termination. The last
row is cut likewise. Rows beyond a cut never reach the result, not even a NaN in them.

Returned are float32 tensors on the inputs' device, which carry no gradient. The sums run in float32: after n steps the relative
error is of the order of n * 6e-8, and at most that times 1 / (1 - gamma * lambda) over the size of one term.

Every estimator is one scalar step, walked backwards by two drivers: on the CPU time outside and envs inside, so that it
vectorises over envs; on CUDA one thread per env, on torch's current stream. The CUDA side neither synchronises nor allocates
anything but the outputs (and copies of inputs that are not contiguous), so it can be captured in a CUDA graph; as with torch's own
lazily loaded kernels, call it once before the capture.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl.kernels.jit import driver, scalar

__all__ = ["discounted_returns", "gae", "lambda_returns", "nstep_returns", "vtrace"]

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_CUDA_THREADS = 128


# ---- What one step does. `following` is the result of row t+1, ignored at a boundary; `beyond` is next_value there, else following.


@scalar
def _gae_step(reward, value, next_value, discount, boundary, lam, following):
    delta = reward + discount * next_value - value
    return delta + discount * lam * (_ZERO if boundary else following)


@scalar
def _discounted_step(reward, next_value, discount, boundary, following):
    return reward + discount * (next_value if boundary else following)


@scalar
def _lambda_step(reward, next_value, discount, boundary, lam, following):
    mixed = (_ONE - lam) * next_value + lam * following
    return reward + discount * (next_value if boundary else mixed)


@scalar
def _vtrace_target(rho, reward, value, next_value, discount, lam, clip_rho, clip_c, beyond):
    delta = (clip_rho if rho > clip_rho else rho) * (reward + discount * next_value - value)
    return value + delta + discount * lam * (clip_c if rho > clip_c else rho) * (beyond - next_value)


@scalar
def _vtrace_advantage(rho, reward, value, discount, clip_pg_rho, beyond):
    return (clip_pg_rho if rho > clip_pg_rho else rho) * (reward + discount * beyond - value)


# ---- CPU. One array is written per loop, the carry has a row of its own, and results are copied out of it: LLVM proves at run time
# that arrays do not overlap, but gives up (and does not vectorise) beyond 8 pairs, or when a row of `out` is read to write another.


@driver
def _gae_cpu(reward, value, next_value, discount, boundary, lam, out):
    steps, envs = reward.shape
    following = np.zeros(envs, np.float32)
    for t in range(steps - 1, -1, -1):
        for i in range(envs):
            cut = boundary[t, i] | (t == steps - 1)
            following[i] = _gae_step(reward[t, i], value[t, i], next_value[t, i], discount[t, i], cut, lam, following[i])
        for i in range(envs):
            out[t, i] = following[i]


@driver
def _discounted_cpu(reward, next_value, discount, boundary, out):
    steps, envs = reward.shape
    following = np.zeros(envs, np.float32)
    for t in range(steps - 1, -1, -1):
        for i in range(envs):
            cut = boundary[t, i] | (t == steps - 1)
            following[i] = _discounted_step(reward[t, i], next_value[t, i], discount[t, i], cut, following[i])
        for i in range(envs):
            out[t, i] = following[i]


@driver
def _lambda_cpu(reward, next_value, discount, boundary, lam, out):
    steps, envs = reward.shape
    following = np.zeros(envs, np.float32)
    for t in range(steps - 1, -1, -1):
        for i in range(envs):
            cut = boundary[t, i] | (t == steps - 1)
            following[i] = _lambda_step(reward[t, i], next_value[t, i], discount[t, i], cut, lam, following[i])
        for i in range(envs):
            out[t, i] = following[i]


@driver
def _nstep_cpu(reward, next_value, discount, boundary, n, out):
    steps, envs = reward.shape
    for t in range(steps):
        end = min(t + n, steps) - 1  # the last row of the window, cut like the last row of all
        for k in range(end, t - 1, -1):
            for i in range(envs):
                cut = boundary[k, i] | (k == end)
                out[t, i] = _discounted_step(reward[k, i], next_value[k, i], discount[k, i], cut, out[t, i])


@driver
def _vtrace_cpu(rho, reward, value, next_value, discount, boundary, lam, clip_rho, clip_c, clip_pg_rho, target, advantage):
    steps, envs = reward.shape
    following = np.zeros(envs, np.float32)
    for t in range(steps - 1, -1, -1):
        for i in range(envs):
            beyond = next_value[t, i] if boundary[t, i] | (t == steps - 1) else following[i]
            advantage[t, i] = _vtrace_advantage(rho[t, i], reward[t, i], value[t, i], discount[t, i], clip_pg_rho, beyond)
        for i in range(envs):
            beyond = next_value[t, i] if boundary[t, i] | (t == steps - 1) else following[i]
            following[i] = _vtrace_target(
                rho[t, i], reward[t, i], value[t, i], next_value[t, i], discount[t, i], lam, clip_rho, clip_c, beyond
            )
        for i in range(envs):
            target[t, i] = following[i]


# ---- CUDA. Plain functions here: `_cuda_kernel` compiles them, and only then is numba.cuda imported.

cuda: Any = None  # numba.cuda from then on


def _gae_cuda(reward, value, next_value, discount, boundary, lam, out):
    steps, envs = reward.shape
    i = cuda.grid(1)
    if i < envs:
        following = _ZERO
        for t in range(steps - 1, -1, -1):
            cut = boundary[t, i] | (t == steps - 1)
            following = _gae_step(reward[t, i], value[t, i], next_value[t, i], discount[t, i], cut, lam, following)
            out[t, i] = following


def _discounted_cuda(reward, next_value, discount, boundary, out):
    steps, envs = reward.shape
    i = cuda.grid(1)
    if i < envs:
        following = _ZERO
        for t in range(steps - 1, -1, -1):
            cut = boundary[t, i] | (t == steps - 1)
            following = _discounted_step(reward[t, i], next_value[t, i], discount[t, i], cut, following)
            out[t, i] = following


def _lambda_cuda(reward, next_value, discount, boundary, lam, out):
    steps, envs = reward.shape
    i = cuda.grid(1)
    if i < envs:
        following = _ZERO
        for t in range(steps - 1, -1, -1):
            cut = boundary[t, i] | (t == steps - 1)
            following = _lambda_step(reward[t, i], next_value[t, i], discount[t, i], cut, lam, following)
            out[t, i] = following


def _nstep_cuda(reward, next_value, discount, boundary, n, out):  # one thread per element: windows do not depend on each other
    steps, envs = reward.shape
    element = cuda.grid(1)
    if element < steps * envs:
        t = element // envs
        i = element - t * envs
        end = min(t + n, steps) - 1
        following = _ZERO
        for k in range(end, t - 1, -1):
            cut = boundary[k, i] | (k == end)
            following = _discounted_step(reward[k, i], next_value[k, i], discount[k, i], cut, following)
        out[t, i] = following


def _vtrace_cuda(rho, reward, value, next_value, discount, boundary, lam, clip_rho, clip_c, clip_pg_rho, target, advantage):
    steps, envs = reward.shape
    i = cuda.grid(1)
    if i < envs:
        following = _ZERO
        for t in range(steps - 1, -1, -1):
            beyond = next_value[t, i] if boundary[t, i] | (t == steps - 1) else following
            advantage[t, i] = _vtrace_advantage(rho[t, i], reward[t, i], value[t, i], discount[t, i], clip_pg_rho, beyond)
            following = _vtrace_target(
                rho[t, i], reward[t, i], value[t, i], next_value[t, i], discount[t, i], lam, clip_rho, clip_c, beyond
            )
            target[t, i] = following


_CPU_KERNELS: dict[str, Any] = {
    "gae": _gae_cpu,
    "discounted": _discounted_cpu,
    "lambda": _lambda_cpu,
    "nstep": _nstep_cpu,
    "vtrace": _vtrace_cpu,
}

_CUDA_KERNELS: dict[str, Callable[..., None]] = {
    "gae": _gae_cuda,
    "discounted": _discounted_cuda,
    "lambda": _lambda_cuda,
    "nstep": _nstep_cuda,
    "vtrace": _vtrace_cuda,
}


@functools.cache
def _cuda_kernel(name: str) -> Any:
    global cuda
    from numba import cuda

    return cuda.jit(_CUDA_KERNELS[name])


def _run(name: str, tensors: list[Tensor], numbers: tuple[Any, ...], outputs: int, threads: int) -> list[Tensor]:
    """Call kernel `name` with the tensors, then the numbers, then new outputs shaped like the tensors."""
    tensors = [x.detach().contiguous() for x in tensors]
    results = [torch.empty_like(tensors[0]) for _ in range(outputs)]
    device = tensors[0].device
    if tensors[0].numel() == 0:
        return results
    if device.type == "cpu":
        _CPU_KERNELS[name](*(x.numpy() for x in tensors), *numbers, *(x.numpy() for x in results))
        return results
    kernel = _cuda_kernel(name)
    with torch.cuda.device(device):
        # sync=False: the inputs were made on this same stream, which is order enough.
        arrays = [cuda.as_cuda_array(x, sync=False) for x in (*tensors, *results)]
        stream = cuda.external_stream(torch.cuda.current_stream().cuda_stream)
        blocks = (threads + _CUDA_THREADS - 1) // _CUDA_THREADS
        kernel[blocks, _CUDA_THREADS, stream](*arrays[: len(tensors)], *numbers, *arrays[len(tensors) :])
    return results


def _check(**tensors: Tensor) -> None:
    """Every tensor must have the shape and device of `reward`, and be float32 (`boundary`: bool)."""
    reward = tensors["reward"]
    for name, tensor in tensors.items():
        dtype = torch.bool if name == "boundary" else torch.float32
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
        if tensor.ndim != 2:
            raise ValueError(f"{name} must have shape [T, B], not {list(tensor.shape)}")
        if tensor.shape != reward.shape:
            raise ValueError(f"{name} must have the shape of reward, {list(reward.shape)}, not {list(tensor.shape)}")
        if tensor.device != reward.device:
            raise ValueError(f"{name} must be on the device of reward, {reward.device}, not {tensor.device}")
    if reward.device.type not in ("cpu", "cuda"):
        raise ValueError(f"reward must be on a cpu or cuda device, not {reward.device}")


def _unit_interval(name: str, value: float) -> np.float32:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], not {value}")
    return np.float32(value)


def _clip(name: str, value: float) -> np.float32:
    if not value > 0.0:
        raise ValueError(f"{name} must be positive (float('inf') for no clipping), not {value}")
    return np.float32(value)


def gae(reward: Tensor, value: Tensor, next_value: Tensor, discount: Tensor, boundary: Tensor, lam: float) -> Tensor:
    """Generalised advantage estimation.

    Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16, as a recursion:
    A_t = delta_t + discount_t lam A_{t+1}, delta_t = r_t + discount_t next_value_t - V_t (eq. 10); A_{t+1} is 0 beyond a boundary.

    All [T, B]; boundary bool, the rest float32; lam in [0, 1]. Returns the advantage [T, B] float32. ValueError on a mismatch.
    """
    _check(reward=reward, value=value, next_value=next_value, discount=discount, boundary=boundary)
    tensors = [reward, value, next_value, discount, boundary]
    return _run("gae", tensors, (_unit_interval("lam", lam),), 1, reward.shape[1])[0]


def discounted_returns(reward: Tensor, discount: Tensor, boundary: Tensor, next_value: Tensor) -> Tensor:
    """Discounted sum of the rewards to the episode's end, bootstrapped where a truncation or the last row cuts it off.

    Sutton and Barto 2018, eq. 3.9: G_t = r_t + discount_t G_{t+1}, where next_value_t stands for G_{t+1} at a cut; elsewhere
    next_value is not read.

    All [T, B]; boundary bool, the rest float32. Returns G [T, B] float32. ValueError on a mismatch.
    """
    _check(reward=reward, discount=discount, boundary=boundary, next_value=next_value)
    return _run("discounted", [reward, next_value, discount, boundary], (), 1, reward.shape[1])[0]


def lambda_returns(reward: Tensor, next_value: Tensor, discount: Tensor, boundary: Tensor, lam: float) -> Tensor:
    """The lambda-return, TD(lambda)'s mixture of all n-step returns.

    Sutton and Barto 2018, eq. 12.20 (state values): G_t = r_t + discount_t ((1 - lam) next_value_t + lam G_{t+1}), where
    next_value_t stands for G_{t+1} at a cut.

    All [T, B]; boundary bool, the rest float32; lam in [0, 1]. Returns G [T, B] float32. ValueError on a mismatch.
    """
    _check(reward=reward, next_value=next_value, discount=discount, boundary=boundary)
    tensors = [reward, next_value, discount, boundary]
    return _run("lambda", tensors, (_unit_interval("lam", lam),), 1, reward.shape[1])[0]


def nstep_returns(reward: Tensor, next_value: Tensor, discount: Tensor, boundary: Tensor, n: int) -> Tensor:
    """The n-step return: n discounted rewards and then the value, or fewer where a boundary or the last row comes first.

    Sutton and Barto 2018, eq. 7.1: G_t = r_t + discount_t (r_{t+1} + ... discount_{t+m-1} next_value_{t+m-1}), m <= n.

    All [T, B]; boundary bool, the rest float32; n >= 1. Returns G [T, B] float32. ValueError on a mismatch. Costs T * n steps:
    for n = T use `discounted_returns`, which is the same.
    """
    _check(reward=reward, next_value=next_value, discount=discount, boundary=boundary)
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"n must be a positive integer, not {n!r}")
    tensors = [reward, next_value, discount, boundary]
    return _run("nstep", tensors, (min(int(n), max(len(reward), 1)),), 1, reward.numel())[0]


def vtrace(
    log_rho: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    discount: Tensor,
    boundary: Tensor,
    lam: float = 1.0,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
    clip_pg_rho: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace: value targets and policy-gradient advantages from another policy's data.

    Espeholt et al. 2018, "IMPALA", eq. 1 in the recursive form of its remark 1: with rho = exp(log_rho), the ratio of the target
    policy's probability to the behaviour policy's, vs_t = V_t + min(rho_t, clip_rho) (r_t + discount_t next_value_t - V_t)
    + discount_t lam min(rho_t, clip_c) (vs_{t+1} - next_value_t); the advantage (section 4.2) is min(rho_t, clip_pg_rho)
    (r_t + discount_t vs_{t+1} - V_t). next_value_t stands for vs_{t+1} at a cut.

    All [T, B]; boundary bool, the rest float32; lam in [0, 1], the clips positive. Returns (vs, advantage), both [T, B] float32.
    ValueError on a mismatch.
    """
    _check(reward=reward, log_rho=log_rho, value=value, next_value=next_value, discount=discount, boundary=boundary)
    numbers = (
        _unit_interval("lam", lam),
        _clip("clip_rho", clip_rho),
        _clip("clip_c", clip_c),
        _clip("clip_pg_rho", clip_pg_rho),
    )
    tensors = [log_rho.detach().exp(), reward, value, next_value, discount, boundary]  # torch's exp vectorises, a kernel's does not
    vs, advantage = _run("vtrace", tensors, numbers, 2, reward.shape[1])
    return vs, advantage
