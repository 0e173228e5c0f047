"""From one env's scalar rules to drivers for B envs: serial, prange, thread pool and CUDA.

What happens around a rule - time limit, episode statistics, final observation, autoreset - is written here once, in `_advance`
and `_finish`; every driver calls these two. A driver on the CPU runs a block of envs in two passes: straight-line arithmetic
for all, which LLVM turns into vector instructions, then only the envs whose episode ended.

Arrays lie struct-of-arrays, `[B, n]` with strides (1, B), when they are narrow, so that neighbouring envs are neighbours in
memory. Drivers get addresses rather than arrays: unboxing twenty arrays would cost more than stepping 64 CartPoles.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium
import numba
import numpy as np
from numba import carray, farray  # type: ignore[attr-defined]

from rl.envs.spec import Spec
from rl.kernels.jit import address_of, as_pointer, driver, load_acquire, scalar, scalar_call, store_release
from rl.kernels.rng import STREAM_RESET, STREAM_STEP

SAME_STEP, NEXT_STEP, DISABLED = 0, 1, 2
WRONG_SHAPE = -(2**62)  # a driver's answer to an action array of another size
UNFINISHED = -(2**62) - 1  # a helper of the pool still works
BLOCK = 1024  # envs in one two-pass block: its rows stay in the first-level cache
NARROW = 64  # numbers per env up to which arrays lie struct-of-arrays

_ONE = np.int32(1)
_ZERO = np.int32(0)
_F0 = np.float32(0)


class Buffers(NamedTuple):
    """The arrays of B envs (NumPy on the CPU, device arrays on CUDA)."""

    state: Any  # [B, state_size]
    obs: Any  # [B, ...]
    final_obs: Any  # [B, ...] valid where the last step ended an episode
    action: Any  # [B] int32, [B, n] int32 or [B, n] float32: checked and clipped
    reward: Any  # [B] float32
    terminated: Any  # [B] bool
    truncated: Any  # [B] bool
    mask: Any  # [B, n] bool; [B, 0] where every action is legal
    elapsed: Any  # [B] int32, steps of the running episode
    running_return: Any  # [B] float32
    episode_return: Any  # [B] float32, of the episode ended last
    episode_length: Any  # [B] int32
    seed: Any  # [B, 2] uint32, low and high word
    number: Any  # [B] uint32, the env's number within its seed (not `index`: CUDA would take it for the tuple's method)
    clock: Any  # [1] int64, steps since seeding; part of every random draw's counter
    low: Any  # [n] float32, bounds of a continuous action
    high: Any  # [n] float32
    counts: Any  # [n] int32, number of choices of each discrete action


class Layout(NamedTuple):
    """How one of the `Buffers` is laid out for a spec: shape behind B, NumPy dtype, struct-of-arrays or not."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    per_env: bool = True


