"""Any Gymnasium env behind `rl.types.VectorEnv`, in worker processes over shared memory.

    gym:LunarLander-v3    Hopper-v5    ALE/Pong-v5    MinAtar/Breakout-v1     any id Gymnasium knows
    mypackage.envs:MyEnv                                                      a gymnasium.Env class, or a function that makes one
    mypackage:MyEnv-v0                                                        an id that importing mypackage registers

What an agent sees. Observations: uint8 boxes stay uint8, other boxes become float32; Discrete is one-hot, Dict and Tuple are
`gymnasium.spaces.flatten`-ed, all float32. Actions: `Discrete`, `MultiDiscrete` (also for MultiBinary), float32 `Box`, clipped to
finite bounds before the env sees them. `info["action_mask"]`, where given, becomes `action_mask`. Episodes are SAME_STEP autoreset with
`final_obs`; terminated and truncated stay as the env gave them.

Workers are plain `python -c` children rather than `multiprocessing` ones. So nothing is forked from a process with torch's threads, the
user's `__main__` is not imported again (no `if __name__ == "__main__"` needed), and an anonymous memory file that the kernel frees
with its last user leaves nothing behind, not even after kill -9.
"""

import json
import logging
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import weakref
from typing import Any

import gymnasium
import numpy as np
import torch

from rl.envs.foreign_names import ForeignEnvError, resolve_foreign
from rl.envs.foreign_worker import Factory, layout, receive, seeds_for, send, views
from rl.errors import RunError
from rl.types import Step

__all__ = ["ForeignEnvError", "ForeignVecEnv", "WorkerError", "make_foreign", "resolve_foreign"]

log = logging.getLogger("rl.envs")

MAX_FAILURES = 10  # of one worker in a row, without a successful step between
START_TIMEOUT = 120.0  # seconds to import and construct, at least: some envs compile or download at first use


class WorkerError(RunError):
    """A worker could not be started, or kept failing. The message holds the worker's own traceback where there is one."""


def make_foreign(
    name: str,
    num_envs: int,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    options: dict[str, Any] | None = None,
    hang_timeout: float | None = 60.0,
    render: bool = False,
) -> "ForeignVecEnv":
    """`num_envs` copies of a foreign env, in `workers` processes (default: one per CPU core, at most `num_envs`).

    Options: see `resolve_foreign`. `hang_timeout`: seconds that a worker may take over one step or reset of its envs before it is
    replaced; None waits for ever. `render=True` makes the envs with `render_mode="rgb_array"`. Raises ForeignEnvError before any work,
    WorkerError where the env cannot be constructed.
    """
    return ForeignVecEnv(
        resolve_foreign(name, options, render=render), num_envs, seed=seed, device=device, workers=workers, hang_timeout=hang_timeout
    )


class _Failure(Exception):
    """One worker died, hung or reported an exception."""


