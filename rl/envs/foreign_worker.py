"""The worker's side of `rl/envs/foreign.py`: builds a block of Gymnasium envs and steps them into shared memory.

Kept light on purpose (standard library, NumPy, Gymnasium): a worker that imported torch would take seconds to start. Worker and
parent talk over a socket pair, one byte for a request and one for the answer; everything else lies in shared memory.

    b"m" map the shared memory (its descriptor comes along)      b"k" done
    b"s" step    b"r" reset    b"v" render    b"q" quit          b"e" failed (text follows)    b"a" wrong action (text follows)
"""

import contextlib
import importlib
import inspect
import mmap
import os
import pickle
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


@dataclass(frozen=True)
class Factory:
    """How to make one env; what `resolve_foreign` answers. Picklable, so a worker can use it."""

    name: str  # as the user wrote it
    spec: Any = None  # gymnasium EnvSpec, or None for module:Class
    target: str | None = None  # "module:Class"
    kwargs: dict[str, Any] = field(default_factory=dict)  # for the constructor
    atari: dict[str, Any] | None = None  # options of AtariPreprocessing, or None
    time_limit: int | None = None  # env steps; 0: none at all; None: whatever the env's registration says
    clip_reward: bool = False  # sign(reward) for the learner (an Atari game clips in its own wrapper)
    render: bool = False


class WrongAction(ValueError):
    """The caller's mistake, not the env's: raised to the caller instead of restarting the worker."""


def build(factory: Factory) -> gymnasium.Env:
    """Make the env a Factory describes. Raises whatever its constructor raises, and TypeError for what is not a Gymnasium env."""
    kwargs = dict(factory.kwargs)
    if factory.spec is not None:
        if factory.render:
            kwargs["render_mode"] = "rgb_array"
        if factory.time_limit is not None:
            kwargs["max_episode_steps"] = -1  # no TimeLimit wrapper: the worker counts
        if factory.atari is not None:
            with contextlib.suppress(ImportError, AttributeError):
                ale_py = importlib.import_module("ale_py")
                ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # else every worker prints a banner
        env = gymnasium.make(factory.spec, disable_env_checker=True, **kwargs)
    else:
        assert factory.target is not None
        make: Any = load(factory.target)
        if factory.render and _takes_keyword(make, "render_mode"):
            kwargs["render_mode"] = "rgb_array"
        env = make(**kwargs)
        if isinstance(env, gymnasium.vector.VectorEnv):
            raise TypeError(f"{factory.target} makes a vector env; give the class or factory of a single gymnasium.Env instead")
        if not isinstance(env, gymnasium.Env):
            raise TypeError(f"{factory.target} made a {type(env).__module__}.{type(env).__qualname__}, which is not a gymnasium.Env")
    if factory.atari is not None:
        from rl.envs.atari import AtariPreprocessing

        env = AtariPreprocessing(env, **factory.atari)
    return env


