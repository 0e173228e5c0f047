"""Every algorithm and environment by name, with what must be checked before work starts.

Standard library only: entries are lazy strings, so that `rl --help` and `rl list` import neither torch nor numba. Outside code
adds to it with `register_env` / `register_algo`, or with entry points in the groups `rl.envs` and `rl.algos` whose value
resolves to an `EnvEntry` / `AlgoEntry`; entry points are looked at only when a name is not found, or by `rl list`.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rl.errors import UnknownName

__all__ = [
    "AlgoEntry",
    "EnvEntry",
    "Reference",
    "UnknownName",
    "algos",
    "envs",
    "find_algo",
    "find_env",
    "load",
    "nearest",
    "register_algo",
    "register_env",
]

ActionKind = Literal["discrete", "multi_discrete", "continuous"]
ObservationKind = Literal["vector", "image"]


@dataclass(frozen=True)
class Reference:
    """A score to be measured against, and who says so."""

    score: float
    source: str


@dataclass(frozen=True)
class EnvEntry:
    """One environment, as much of it as can be said without importing it.

    A foreign env's kinds, players, limit and threshold are None: they are known only once it is built. Its `entry` is
    `gym:ID` for an id of Gymnasium's registry, else the `module:Class` that was asked for.
    """

    name: str
    entry: str
    family: str
    """ "classic", "test", "foreign", ...: presets may be kept per family, under `class:<family>`. """
    action_kind: ActionKind | None
    observation_kind: ObservationKind | None
    players: int | None = 1
    time_limit: int | None = None
    """Env steps after which an episode is truncated."""
    threshold: float | None = None
    """Mean evaluation return at which the suite calls the env solved."""
    random_score: float | None = None
    """Mean return of uniformly random actions."""
    references: tuple[Reference, ...] = ()
    version: int = 0
    summary: str = ""
    subfamily: str = ""
    """Of foreign envs: "atari", "mujoco", "minatar" or nothing; presets under `class:<subfamily>` come first."""

    @property
    def id(self) -> str:
        """The name under which Gymnasium knows it."""
        return self.name if self.family == "foreign" else f"rl/{self.name}-v{self.version}"


@dataclass(frozen=True)
class AlgoEntry:
    """One algorithm, as much of it as can be said without importing it."""

    name: str
    entry: str
    loop: str
    """Which loop of `rl/loops.py` drives it: "on_policy", ..."""
    action_kinds: tuple[ActionKind, ...]
    observation_kinds: tuple[ObservationKind, ...]
    players: tuple[int, ...] = (1,)
    needs_dataset: bool = False
    summary: str = ""
    paper: str = ""


_GYM = "Gymnasium's reward_threshold, gymnasium/envs/__init__.py"
_ZOO = "Stable-Baselines3 RL-Zoo, benchmark.md, PPO after"
_SUITE = "this suite's bar for PPO"

_RESIDENTS = (
    EnvEntry(
        "CartPole", "rl.envs.cartpole:SPEC", "classic", "discrete", "vector",
        time_limit=500, threshold=475.0, random_score=22.0, version=1, summary="keep a pole upright by pushing its cart left or right",
        references=(Reference(475.0, _GYM), Reference(500.0, f"{_ZOO} 100k steps")),
    ),
    EnvEntry(
        "Acrobot", "rl.envs.acrobot:SPEC", "classic", "discrete", "vector",
        time_limit=500, threshold=-100.0, random_score=-499.0, version=1, summary="swing a two-link arm above a line by its middle joint",
        references=(Reference(-100.0, _GYM), Reference(-73.5, f"{_ZOO} 1M steps")),
    ),
    EnvEntry(
        "MountainCar", "rl.envs.mountain_car:SPEC", "classic", "discrete", "vector",
        time_limit=200, threshold=-125.0, random_score=-200.0, version=0, summary="rock a weak car out of a valley, three pushes",
        references=(Reference(-125.0, f"{_SUITE} within 1M steps"), Reference(-110.0, _GYM), Reference(-110.4, f"{_ZOO} 1M steps")),
    ),
    EnvEntry(
        "MountainCarContinuous", "rl.envs.mountain_car_continuous:SPEC", "classic", "continuous", "vector",
        time_limit=999, threshold=85.0, random_score=-33.0, version=0, summary="rock a weak car out of a valley with little force",
        references=(Reference(85.0, f"{_SUITE} within 300k steps"), Reference(90.0, _GYM)),
    ),
    EnvEntry(
        "Pendulum", "rl.envs.pendulum:SPEC", "classic", "continuous", "vector",
        time_limit=200, threshold=-250.0, random_score=-1227.0, version=1, summary="swing a pendulum up and hold it with a limited torque",
        references=(Reference(-250.0, f"{_SUITE} within 300k steps"), Reference(-172.0, f"{_ZOO} 100k steps")),
    ),
    EnvEntry(
        "Identity", "rl.envs.identity:SPEC", "test", "discrete", "vector",
        summary="test: name the symbol that is shown",
    ),
    EnvEntry(
        "IdentityMultiDiscrete", "rl.envs.identity:SPEC_MULTI_DISCRETE", "test", "multi_discrete", "vector",
        summary="test: name several symbols at once",
    ),
    EnvEntry(
        "IdentityContinuous", "rl.envs.identity:SPEC_CONTINUOUS", "test", "continuous", "vector",
        summary="test: answer with the number that is shown",
    ),
    EnvEntry(
        "NeverEnding", "rl.envs.never_ending:SPEC", "test", "discrete", "vector",
        time_limit=20, summary="test: reward 1 for ever, only ever truncated; the value is 1 / (1 - gamma)",
    ),
)  # fmt: skip

_ALGOS = (
    AlgoEntry(
        "ppo", "rl.algos.ppo:PPO", "on_policy", ("discrete", "multi_discrete", "continuous"), ("vector", "image"),
        summary="proximal policy optimisation", paper="Schulman et al. 2017, arXiv:1707.06347",
    ),
)  # fmt: skip

_MUJOCO = {
    "Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum", "Pusher",
    "Reacher", "Swimmer", "Walker2d",
}  # fmt: skip

_MODULE_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_VERSIONED = re.compile(r"(?P<name>[A-Za-z][\w.-]*?)-v(?P<version>\d+)")

_env_table: dict[str, EnvEntry] = {entry.name.lower(): entry for entry in _RESIDENTS}
_algo_table: dict[str, AlgoEntry] = {entry.name.lower(): entry for entry in _ALGOS}
_entry_points_read = False
_entry_point_failures: list[str] = []


def register_env(entry: EnvEntry) -> None:
    """Add an environment from outside. A name can be taken only once."""
    _register(_env_table, entry)


def register_algo(entry: AlgoEntry) -> None:
    """Add an algorithm from outside. A name can be taken only once."""
    _register(_algo_table, entry)


def _register(table: dict[str, Any], entry: Any) -> None:
    if table.setdefault(entry.name.lower(), entry) != entry:
        raise ValueError(f"the name {entry.name!r} is taken by {table[entry.name.lower()].entry}")


def envs() -> tuple[EnvEntry, ...]:
    """All environments, those of installed packages included."""
    _read_entry_points()
    return tuple(_env_table.values())


def algos() -> tuple[AlgoEntry, ...]:
    """All algorithms, those of installed packages included."""
    _read_entry_points()
    return tuple(_algo_table.values())


def entry_point_failures() -> tuple[str, ...]:
    """What went wrong while reading installed packages' entry points, one line each."""
    return tuple(_entry_point_failures)


