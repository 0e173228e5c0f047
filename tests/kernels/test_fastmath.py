"""Error bounds of the float32 functions, their edge cases, and that the compiled code is vectorised and free of float64."""

import math
import platform
import re

import numpy as np
import pytest
from numba import float32, types
from numba.core.caching import NullCache

from rl.kernels.fastmath import sincos, tanh, wrap_angle
from rl.kernels.jit import driver


@driver
def _sincos_loop(x, sin, cos):
    for i in range(x.shape[0]):
        sin[i], cos[i] = sincos(x[i])


@driver
def _tanh_loop(x, out):
    for i in range(x.shape[0]):
        out[i] = tanh(x[i])


@driver
def _wrap_loop(x, out):
    for i in range(x.shape[0]):
        out[i] = wrap_angle(x[i])


def _sincos(x):
    x = np.asarray(x, np.float32)
    sin, cos = np.empty_like(x), np.empty_like(x)
    _sincos_loop(x, sin, cos)
    return sin, cos


def _apply(loop, x):
    x = np.asarray(x, np.float32)
    out = np.empty_like(x)
    loop(x, out)
    return out


def _grid(limit: float) -> np.ndarray:
    """A dense grid, every float32 neighbour of the multiples of pi/4 (where quadrants change), and tiny numbers."""
    multiples = (np.arange(-200, 201) * (math.pi / 4)).astype(np.float32)
    multiples = multiples[np.abs(multiples) < limit]
    near = [multiples]
    for direction in (np.float32(-np.inf), np.float32(np.inf)):
        step = multiples
        for _ in range(3):
            step = np.nextafter(step, direction)
            near.append(step)
    tiny = np.float32(2.0) ** np.arange(-140, 0, dtype=np.float32)
    return np.concatenate([np.linspace(-limit, limit, 400_001, dtype=np.float32), *near, tiny, -tiny])


@pytest.mark.parametrize(("limit", "bound"), [(100.0, 8e-8), (8192.0, 1e-7)])
def test_sincos_error(limit, bound):
    x = _grid(limit)
    sin, cos = _sincos(x)
    assert np.abs(sin - np.sin(x.astype(np.float64))).max() < bound
    assert np.abs(cos - np.cos(x.astype(np.float64))).max() < bound


def test_tanh_error_and_range():
    x = _grid(20.0)
    y = _apply(_tanh_loop, x)
    assert np.abs(y - np.tanh(x.astype(np.float64))).max() < 2.5e-7
    assert np.abs(y).max() == 1.0
    assert np.array_equal(y, -_apply(_tanh_loop, -x))
    small = x[np.abs(x) < 1e-3]
    np.testing.assert_allclose(_apply(_tanh_loop, small), np.tanh(small.astype(np.float64)), rtol=4e-7, atol=1e-45)


@pytest.mark.parametrize("limit", [20.0, 8192.0])
def test_wrap_angle_error(limit):
    x = _grid(limit)
    y = _apply(_wrap_loop, x)
    reference = ((x.astype(np.float64) + np.pi) % (2 * np.pi)) - np.pi  # gymnasium's angle_normalize
    distance = np.abs(y - reference)
    assert np.minimum(distance, 2 * np.pi - distance).max() < 4e-7  # on the circle: -pi and pi are neighbours
    assert (y >= -np.float32(np.pi)).all() and (y < np.float32(np.pi)).all()


def test_wrap_angle_leaves_angles_in_range_alone():
    x = np.linspace(-3.1415, 3.1415, 10_001, dtype=np.float32)
    assert np.array_equal(_apply(_wrap_loop, x), x)
    assert _apply(_wrap_loop, [np.float32(np.pi)])[0] < 0  # half open: pi itself is -pi


def test_special_values():
    bad = np.array([np.nan, np.inf, -np.inf], np.float32)
    assert np.isnan(_sincos(bad)).all()
    assert np.isnan(_apply(_wrap_loop, bad)).all()
    np.testing.assert_array_equal(_apply(_tanh_loop, bad), np.array([np.nan, 1.0, -1.0], np.float32))
    sin, cos = _sincos([0.0])
    assert (sin[0], cos[0]) == (0.0, 1.0)


@pytest.mark.parametrize("loop", [_sincos_loop, _tanh_loop, _wrap_loop])
def test_loops_are_vectorised(loop):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("vector types are checked on x86 only")
    fresh = driver(loop.py_func)
    fresh._cache = NullCache()  # what comes from the disk cache cannot be inspected
    arguments = 3 if loop is _sincos_loop else 2
    fresh.compile((float32[::1],) * arguments)
    llvm = fresh.inspect_llvm(fresh.signatures[0])
    assert re.search(r"f(add|mul|sub) <(4|8|16) x float>", llvm), "the loop is scalar"
    assert "double" not in llvm


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
def test_ptx_has_no_float64(compile_ptx, cc):
    from numba import cuda

    def kernel(x, out):
        i = cuda.grid(1)  # pyright: ignore[reportCallIssue]
        if i < x.shape[0]:
            sin, cos = sincos(x[i])
            out[i] = sin + cos + tanh(x[i]) + wrap_angle(x[i])

    ptx = compile_ptx(kernel, types.void(float32[::1], float32[::1]), cc)
    assert ".f64" not in ptx
    assert "fma.rn.f32" in ptx