def load(target: str) -> Any:
    """The object that "module:Outer.name" names. Raises ImportError or AttributeError."""
    module, _, path = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _takes_keyword(function: Any, name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def seeds_for(seed: int, index: int, restart: int = 0, generation: int = 0) -> tuple[int, int]:
    """Two seeds in [0, 2^31) for env `index`: one for `reset`, one for its action space.

    `restart` counts how often that env's worker was replaced, `generation` the env steps taken before a resume. Nothing depends
    on how many envs or workers there are.
    """
    words = np.random.SeedSequence(seed, spawn_key=(index, restart, generation)).generate_state(2)
    return int(words[0] >> 1), int(words[1] >> 1)


# -- spaces ------------------------------------------------------------------------------------------------------------------


def observation_codec(space: spaces.Space) -> tuple[spaces.Box, Callable[[Any], np.ndarray]]:
    """The Box that stands for an observation space, and a function from its observations to arrays of the Box's shape.

    uint8 Box: as it is. Any other Box: float32. Discrete, MultiDiscrete, Dict, Tuple, MultiBinary: `gymnasium.spaces.flatten`
    (one-hot for discrete parts), float32 [n]. The function raises ValueError for an observation of the wrong shape or kind.
    """
    if isinstance(space, spaces.Box):
        dtype = np.dtype(np.uint8 if space.dtype == np.uint8 else np.float32)
        with np.errstate(over="ignore"):  # float64 bounds beyond float32 become infinite, which they mean
            low, high = space.low.astype(dtype), space.high.astype(dtype)
        box = spaces.Box(low, high, space.shape, dtype.type)
        shape, integral = space.shape, dtype == np.uint8

        def encode(obs: Any) -> np.ndarray:
            array = obs if type(obs) is np.ndarray else np.asarray(obs)
            if array.shape != shape or (integral and array.dtype != np.uint8) or array.dtype.kind not in "fiub":
                raise ValueError(f"the env observed {array.dtype} {list(array.shape)}, but declares {space}")
            return array

        return box, encode
    if not space.is_np_flattenable:
        raise TypeError(f"observation space {space} cannot be flattened into an array; wrap the env to observe a Box")
    flat = spaces.flatten_space(space)
    assert isinstance(flat, spaces.Box)
    with np.errstate(over="ignore"):
        box = spaces.Box(flat.low.astype(np.float32), flat.high.astype(np.float32), flat.shape, np.float32)

    def encode_flat(obs: Any) -> np.ndarray:
        array = np.asarray(spaces.flatten(space, obs))
        if array.shape != box.shape:
            raise ValueError(f"the env observed {obs!r}, which does not flatten to {list(box.shape)} as its space {space} does")
        return array

    return box, encode_flat


def action_codec(space: spaces.Space) -> tuple[spaces.Space, Callable[[np.ndarray], list[Any]]]:
    """The space an agent acts in, and a function from a block's actions [b, ...] to a list of what each env's `step` takes.

    Discrete(n, start) -> Discrete(n); MultiDiscrete -> MultiDiscrete of one dimension; MultiBinary -> MultiDiscrete of twos;
    floating Box -> float32 Box with the same bounds. The function raises WrongAction for actions out of range.
    """
    if isinstance(space, spaces.Discrete):
        n, start = int(space.n), space.start

        def decode_discrete(actions: np.ndarray) -> list[Any]:
            if actions.min() < 0 or actions.max() >= n:
                raise WrongAction(f"actions must lie in 0..{n - 1}; got {actions.tolist()}")
            return list(actions + start if start else actions)

        return spaces.Discrete(n), decode_discrete
    if isinstance(space, (spaces.MultiDiscrete, spaces.MultiBinary)):
        binary = isinstance(space, spaces.MultiBinary)
        nvec = np.full(space.shape, 2, np.int64) if binary else space.nvec  # pyright: ignore[reportAttributeAccessIssue]
        start = 0 if binary else getattr(space, "start", 0)
        counts = nvec.reshape(-1).astype(np.int64)

        def decode_multi(actions: np.ndarray) -> list[Any]:
            if (actions < 0).any() or (actions >= counts).any():
                raise WrongAction(f"each action must lie below {counts.tolist()}; got {actions.tolist()}")
            return list((actions.reshape(-1, *space.shape) + start).astype(space.dtype))  # type: ignore[misc]

        return spaces.MultiDiscrete(counts), decode_multi
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):  # type: ignore[arg-type]
        with np.errstate(over="ignore"):
            low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        box = spaces.Box(low, high, space.shape, np.float32)
        # The cast to float32 may have rounded a bound outwards, so the env's own bounds are applied after casting back.
        return box, lambda actions: list(np.clip(actions.astype(space.dtype), space.low, space.high))
    raise TypeError(f"action space {space} is not supported: Discrete, MultiDiscrete, MultiBinary and floating Box are")


# -- shared memory -----------------------------------------------------------------------------------------------------------