def layouts(spec: Spec) -> dict[str, Layout]:
    """The layout of every field of `Buffers` for `spec`."""
    space = spec.observation_space
    if isinstance(space, gymnasium.spaces.Box):
        obs_shape, obs_dtype = tuple(space.shape), space.dtype  # type: ignore[arg-type]
    elif isinstance(space, gymnasium.spaces.Discrete):
        obs_shape, obs_dtype = (1,), np.dtype(np.int64)
    else:
        raise TypeError(f"{spec.name}: observation space {space} is neither Box nor Discrete")
    if not 1 <= len(obs_shape) <= 3:
        raise TypeError(f"{spec.name}: an observation needs one to three dimensions, got shape {obs_shape}")
    action = action_kind(spec.action_space)
    if action == "discrete":
        action_shape, choices = (), (int(spec.action_space.n),)  # type: ignore[attr-defined]
    elif action == "multi_discrete":
        choices = tuple(int(n) for n in spec.action_space.nvec)  # type: ignore[attr-defined]
        action_shape = (len(choices),)
    else:
        action_shape, choices = spec.action_space.shape, ()  # type: ignore[assignment]
    assert action_shape is not None
    bounds = action_shape if action == "continuous" else (0,)
    narrow_obs = len(obs_shape) == 1 and obs_shape[0] <= NARROW
    f32, i32, u32, flag = (np.dtype(x) for x in (np.float32, np.int32, np.uint32, np.bool_))
    return {
        "state": Layout((spec.state_size,), np.dtype(spec.state_dtype), spec.state_size <= NARROW),
        "obs": Layout(obs_shape, np.dtype(obs_dtype), narrow_obs),
        "final_obs": Layout(obs_shape, np.dtype(obs_dtype), narrow_obs),
        "action": Layout(action_shape, f32 if action == "continuous" else i32, len(action_shape) == 1),
        "reward": Layout((), f32, False),
        "terminated": Layout((), flag, False),
        "truncated": Layout((), flag, False),
        "mask": Layout((sum(choices) if spec.legal is not None else 0,), flag, False),
        "elapsed": Layout((), i32, False),
        "running_return": Layout((), f32, False),
        "episode_return": Layout((), f32, False),
        "episode_length": Layout((), i32, False),
        "seed": Layout((2,), u32, True),
        "number": Layout((), u32, False),
        "clock": Layout((1,), np.dtype(np.int64), False, per_env=False),
        "low": Layout(bounds, f32, False, per_env=False),
        "high": Layout(bounds, f32, False, per_env=False),
        "counts": Layout((len(choices),), i32, False, per_env=False),
    }


def action_kind(space: gymnasium.Space) -> str:
    """`discrete`, `multi_discrete` or `continuous`; TypeError for any other action space."""
    if isinstance(space, gymnasium.spaces.Discrete) and space.start == 0:
        return "discrete"
    if isinstance(space, gymnasium.spaces.MultiDiscrete) and len(space.shape) == 1 and not space.start.any():
        return "multi_discrete"
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating):
        return "continuous"
    raise TypeError(f"action space {space} is not supported: use Discrete, one-dimensional MultiDiscrete or one-dimensional float Box")


# `target[:] = source` would compile Numba's error messages along, for five seconds.
@scalar
def _copy_1d(source, target):
    for i in range(source.shape[0]):
        target[i] = source[i]


@scalar
def _copy_2d(source, target):
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            target[i, j] = source[i, j]


@scalar
def _copy_3d(source, target):
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            for k in range(source.shape[2]):
                target[i, j, k] = source[i, j, k]


_COPY = {1: _copy_1d, 2: _copy_2d, 3: _copy_3d}