class _Worker:
    """One child process and its socket. Every method raises _Failure when the child does not do its part in time."""

    def __init__(self, index: int, first: int, count: int) -> None:
        self.index, self.first, self.count = index, first, count
        self.rows = slice(first, first + count)
        self.failures = 0  # in a row
        self.waiting = False  # an answer is due
        self.process: subprocess.Popen | None = None
        self.sock: socket.socket | None = None

    def launch(self, factory: Factory, seeds: list[tuple[int, int]]) -> None:
        ours, theirs = socket.socketpair()
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        try:
            output = 2 if os.fstat(2) else None  # what an env prints must not land among a command's --json
        except OSError:
            output = subprocess.DEVNULL
        # One thread each: W workers with a BLAS pool each would fight over the same cores.
        threads = {f"{lib}_NUM_THREADS": "1" for lib in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")}
        boot = (
            "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import sys, json, faulthandler; faulthandler.enable(); "
            "sys.path[:] = json.loads(sys.argv[3]); from rl.envs.foreign_worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
        )
        command = [sys.executable, "-c", boot, str(theirs.fileno()), str(os.getpid()), path]
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, pass_fds=[theirs.fileno()], env={**os.environ, **threads}
            )
        self.sock, self.waiting = ours, True
        try:
            send(ours, pickle.dumps({"factory": factory, "first": self.first, "seeds": seeds}))
        except OSError:
            raise _Failure(self._epitaph()) from None

    def timeout(self, seconds: float | None) -> None:
        """How long `answer` waits. A receive timeout in the kernel: cheaper than polling before each receive."""
        assert self.sock is not None
        whole, part = divmod(seconds or 0.0, 1.0)  # 0: for ever
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(whole), int(part * 1e6)))

    def ask(self, request: bytes) -> None:
        if self.waiting:
            self.answer()  # an interrupt (Ctrl-C) left this one unread
        assert self.sock is not None
        try:
            self.sock.send(request)
        except OSError:
            raise _Failure(self._epitaph()) from None
        self.waiting = True

    def answer(self) -> None:
        """Wait for the answer. Raises ValueError where the worker refuses the action."""
        assert self.sock is not None
        code = b""
        try:
            code = self.sock.recv(1)
            if code == b"k":
                self.waiting = False
                return
            text = receive(self.sock).decode() if code else self._epitaph()
        except BlockingIOError:
            raise _Failure("hangs: no answer in time") from None
        except (OSError, EOFError):
            text = self._epitaph()
        self.waiting = False
        raise ValueError(text) if code == b"a" else _Failure(text)

    def result(self) -> Any:
        self.answer()
        assert self.sock is not None
        try:
            return pickle.loads(receive(self.sock))  # from our own child
        except (OSError, EOFError):
            raise _Failure(self._epitaph()) from None

    def map(self, fields: Any, size: int, descriptor: int) -> None:
        self.ask(b"m")
        assert self.sock is not None
        try:
            send(self.sock, pickle.dumps((fields, size)))
            socket.send_fds(self.sock, [b"f"], [descriptor])
        except OSError:
            raise _Failure(self._epitaph()) from None
        self.answer()

    def kill(self) -> None:
        if self.sock is not None:
            self.sock.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _epitaph(self) -> str:
        assert self.process is not None
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"died with exit status {code}"
        try:
            return f"died of signal {signal.Signals(-code).name}"
        except ValueError:
            return f"died of signal {-code}"


def _shut_down(workers: list[_Worker]) -> None:
    for worker in workers:
        if worker.sock is not None:
            worker.sock.close()  # an idle worker takes this as its leave and closes its envs
    for worker in workers:
        if worker.process is not None:
            try:
                worker.process.wait(2)
            except subprocess.TimeoutExpired:
                worker.kill()