def layout(
    num_envs: int, obs: spaces.Box, action: spaces.Space, mask: int | None
) -> tuple[list[tuple[str, tuple[int, ...], str, int]], int]:
    """The arrays in shared memory as (name, shape, dtype, offset), each on a cache line of its own, and the bytes they need."""
    b, obs_type = num_envs, np.dtype(obs.dtype).str
    fields: list[tuple[str, tuple[int, ...], Any]] = [
        ("obs", (b, *obs.shape), obs_type),
        ("final_obs", (b, *obs.shape), obs_type),
        ("action", (b, *(action.shape or ())), "<f4" if isinstance(action, spaces.Box) else "<i8"),
        ("reward", (b,), "<f4"),
        ("terminated", (b,), "|b1"),
        ("truncated", (b,), "|b1"),
        ("over", (b,), "|b1"),  # the whole game ended, not just a life
        ("episode_return", (b,), "<f4"),
        ("episode_length", (b,), "<i4"),
        ("run_return", (b,), "<f8"),  # of the episode under way
        ("run_length", (b,), "<i4"),
        ("stage", (b,), "|u1"),  # 1 once this step's result is complete: what survives a worker's death
        ("seed", (b, 2), "<i8"),  # for b"r"; -1: go on without reseeding
    ]
    if mask is not None:
        fields.append(("mask", (b, mask), "|b1"))
    placed, offset = [], 0
    for name, shape, dtype in fields:
        placed.append((name, shape, dtype, offset))
        offset += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64
    return placed, max(offset, 64)


def views(buffer: Any, fields: list[tuple[str, tuple[int, ...], str, int]]) -> dict[str, np.ndarray]:
    """The arrays of a `layout` over a buffer, by name."""
    return {name: np.ndarray(shape, dtype, buffer, offset) for name, shape, dtype, offset in fields}


# -- the worker --------------------------------------------------------------------------------------------------------------


class Block:
    """Envs `first` .. `first + count - 1`, with their rows of the shared arrays."""

    def __init__(self, factory: Factory, first: int, seeds: list[tuple[int, int]]) -> None:
        self.first, self.count = first, len(seeds)
        self.envs: list[Any] = [build(factory) for _ in seeds]
        env = self.envs[0]
        self.observation_space, self.encode = observation_codec(env.observation_space)
        self.action_space, self.decode = action_codec(env.action_space)
        self.atari, self.clip, self.limit = factory.atari is not None, factory.clip_reward, factory.time_limit or 0
        self.firsts = [self._reset_env(env, *seed) for env, seed in zip(self.envs, seeds)]
        masks = [info.get("action_mask") for _, info in self.firsts]
        self.mask: int | None = None
        if masks[0] is not None:
            if not isinstance(self.action_space, spaces.Discrete):
                raise TypeError(f"info['action_mask'] is understood for Discrete actions only, not {env.action_space}")
            self.mask = int(self.action_space.n)
        self.encode(self.firsts[0][0])  # a first observation of the wrong shape is an error now, not at the first step

    def map(self, arrays: dict[str, np.ndarray]) -> None:
        rows = slice(self.first, self.first + self.count)
        v = {name: array[rows] for name, array in arrays.items()}
        self.obs, self.final_obs, self.action, self.reward = v["obs"], v["final_obs"], v["action"], v["reward"]
        self.terminated, self.truncated, self.over, self.stage = v["terminated"], v["truncated"], v["over"], v["stage"]
        self.episode_return, self.episode_length = v["episode_return"], v["episode_length"]
        self.run_return, self.run_length, self.seed = v["run_return"], v["run_length"], v["seed"]
        self.masks = v.get("mask")
        for i, (obs, info) in enumerate(self.firsts):
            self._begin(i, obs, info)
        self.run_return[:], self.run_length[:] = 0, 0
        self.firsts = []

    def reset(self) -> None:
        for i, env in enumerate(self.envs):
            seed, action_seed = self.seed[i].tolist()
            self._begin(i, *self._reset_env(env, None if seed < 0 else seed, action_seed))
            self.run_return[i], self.run_length[i] = 0, 0

    def _reset_env(self, env: Any, seed: int | None, action_seed: int) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            env.action_space.seed(action_seed)
        return _pair(env.reset(seed=seed, options={"new_game": True}) if self.atari else env.reset(seed=seed))

    def _begin(self, i: int, obs: Any, info: dict[str, Any]) -> None:
        self.obs[i] = self.encode(obs)
        if self.masks is not None:
            self.masks[i] = _mask(info)

    def step(self) -> None:
        actions = self.decode(self.action)
        for i, env in enumerate(self.envs):
            obs, reward, terminated, truncated, info = env.step(actions[i])
            length = self.run_length[i] = self.run_length[i] + 1
            truncated = bool(truncated) or 0 < self.limit <= length
            self.run_return[i] += env.raw_reward if self.atari else reward
            self.reward[i] = np.sign(reward) if self.clip else reward
            self.terminated[i], self.truncated[i] = terminated, truncated
            if not (terminated or truncated):
                self.obs[i] = self.encode(obs)
                if self.masks is not None:
                    self.masks[i] = _mask(info)
                self.over[i] = False
                self.stage[i] = 1
                continue
            over = truncated or not self.atari or env.game_over
            self.final_obs[i] = self.encode(obs)
            self.over[i] = over
            self.episode_return[i] = self.run_return[i] if over else np.nan
            self.episode_length[i] = length if over else 0
            self.stage[i] = 1
            # Our own time limit must end the game too, where the Atari wrapper would go on with the next life.
            again = env.reset(options={"new_game": True}) if self.atari and over else env.reset()
            self._begin(i, *_pair(again))
            if over or env.new_game:
                self.run_return[i], self.run_length[i] = 0, 0


