"""A training run from beginning to end: what lives around the loop - progress, evaluation, checkpoints, interrupts, NaN.

A run is a pure function of its configuration on the CPU with native envs: nothing here that depends on the clock reaches the
agent or the env, so a run that was killed and resumed ends with the same weights as one that was not.
"""

import json
import math
import os
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rl import checkpoint as _checkpoint
from rl.config import Resolved, create_run_folder, read_run, rewrite_record
from rl.display import Display
from rl.envs import make_vec
from rl.errors import ConfigError, RunError
from rl.evaluation import Evaluation, build_agent, evaluate, evaluation_env, stream_seed
from rl.logger import RunLogger
from rl.loops import LoopState, on_policy
from rl.rollout import Rollout
from rl.types import Progress

WINDOW = 100  # episodes in `rollout/ep_rew_mean`, as Stable-Baselines3 has it


@dataclass
class Result:
    """What a run came to."""

    run: str
    algo: str
    env: str
    seed: int
    env_steps: int
    wall_seconds: float  # of all sessions of the run
    learning_seconds: float  # of it acting and learning, without evaluation, checkpoints and start-up
    steps_per_second: float  # env steps per learning second
    final: dict[str, Any] | None
    best: dict[str, Any] | None
    threshold: float | None
    threshold_step: int | None  # env steps at the first evaluation that reached the threshold
    threshold_second: float | None  # wall seconds then
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def summary(self) -> str:
        speed = f"{self.env_steps:,} env steps in {self.wall_seconds:.1f} s ({self.steps_per_second:,.0f}/s while learning)"
        lines = [f"{self.algo} on {self.env}: {speed}"]
        for name, e in (("final", self.final), ("best", self.best)):
            if e is not None:
                score = f"{e['mean']:.1f} ± {e['std']:.1f} over {e['episodes']} greedy episodes"
                lines.append(f"{name:<6} {score} (at step {e['env_steps']:,})")
        if self.threshold is not None:
            reached = "not reached" if self.threshold_step is None else f"reached at step {self.threshold_step:,}"
            lines.append(f"threshold {self.threshold:g}: {reached}")
        lines.append(f"run    {self.run}")
        return "\n".join(lines)


def run_train(resolved: Resolved, display: Display) -> Result:
    """Train a new run; its folder must not hold one."""
    parts = _Run(resolved, display)
    try:
        create_run_folder(resolved)
        parts.lock()
        return parts.go()
    finally:
        parts.close()


def run_resume(folder: Path, overrides: Any, display: Display) -> Result:
    """Go on with a run from its newest sound checkpoint; from the beginning where it was stopped before its first."""
    resolved = read_run(folder, overrides)
    display.total_steps = resolved.common.total_steps
    parts = _Run(resolved, display)
    try:
        parts.lock()
        checkpoints = folder / "checkpoints"
        if _checkpoint.list_checkpoints(checkpoints):
            state, _, skipped = _checkpoint.load_latest_good(checkpoints)
            for path, reason in skipped:
                display.message(f"skipped a damaged checkpoint, {path}: {reason}")
            parts.restore(state)
            if skipped:  # else "last" and "best" would still mean them
                _checkpoint.drop_after(checkpoints, parts.loop_state.env_steps)
        else:
            display.message("stopped before its first checkpoint: beginning again from step 0")
        done = parts.loop_state.env_steps
        if overrides and done >= resolved.common.total_steps:
            raise ConfigError(f"the run stands at {done:,} env steps and is done; give a larger total_steps, or begin a new run")
        if overrides:
            rewrite_record(resolved)
        return parts.go()
    finally:
        parts.close()


def choose_device(wanted: str) -> torch.device:
    """The device that is meant: "auto" is CUDA where torch and numba-cuda can use it, else the CPU."""
    if wanted != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        try:
            import numba_cuda  # type: ignore[import-not-found] # noqa: F401

            return torch.device("cuda", torch.cuda.current_device())
        except ImportError:
            pass
    return torch.device("cpu")


class _NotFinite(Exception):
    """NaN or Inf, in `what`."""