def find_env(name: str) -> EnvEntry:
    """The environment of this name: `CartPole`, `CartPole-v1`, `rl/CartPole-v1` in any case, or a foreign one.

    Foreign are `gym:ID` (always Gymnasium's own, `gym:CartPole-v1` too), `NAMESPACE/ID` (`ALE/Pong-v5`), `module:Class`, and
    any `Name-vN` that is not ours. Whether a foreign one exists is not looked up here.
    """
    asked = name.strip()
    if asked.startswith("gym:") and asked != "gym:":
        return _foreign(asked, asked)
    ours = asked[3:] if asked.lower().startswith("rl/") else asked
    versioned = _VERSIONED.fullmatch(ours)
    base = versioned["name"] if versioned else ours
    entry = _lookup(_env_table, base, dig=versioned is None)
    if entry is not None:
        if versioned is None or int(versioned["version"]) == entry.version:
            return entry
        theirs = f"gym:{entry.name}-v{versioned['version']}"
        raise UnknownName(f"unknown env {name!r}: the suite has {entry.name}-v{entry.version}; Gymnasium's own would be {theirs}")
    if ours is asked:
        if _MODULE_CLASS.fullmatch(asked):
            return _foreign(asked, asked)
        if versioned or re.fullmatch(r"[\w.-]+/[\w./-]+", asked):
            # An installed package may have registered this very name with us: only now is it worth looking.
            return _lookup(_env_table, base) or _foreign(asked, f"gym:{asked}")
    raise UnknownName(_unknown("env", name, (entry.name for entry in _env_table.values()), "rl list envs"))


