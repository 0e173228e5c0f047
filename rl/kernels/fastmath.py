"""float32 elementary functions without branches or calls, so that LLVM vectorises a loop over them.

`np.sin`, `np.cos`, `np.tanh` and `%` become one library call per element; these become a dozen vector instructions, and on
CUDA they are the same arithmetic with no float64 in it. The errors named below are absolute and measured in the tests.

NaN gives NaN everywhere; an infinity gives NaN, except in `tanh`. Beyond the ranges named below the angles lose their meaning
(the error grows past 1e-6 at |x| = 1e5, where float32 itself resolves 0.008 radians).
"""

import math

import numpy as np

from rl.kernels.jit import scalar

__all__ = ["sincos", "tanh", "wrap_angle"]

_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
_BIT_0 = np.int32(1)
_BIT_1 = np.int32(2)

# x + 1.5 * 2^23 has no fraction bits left, so adding and subtracting it rounds to the nearest integer (|x| < 2^22).
_ROUND = np.float32(12582912.0)

# pi/2 in three parts (Cody and Waite 1980, "Software Manual for the Elementary Functions"; the parts are four times and twice
# Cephes' sinf.c's of pi/4). The first has 8 significant bits and the second 11, so their products with a small integer are exact.
_TWO_OVER_PI = np.float32(2.0 / math.pi)
_HALF_PI_1 = np.float32(1.5703125)
_HALF_PI_2 = np.float32(4.837512969970703125e-4)
_HALF_PI_3 = np.float32(7.549789948768648e-8)
_FOUR = np.float32(4.0)
_ONE_OVER_TWO_PI = np.float32(0.5 / math.pi)
_TWO_PI_1 = _HALF_PI_1 * _FOUR
_TWO_PI_2 = _HALF_PI_2 * _FOUR
_TWO_PI_3 = _HALF_PI_3 * _FOUR
_PI = np.float32(math.pi)
_TWO_PI = np.float32(2.0 * math.pi)

# Minimax polynomials on [-pi/4, pi/4] (Cephes, sinf.c): sin r = r + r z (S1 + S2 z + S3 z^2), z = r^2, cos likewise.
_S1 = np.float32(-1.6666654611e-1)
_S2 = np.float32(8.3321608736e-3)
_S3 = np.float32(-1.9515295891e-4)
_C1 = np.float32(4.166664568298827e-2)
_C2 = np.float32(-1.388731625493765e-3)
_C3 = np.float32(2.443315711809948e-5)

# tanh(x/2) = x P(x^2) / 2 Q(x^2) on [-9.02, 9.02]: own minimax fit by iteratively reweighted least squares, with P(0) = Q(0) = 1,
# for the error that is left after doubling the angle (7e-9 before rounding). All coefficients are positive: no cancellation.
_TANH_END = np.float32(9.02)  # from here on tanh is 1 in float32
_QUARTER = np.float32(0.25)
_P1 = np.float32(0.11906409745416185 / 4)
_P2 = np.float32(0.001825501439391485 / 16)
_Q1 = np.float32(0.4523972506274996 / 4)
_Q2 = np.float32(0.01929192859850829 / 16)
_Q3 = np.float32(7.845421431210085e-05 / 64)


@scalar
def sincos(x):
    """Sine and cosine of a float32 angle in radians; error below 8e-8 for |x| <= 100 and 1e-7 for |x| <= 8192."""
    q = (x * _TWO_OVER_PI + _ROUND) - _ROUND
    k = np.int32(q)
    r = ((x - q * _HALF_PI_1) - q * _HALF_PI_2) - q * _HALF_PI_3
    z = r * r
    s = ((_S3 * z + _S2) * z + _S1) * z * r + r
    c = ((_C3 * z + _C2) * z + _C1) * z * z - _HALF * z + _ONE
    odd = (k & _BIT_0) != 0
    sin = c if odd else s
    cos = s if odd else c
    sin = -sin if (k & _BIT_1) != 0 else sin
    cos = -cos if ((k + _BIT_0) & _BIT_1) != 0 else cos
    return sin, cos


@scalar
def tanh(x):
    """Hyperbolic tangent of a float32, odd and never outside [-1, 1]; error below 2.5e-7 everywhere.

    By tanh x = 2 t / (1 + t^2) with t = tanh(x/2) = p / 2q: where tanh is near 1, the doubling shrinks the rounding errors of
    p and q to nothing; it still takes only one division.
    """
    x = _TANH_END if x > _TANH_END else x  # not min(): that would turn NaN into a number
    x = -_TANH_END if x < -_TANH_END else x
    z = x * x
    p = ((_P2 * z + _P1) * z + _ONE) * x
    q = ((_Q3 * z + _Q2) * z + _Q1) * z + _ONE
    y = p * q / (_QUARTER * p * p + q * q)
    y = _ONE if y > _ONE else y
    return -_ONE if y < -_ONE else y


@scalar
def wrap_angle(x):
    """The float32 angle in [-pi, pi) that equals x modulo 2 pi: ((x + pi) % (2 pi)) - pi as in Gymnasium's pendulum.

    Error (as an angle, on the circle) below 4e-7 for |x| <= 8192.
    """
    q = (x * _ONE_OVER_TWO_PI + _ROUND) - _ROUND
    r = ((x - q * _TWO_PI_1) - q * _TWO_PI_2) - q * _TWO_PI_3
    # Rounding x / 2 pi can pick the neighbouring turn when x is next to an odd multiple of pi.
    r = r - _TWO_PI if r >= _PI else r
    return r + _TWO_PI if r < -_PI else r
