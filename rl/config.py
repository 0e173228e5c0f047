"""Words of the command line -> one resolved, typed, checked and saved configuration (design R11, R12).

Words are flat: `algo=ppo env=CartPole lr=3e-4 env.time_limit=300`. What the suite understands is in `TrainConfig`; the
algorithm's own `Config`, beside its class, adds its fields to the same namespace. Later layers win:

    Config defaults < PRESETS[env], or PRESETS["class:<family>"] where there is none < preset=NAME < config=FILE < command line

`resolve` reads words for a new run, `read_run` the record of an old one. Both raise `ConfigError` or `UnknownName` before any work.
"""

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rl import registry
from rl.errors import ConfigError, UnknownName
from rl.record import describe_machine
from rl.registry import AlgoEntry, EnvEntry
from rl.words import Slots, parse_yaml_value, split, suggest, unknown_key

__all__ = ["ConfigError", "Resolved", "TrainConfig", "UnknownName", "create_run_folder", "read_run", "resolve", "rewrite_record"]

RECORD = "config.yaml"  # the resolved configuration in a run's folder


@dataclass(frozen=True)
class TrainConfig:
    """What every training run understands, whatever its algorithm."""

    algo: str = ""
    """Algorithm: a name of `rl list algos`, or module:Class."""
    env: str = ""
    """Environment: a name of `rl list envs`, gym:ID, NAMESPACE/ID or module:Class; its own options are written env.KEY=VALUE."""
    seed: int = 0
    """Everything random in the run follows from it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    total_steps: int = 100_000
    """Length of training, env steps over all envs; rounded up to whole iterations of the loop."""
    num_envs: int = 8
    """Envs stepped side by side, count."""
    threads: int = 1
    """Threads of torch, count; small networks gain nothing from more."""
    env_threads: int = 1
    """Threads that step the envs, count."""
    run_dir: str = ""
    """Folder of this run; empty: runs/<env>/<algo>/<date>-<seed>."""
    preset: str = ""
    """Name of a preset laid over the env's own, such as debug."""
    config: str = ""
    """File of settings, such as the config.yaml of another run."""
    eval_every: int = 0
    """Env steps between evaluations; 0: a twentieth of total_steps."""
    eval_episodes: int = 100
    """Length of an evaluation, episodes."""
    stop_at_threshold: bool = False
    """Stop as soon as an evaluation reaches the env's threshold."""
    checkpoint_seconds: float = 60.0
    """Least time between checkpoints, seconds."""
    keep: int = 3
    """Latest checkpoints kept, count; the best one is kept besides."""
    compile: bool = False
    """Run the algorithm's update through torch.compile, and on CUDA through graphs."""
    log_every: int = 0
    """Env steps between rows of metrics; 0: every iteration."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    nan_retries: int = 3
    """Times a run goes back to its last good checkpoint after NaN or Inf before it gives up, count."""
    env_options: dict[str, Any] = field(default_factory=dict)
    """What was written as env.KEY=VALUE."""

    @property
    def eval_interval(self) -> int:
        """Env steps between evaluations, resolved."""
        return self.eval_every or max(1, self.total_steps // 20)


DEBUG: dict[str, Any] = dict(total_steps=2_048, num_envs=4, eval_episodes=4, eval_every=1_024, keep=2, checkpoint_seconds=5.0)
"""`preset=debug` of every algorithm: seconds, not skill. An algorithm's own "debug" preset lies over it."""

