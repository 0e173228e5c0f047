"""Philox against Random123's known answers and a big-integer twin; the laws of what is drawn; independence of neighbouring keys."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import float32, int32, types, uint32
from scipy import stats

from rl.kernels import rng
from rl.kernels.jit import driver

WORD = 2**32 - 1
KEY = (0x12345678, 0x9ABCDEF0, 7, 1000, 1)  # seed low, seed high, index, clock, stream


@driver
def _philox(counter, key):
    return rng.philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1])


@driver
def _bits(words, key, first):
    k = (key[0], key[1], key[2], key[3], key[4])
    for i in range(words.shape[0]):
        words[i] = rng.bits(k, np.uint32(first + i))


@driver
def _bits4(words, key):
    k = (key[0], key[1], key[2], key[3], key[4])
    for i in range(words.shape[0]):
        words[i, 0], words[i, 1], words[i, 2], words[i, 3] = rng.bits4(k, np.uint32(i))


@driver
def _field(words, key, field, draw):
    """words[i] is draw `draw` of the key whose number `field` is raised by i: what a batch of envs, or one env in time, sees."""
    for i in range(words.shape[0]):
        key[field] += np.uint32(1)
        words[i] = rng.bits((key[0], key[1], key[2], key[3], key[4]), np.uint32(draw))


@driver
def _uniform(out, key):
    k = (key[0], key[1], key[2], key[3], key[4])
    for i in range(out.shape[0]):
        out[i] = rng.uniform(k, np.uint32(i))


@driver
def _uniform4(out, key):
    k = (key[0], key[1], key[2], key[3], key[4])
    for i in range(out.shape[0]):
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = rng.uniform4(k, np.uint32(i))


@driver
def _normal(out, key):
    k = (key[0], key[1], key[2], key[3], key[4])
    for i in range(out.shape[0]):
        out[i] = rng.normal(k, np.uint32(i))


@driver
def _randint(out, key, n):
    k = (key[0], key[1], key[2], key[3], key[4])
    for i in range(out.shape[0]):
        out[i] = rng.randint(k, np.uint32(i), n)


@driver
def _unit(words, out):
    for i in range(words.shape[0]):
        out[i] = rng.unit(words[i])


def key_array(key=KEY):
    return np.array(key, np.uint32)


def draw_bits(count, key=KEY, first=0):
    words = np.empty(count, np.uint32)
    _bits(words, key_array(key), first)
    return words


def philox(counter, key):
    return tuple(int(x) for x in _philox(np.array(counter, np.uint32), np.array(key, np.uint32)))


def twin(counter, key):
    """Philox4x32-10 in Python's own integers, as the paper writes it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123, tests/kat_vectors, "philox4x32 10"
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD, WORD, WORD, WORD), (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, answer):
    assert philox(counter, key) == answer
    assert twin(counter, key) == answer


words = st.integers(0, WORD)


@settings(max_examples=200, deadline=None)
@given(st.tuples(words, words, words, words), st.tuples(words, words))
def test_philox_against_big_integers(counter, key):
    assert philox(counter, key) == twin(counter, key)


def test_layout_of_the_counter():
    """What every golden playthrough rests on: (block, stream, index, clock) is the counter, the seed is the key."""
    low, high, index, clock, stream = KEY
    block3 = twin((3, stream, index, clock), (low, high))
    assert tuple(draw_bits(16).reshape(4, 4)[3]) == block3


def test_bits_are_the_lanes_of_bits4():
    blocks = np.empty((64, 4), np.uint32)
    _bits4(blocks, key_array())
    assert np.array_equal(draw_bits(256), blocks.ravel())


def test_uniform4_is_four_uniforms():
    one, four = np.empty(256, np.float32), np.empty((64, 4), np.float32)
    _uniform(one, key_array())
    _uniform4(four, key_array())
    assert np.array_equal(one, four.ravel())


def test_unit_ends():
    out = np.empty(4, np.float32)
    _unit(np.array([0, 255, 256, WORD], np.uint32), out)
    assert out.tolist() == [0.0, 0.0, 2.0**-24, 1.0 - 2.0**-24]


# ---- Laws. The seed is fixed, so these either hold for good or fail for good; 1e-4 is no accident of one sample.

ENOUGH = 1e-4