def _pair(answer: Any) -> tuple[Any, dict[str, Any]]:
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
        raise TypeError(f"reset() must return (obs, info dict), the Gymnasium signature; it returned a {type(answer).__name__}")
    return answer


def _mask(info: dict[str, Any]) -> np.ndarray:
    if "action_mask" not in info:
        raise ValueError("the env gave info['action_mask'] at its first reset but not at this moment: give it always or never")
    return np.asarray(info["action_mask"]) != 0


def main(descriptor: int, parent: int) -> None:
    """Serve one parent over an inherited socket until it says quit, closes the socket or dies."""
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    with socket.socket(fileno=descriptor) as sock:
        block = None
        try:
            order = pickle.loads(receive(sock))
            gymnasium.logger.min_level = gymnasium.logger.WARN if order["first"] == 0 else gymnasium.logger.ERROR  # one voice is enough
            block = Block(order["factory"], order["first"], order["seeds"])
            sock.sendall(b"k")
            send(sock, pickle.dumps((block.observation_space, block.action_space, block.mask)))
            _serve(sock, block)
        except (EOFError, ConnectionError):
            pass  # the parent is gone
        except BaseException as error:  # SystemExit too: an env must not take its worker down without a word
            _fail(sock, error)
        finally:
            for env in block.envs if block is not None else ():
                with contextlib.suppress(Exception):
                    env.close()


def _serve(sock: socket.socket, block: Block) -> None:
    while True:
        request = sock.recv(1)
        if request == b"s":
            try:
                block.step()
            except WrongAction as error:
                sock.sendall(b"a")
                send(sock, str(error).encode())
                continue
        elif request == b"r":
            block.reset()
        elif request == b"v":
            index = struct.unpack("<q", receive(sock))[0]
            try:
                answer = np.asarray(block.envs[index].render())
            except Exception as error:  # a picture that fails is no reason to lose the episodes
                answer = "".join(traceback.format_exception(error))
            sock.sendall(b"k")
            send(sock, pickle.dumps(answer))
            continue
        elif request == b"m":
            fields, size = pickle.loads(receive(sock))
            _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
            block.map(views(mmap.mmap(descriptors[0], size), fields))
            os.close(descriptors[0])
        else:  # b"q", or the parent closed its end
            return
        sock.send(b"k")


def _fail(sock: socket.socket, error: BaseException) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(b"e")
        send(sock, "".join(traceback.format_exception(error)).encode())


def _die_with(parent: int) -> None:
    """A worker inside a long or hung step does not see its socket close; it must not outlive its parent for that."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def send(sock: socket.socket, data: bytes) -> None:
    """Send bytes behind their length."""
    sock.sendall(struct.pack("<q", len(data)) + data)


def receive(sock: socket.socket) -> bytes:
    """Receive what `send` sent. Raises EOFError where the other end closed."""
    return _exactly(sock, struct.unpack("<q", _exactly(sock, 8))[0])


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise EOFError("the other end of the socket closed")
        data += part
    return bytes(data)
