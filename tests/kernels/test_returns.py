"""Estimators: hand-computed numbers (T1), a naive twin (T2), identities (T3), the CUDA side (T4) and what truncation is worth."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types

from rl.kernels import returns
from rl.kernels.returns import discounted_returns, gae, lambda_returns, nstep_returns, vtrace

# ---- T1. One env, gamma 1/2. Row 1 is truncated, row 3 terminates, row 5 is cut by the end of the data.
#
#   t            0     1     2     3     4     5
#   reward       1     2     3     4     5     6
#   value        2     4     4     8    10    12
#   next_value   4    20     8   100    12    16     (20: V(final_obs) at the truncation; 100: must not be seen)
#   discount   1/2   1/2   1/2     0   1/2   1/2
#   boundary     -  trunc    -  term     -     -
REWARD = [1.0, 2, 3, 4, 5, 6]
VALUE = [2.0, 4, 4, 8, 10, 12]
NEXT_VALUE = [4.0, 20, 8, 100, 12, 16]
DISCOUNT = [0.5, 0.5, 0.5, 0.0, 0.5, 0.5]
BOUNDARY = [False, True, False, True, False, False]


def column(numbers, dtype=torch.float32):
    return torch.tensor(numbers, dtype=dtype).unsqueeze(1)


@pytest.fixture
def hand():
    return {
        "reward": column(REWARD),
        "value": column(VALUE),
        "next_value": column(NEXT_VALUE),
        "discount": column(DISCOUNT),
        "boundary": column(BOUNDARY, torch.bool),
    }


def without_value(data):
    return {k: v for k, v in data.items() if k != "value"}


def check(found, expected):
    torch.testing.assert_close(found, column(expected), rtol=1e-6, atol=1e-6)


def test_gae_by_hand(hand):
    # delta = r + discount next_value - value:  1+2-2=1  2+10-4=8  3+4-4=3  4+0-8=-4  5+6-10=1  6+8-12=2
    # discount lam = 1/4.  A5=2  A4=1+2/4=1.5  A3=-4 (cut)  A2=3-4/4=2  A1=8 (cut, but bootstrapped)  A0=1+8/4=3
    check(gae(**hand, lam=0.5), [3, 8, 2, -4, 1.5, 2])


def test_discounted_returns_by_hand(hand):
    # G5=6+16/2=14  G4=5+14/2=12  G3=4  G2=3+4/2=5  G1=2+20/2=12  G0=1+12/2=7
    check(discounted_returns(**without_value(hand)), [7, 12, 5, 4, 12, 14])


def test_lambda_returns_by_hand(hand):
    # lam=1/2: G = r + discount (next_value + G')/2.  G5=6+8=14  G4=5+(12+14)/4=11.5  G3=4  G2=3+(8+4)/4=6  G1=2+10=12
    # G0=1+(4+12)/4=5
    check(lambda_returns(**without_value(hand), lam=0.5), [5, 12, 6, 4, 11.5, 14])


def test_nstep_returns_by_hand(hand):
    # n=2.  t0: 1+2/2+20/4=7  t1: truncated at once, 2+20/2=12  t2: 3+4/2=5 (terminated)  t3: 4  t4: 5+6/2+16/4=12  t5: 6+16/2=14
    check(nstep_returns(**without_value(hand), n=2), [7, 12, 5, 4, 12, 14])
    # n=1.  r + discount next_value: 1+2  2+10  3+4  4  5+6  6+8
    check(nstep_returns(**without_value(hand), n=1), [3, 12, 7, 4, 11, 14])


def test_vtrace_by_hand(hand):
    # rho = 2, 1/2, 1, 4, 1/2, 2; clip_rho = 1, clip_c = 1: both clipped to 1, 1/2, 1, 1, 1/2, 1. lam = 1.
    # delta = rho (r + discount next_value - value), raw as in gae 1 8 3 -4 1 2: 1 4 3 -4 1/2 2
    # vs = value + delta + discount c (vs' - next_value):
    # vs5=12+2=14  vs4=10+.5+.25(14-12)=11  vs3=8-4=4  vs2=4+3+.5(4-8)=5  vs1=4+4=8  vs0=2+1+.5(8-4)=5
    # advantage = min(rho, 2) (r + discount vs' - value), clip_pg_rho = 2, so 2 1/2 1 2 1/2 2:
    # 2(1+4-2)=6  .5(2+10-4)=4  3+2-4=1  2(4-8)=-8  .5(5+7-10)=1  2(6+8-12)=4
    log_rho = column([2.0, 0.5, 1.0, 4.0, 0.5, 2.0]).log()
    vs, advantage = vtrace(log_rho, **hand, clip_pg_rho=2.0)
    check(vs, [5, 8, 5, 4, 11, 14])
    check(advantage, [6, 4, 1, -8, 1, 4])


def test_vtrace_clips_each_have_their_place():
    # One step before the end, rho = 8, gamma 1: V = 0, 1; next_value = 1, 3; r = 1, 1. clip_rho 4, clip_c 2, clip_pg_rho 5, lam 1/2.
    # vs1 = 1 + 4 (1+3-1) = 13;  vs0 = 0 + 4 (1+1-0) + 1/2 2 (13-1) = 20;  advantage1 = 5 (1+3-1) = 15; advantage0 = 5 (1+13-0) = 70
    vs, advantage = vtrace(
        column([8.0, 8.0]).log(), column([1.0, 1]), column([0.0, 1]), column([1.0, 3]), column([1.0, 1]),
        column([False, False], torch.bool), lam=0.5, clip_rho=4.0, clip_c=2.0, clip_pg_rho=5.0,
    )  # fmt: skip
    check(vs, [20, 13])
    check(advantage, [70, 15])


# ---- T2. Naive twins: the definitions as sums, quadratic in T, in float64, one env at a time.


def end_of(boundary, t):
    """The last row of t's episode within the data."""
    while t < len(boundary) - 1 and not boundary[t]:
        t += 1
    return t