def chi_square_p(values, cells):
    return stats.chisquare(np.bincount(values, minlength=cells)).pvalue


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_are_uniform(shift):
    byte = (draw_bits(200_000) >> np.uint32(shift)) & np.uint32(255)
    assert chi_square_p(byte, 256) > ENOUGH


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_pairs_are_uniform(lag):
    cell = (draw_bits(200_000) >> np.uint32(28)).astype(np.int64)  # 16 cells
    assert chi_square_p(cell[:-lag] * 16 + cell[lag:], 256) > ENOUGH


@pytest.mark.parametrize("field", range(5))
def test_words_over_a_field_are_uniform(field):
    """One draw of many envs (or clocks, ...) must be as good as many draws of one env."""
    found = np.empty(100_000, np.uint32)
    _field(found, key_array(), field, 0)
    cell = (found >> np.uint32(28)).astype(np.int64)
    assert chi_square_p(cell, 16) > ENOUGH
    assert chi_square_p(cell[:-1] * 16 + cell[1:], 256) > ENOUGH


def test_uniform():
    out = np.empty(200_000, np.float32)
    _uniform(out, key_array())
    assert out.min() >= 0.0 and out.max() < 1.0
    assert stats.kstest(out.astype(np.float64), "uniform").pvalue > ENOUGH


def test_normal():
    out = np.empty(200_000, np.float32)
    _normal(out, key_array())
    assert np.isfinite(out).all()
    assert abs(out.mean()) < 4 / np.sqrt(out.size)
    assert abs(out.var() - 1) < 4 * np.sqrt(2 / out.size)
    assert stats.kstest(out.astype(np.float64), "norm").pvalue > ENOUGH
    assert np.abs(out).max() > 4.0  # the tails are there (P(none of 200,000 beyond 4) = 3e-6)
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 4 / np.sqrt(out.size)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 64, 1000])
def test_randint(n):
    out = np.empty(200_000, np.int32)
    _randint(out, key_array(), n)
    assert set(out.tolist()) == set(range(n))
    if n > 1:
        assert chi_square_p(out, n) > ENOUGH


def test_randint_spans_int32():
    out = np.empty(10_000, np.int32)
    _randint(out, key_array(), 2**31 - 1)
    assert out.min() >= 0
    assert out.max() > 0.999 * 2**31


# ---- Neighbouring keys.

NEIGHBOURS = [*range(5), "draw", "block"]


def raised(count, what):
    """`count` words at pseudo-random keys, and the words of the same keys with one number of them one higher."""
    generator = np.random.default_rng(3)
    keys = generator.integers(0, 2**32 - 1, size=(count, 5), dtype=np.uint32)
    others = keys.copy()
    step = {"draw": 1, "block": 4}.get(what, 0)
    if step == 0:
        others[:, what] += np.uint32(1)
    before, after = np.empty((2, count), np.uint32)
    for i in range(count):
        _bits(before[i : i + 1], keys[i], 0)
        _bits(after[i : i + 1], others[i], step)
    return before, after


@pytest.mark.parametrize("what", NEIGHBOURS)
def test_neighbours_are_independent(what):
    count = 4000
    before, after = raised(count, what)
    flips = ((before ^ after)[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    sigma = 0.5 / np.sqrt(count)
    assert abs(flips.mean() - 0.5) < 4 * sigma / np.sqrt(32)  # half of all bits flip
    assert np.abs(flips.mean(axis=0) - 0.5).max() < 4.5 * sigma  # and of each bit, 32 of them
    correlation = np.corrcoef(before.astype(np.float64), after.astype(np.float64))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(count)


def test_every_number_of_the_key_counts():
    base = draw_bits(8)
    for field in range(5):
        for bit in range(32):
            key = list(KEY)
            key[field] ^= 1 << bit  # pyright: ignore[reportArgumentType, reportCallIssue]
            assert not np.any(draw_bits(8, tuple(key)) == base)


# ---- CUDA.


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
def test_ptx_has_no_float64(compile_ptx, cc):
    from numba import cuda

    def kernel(reals, integers, seed, clock):
        i = cuda.grid(1)  # pyright: ignore[reportCallIssue]
        if i < reals.shape[0]:
            key = (np.uint32(seed), np.uint32(0), np.uint32(i), np.uint32(clock), rng.STREAM_STEP)
            a, b, c, d = rng.uniform4(key, np.uint32(4))
            reals[i] = rng.uniform(key, np.uint32(0)) + rng.normal(key, np.uint32(1)) + a + b + c + d
            integers[i] = rng.randint(key, np.uint32(2), 6)

    ptx = compile_ptx(kernel, types.void(float32[::1], int32[::1], uint32, uint32), cc)
    assert ".f64" not in ptx
    assert ".f32" in ptx