def _rules(spec: Spec) -> SimpleNamespace:
    """The scalar functions around the spec's rules that every driver shares."""
    rule_reset, rule_step, rule_observe, rule_legal = spec.reset, spec.step, spec.observe, spec.legal
    kind = action_kind(spec.action_space)

    copy_obs = _COPY[len(layouts(spec)["obs"].shape)]
    if rule_legal is None:

        @scalar
        def legal(i, b):
            pass
    else:

        @scalar
        def legal(i, b):
            rule_legal(b.state[i], b.mask[i])

    # Not inlined: run once an episode, and LLVM takes long over ten rounds of Philox in every loop.
    @scalar_call
    def begin(i, b):
        """Start an episode in env i."""
        key = (b.seed[i, 0], b.seed[i, 1], b.number[i], np.uint32(b.clock[0]), STREAM_RESET)
        rule_reset(b.state[i], key)
        rule_observe(b.state[i], b.obs[i])
        legal(i, b)
        b.elapsed[i] = _ZERO
        b.running_return[i] = _F0

    @scalar
    def advance(i, b, limit):
        """Step env i by b.action[i]; whether its episode ended."""
        key = (b.seed[i, 0], b.seed[i, 1], b.number[i], np.uint32(b.clock[0]), STREAM_STEP)
        reward, terminated = rule_step(b.state[i], b.action[i], key)
        rule_observe(b.state[i], b.obs[i])
        legal(i, b)
        elapsed = b.elapsed[i] + _ONE
        truncated = elapsed >= limit
        b.elapsed[i] = elapsed
        b.reward[i] = reward
        b.running_return[i] += reward
        b.terminated[i] = terminated
        b.truncated[i] = truncated
        return terminated | truncated

    @scalar_call
    def finish(i, b):
        """Close the episode of env i: its statistics and last observation."""
        copy_obs(b.obs[i], b.final_obs[i])
        b.episode_return[i] = b.running_return[i]
        b.episode_length[i] = b.elapsed[i]

    if kind == "discrete":

        @scalar
        def impossible(i, b, action):  # as `check`, but writes nothing
            a = action[i]
            return (a < 0) | (a >= b.counts[0])

        @scalar
        def check(i, b, action):
            """Copy action[i] into b.action; whether it is impossible."""
            a = action[i]
            b.action[i] = np.int32(a)
            return (a < 0) | (a >= b.counts[0])
    elif kind == "multi_discrete":

        @scalar
        def impossible(i, b, action):
            bad = False
            for k in range(b.counts.shape[0]):
                a = action[i, k]
                bad |= (a < 0) | (a >= b.counts[k])
            return bad

        @scalar
        def check(i, b, action):
            bad = False
            for k in range(b.counts.shape[0]):
                a = action[i, k]
                b.action[i, k] = np.int32(a)
                bad |= (a < 0) | (a >= b.counts[k])
            return bad
    else:

        @scalar
        def impossible(i, b, action):
            bad = False
            for k in range(b.low.shape[0]):
                a = action[i, k]
                bad |= a != a
            return bad

        @scalar
        def check(i, b, action):
            bad = False
            for k in range(b.low.shape[0]):
                a = action[i, k]
                bad |= a != a
                b.action[i, k] = min(max(a, b.low[k]), b.high[k])
            return bad

    return SimpleNamespace(begin=begin, advance=advance, finish=finish, check=check, impossible=impossible, kind=kind)


class CpuDrivers(NamedTuple):
    """Compiled functions of `table`, the address of int64 [B, time limit, autoreset mode, addresses of `Buffers`...].

    All return the number of episodes ended; or -1 - i when action i is impossible, in which case no env of the range has
    moved; or WRONG_SHAPE. An action array of the wrong dtype, rank or layout raises TypeError.

    `step(table, action, lo, hi)`: envs lo..hi. `many(table, actions)`: a whole [T, B, ...] array at once (-1 - (t B + i) for
    an impossible action). `begin(table, flags)`: reset the envs whose bool is set. `prange(table, action)`: like `step` for all
    envs, on Numba's own threads. `serve(table, control, lo, hi, spins)`: a pool thread's loop, see `rl.envs.pool`. `pooled(table,
    action, controls, helpers, ticket, lo, hi, spins)`: all envs with the pool's helpers, UNFINISHED where one is not done in time.
    """

    step: Any
    many: Any
    begin: Any
    prange: Any
    serve: Any
    pooled: Any
    action_type: Any  # Numba's type of the action array