def naive_nstep(reward, next_value, discount, boundary, n, t):
    end = min(end_of(boundary, t), t + n - 1)
    total, weight = 0.0, 1.0
    for k in range(t, end + 1):
        total += weight * reward[k]
        weight *= discount[k]
    return total + weight * next_value[end]


def naive_lambda(reward, next_value, discount, boundary, lam, t):
    """The mixture of n-step returns, Sutton and Barto eq. 12.3: the last takes all the weight that is left."""
    horizon = end_of(boundary, t) - t + 1
    total = lam ** (horizon - 1) * naive_nstep(reward, next_value, discount, boundary, horizon, t)
    for n in range(1, horizon):
        total += (1 - lam) * lam ** (n - 1) * naive_nstep(reward, next_value, discount, boundary, n, t)
    return total


def naive_gae(reward, value, next_value, discount, boundary, lam, t):
    total, weight = 0.0, 1.0
    for k in range(t, end_of(boundary, t) + 1):
        total += weight * (reward[k] + discount[k] * next_value[k] - value[k])
        weight *= discount[k] * lam
    return total


def naive_vtrace(rho, reward, value, next_value, discount, boundary, lam, clip_rho, clip_c, t):
    """Espeholt et al. eq. 1 as a sum. It holds where next_value[k] is value[k + 1] inside an episode."""
    total, weight = value[t], 1.0
    for k in range(t, end_of(boundary, t) + 1):
        total += weight * min(rho[k], clip_rho) * (reward[k] + discount[k] * next_value[k] - value[k])
        weight *= discount[k] * lam * min(rho[k], clip_c)
    return total


def over_envs(naive, tensors, *numbers):
    steps, envs = tensors[0].shape
    arrays = [x.double().numpy() if x.dtype != torch.bool else x.numpy() for x in tensors]
    return torch.tensor([[naive(*(a[:, i] for a in arrays), *numbers, t) for i in range(envs)] for t in range(steps)])


def random_data(seed, steps, envs, p_end=0.15):
    generator = np.random.default_rng(seed)
    terminated = generator.random((steps, envs)) < p_end
    truncated = generator.random((steps, envs)) < p_end
    gamma = generator.uniform(0.5, 1.0)
    value = generator.normal(size=(steps, envs))
    # V(obs_{t+1}) where the episode goes on, another state's value at its end and in the last row
    next_value = np.where(terminated | truncated, generator.normal(size=(steps, envs)), np.roll(value, -1, axis=0))
    next_value[-1] = generator.normal(size=envs)
    arrays = {
        "reward": generator.normal(size=(steps, envs)),
        "value": value,
        "next_value": next_value,
        "discount": gamma * ~terminated,
    }
    data = {k: torch.tensor(v, dtype=torch.float32) for k, v in arrays.items()}
    return data | {"boundary": torch.tensor(terminated | truncated)}


cases = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 9))
probabilities = st.floats(0.0, 1.0, width=32)
few = settings(max_examples=60, deadline=None)