_LEAST = {
    "seed": 0, "total_steps": 1, "num_envs": 1, "threads": 1, "env_threads": 1, "eval_every": 0, "eval_episodes": 1,
    "checkpoint_seconds": 0, "keep": 1, "log_every": 0, "nan_retries": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """A configuration in which nothing is open any more."""

    common: TrainConfig
    algo: Any  # an instance of the algorithm's Config
    env_entry: EnvEntry
    algo_entry: AlgoEntry
    sources: dict[str, str]  # by key: "default", "preset CartPole", "preset=debug", "file x", "command line"

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.common.run_dir)

    def to_dict(self) -> dict[str, Any]:
        """All settings by their flat keys, as `config=FILE` reads them back."""
        out: dict[str, Any] = {"algo": self.common.algo, "env": self.common.env}
        out.update({f"env.{key}": value for key, value in self.common.env_options.items()})
        for part in (self.common, self.algo):
            for slot in fields(part):
                if slot.name != "env_options":
                    value = getattr(part, slot.name)
                    out[slot.name] = list(value) if isinstance(value, tuple) else value
        return out

    def to_yaml(self, command: Sequence[str] | None = None) -> str:
        """The file `config.yaml`: the settings, and under `meta` what they ran on (ignored when read back)."""
        return OmegaConf.to_yaml(OmegaConf.create({**self.to_dict(), "meta": describe_machine(command or sys.argv)}))


def resolve(words: Sequence[str] | Mapping[str, Any]) -> Resolved:
    """The configuration of a new run from `key=value` words or a mapping; nothing is written yet."""
    done = _resolve(_given(words), record=None)
    if not done.common.run_dir:
        done = replace(done, common=replace(done.common, run_dir=str(_default_folder(done.common))))
    _check_new_folder(done.folder)
    return done


def read_run(folder: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Resolved:
    """The configuration recorded in a run's folder, with words laid over it."""
    folder = Path(folder)
    record = folder / RECORD
    if not record.is_file():
        lacks = f"it has no {RECORD}" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"no run in {str(folder)!r}: {lacks}{_latest_runs(folder)}")
    given = _given(overrides)
    for key in ("algo", "env", "seed", "num_envs", "run_dir", "config", "preset", *(key for key in given if key.startswith("env."))):
        if key in given:
            raise ConfigError(f"{key} is fixed once a run has begun: rl train config={record} {key}={given[key]} starts a new one")
    done = _resolve(given, record=record)
    return replace(done, common=replace(done.common, run_dir=str(folder)))


def create_run_folder(resolved: Resolved, command: Sequence[str] | None = None) -> Path:
    """Make the folder and put `config.yaml` into it, whole or not at all; of two runs that want one folder, one is refused."""
    _write_record(resolved, command, replace=False)
    return resolved.folder


def rewrite_record(resolved: Resolved, command: Sequence[str] | None = None) -> None:
    """Put the settings a run goes on with in the place of those it began with."""
    _write_record(resolved, command, replace=True)


def _write_record(resolved: Resolved, command: Sequence[str] | None, replace: bool) -> None:
    folder = resolved.folder
    scratch = folder / f".{RECORD}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(scratch, "w", encoding="utf-8") as file:
                file.write(resolved.to_yaml(command))
                file.flush()
                os.fsync(file.fileno())
            if not replace:
                try:
                    os.link(scratch, folder / RECORD)  # unlike a rename, it never replaces another run's file
                    return
                except FileExistsError:
                    raise _occupied(folder) from None
                except OSError:  # a file system without hard links
                    pass
            os.replace(scratch, folder / RECORD)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write into the run folder {str(folder)!r}: {error.strerror}") from None