def cpu_drivers(spec: Spec) -> CpuDrivers:
    """Drivers for the CPU, compiled or read from disk."""
    rules = _rules(spec)
    advance, finish, begin, check = rules.advance, rules.finish, rules.begin, rules.check
    impossible = rules.impossible
    unpack = _unpacker(spec)
    action_type = np.float32 if rules.kind == "continuous" else np.int64
    width = int(np.prod(layouts(spec)["action"].shape, dtype=np.int64))
    action_dims = len(layouts(spec)["action"].shape)

    if action_dims:

        @scalar
        def action_array(address, num_envs):
            return carray(as_pointer(address), (num_envs, width), action_type)
    else:

        @scalar
        def action_array(address, num_envs):
            return carray(as_pointer(address), (num_envs,), action_type)

    @scalar
    def step_range(b, action, lo, hi, limit, mode):
        # Indices are unsigned, so that no code is made for negative ones.
        first, last = np.uint64(lo), np.uint64(hi)
        bad = False
        for i in range(first, last):
            bad |= check(i, b, action)
        if bad:
            for i in range(first, last):
                if check(i, b, action):
                    return -1 - np.int64(i)
        ended = 0
        if mode == NEXT_STEP:
            for i in range(first, last):
                if b.terminated[i] | b.truncated[i]:
                    begin(i, b)
                    b.reward[i] = _F0
                    b.terminated[i] = False
                    b.truncated[i] = False
                elif advance(i, b, limit):
                    finish(i, b)
                    ended += 1
            return ended
        for start in range(lo, hi, BLOCK):
            first, last = np.uint64(start), np.uint64(min(start + BLOCK, hi))
            here = _ZERO  # 32 bits like all else in this loop: the widest type decides how many envs fit a vector
            for i in range(first, last):
                here = np.int32(here + np.int32(advance(i, b, limit)))
            if here > 0:
                ended += here
                for i in range(first, last):
                    if b.terminated[i] | b.truncated[i]:
                        finish(i, b)
                        if mode == SAME_STEP:
                            begin(i, b)
        return ended

    @driver
    def step(table, action, lo, hi):
        head = carray(as_pointer(table), (3,), np.int64)
        if action.size != head[0] * width:
            return WRONG_SHAPE
        b = unpack(table)
        ended = step_range(b, action, lo, hi, np.int32(head[1]), head[2])
        if hi - lo == head[0] and ended >= 0:
            b.clock[0] += 1
        return ended

    @driver
    def many(table, actions):
        head = carray(as_pointer(table), (3,), np.int64)
        num_envs, steps = head[0], actions.shape[0]
        if actions.size != steps * num_envs * width:
            return WRONG_SHAPE
        b = unpack(table)
        limit, mode = np.int32(head[1]), head[2]
        ended = 0
        for t in range(steps):
            result = step_range(b, actions[t], 0, num_envs, limit, mode)
            if result < 0:
                return result - t * num_envs
            ended += result
            b.clock[0] += 1
        return ended

    @driver
    def begin_flagged(table, flags):
        b = unpack(table)
        for i in range(np.uint64(flags.size)):
            if flags[i]:
                begin(i, b)
                b.terminated[i] = False
                b.truncated[i] = False
        b.clock[0] += 1  # the next reset of the same env draws anew

    @scalar_call
    def step_chunk(table, action, lo, hi):  # Numba cannot carry a named tuple into a parallel region
        head = carray(as_pointer(table), (3,), np.int64)
        return step_range(unpack(table), action, lo, hi, np.int32(head[1]), head[2])

    @driver(parallel=True)
    def step_prange(table, action):
        head = carray(as_pointer(table), (3,), np.int64)
        num_envs = head[0]
        if action.size != num_envs * width:
            return WRONG_SHAPE
        b = unpack(table)
        # The check comes first over all envs, so that an impossible action moves none of them.
        for i in range(num_envs):
            if check(np.uint64(i), b, action):
                return -1 - i
        ended = 0
        for c in numba.prange((num_envs + BLOCK - 1) // BLOCK):
            ended += step_chunk(table, action, c * BLOCK, min((c + 1) * BLOCK, num_envs))
        b.clock[0] += 1
        return ended

    @driver
    def serve(table, control, lo, hi, spins):
        """Wait for work, do it, report; returns when nothing came for `spins` looks (or 0 sent: the pool closes).

        control: address of int64 [ticket, action address, this thread's finished ticket, its result].
        """
        head = carray(as_pointer(table), (3,), np.int64)
        b = unpack(table)
        done = load_acquire(control + 16)
        idle = 0
        while idle < spins:
            ticket = load_acquire(control)
            if ticket == done:
                idle += 1
                continue
            if ticket < 0:
                return -1
            idle = 0
            action = action_array(load_acquire(control + 8), head[0])
            store_release(control + 24, step_range(b, action, lo, hi, np.int32(head[1]), head[2]))
            done = ticket
            store_release(control + 16, done)
        return 0

    @driver
    def pooled(table, action, controls, helpers, ticket, lo, hi, spins):
        head = carray(as_pointer(table), (3,), np.int64)
        if action.size != head[0] * width:
            return WRONG_SHAPE
        b = unpack(table)
        # Looked through here and not by each thread in its block: one must not move while another finds something wrong.
        bad = False
        for i in range(np.uint64(head[0])):
            bad |= impossible(i, b, action)
        if bad:
            for i in range(np.uint64(head[0])):
                if impossible(i, b, action):
                    return -1 - np.int64(i)
        for k in range(helpers):
            store_release(controls + k * 64 + 8, address_of(action))
            store_release(controls + k * 64, ticket)
        ended = step_range(b, action, lo, hi, np.int32(head[1]), head[2])
        k = 0
        while k < helpers and spins > 0:
            if load_acquire(controls + k * 64 + 16) == ticket:
                ended += load_acquire(controls + k * 64 + 24)
                k += 1
            else:
                spins -= 1
        if k < helpers:
            return UNFINISHED
        b.clock[0] += 1
        return ended

    # Compiled for just these types (from disk, mostly). A call with an array of another dtype, rank or layout is then a
    # TypeError, which `NativeVecEnv` takes as its cue to convert.
    number, kind = numba.types.int64, numba.from_dtype(np.dtype(action_type))  # type: ignore[call-overload]
    one = numba.types.Array(kind, 1 + action_dims, "C")
    fix(step, (number, one, number, number))
    return CpuDrivers(
        step,
        _Lazy(many, (number, numba.types.Array(kind, 2 + action_dims, "C"))),
        fix(begin_flagged, (number, numba.types.Array(numba.types.boolean, 1, "C"))),
        _Lazy(step_prange, (number, one)),
        _Lazy(serve, (number,) * 5),
        _Lazy(pooled, (number, one, *(number,) * 6)),
        one,
    )


def fix(function: Any, signature: tuple[Any, ...]) -> Any:
    """Compile `function` for this signature alone."""
    if hasattr(function, "compile"):  # not under NUMBA_DISABLE_JIT
        function.compile(signature)
        function.disable_compile()
    return function


class _Lazy:
    """A driver that few need, compiled at its first call."""

    def __init__(self, function: Any, signature: tuple[Any, ...]):
        self._function, self._signature, self._ready = function, signature, False

    def prepare(self) -> None:
        if not self._ready:
            fix(self._function, self._signature)
            self._ready = True

    def __call__(self, *args: Any) -> Any:
        self.prepare()
        return self._function(*args)


def _unpacker(spec: Spec) -> Any:
    """A scalar function from the table's address to `Buffers`, with this spec's shapes and dtypes as constants."""
    made = layouts(spec)
    state, obs, action, mask = made["state"], made["obs"], made["action"], made["mask"]
    state_size, state_type, state_array = state.shape[0], state.dtype.type, farray if state.fortran else carray
    obs_shape, obs_type, obs_array = obs.shape, obs.dtype.type, farray if obs.fortran else carray
    action_shape, action_type, action_array = action.shape, action.dtype.type, farray if action.fortran else carray
    mask_size, bounds, choices = mask.shape[0], made["low"].shape[0], made["counts"].shape[0]

    # One function, not one per field: Numba spends a quarter of a second on each function it compiles.
    @scalar
    def unpack(table):
        head = carray(as_pointer(table), (3 + 18,), np.int64)
        n = head[0]
        return Buffers(
            state_array(as_pointer(head[3]), (n, state_size), state_type),
            obs_array(as_pointer(head[4]), (n,) + obs_shape, obs_type),  # noqa: RUF005
            obs_array(as_pointer(head[5]), (n,) + obs_shape, obs_type),  # noqa: RUF005
            action_array(as_pointer(head[6]), (n,) + action_shape, action_type),  # noqa: RUF005
            carray(as_pointer(head[7]), (n,), np.float32),
            carray(as_pointer(head[8]), (n,), np.bool_),
            carray(as_pointer(head[9]), (n,), np.bool_),
            carray(as_pointer(head[10]), (n, mask_size), np.bool_),
            carray(as_pointer(head[11]), (n,), np.int32),
            carray(as_pointer(head[12]), (n,), np.float32),
            carray(as_pointer(head[13]), (n,), np.float32),
            carray(as_pointer(head[14]), (n,), np.int32),
            farray(as_pointer(head[15]), (n, 2), np.uint32),
            carray(as_pointer(head[16]), (n,), np.uint32),
            carray(as_pointer(head[17]), (1,), np.int64),
            carray(as_pointer(head[18]), (bounds,), np.float32),
            carray(as_pointer(head[19]), (bounds,), np.float32),
            carray(as_pointer(head[20]), (choices,), np.int32),
        )

    return unpack


class PythonDrivers(NamedTuple):
    """The same semantics in plain Python over `Buffers` of NumPy arrays; what the tests compare the others with."""

    step: Any
    begin: Any


def python_drivers(spec: Spec) -> PythonDrivers:
    """Interpreted drivers: the shared scalar functions and the spec's own, as Python runs them."""
    rules = _rules(spec)
    advance, finish, begin, check = (getattr(f, "py_func", f) for f in (rules.advance, rules.finish, rules.begin, rules.check))

    def step(b: Buffers, action: np.ndarray, limit: int, mode: int) -> int:
        for i in range(len(b.reward)):
            if check(i, b, action):
                return -1 - i
        ended = 0
        for i in range(len(b.reward)):
            if mode == NEXT_STEP and (b.terminated[i] | b.truncated[i]):
                begin(i, b)
                b.reward[i], b.terminated[i], b.truncated[i] = 0, False, False
            elif advance(i, b, np.int32(limit)):
                finish(i, b)
                ended += 1
                if mode == SAME_STEP:
                    begin(i, b)
        b.clock[0] += 1
        return ended

    def begin_flagged(b: Buffers, flags: np.ndarray) -> None:
        for i in np.flatnonzero(flags):
            begin(i, b)
            b.terminated[i] = b.truncated[i] = False
        b.clock[0] += 1

    return PythonDrivers(step, begin_flagged)


class CudaDrivers(NamedTuple):
    """CUDA kernels over `Buffers` of device arrays, one thread per env: `step`, then `tick` (one thread), and `begin`."""

    step: Any
    tick: Any
    begin: Any


def cuda_functions(spec: Spec) -> CudaDrivers:
    """The kernels as plain functions, to be compiled by `numba.cuda.jit` (or to PTX without a GPU, or by the simulator)."""
    global cuda  # not a local: the simulator puts its own module into the place of this name in a kernel's globals
    from numba import cuda

    rules = _rules(spec)
    advance, finish, begin, check = rules.advance, rules.finish, rules.begin, rules.check

    def step(b, action, limit, mode, errors):
        i = cuda.grid(1)  # type: ignore[attr-defined]
        if i >= b.reward.shape[0]:
            return
        if check(i, b, action):
            # No exception can leave a kernel: count it, and hold the env still. The host raises when it next looks.
            errors[0] = _ONE
            b.reward[i] = _F0
            b.terminated[i] = False
            b.truncated[i] = False
            return
        if mode == NEXT_STEP and (b.terminated[i] | b.truncated[i]):
            begin(i, b)
            b.reward[i] = _F0
            b.terminated[i] = False
            b.truncated[i] = False
        elif advance(i, b, limit):
            finish(i, b)
            if mode == SAME_STEP:
                begin(i, b)

    def tick(clock):
        if cuda.grid(1) == 0:  # type: ignore[attr-defined]
            clock[0] += 1

    def begin_flagged(b, flags):
        i = cuda.grid(1)  # type: ignore[attr-defined]
        if i < b.reward.shape[0] and flags[i]:
            begin(i, b)
            b.terminated[i] = False
            b.truncated[i] = False

    return CudaDrivers(step, tick, begin_flagged)