def close(found, expected):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@few
@given(cases, probabilities, st.integers(1, 14))
def test_returns_against_naive_twin(case, lam, n):
    data = random_data(*case)
    plain = without_value(data)
    tensors = [data[k] for k in ("reward", "next_value", "discount", "boundary")]
    close(gae(**data, lam=lam), over_envs(naive_gae, [data["reward"], data["value"], *tensors[1:]], lam))
    close(lambda_returns(**plain, lam=lam), over_envs(naive_lambda, tensors, lam))
    close(nstep_returns(**plain, n=n), over_envs(naive_nstep, tensors, n))
    close(discounted_returns(**plain), over_envs(naive_nstep, tensors, case[1]))


@few
@given(cases, probabilities, st.floats(0.25, 3.0, width=32), st.floats(0.25, 3.0, width=32), st.floats(0.25, 3.0, width=32))
def test_vtrace_against_naive_twin(case, lam, clip_rho, clip_c, clip_pg_rho):
    data = random_data(*case)
    data["discount"] *= 0.5  # c up to 3: keep the products from exploding
    log_rho = torch.tensor(np.random.default_rng(case[0]).normal(size=data["reward"].shape), dtype=torch.float32)
    rho = log_rho.double().exp()
    vs, advantage = vtrace(log_rho, **data, lam=lam, clip_rho=clip_rho, clip_c=clip_c, clip_pg_rho=clip_pg_rho)
    expected = over_envs(naive_vtrace, [rho, *data.values()], lam, clip_rho, clip_c)
    torch.testing.assert_close(vs.double(), expected, rtol=1e-4, atol=1e-4)
    beyond = torch.cat([expected[1:], data["next_value"][-1:]])
    beyond = torch.where(data["boundary"], data["next_value"], beyond)
    gain = rho.clamp(max=clip_pg_rho) * (data["reward"] + data["discount"] * beyond - data["value"])
    torch.testing.assert_close(advantage.double(), gain, rtol=1e-4, atol=2e-4)


# ---- T3. Identities.


@pytest.fixture
def data():
    return random_data(seed=5, steps=40, envs=33, p_end=0.05)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nstep_to_the_end_is_lambda_one_is_discounted(data):
    plain = without_value(data)
    full = discounted_returns(**plain)
    assert torch.equal(nstep_returns(**plain, n=40), full)
    assert torch.equal(nstep_returns(**plain, n=10**6), full)
    same(lambda_returns(**plain, lam=1.0), full)


def test_lambda_zero_is_one_step(data):
    plain = without_value(data)
    one_step = data["reward"] + data["discount"] * data["next_value"]
    same(lambda_returns(**plain, lam=0.0), one_step)
    same(nstep_returns(**plain, n=1), one_step)
    same(gae(**data, lam=0.0), one_step - data["value"])


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_gae_plus_value_is_the_lambda_return(data, lam):
    # Only where next_value is the next row's value, which is so inside an episode.
    same(gae(**data, lam=lam) + data["value"], lambda_returns(**without_value(data), lam=lam))


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_vtrace_on_policy_is_the_lambda_return(data, lam):
    zero = torch.zeros_like(data["reward"])
    vs, advantage = vtrace(zero, **data, lam=lam)
    same(vs, lambda_returns(**without_value(data), lam=lam))
    if lam == 1.0:
        same(advantage, gae(**data, lam=1.0))


def test_vtrace_of_impossible_actions_is_the_value(data):
    vs, advantage = vtrace(torch.full_like(data["reward"], -torch.inf), **data)
    assert torch.equal(vs, data["value"])
    assert (advantage == 0).all()


def test_envs_do_not_see_each_other(data):
    for i in range(0, 33, 8):
        one = {k: v[:, i : i + 1] for k, v in data.items()}  # a strided view: not contiguous
        assert not one["reward"].is_contiguous()
        same(gae(**one, lam=0.9), gae(**data, lam=0.9)[:, i : i + 1])
        same(nstep_returns(**without_value(one), n=3), nstep_returns(**without_value(data), n=3)[:, i : i + 1])


def test_nothing_beyond_a_cut_is_read(data):
    """NaN in every row after row 19, where all episodes end: the rows up to it must not change."""
    data["boundary"][19] = True
    spoilt = {k: v.clone() for k, v in data.items()}
    for name in ("reward", "value", "next_value", "discount"):
        spoilt[name][20:] = torch.nan
    zero = torch.zeros_like(data["reward"])
    for estimate in (
        lambda d: gae(**d, lam=0.9),
        lambda d: discounted_returns(**without_value(d)),
        lambda d: lambda_returns(**without_value(d), lam=0.9),
        lambda d: nstep_returns(**without_value(d), n=5),
        lambda d: vtrace(zero, **d)[0],
        lambda d: vtrace(zero, **d)[1],
    ):
        assert torch.equal(estimate(spoilt)[:20], estimate(data)[:20])
        assert estimate(spoilt)[20:].isnan().any()


