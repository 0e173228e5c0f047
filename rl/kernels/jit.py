"""Numba helpers: one set of compiler options and a disk cache that is keyed by content.

`numba.njit(cache=True)` looks only at the modification time of the file that holds the function. It goes stale when a
callee in another file changes, and it never hits for drivers made in a factory, whose closures hold dispatchers. The cache
here is keyed by the function's signature, the CPU, the Numba version and a hash of everything the function is made from:
the source of every compiled function it reaches and the value of every constant these read.
"""

import hashlib
import importlib.util
import os
import pickle
import sys
import types as pytypes
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import config as numba_config
from numba.core import compiler, extending, serialize, types
from numba.core.dispatcher import Dispatcher

__all__ = ["address_of", "as_pointer", "cache_dir", "driver", "fingerprint", "load_acquire", "scalar", "scalar_call", "store_release"]

# `error_model="numpy"`: a division yields inf or nan instead of a branch to an exception, so that loops vectorise.
_OPTIONS: dict[str, Any] = {"error_model": "numpy"}
_DIGEST = 32  # bytes of SHA-256 before the content of a cache file

intrinsic: Any = extending.intrinsic  # whose type hints would make callers pass the typing context too


def scalar(function: Any) -> Any:
    """Compile a scalar function (an env's `step`, a helper) that drivers inline; it never allocates.

    The same object can be called from a `numba.cuda.jit` kernel.
    """
    return numba.njit(forceinline=True, **_OPTIONS)(function)


def scalar_call(function: Any) -> Any:
    """Like `scalar`, for what runs seldom: left to LLVM whether to inline it, which keeps compilation short."""
    return numba.njit(**_OPTIONS)(function)


def driver(function: Any = None, **options: Any) -> Any:
    """Compile a function called from Python: it releases the GIL, and its machine code is kept on disk."""
    if function is None:
        return lambda f: driver(f, **options)
    dispatcher = numba.njit(nogil=True, **_OPTIONS, **options)(function)
    if not numba_config.DISABLE_JIT:  # type: ignore[attr-defined]
        dispatcher._cache = _ContentCache(dispatcher)  # type: ignore[assignment]
    return dispatcher