class ForeignVecEnv:
    """B foreign envs as a `rl.types.VectorEnv`. Make one with `make_foreign`.

    Beyond the protocol:
    - `episode_over` [B] bool: where the last step ended a whole game. It differs from `terminated | truncated` only for Atari with
      `terminal_on_life_loss`: there, at a lost life, it is False, `episode_return` is NaN and `episode_length` 0; at the game's
      end both cover the whole game. Count scores where `episode_over`.
    - `restarts`: how many times a worker was replaced. Where one dies, raises or hangs, the transitions its envs had already
      completed are kept; an env that was in the middle gets reward 0 and its last observation as `final_obs`; all of the worker's running
      episodes are truncated there and new ones begin, seeded by (seed, env index, number of restarts of that env).
    - `steps`: env steps taken so far, over all envs. `obs`: the current observation.
    """

    exact_resume = False

    def __init__(
        self,
        factory: Factory,
        num_envs: int,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        workers: int | None = None,
        hang_timeout: float | None = 60.0,
    ) -> None:
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _shut_down, self._workers)  # also at exit, and safe if this constructor fails
        if not hasattr(socket, "send_fds"):
            raise ForeignEnvError("foreign environments need a POSIX system (Linux, macOS, WSL)")
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        if hang_timeout is not None and hang_timeout <= 0:
            raise ValueError(f"hang_timeout must be positive seconds or None, not {hang_timeout}")
        count = min(num_envs, workers or _cores())
        self.name, self.num_envs, self.device = factory.name, num_envs, torch.device(device)
        self.seed, self.steps, self.restarts = seed, 0, 0
        self._factory, self._hang_timeout = factory, hang_timeout
        self._generation = 0  # env steps taken before the last resume
        self._env_restarts = [0] * num_envs
        self._fresh = True  # no step since the last reset
        edges = [num_envs * w // count for w in range(count + 1)]
        self._workers += [_Worker(w, edges[w], edges[w + 1] - edges[w]) for w in range(count)]
        try:
            for worker in self._workers:
                worker.launch(factory, self._seeds(worker))
            spaces = [self._first_answer(worker) for worker in self._workers]
            for worker, theirs in zip(self._workers, spaces):
                if theirs != spaces[0]:
                    raise _Failure(f"worker {worker.index} has other spaces than worker 0: {theirs} against {spaces[0]}")
            self.single_observation_space, self.single_action_space, mask = spaces[0]
            self._fields, self._size = layout(num_envs, self.single_observation_space, self.single_action_space, mask)
            self._descriptor = _memory_file(self._size)
            weakref.finalize(self, os.close, self._descriptor)
            self._arrays = views(mmap.mmap(self._descriptor, self._size), self._fields)
            for worker in self._workers:
                self._map(worker)
        except _Failure as failure:
            self.close()
            raise WorkerError(f"{self.name}: a worker process could not make its envs:\n{failure}") from None
        except BaseException:
            self.close()
            raise
        shared = {key: torch.from_numpy(array) for key, array in self._arrays.items()}
        # Actions arrive in shared memory whatever the device; results are served from it on the CPU, and copied elsewhere.
        self._action, self._shared = shared["action"], shared
        on_device = shared if self.device.type == "cpu" else {key: t.to(self.device) for key, t in shared.items()}
        self._on_device = on_device
        self._stage = self._arrays["stage"]
        self._bounds: tuple[torch.Tensor, torch.Tensor] | None = None
        if isinstance(self.single_action_space, gymnasium.spaces.Box):
            self._bounds = torch.from_numpy(self.single_action_space.low), torch.from_numpy(self.single_action_space.high)
        self.reward_threshold: float | None = getattr(factory.spec, "reward_threshold", None)  # Gymnasium's, if it names one
        self.obs = on_device["obs"]
        self.episode_return, self.episode_length = on_device["episode_return"], on_device["episode_length"]
        self.episode_over = on_device["over"]
        self.action_mask: torch.Tensor | None = on_device.get("mask")
        self._step = Step(self.obs, on_device["reward"], on_device["terminated"], on_device["truncated"], on_device["final_obs"])

    def reset(self, seed: int | None = None) -> torch.Tensor:
        """Begin B new episodes; obs [B, ...]. With a seed, all that follows is determined by it (as far as the env keeps to its seed)."""
        if seed is not None:
            self.seed, self._generation = seed, 0
            self._env_restarts = [0] * self.num_envs
        elif self._fresh:
            return self.obs  # the constructor, or a resume, has just begun new episodes
        self._reset_all(reseed=seed is not None)
        return self.obs

    def step(self, action: torch.Tensor) -> Step:
        """One step. Raises ValueError for an action of the wrong shape, kind or range, WorkerError for a worker that keeps failing."""
        if action.shape != self._action.shape:
            raise ValueError(f"{self.name} takes actions of shape {list(self._action.shape)}; got {list(action.shape)}")
        if self._bounds is None:
            if action.is_floating_point():
                raise ValueError(f"{self.name} takes integer actions; got {action.dtype}")
            self._action.copy_(action)
        elif self.device.type == "cpu" and action.dtype == torch.float32:
            torch.clamp(action.detach(), *self._bounds, out=self._action)
        else:
            self._action.copy_(action.detach())
            self._action.clamp_(*self._bounds)
        self._fresh = False
        self._stage.fill(0)
        failed = self._command(b"s")
        for worker, reason in failed:
            self._salvage(worker)
            self._restart(worker, reason)
        self.steps += self.num_envs
        if self.device.type != "cpu":
            self._upload()
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """What a foreign env can tell of itself: its seed and counters. The episodes under way are lost (`exact_resume` is False)."""
        return {"seed": self.seed, "steps": self.steps, "restarts": self.restarts, "env_restarts": list(self._env_restarts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counters and begin new episodes with seeds made of (seed, steps so far), not those of the first start again."""
        if len(state["env_restarts"]) != self.num_envs:
            raise ValueError(f"the saved state is of {len(state['env_restarts'])} envs; there are {self.num_envs}")
        self.seed, self.steps, self.restarts = int(state["seed"]), int(state["steps"]), int(state["restarts"])
        self._env_restarts = [int(n) for n in state["env_restarts"]]
        self._generation = self.steps
        self._reset_all(reseed=True)

    def render(self, index: int = 0) -> np.ndarray:
        """Env `index` as RGB uint8 [H, W, 3]. Raises RuntimeError where it was made without `render=True` or cannot draw itself."""
        if not self._factory.render:
            raise RuntimeError(f"{self.name} was made without render=True; pictures have to be asked for when the env is made")
        if not 0 <= index < self.num_envs:
            raise IndexError(f"there are envs 0..{self.num_envs - 1}, not {index}")
        worker = next(w for w in self._workers if index < w.first + w.count)
        try:
            worker.ask(b"v")
            assert worker.sock is not None
            send(worker.sock, struct.pack("<q", index - worker.first))
            picture = worker.result()
        except (OSError, _Failure) as failure:
            raise RuntimeError(f"{self.name}: the worker of env {index} failed while rendering: {failure}") from None
        if isinstance(picture, str) or picture.ndim != 3:
            raise RuntimeError(f"{self.name} cannot be rendered as an RGB array: {picture if isinstance(picture, str) else picture.shape}")
        return picture.astype(np.uint8, copy=False)

    def close(self) -> None:
        """End the workers. May be called again; tensors already handed out stay readable."""
        self._finalizer()

    # -- workers -------------------------------------------------------------------------------------------------------------

    def _seeds(self, worker: _Worker) -> list[tuple[int, int]]:
        rows = range(worker.first, worker.first + worker.count)
        return [seeds_for(self.seed, i, self._env_restarts[i], self._generation) for i in rows]

    def _first_answer(self, worker: _Worker) -> Any:
        worker.timeout(None if self._hang_timeout is None else max(self._hang_timeout, START_TIMEOUT))
        return worker.result()

    def _map(self, worker: _Worker) -> None:
        worker.timeout(self._hang_timeout)
        worker.map(self._fields, self._size, self._descriptor)

    def _command(self, request: bytes) -> list[tuple[_Worker, str]]:
        """Send one request to all workers, wait for all of them, and return those that failed, with the reason."""
        if not self._finalizer.alive:
            raise RuntimeError(f"{self.name} is closed")
        failed: list[tuple[_Worker, str]] = []
        sent = []
        wrong: ValueError | None = None
        for worker in self._workers:
            try:
                worker.ask(request)
                sent.append(worker)
            except _Failure as failure:
                failed.append((worker, str(failure)))
        for worker in sent:
            try:
                worker.answer()
                worker.failures = 0
            except _Failure as failure:
                failed.append((worker, str(failure)))
            except ValueError as error:
                wrong = error
        if wrong is not None:
            raise ValueError(f"{self.name}: {wrong}")
        return failed

    def _reset_all(self, reseed: bool) -> None:
        seeds = [seed for worker in self._workers for seed in self._seeds(worker)] if reseed else -1
        self._arrays["seed"][:] = seeds
        for worker, reason in self._command(b"r"):
            self._restart(worker, reason)
        self._fresh = True
        if self.device.type != "cpu":
            self._upload()

    def _salvage(self, worker: _Worker) -> None:
        """End the episodes of a lost worker's envs as truncated, with what is known of them."""
        a = self._arrays
        for i in range(worker.first, worker.first + worker.count):
            complete = bool(a["stage"][i])
            if complete and (a["terminated"][i] or a["truncated"][i]) and a["over"][i]:
                continue  # it ended by itself before the worker died
            lost_life = complete and a["terminated"][i]
            if not complete:
                a["reward"][i], a["terminated"][i] = 0.0, False
            if not lost_life:
                a["final_obs"][i] = a["obs"][i]
                a["truncated"][i] = True
            a["over"][i] = False  # nobody knows how the episode would have ended: it counts in no score
            a["episode_return"][i], a["episode_length"][i] = np.nan, 0

    def _restart(self, worker: _Worker, reason: str) -> None:
        while True:
            worker.failures += 1
            self.restarts += 1
            where = f"{self.name}: worker {worker.index} (envs {worker.first}..{worker.first + worker.count - 1})"
            log.warning("%s failed; its episodes are truncated and it is restarted (restart %d): %s", where, self.restarts, reason)
            worker.kill()
            if worker.failures > MAX_FAILURES:
                self.close()
                raise WorkerError(f"{where} failed {worker.failures} times without one successful step between; the last time:\n{reason}")
            for i in range(worker.first, worker.first + worker.count):
                self._env_restarts[i] += 1
            try:
                worker.launch(self._factory, self._seeds(worker))
                self._first_answer(worker)
                self._map(worker)
                return
            except _Failure as failure:
                reason = str(failure)

    def _upload(self) -> None:
        for key, tensor in self._on_device.items():
            if key not in ("action", "stage", "seed", "run_return", "run_length"):
                tensor.copy_(self._shared[key])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_file(size: int) -> int:
    """A descriptor of `size` bytes of nameless shared memory. Not bound by the size of /dev/shm (64 MB in a container)."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("rl-envs")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