def find_algo(name: str) -> AlgoEntry:
    """The algorithm of this name in any case, or `module:Class`.

    A class from outside may carry an `AlgoEntry` as its attribute `ENTRY`; until it is loaded it is taken to be on-policy and
    to take any action and observation.
    """
    asked = name.strip()
    entry = _lookup(_algo_table, asked)
    if entry is not None:
        return entry
    if _MODULE_CLASS.fullmatch(asked):
        return AlgoEntry(asked, asked, "on_policy", ("discrete", "multi_discrete", "continuous"), ("vector", "image"))
    raise UnknownName(_unknown("algo", name, (entry.name for entry in _algo_table.values()), "rl list algos"))


def load(entry: str) -> Any:
    """Import what `module:attribute` names."""
    module_name, _, attribute = entry.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only when the module itself is missing: a missing import inside it is its own, different error.
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise
        here = os.getcwd()
        if here in sys.path or "" in sys.path:
            raise UnknownName(f"cannot import {module_name!r}, which {entry!r} names") from None
        sys.path.append(here)  # the installed command, unlike `python -m`, does not look into the working directory
        return load(entry)
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = [word for word in vars(module) if not word.startswith("_")]
        raise UnknownName(f"module {module_name!r} has no {attribute!r}{nearest(attribute, public)}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint "; did you mean 'x'?", or nothing where nothing is near."""
    import difflib

    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def _unknown(kind: str, name: str, known: Iterable[str], command: str) -> str:
    hint = nearest(_VERSIONED.sub(r"\g<name>", name.strip().removeprefix("rl/")), known)
    return f"unknown {kind} {name!r}{hint or ';'} `{command}` shows all"


def _lookup(table: dict[str, Any], name: str, dig: bool = True) -> Any:
    found = table.get(name.lower())
    if found is None and dig and not _entry_points_read:
        _read_entry_points()
        found = table.get(name.lower())
    return found


def _foreign(name: str, entry: str) -> EnvEntry:
    plain = name.removeprefix("gym:")
    versioned = _VERSIONED.fullmatch(plain)
    subfamily = ""
    if plain.startswith("ALE/"):
        subfamily = "atari"
    elif plain.startswith("MinAtar/"):
        subfamily = "minatar"
    elif (versioned["name"] if versioned else plain) in _MUJOCO:
        subfamily = "mujoco"
    return EnvEntry(name, entry, "foreign", None, None, players=None, subfamily=subfamily)


def _read_entry_points() -> None:
    """Take in what installed packages offer; one broken package must not take the command down."""
    global _entry_points_read
    if _entry_points_read:
        return
    _entry_points_read = True
    import importlib.metadata  # with all it imports a tenth of the time that `rl --help` takes

    groups = importlib.metadata.entry_points()
    for group, table, kind in (("rl.envs", _env_table, EnvEntry), ("rl.algos", _algo_table, AlgoEntry)):
        for point in groups.select(group=group):
            try:
                entry = point.load()
                if not isinstance(entry, kind):
                    raise TypeError(f"is a {type(entry).__name__}, not an {kind.__name__}")
                _register(table, entry)
            except Exception as error:
                _entry_point_failures.append(f"entry point {group}: {point.name} = {point.value}: {error}")


def preset_names(entry: AlgoEntry) -> tuple[str, ...]:
    """The keys of an algorithm's PRESETS, read from its source: importing it would import torch."""
    import ast
    import importlib.util

    names: dict[str, None] = {"debug": None}
    try:
        spec = importlib.util.find_spec(entry.entry.partition(":")[0])
        with open(spec.origin, encoding="utf-8") as file:  # type: ignore[union-attr, arg-type]
            source = file.read()
        start = re.search(r"^PRESETS\b", source, re.MULTILINE)  # it comes last in the file: parse from there
        tree = ast.parse(source[start.start() :] if start else "")
    except (AttributeError, ImportError, OSError, SyntaxError, TypeError, ValueError):
        return tuple(names)
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == "PRESETS":
                names |= {key.value: None for key in node.value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return tuple(names)