def _given(words: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(words, str):
        words = words.split()
    if not isinstance(words, Mapping):
        return dict(split(words))
    given = dict(words)
    options = given.pop("env_options", None) or {}
    return given | {f"env.{key}": value for key, value in options.items()}


def _resolve(given: dict[str, Any], record: Path | None) -> Resolved:
    path = record or (Path(str(given["config"])) if given.get("config") else None)
    stored, is_record = _read_file(path) if path else ({}, False)
    where = f"in {path}: "
    algo_entry, env_entry = _find_parts(given, stored, where)
    _check_fit(algo_entry, env_entry)

    cls = registry.load(algo_entry.entry)
    if algo_entry.name == algo_entry.entry and hasattr(cls, "ENTRY"):  # named as module:Class: now it can say what it is
        algo_entry = replace(cls.ENTRY, name=algo_entry.name, entry=algo_entry.entry)
        _check_fit(algo_entry, env_entry)
    module = sys.modules[cls.__module__]
    if not hasattr(module, "Config"):
        raise ConfigError(f"algo={algo_entry.name}: module {module.__name__} has no dataclass Config beside the class")
    slots = Slots(TrainConfig, module.Config)
    presets: dict[str, dict[str, Any]] = getattr(module, "PRESETS", {})

    preset = str(given.get("preset", "" if is_record else stored.get("preset", "")) or "")
    if preset and is_record:
        raise ConfigError(f"preset={preset} would change nothing: {path} sets every key itself")
    layers: list[tuple[str, str, Mapping[str, Any]]] = []  # (source, where an error lies, values)
    for name in (env_entry.name, env_entry.name.removeprefix("gym:"), f"class:{env_entry.subfamily}", f"class:{env_entry.family}"):
        if name in presets:
            layers.append((f"preset {name}", f"in PRESETS[{name!r}] of {module.__name__}: ", presets[name]))
            break
    if preset:
        layers.append((f"preset={preset}", f"in preset {preset!r} of {module.__name__}: ", _named_preset(preset, presets, algo_entry)))
    layers += [(f"file {path}", where, stored), ("command line", "", given)]

    values, options = dict(slots.defaults), {}
    sources = dict.fromkeys(slots, "default")
    keys = [key for key in slots if key != "env_options"]
    for source, inside, layer in layers:
        for key, value in layer.items():
            if key.startswith("env.") and len(key) > 4:
                options[key[4:]] = parse_yaml_value(value) if layer is given and isinstance(value, str) else value
            elif key not in keys:
                raise unknown_key(key, [*keys, "env.time_limit"], inside)
            else:
                values[key] = slots.convert(key, value, inside)
            sources[key] = source
    del sources["env_options"]
    values |= {"algo": algo_entry.name, "env": env_entry.name, "env_options": options}
    values["config"] = str(path) if path and not record else values["config"]
    common = slots.build(TrainConfig, values)
    _check_common(common, env_entry)
    _check_foreign(env_entry, options)
    return Resolved(common, slots.build(module.Config, values), env_entry, algo_entry, sources)


def _read_file(path: Path) -> tuple[dict[str, Any], bool]:
    """A file's settings, and whether it is the record of a run (it has `meta`), whose folder is then not taken over."""
    path = path / RECORD if path.is_dir() else path
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r}: {error.strerror}") from None
    except Exception as error:  # whatever yaml says of the text
        raise ConfigError(f"config file {str(path)!r} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config file {str(path)!r} holds no key: value lines")
    stored = {str(key): value for key, value in content.items()}
    if not stored:
        raise ConfigError(f"config file {str(path)!r} is empty")
    stored |= {f"env.{key}": value for key, value in (stored.pop("env_options", None) or {}).items()}
    is_record = stored.pop("meta", None) is not None
    if is_record:
        for key in ("run_dir", "config"):
            stored.pop(key, None)
    return stored, is_record