class _Run:
    """The parts of one run and what happens to them between two iterations of the loop."""

    def __init__(self, resolved: Resolved, display: Display):
        self.resolved, self.display = resolved, display
        c = self.common = resolved.common
        self.started = time.perf_counter()
        torch.set_num_threads(c.threads)
        self.device = choose_device(c.device)
        self.folder = Path(c.run_dir)
        self.env = make_vec(
            resolved.env_entry.name, c.num_envs, seed=stream_seed(c.seed, 1), device=self.device, threads=c.env_threads,
            **c.env_options,
        )  # fmt: skip
        threshold = resolved.env_entry.threshold
        self.threshold: float | None = threshold if threshold is not None else getattr(self.env, "reward_threshold", None)
        try:
            self._check_threshold()
            self.agent = build_agent(resolved, self.env, c.num_envs, self.device)
            self.rollout = Rollout(self.env, resolved.algo.rollout_steps)
        except BaseException:
            self.env.close()
            raise
        self.eval_env: Any = None
        self.loop_state = LoopState()
        self.logger: RunLogger | None = None
        self.resumed_at: int | None = None
        # What a checkpoint keeps besides agent, env and loop.
        self.returns: deque[float] = deque(maxlen=WINDOW)
        self.lengths: deque[float] = deque(maxlen=WINDOW)
        self.evaluations: list[Evaluation] = []
        self.next_eval, self.next_log = c.eval_interval, 0
        self.learning_seconds = self.earlier_seconds = 0.0
        self.reached: tuple[int, float] | None = None
        self.retries = 0
        self.good: Any = None  # the last state known to be finite
        self.last_save = time.perf_counter()
        self.stop_requested = False
        self._lock: Any = None
        self.sound = False  # whether the last iteration was looked at and found finite: nothing else is saved

    def _check_threshold(self) -> None:
        if self.common.stop_at_threshold and self.threshold is None:
            raise ConfigError(f"stop_at_threshold=true: {self.common.env} has no threshold of reward")

    # -- the run -----------------------------------------------------------------------------------------------------

    def go(self) -> Result:
        c = self.common
        if self.resumed_at is None:
            self.env.reset(stream_seed(c.seed, 1))
        self.logger = RunLogger(self.folder, c.tensorboard, self.resumed_at)
        self.good = clone(self.state_dict())
        saved_at = self.resumed_at
        with _Interrupts(self):
            while True:
                try:
                    self._iterate()
                    break
                except _NotFinite as error:
                    self._roll_back(str(error))
            if self.stop_requested:
                if self.loop_state.env_steps != saved_at:
                    self.save()
                raise KeyboardInterrupt(f"stopped at step {self.loop_state.env_steps:,}; rl resume {self.folder} goes on")
            return self._finish()

    def _iterate(self) -> None:
        c = self.common
        if c.stop_at_threshold and self.reached is not None:
            return  # resumed behind the evaluation that ends it
        graphs = c.compile and self.device.type == "cuda" and self.env.exact_resume
        loop = on_policy(self.agent, self.env, self.rollout, c.total_steps, self.loop_state, graphs)
        while True:
            before = time.perf_counter()
            try:
                progress = next(loop, None)
            except ValueError as error:  # an env refuses an action that is not a number
                wrong = self._not_finite()
                if not wrong:
                    raise
                raise _NotFinite(", ".join(wrong)) from error
            self.learning_seconds += time.perf_counter() - before
            if progress is None:
                return
            self._account(progress)
            if progress.env_steps >= self.next_eval:
                self.next_eval = (progress.env_steps // c.eval_interval + 1) * c.eval_interval
                if self._evaluate(progress.env_steps) and c.stop_at_threshold:
                    return
            if self.sound and self.stop_requested:
                return
            if self.sound and self._save_is_due():
                self.save()

    def _account(self, progress: Progress) -> None:
        """Log and show an iteration; raise _NotFinite if something in it is not a number."""
        assert self.logger is not None
        self.returns.extend(progress.episode_returns.tolist())
        self.lengths.extend(progress.episode_lengths.tolist())
        steps = progress.env_steps
        logged = steps >= min(self.next_log, self.common.total_steps)
        self.sound = logged or steps >= self.next_eval or self.stop_requested or self._save_is_due()
        if not self.sound:
            return
        names = list(progress.metrics)
        values = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=self.device) for x in progress.metrics.values()]).tolist()
        metrics = dict(zip(names, values, strict=True))
        # Other figures may be infinite in a healthy run: a KL of a ratio that clipping keeps from the loss, say.
        vital = [name for name in names if name.endswith(("_loss", "grad_norm"))]
        wrong = self.rollout.not_finite() + [name for name in vital if not math.isfinite(metrics[name])]
        if wrong:
            raise _NotFinite(", ".join(wrong))
        check = getattr(self.env, "check_errors", None)
        if check is not None:
            check()
        if not logged:
            return
        self.next_log = steps + self.common.log_every
        if self.returns:
            metrics["rollout/ep_rew_mean"] = sum(self.returns) / len(self.returns)
            metrics["rollout/ep_len_mean"] = sum(self.lengths) / len(self.lengths)
        metrics["time/fps"] = steps / max(self.learning_seconds, 1e-9)
        self.logger.log(steps, metrics)
        shown = {}
        for tag, name in (
            ("rollout/ep_rew_mean", "return"),
            ("train/policy_gradient_loss", "policy"),
            ("train/value_loss", "value"),
            ("train/entropy_loss", "entropy"),
        ):
            if tag in metrics:
                shown[name] = metrics[tag]
        if self.evaluations:
            shown["eval"] = self.evaluations[-1].mean
        self.display.update(steps, shown)

    def _not_finite(self) -> list[str]:
        """What the next action is made from and is not a number."""
        obs = self.env.obs
        wrong = ["observation"] if obs.is_floating_point() and not bool(torch.isfinite(obs).all()) else []
        leaves = _leaves(self.agent.state_dict(), "agent")
        return wrong + [name for name, x in leaves if x.is_floating_point() and not bool(torch.isfinite(x).all())]

    def _save_is_due(self) -> bool:
        return time.perf_counter() - self.last_save >= self.common.checkpoint_seconds

    def _evaluate(self, steps: int) -> bool:
        """Evaluate, keep the best; whether the env's threshold is reached."""
        assert self.logger is not None
        if self.eval_env is None:
            self.eval_env = evaluation_env(self.resolved, self.common.eval_episodes, self.device)
        seed = stream_seed(self.common.seed, 3, steps)
        result = evaluate(self.agent, self.eval_env, self.common.eval_episodes, seed, steps)
        best = max((e.mean for e in self.evaluations), default=-math.inf)
        self.evaluations.append(result)
        self.logger.log(steps, {"eval/mean_reward": result.mean, "eval/std_reward": result.std, "eval/mean_ep_length": result.length})
        reached = self.threshold is not None and result.mean >= self.threshold
        if reached and self.reached is None:
            self.reached = (steps, self.seconds)
        if result.mean >= best:  # of equal ones the later, as `checkpoint.find` and the result have it
            self.save()
        return reached

    def _finish(self) -> Result:
        assert self.logger is not None
        steps = self.loop_state.env_steps
        if self.eval_env is None:
            self.eval_env = evaluation_env(self.resolved, self.common.eval_episodes, self.device)
        final = evaluate(self.agent, self.eval_env, self.common.eval_episodes, stream_seed(self.common.seed, 4, steps), steps)
        self.logger.log(steps, {"eval/final_mean_reward": final.mean, "eval/final_std_reward": final.std})
        if not self.evaluations:  # a run shorter than the interval
            self.evaluations.append(final)
        best = max(self.evaluations, key=lambda e: (e.mean, e.env_steps))
        self.save()
        c = self.common
        notes: dict[str, Any] = {}
        if self.retries:
            notes["rollbacks_after_nan"] = self.retries
        restarts = getattr(self.env, "restarts", 0) + getattr(self.eval_env, "restarts", 0)
        if restarts:
            notes["worker_restarts"] = int(restarts)
        result = Result(
            str(self.folder), c.algo, c.env, c.seed, steps, self.seconds, self.learning_seconds,
            steps / max(self.learning_seconds, 1e-9), final.to_json(), best.to_json(), self.threshold,
            self.reached[0] if self.reached else None, self.reached[1] if self.reached else None,
            [e.to_json() for e in self.evaluations], notes,
        )  # fmt: skip
        write_json(self.folder / "evaluation.json", result.to_json())
        return result

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "agent": self.agent.state_dict(),
            "env": self.env.state_dict(),
            "loop": self.loop_state.state_dict(),
            "run": {
                "returns": list(self.returns), "lengths": list(self.lengths), "next_eval": self.next_eval, "next_log": self.next_log,
                "evaluations": [e.to_json() for e in self.evaluations], "reached": self.reached, "retries": self.retries,
                "learning_seconds": self.learning_seconds, "wall_seconds": self.seconds,
            },
        }  # fmt: skip

    def save(self) -> None:
        assert self.logger is not None
        state = self.state_dict()
        self.logger.sync()
        steps = self.loop_state.env_steps
        last = self.evaluations[-1] if self.evaluations else None
        score = last.mean if last is not None and last.env_steps == steps else None
        meta = {"env_steps": steps, "algo": self.common.algo, "env": self.common.env}
        _checkpoint.save(self.folder / "checkpoints", steps, state, meta=meta, keep=self.common.keep, best_score=score)
        self.good = clone(state)
        self.last_save = time.perf_counter()

    def restore(self, state: dict[str, Any]) -> None:
        """Put a checkpoint's state into every part. RunError where it does not fit the configuration."""
        try:
            self._restore(state)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise RunError(f"the checkpoint does not fit this run's configuration: {error!r}") from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.agent.load_state_dict(state["agent"])
        self.env.load_state_dict(state["env"])
        self.loop_state.load_state_dict(state["loop"])
        run = state["run"]
        self.returns, self.lengths = deque(run["returns"], WINDOW), deque(run["lengths"], WINDOW)
        self.next_eval, self.next_log, self.retries = run["next_eval"], run["next_log"], run["retries"]
        self.evaluations = [Evaluation(**e) for e in run["evaluations"]]
        self.reached = tuple(run["reached"]) if run["reached"] else None
        self.learning_seconds, self.earlier_seconds = run["learning_seconds"], run["wall_seconds"]
        self.resumed_at = self.loop_state.env_steps
        if not self.env.exact_resume:
            self.display.message(f"{self.env.name} cannot be restored: its envs begin new episodes (the agent goes on exactly)")
            self._begin_episodes()

    def _begin_episodes(self) -> None:
        """Every env has begun a new episode that the agent knows nothing of."""
        self.agent.begin_episodes()
        if self.loop_state.recurrent is not None:
            self.loop_state.recurrent = torch.zeros_like(self.loop_state.recurrent)

    # -- what may go wrong ---------------------------------------------------------------------------------------------

    def _roll_back(self, what: str) -> None:
        """NaN or Inf turned up: dump the batch, go back to the last good state with other random numbers, or give up."""
        steps = self.loop_state.env_steps
        self.retries += 1
        dump = self.folder / "not_finite"
        tree = {"what": what, "rollout": self.rollout.state_dict(), "agent": self.agent.state_dict()}
        _checkpoint.save(dump, steps, tree, meta={"env_steps": steps, "what": what}, keep=self.common.nan_retries + 1)
        message = f"NaN or Inf in {what} at step {steps:,}; the batch is in {dump}"
        if self.retries > self.common.nan_retries:
            raise RunError(f"{message}. Gave up after going back {self.common.nan_retries} times; the last good checkpoint is kept.")
        retries = self.retries
        earlier, good_steps = self.earlier_seconds, self.good["loop"]["env_steps"]
        self.display.message(f"{message}; going back to step {good_steps:,} with other random numbers")
        self.restore(clone(self.good))
        if self.logger is not None:  # what was measured since did not happen
            self.logger.close()
        self.logger = RunLogger(self.folder, self.common.tensorboard, self.resumed_at)
        self.retries, self.earlier_seconds = retries, earlier
        # The same numbers would lead to the same end.
        seed = stream_seed(self.common.seed, 6, retries)
        self.agent.reseed(seed)
        self.env.reset(seed)
        self._begin_episodes()

    def lock(self) -> None:
        """Keep the run's folder to this process. RunError where another one works in it."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process is at work in {self.folder}") from error

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
        for part in (self.env, self.eval_env, self.logger):
            if part is not None:
                part.close()


class _Interrupts:
    """The first Ctrl-C or SIGTERM ends the iteration, saves and stops; a second one stops at once."""

    def __init__(self, run: _Run):
        self._run = run
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self._run.stop_requested:
            raise KeyboardInterrupt
        self._run.stop_requested = True
        self._run.display.message("stopping after this iteration (once more to stop at once)")


def clone(tree: Any) -> Any:
    """A deep copy of a state tree whose tensors share nothing with the original."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: clone(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(clone(value) for value in tree)
    return tree


def _leaves(tree: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        return [(name, tree)]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [leaf for key, value in items for leaf in _leaves(value, f"{name}/{key}")]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with open(scratch, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


__all__ = ["ConfigError", "Result", "choose_device", "run_resume", "run_train"]