def cache_dir() -> Path:
    """The folder of compiled kernels: `$RL_CACHE_DIR`, or `rl-suite` in the user's cache folder."""
    chosen = os.environ.get("RL_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(base).expanduser() / "rl-suite"


def fingerprint(function: Any) -> str:
    """A hash of the source and constants of `function` and of everything compiled that it reaches.

    Two equal fingerprints mean the same behaviour. Reached are globals, closure cells and attributes of modules.
    """
    parts: list[str] = []
    _describe(function, parts, set())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _describe(value: Any, parts: list[str], seen: set[int]) -> None:
    if isinstance(value, Dispatcher):
        _describe(value.py_func, parts, seen)
        parts.append(repr(sorted((k, repr(v)) for k, v in value.targetoptions.items())))
    elif isinstance(value, pytypes.FunctionType):
        if id(value) in seen:
            return
        seen.add(id(value))
        parts.append(f"{value.__module__}.{value.__qualname__}")
        _describe_code(value.__code__, value, parts, seen)
        for default in value.__defaults__ or ():
            _describe(default, parts, seen)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            parts.append(f"cell {name}")
            _describe(cell.cell_contents, parts, seen)
    elif isinstance(value, np.ndarray):
        parts.append(f"{value.dtype}{value.shape}{hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}")
    elif isinstance(value, bool | int | float | complex | str | bytes | np.generic | np.dtype | types.Type | type(None)):
        parts.append(f"{type(value).__name__} {value!r}")
    elif isinstance(value, tuple | list):
        parts.append(f"{type(value).__name__}{len(value)}")
        for item in value:
            _describe(item, parts, seen)
    elif hasattr(value, "_defn") and callable(value):  # a Numba intrinsic
        _describe(value._defn, parts, seen)
    else:
        parts.append(f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}")


def _describe_code(code: pytypes.CodeType, function: pytypes.FunctionType, parts: list[str], seen: set[int]) -> None:
    parts.append(code.co_code.hex())
    parts.append(repr([c for c in code.co_consts if not isinstance(c, pytypes.CodeType)]))
    for name in code.co_names:
        if name in function.__globals__:
            parts.append(f"global {name}")
            value = function.__globals__[name]
            if isinstance(value, pytypes.ModuleType):
                _describe_module(value, code.co_names, parts, seen, set())
            else:
                _describe(value, parts, seen)
        else:
            parts.append(f"name {name}")
    for const in code.co_consts:
        if isinstance(const, pytypes.CodeType):
            _describe_code(const, function, parts, seen)


def _describe_module(module: pytypes.ModuleType, names: tuple[str, ...], parts: list[str], seen: set[int], visited: set[str]) -> None:
    """For `rng.uniform` or `pkg.rng.uniform`: every name of the code that the module has, or that a module in it has."""
    visited.add(module.__name__)
    parts.append(module.__name__)
    for name in names:
        found = vars(module).get(name)  # not getattr: NumPy answers some names with a warning
        if isinstance(found, pytypes.ModuleType):
            if found.__name__ not in visited:
                _describe_module(found, names, parts, seen, visited)
        elif isinstance(found, Dispatcher | bool | int | float | tuple | np.generic | np.ndarray) or hasattr(found, "_defn"):
            parts.append(f"attribute {name}")
            _describe(found, parts, seen)


class _ContentCache:
    """Stands in for Numba's FunctionCache on one dispatcher: one file per (content, signature, CPU)."""

    def __init__(self, dispatcher: Any):
        self._dispatcher = dispatcher
        self._content: str | None = None
        self.cache_path = str(cache_dir() / "kernels")
        self.stats = {"hits": 0, "misses": 0}

    def _file(self, sig: Any, codegen: Any) -> Path:
        if self._content is None:
            self._content = fingerprint(self._dispatcher)
        # The name of a function's type holds its address, which another function may have in another process.
        described = [fingerprint(t.dispatcher) if isinstance(t, types.Dispatcher) else str(t) for t in getattr(sig, "args", sig)]
        key = (described, codegen.magic_tuple(), numba.__version__, sys.version_info[:2], self._content)
        name = f"{self._dispatcher.py_func.__name__}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.nbc"
        return Path(self.cache_path) / name

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        _postpone_scipy()
        target_context.refresh()
        try:
            raw = self._file(sig, target_context.codegen()).read_bytes()
            digest, data = raw[:_DIGEST], raw[_DIGEST:]
            if hashlib.sha256(data).digest() != digest:  # a damaged page would run as machine code
                raise ValueError("damaged cache file")
            # The folder is the user's own (mode 0700) and only this class writes there; Numba's own cache does the same.
            result = compiler.CompileResult._rebuild(target_context, *pickle.loads(data))
        except Exception:  # missing, torn or from elsewhere: compile and write it anew
            self.stats["misses"] += 1
            return None
        self.stats["hits"] += 1
        return result

    def save_overload(self, sig: Any, data: Any) -> None:
        if data.lifted or data.library.has_dynamic_globals:
            return
        path = self._file(sig, data.codegen)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            body = serialize.dumps(data._reduce())
            temporary.write_bytes(hashlib.sha256(body).digest() + body)
            os.replace(temporary, path)
        except OSError:
            return  # a read-only home: compile in every process, as without a cache

    def flush(self) -> None:
        pass

    def enable(self) -> None:
        pass

    def disable(self) -> None:
        pass


def _postpone_scipy() -> None:
    """Keep Numba from importing scipy.linalg (0.3 s) only to learn that there is a BLAS; `np.dot` in a kernel still imports it."""
    if "numba.np.arraymath" in sys.modules or importlib.util.find_spec("scipy") is None:
        return
    from numba.np import linalg

    real: Any = getattr(linalg, "ensure_blas", None)
    if real is None:  # another version of Numba: it is only the time
        return
    linalg.ensure_blas = lambda: None
    try:
        from numba.np import arraymath
    finally:
        linalg.ensure_blas = real
    arraymath.ensure_blas = real  # type: ignore[attr-defined]


@intrinsic
def as_pointer(typingctx, address):
    """`as_pointer(address: int64)`: the address as a pointer, for `numba.carray` and `numba.farray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@intrinsic
def address_of(typingctx, array):
    """The address of the first element of `array`, an int64."""

    def codegen(context, builder, signature, args):
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.ptrtoint(struct.data, context.get_value_type(types.int64))

    return types.int64(array), codegen


@intrinsic
def load_acquire(typingctx, address):
    """Read the int64 at `address` such that what its writer wrote before is seen."""

    def codegen(context, builder, signature, args):
        i64 = context.get_value_type(types.int64)
        return builder.load_atomic(builder.inttoptr(args[0], i64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_release(typingctx, address, value):
    """Write the int64 at `address` such that what was written before is seen by whoever reads it with `load_acquire`."""

    def codegen(context, builder, signature, args):
        i64 = context.get_value_type(types.int64)
        builder.store_atomic(args[1], builder.inttoptr(args[0], i64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