def _find_parts(given: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> tuple[AlgoEntry, EnvEntry]:
    names = {}
    for key, example, command in (("algo", "ppo", "rl list algos"), ("env", "CartPole", "rl list envs")):
        names[key] = str(given.get(key, stored.get(key, "")) or "")
        if names[key]:
            continue
        for layer, inside in ((given, ""), (stored, where)):  # a misspelt `alog=ppo` is better called that
            for word in layer:
                if suggest(word, ("algo", "env", "run_dir", "seed", "device")).endswith(f"{key!r}?") and word not in ("algo", "env"):
                    raise unknown_key(word, (key,), inside)
        raise ConfigError(f"{key} is missing: write {key}={example}, for instance; `{command}` shows all")
    return registry.find_algo(names["algo"]), registry.find_env(names["env"])


def _named_preset(name: str, presets: Mapping[str, dict[str, Any]], algo: AlgoEntry) -> dict[str, Any]:
    if name == "debug":
        return DEBUG | presets.get("debug", {})
    if name not in presets:
        known = sorted({*presets, "debug"})
        raise ConfigError(f"unknown preset {name!r} of algo={algo.name}{suggest(name, known) or ': it has ' + ', '.join(known)}")
    return presets[name]


def _check_fit(algo: AlgoEntry, env: EnvEntry) -> None:
    """Whether the algorithm can work in the env, as far as that is known before the env is built."""
    for what in ("action", "observation"):
        kind, kinds = getattr(env, f"{what}_kind"), getattr(algo, f"{what}_kinds")
        if kind is not None and kind not in kinds:
            able = [entry.name for entry in registry.algos() if kind in getattr(entry, f"{what}_kinds")]
            also = f"; it works with algo={' or algo='.join(able)}" if able else ""
            theirs, its = " or ".join(kinds).replace("_", "-"), kind.replace("_", "-")
            raise ConfigError(f"algo={algo.name} takes {theirs} {what}s, env={env.name} has {its} ones{also}")
    if env.players is not None and env.players not in algo.players:
        raise ConfigError(f"algo={algo.name} is for {' or '.join(map(str, algo.players))} player(s), env={env.name} has {env.players}")


def _check_foreign(env: EnvEntry, options: Mapping[str, Any]) -> None:
    """Whether a foreign env exists, takes these options, and has the packages it needs; the env itself is not made."""
    if env.family == "foreign":
        try:
            registry.load("rl.envs.foreign:resolve_foreign")(env.entry, dict(options))
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _check_common(common: TrainConfig, env: EnvEntry) -> None:
    for key, least in _LEAST.items():
        value = getattr(common, key)
        if not least <= value < 2**63:
            raise ConfigError(f"{key} must be at least {least}, not {value}")
    if common.stop_at_threshold and env.threshold is None and env.family != "foreign":
        raise ConfigError(f"stop_at_threshold: env={env.name} has no threshold to stop at")
    _check_device(common.device)


def _check_device(device: str) -> None:
    if device in ("auto", "cpu"):
        return
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}{suggest_device(device)}")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError(f"device={device}: torch sees no CUDA device here; did you mean 'cpu'?")
    if int(match[1] or 0) >= count:
        raise ConfigError(f"device={device}: there are {count}, the last is cuda:{count - 1}")


def suggest_device(device: str) -> str:
    """The valid device nearest to a wrong one."""
    if re.match(r"(gpu|nvidia|cud)", device.lower()):
        return "; did you mean 'cuda'?"
    return registry.nearest(device, ("auto", "cpu", "cuda"))


def _default_folder(common: TrainConfig) -> Path:
    env, algo = (re.sub(r"[^\w.-]+", "-", name) for name in (common.env, common.algo))
    first = Path("runs") / env / algo / f"{time.strftime('%Y%m%d-%H%M%S')}-{common.seed}"
    folder, n = first, 1
    while folder.exists():
        n += 1
        folder = first.with_name(f"{first.name}-{n}")
    return folder


def _check_new_folder(folder: Path) -> None:
    if any((folder / name).exists() for name in (RECORD, "checkpoints", "metrics.csv")):
        raise _occupied(folder)
    standing = folder
    while not standing.exists() and standing != standing.parent:
        standing = standing.parent
    if not standing.is_dir():
        raise ConfigError(f"run_dir={folder}: {str(standing)!r} is a file, not a folder")
    if not os.access(standing, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={folder}: no permission to write in {str(standing.absolute())!r}")


def _occupied(folder: Path) -> ConfigError:
    return ConfigError(f"{str(folder)!r} already holds a run: `rl resume {folder}` goes on with it; a new one needs another run_dir")


def _latest_runs(folder: Path) -> str:
    """The newest run below or beside the folder, as a hint."""
    for root in (folder, folder.parent if folder.parent.name else Path("runs"), Path("runs")):
        found = [*root.glob(f"*/{RECORD}"), *root.glob(f"*/*/{RECORD}"), *root.glob(f"*/*/*/{RECORD}")] if root.is_dir() else []
        if found:
            return f"; the latest is {max(found, key=lambda path: path.stat().st_mtime).parent}"
    return ""