def test_discounted_returns_read_next_value_only_at_cuts(data):
    plain = without_value(data)
    cut = data["boundary"].clone()
    cut[-1] = True
    spoilt = plain | {"next_value": torch.where(cut, data["next_value"], torch.nan)}
    assert torch.equal(discounted_returns(**spoilt), discounted_returns(**plain))


# ---- What truncation is worth: a reward of 1 for ever, gamma 0.9, a time limit of 20, and a state that does not show the time.


@pytest.mark.parametrize(("truncation_handled", "value"), [(True, 10.0), (False, 6.90)])
def test_fixed_point_under_a_time_limit(truncation_handled, value):
    """V = 1 + 0.9 V = 10 with truncation handled; taken for a termination, one state in 20 has no future: V = 1 + 0.9 V 19/20."""
    steps = 20
    ended = torch.zeros(steps, 1, dtype=torch.bool)
    ended[-1] = True
    terminated = torch.zeros_like(ended) if truncation_handled else ended
    reward = torch.ones(steps, 1)
    for lam in (0.0, 0.5):
        v = torch.zeros(())
        for _ in range(400):
            values = v.expand(steps, 1)
            target = lambda_returns(reward, values, 0.9 * ~terminated, ended, lam)
            advantage = gae(reward, values, values, 0.9 * ~terminated, ended, lam)
            same(advantage, target - values)
            v = target.mean()
        if lam == 0.0 or truncation_handled:  # with lam > 0 the wrong fixed point depends on lam
            assert abs(v.item() - value) < 5e-3


# ---- Arguments.


def test_inputs_are_detached_and_untouched(data):
    before = {k: v.clone() for k, v in data.items()}
    data["value"].requires_grad_(True)
    data["next_value"].requires_grad_(True)
    log_rho = torch.zeros_like(data["reward"], requires_grad=True)
    outputs = [gae(**data, lam=0.9), lambda_returns(**without_value(data), lam=0.9), *vtrace(log_rho, **data)]
    assert not any(x.requires_grad for x in outputs)
    assert all(torch.equal(data[k].detach(), before[k]) for k in data)


@pytest.mark.parametrize("shape", [(0, 4), (5, 0)])
def test_empty(shape):
    empty = torch.zeros(shape)
    boundary = torch.zeros(shape, dtype=torch.bool)
    assert gae(empty, empty, empty, empty, boundary, 0.9).shape == shape
    assert nstep_returns(empty, empty, empty, boundary, 3).shape == shape


ESTIMATORS = {
    "gae": lambda d: gae(**d, lam=0.9),
    "discounted_returns": lambda d: discounted_returns(**without_value(d)),
    "lambda_returns": lambda d: lambda_returns(**without_value(d), lam=0.9),
    "nstep_returns": lambda d: nstep_returns(**without_value(d), n=3),
    "vtrace": lambda d: vtrace(torch.zeros(40, 33), **d),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["reward", "next_value", "discount", "boundary"])
def test_mismatches_name_the_argument(estimator, name, data):
    good = data[name]
    for bad in (good.double(), good[..., None], good.numpy()):
        with pytest.raises(ValueError, match=rf"^{name} must (be|have)"):
            ESTIMATORS[estimator](data | {name: bad})
    # Where reward is the odd one out, the next argument is the first to disagree with it.
    with pytest.raises(ValueError, match=r"must have" if name == "reward" else rf"^{name} must have the shape of reward"):
        ESTIMATORS[estimator](data | {name: good[:-1]})
    if name != "reward":
        with pytest.raises(ValueError, match=rf"^{name} must be on the device of reward"):
            ESTIMATORS[estimator](data | {name: good.to("meta")})


