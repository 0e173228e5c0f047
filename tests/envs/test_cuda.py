"""The CUDA driver: PTX without a GPU, the kernels' logic under the simulator, and, marked `gpu`, the real thing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_envs import NAMES, assert_same, make, random_actions, record, spec_of
from numba import from_dtype, types

from rl.envs.drivers import Buffers, cuda_functions, layouts

ROOT = Path(__file__).resolve().parents[2]


def array_type(layout):
    dims = len(layout.shape) + (1 if layout.per_env else 0)
    return types.Array(from_dtype(layout.dtype), dims, "F" if layout.fortran else "C")


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile_without_float64(name, cc, compile_ptx):
    spec = spec_of(name)
    made = layouts(spec)
    buffers = types.NamedTuple([array_type(made[field]) for field in Buffers._fields], Buffers)
    number = types.float32 if made["action"].dtype.kind == "f" else types.int64
    action = types.Array(number, 1 + len(made["action"].shape), "C")
    functions = cuda_functions(spec)
    step = compile_ptx(functions.step, types.void(buffers, action, types.int32, types.int64, types.int32[::1]), cc)
    tick = compile_ptx(functions.tick, types.void(types.int64[::1]), cc)
    begin = compile_ptx(functions.begin, types.void(buffers, types.boolean[::1]), cc)
    for ptx in (step, tick, begin):
        assert ".entry" in ptx or ".func" in ptx
        assert ".f64" not in ptx
    assert ".f32" in step


_SIMULATED = """
import sys, torch
sys.path[:0] = {paths!r}
from numba import config, cuda
assert config.ENABLE_CUDASIM and config.DISABLE_JIT
from native_envs import random_actions, record, spec_of
from rl.envs import vector
from rl.envs.vector import NativeVecEnv

vector._CUDA_BLOCK = 2  # a simulated thread is a Python thread

class Simulated(NativeVecEnv):
    "The CUDA backend over CPU tensors, which the simulator takes as they are."

    def _choose_backend(self, backend, threads):
        return "cuda"

runs = {{}}
for name, mode, steps in {cases!r}:
    env = Simulated(spec_of(name), 2, seed=5, time_limit=7, autoreset=mode)
    runs[f"{{name}} {{mode}}"] = record(env, random_actions(env, steps))
env = Simulated(spec_of("CartPole"), 3)
env.reset()
before = env.obs.clone()
assert env.ended is None
env.check_errors()
env.step(torch.tensor([0, 5, -1]))
assert not torch.equal(env.obs[0], before[0]) and torch.equal(env.obs[1:], before[1:]), "an impossible action moved its env"
try:
    env.check_errors()
except ValueError:
    env.check_errors()  # said once
else:
    raise AssertionError("the impossible action went unnoticed")
torch.save(runs, {out!r})
"""


def simulate(cases, tmp_path):
    out = str(tmp_path / "runs.pt")
    code = _SIMULATED.format(paths=[str(ROOT), str(ROOT / "tests" / "envs")], cases=cases, out=out)
    # Row views of an array need NUMBA_DISABLE_JIT too (design section 4).
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


def test_kernels_under_the_simulator(tmp_path):
    """The simulator runs a kernel as Python: same float32 arithmetic, so the same bits as the compiled CPU driver."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    cases = [("CartPole", "same_step", 200), ("Identity", "next_step", 20), ("Identity", "disabled", 12)]
    cases += [(name, "same_step", 12) for name in NAMES if name != "CartPole"]
    runs = simulate(cases, tmp_path)
    for name, mode, steps in cases:
        env = make(name, 2, seed=5, time_limit=7, autoreset=mode, backend="serial")
        assert_same(record(env, random_actions(env, steps)), runs[f"{name} {mode}"])


# -- on a real GPU -----------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
INTEGER = ("Identity", "IdentityMultiDiscrete", "NeverEnding")


def to_cpu(run):
    return {key: value.cpu() for key, value in run.items()}


