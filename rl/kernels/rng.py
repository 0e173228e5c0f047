"""Counter-based random numbers: Philox4x32-10.

A draw is a pure function of (seed, env index, clock, stream, draw), so results depend neither on the batch size nor on the
number of threads nor on the backend, and nothing has to be stored but two counters.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (constants and rounds: table 2 and
section 3.3; known answers: the authors' Random123 library).

A `key` is a tuple of five uint32: (seed low, seed high, index, clock, stream). `draw` numbers the draws within one key.
"""

import math

import numpy as np

from rl.kernels.fastmath import sincos
from rl.kernels.jit import scalar, scalar_call

STREAM_RESET = np.uint32(0)
STREAM_STEP = np.uint32(1)

_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = np.uint32(0x9E3779B9)
_W1 = np.uint32(0xBB67AE85)
_SHIFT = np.uint64(32)
_MASK = np.uint64(0xFFFFFFFF)
_TO_UNIT = np.float32(2.0**-24)
_HALF_UNIT = np.float32(2.0**-25)
_EIGHT = np.uint32(8)
_THREE = np.uint32(3)
_TWO = np.uint32(2)
_ONE = np.uint32(1)
_ZERO = np.uint32(0)
_TWO_PI = np.float32(2.0 * math.pi)
_MINUS_TWO = np.float32(-2.0)


@scalar_call
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four uint32 of counter and two of key to four uint32."""
    for _ in range(10):
        p0 = _M0 * np.uint64(c0)
        p1 = _M1 * np.uint64(c2)
        c0, c1, c2, c3 = (
            np.uint32((p1 >> _SHIFT) ^ np.uint64(c1) ^ np.uint64(k0)),
            np.uint32(p1 & _MASK),
            np.uint32((p0 >> _SHIFT) ^ np.uint64(c3) ^ np.uint64(k1)),
            np.uint32(p0 & _MASK),
        )
        k0 = np.uint32((np.uint64(k0) + np.uint64(_W0)) & _MASK)
        k1 = np.uint32((np.uint64(k1) + np.uint64(_W1)) & _MASK)
    return c0, c1, c2, c3


@scalar
def bits4(key, block):
    """Four independent uint32: block number `block` (0, 1, ...) of `key`."""
    return philox(np.uint32(block), key[4], key[2], key[3], key[0], key[1])


@scalar
def bits(key, draw):
    """One uint32: draw number `draw` of `key`; draws 0-3 are block 0, 4-7 block 1 and so on."""
    d = np.uint32(draw)
    a, b, c, e = bits4(key, d >> _TWO)
    lane = d & _THREE
    low = b if lane == _ONE else a
    high = e if lane == _THREE else c
    return high if lane >= _TWO else low


@scalar
def unit(word):
    """A uint32 as a float32 in [0, 1), in steps of 2^-24."""
    return np.float32(word >> _EIGHT) * _TO_UNIT


@scalar
def uniform(key, draw):
    """A float32 uniform in [0, 1)."""
    return unit(bits(key, draw))


@scalar
def uniform4(key, block):
    """Four float32 uniform in [0, 1), for the price of one."""
    a, b, c, d = bits4(key, block)
    return unit(a), unit(b), unit(c), unit(d)


@scalar
def randint(key, draw, n):
    """An int32 uniform in [0, n), by the high half of a product (bias below n / 2^32)."""
    return np.int32((np.uint64(bits(key, draw)) * np.uint64(n)) >> _SHIFT)


@scalar
def normal(key, draw):
    """A standard normal float32 by Box-Muller; uses block `draw` of the key whole."""
    a, b, _, _ = bits4(key, draw)
    # math and not np: numba-cuda has no np.sqrt. sincos and not cos: CUDA's cosf falls back on float64.
    radius = math.sqrt(_MINUS_TWO * math.log(unit(a) + _HALF_UNIT))
    return np.float32(radius * sincos(_TWO_PI * unit(b))[1])