def test_numbers_are_checked(data):
    plain = without_value(data)
    zero = torch.zeros_like(data["reward"])
    for lam in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="lam must be in"):
            gae(**data, lam=lam)
        with pytest.raises(ValueError, match="lam must be in"):
            lambda_returns(**plain, lam=lam)
    for n in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="n must be a positive integer"):
            nstep_returns(**plain, n=n)  # pyright: ignore[reportArgumentType]
    for name in ("clip_rho", "clip_c", "clip_pg_rho"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            vtrace(zero, **data, **{name: 0.0})  # pyright: ignore[reportArgumentType]
        vtrace(zero, **data, **{name: float("inf")})  # pyright: ignore[reportArgumentType]


def test_numba_cuda_is_not_imported_on_the_cpu():
    code = """
        import sys, torch
        from rl.kernels.returns import discounted_returns
        x = torch.ones(3, 2)
        discounted_returns(x, x, x > 2, x)
        assert not any(m == "numba.cuda" or m.startswith("numba.cuda.") for m in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


# ---- T4. CUDA.

_matrix, _flags, _number = types.float32[:, ::1], types.boolean[:, ::1], types.float32
CUDA_SIGNATURES = {
    "gae": types.void(_matrix, _matrix, _matrix, _matrix, _flags, _number, _matrix),
    "discounted": types.void(_matrix, _matrix, _matrix, _flags, _matrix),
    "lambda": types.void(_matrix, _matrix, _matrix, _flags, _number, _matrix),
    "nstep": types.void(_matrix, _matrix, _matrix, _flags, types.int64, _matrix),
    "vtrace": types.void(*[_matrix] * 5, _flags, *[_number] * 4, _matrix, _matrix),
}


@pytest.mark.parametrize("name", CUDA_SIGNATURES)
@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
def test_ptx_has_no_float64(compile_ptx, monkeypatch, name, cc):
    from numba import cuda

    monkeypatch.setattr(returns, "cuda", cuda)
    ptx = compile_ptx(returns._CUDA_KERNELS[name], CUDA_SIGNATURES[name], cc)
    assert ".f64" not in ptx
    assert "fma.rn.f32" in ptx and "st.global" in ptx


def test_every_cuda_kernel_is_compiled_here():
    assert set(returns._CUDA_KERNELS) == set(returns._CPU_KERNELS) == set(CUDA_SIGNATURES)


def test_cuda_logic_in_the_simulator():
    """The CUDA kernels on NumPy arrays under Numba's simulator: the CPU's results, also where the grid exceeds the envs."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    code = """
        import numpy as np
        from rl.kernels import returns
        g = np.random.default_rng(0)
        steps, envs = 9, 5
        f = lambda: g.normal(size=(steps, envs)).astype(np.float32)
        rho, reward, value, next_value, discount = np.exp(f()), f(), f(), f(), np.abs(f())
        boundary = g.random((steps, envs)) < 0.3
        half, one, two = np.float32(0.5), np.float32(1), np.float32(2)
        calls = {
            "gae": ((reward, value, next_value, discount, boundary, half), 1),
            "discounted": ((reward, next_value, discount, boundary), 1),
            "lambda": ((reward, next_value, discount, boundary, half), 1),
            "nstep": ((reward, next_value, discount, boundary, 3), 1),
            "vtrace": ((rho, reward, value, next_value, discount, boundary, half, one, half, two), 2),
        }
        assert set(calls) == set(returns._CUDA_KERNELS)
        for name, (arguments, outputs) in calls.items():
            cpu = [np.full((steps, envs), np.nan, np.float32) for _ in range(outputs)]
            gpu = [np.full((steps, envs), np.nan, np.float32) for _ in range(outputs)]
            returns._CPU_KERNELS[name](*arguments, *cpu)
            threads = steps * envs if name == "nstep" else envs
            returns._cuda_kernel(name)[(threads + 3) // 4, 4](*arguments, *gpu)
            for a, b in zip(cpu, gpu):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
            print(name, "ok")
    """
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok") == len(CUDA_SIGNATURES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu():
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    data = random_data(seed=1, steps=50, envs=300, p_end=0.05)
    log_rho = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 0.3
    on_gpu = {k: v.cuda() for k, v in data.items()}

    def everything(d, log_rho):
        plain = without_value(d)
        return [
            gae(**d, lam=0.95),
            discounted_returns(**plain),
            lambda_returns(**plain, lam=0.95),
            nstep_returns(**plain, n=5),
            *vtrace(log_rho, **d),
        ]

    expected = everything(data, log_rho)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = everything(on_gpu, log_rho.cuda())
    side.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cuda"
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)

    graph = torch.cuda.CUDAGraph()
    log_rho = log_rho.cuda()
    with torch.cuda.graph(graph):
        captured = everything(on_gpu, log_rho)
    graph.replay()
    first = [x.clone() for x in captured]
    on_gpu["reward"].mul_(2.0)  # a replay reads the inputs anew
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(first, expected, captured, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)
        assert not torch.equal(a, c)