@gpu
@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu_agrees_step_by_step(name):
    """From the same state each time: errors of a step do not add up. Integer envs agree exactly."""
    n = 1000
    cpu, cuda = make(name, n, seed=3), make(name, n, seed=3, device="cuda")
    assert cuda.backend == "cuda" and cuda.reset().is_cuda
    cpu.reset()
    tolerance = 0.0 if name in INTEGER else 2e-5
    flips = 0
    for action in random_actions(cpu, 60):
        a, b = cpu.step(action), cuda.step(action.cuda())
        ended = a.terminated | a.truncated
        same = ended == (b.terminated | b.truncated).cpu()
        flips += int((~same).sum())  # rounding next to a threshold
        torch.testing.assert_close(a.obs[same], b.obs.cpu()[same], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(a.reward[same], b.reward.cpu()[same], rtol=tolerance, atol=max(tolerance, 1e-4 * (tolerance > 0)))
        torch.testing.assert_close(a.final_obs[ended & same], b.final_obs.cpu()[ended & same], rtol=tolerance, atol=tolerance)
        cuda.load_state_dict(cpu.state_dict())
    assert flips <= (0 if name in INTEGER else 5)
    cuda.check_errors()


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["same_step", "next_step", "disabled"])
def test_gpu_modes_and_batch_independence(mode):
    how = {"seed": 4, "time_limit": 7, "autoreset": mode}
    cpu, cuda = make("Identity", 700, **how), make("Identity", 700, device="cuda", **how)
    actions = random_actions(cpu, 40)
    expected = record(cpu, actions)
    assert_same(expected, to_cpu(record(cuda, actions.cuda())))
    part = make("Identity", 1, device="cuda", first_index=699, **how)
    run = to_cpu(record(part, actions[:, 699:].cuda()))
    assert torch.equal(run["reward"][:, 0], expected["reward"][:, 699])


@gpu
@needs_gpu
def test_gpu_step_does_not_wait():
    env = make("Pendulum", 4096, device="cuda")
    env.reset()
    action = torch.zeros((4096, 1), device="cuda")
    env.step(action)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        env.step(action)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # torch sees only its own waits. Behind work that takes long, the calls must return before it is done.
    a = torch.randn((8192, 8192), device="cuda")
    done = torch.cuda.Event()
    for _ in range(40):
        a.matmul(a)
    for _ in range(5):
        env.step(action)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


@gpu
@needs_gpu
@pytest.mark.parametrize("name", ["CartPole", "Pendulum", "IdentityMultiDiscrete"])
def test_gpu_graph_replays(name):
    """A captured step, replayed, is the same step again: state, clock and random numbers go on."""
    plain, captured = make(name, 512, device="cuda", seed=9, time_limit=20), make(name, 512, device="cuda", seed=9, time_limit=20)
    actions = random_actions(plain, 50).cuda()
    plain.reset()
    captured.reset()
    given = actions[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step(given)  # compiles
        start = captured.state_dict()
    torch.cuda.current_stream().wait_stream(side)
    plain.step(actions[0])
    captured.load_state_dict(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(given)
    for action in actions[1:]:
        given.copy_(action)
        graph.replay()
        out = plain.step(action)
        for key in ("obs", "reward", "terminated", "truncated"):
            assert torch.equal(getattr(out, key), getattr(captured._out, key)), key


@gpu
@needs_gpu
def test_gpu_impossible_action_is_told_later():
    env = make("CartPole", 3, device="cuda")
    env.reset()
    before = env.obs.clone()
    env.step(torch.tensor([0, 5, 1], device="cuda"))
    assert torch.equal(env.obs[1], before[1]) and not torch.equal(env.obs[0], before[0])
    with pytest.raises(ValueError, match="CartPole"):
        env.check_errors()
    env.check_errors()
    with pytest.raises(TypeError, match="cpu"):
        env.step(torch.zeros(3, dtype=torch.int64))
