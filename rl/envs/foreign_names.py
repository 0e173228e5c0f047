"""What the name and the options of a foreign env mean, and every complaint about them, before a worker starts."""

import difflib
import importlib.util
import os
import pickle
import pkgutil
import sys
import typing
from typing import Any

import gymnasium

from rl.envs import atari
from rl.envs.foreign_worker import Factory, load
from rl.errors import ConfigError

ATARI_KEYS = (*atari.DEFAULTS, "sticky")
# Import name -> (what to install, pip target)
_DEPENDENCIES = {
    "ale_py": "pip install 'rl-suite[atari]'",
    "mujoco": "pip install 'rl-suite[mujoco]'",
    "Box2D": "pip install 'rl-suite[box2d]'",
    "minatar": "pip install minatar",
}
_ENTRY_POINTS = {"ale_py": "ale_py", "gymnasium.envs.mujoco": "mujoco", "gymnasium.envs.box2d": "Box2D", "minatar": "minatar"}


class ForeignEnvError(ConfigError):
    """The name or the options of a foreign env are wrong, or what it needs is not installed. Raised before any worker starts."""


def resolve_foreign(name: str, options: dict[str, Any] | None = None, *, render: bool = False) -> Factory:
    """Find what `name` means and check `options`, without making the env.

    Options: `time_limit` (env steps; 0 for none) and `clip_reward` for every env; for Atari also those of `rl/envs/atari.py`
    and `sticky` (probability that ALE repeats the last action: 0.0 as in Mnih et al. 2015; Machado et al. 2018 propose 0.25).
    Everything else goes to the env's constructor.

    Raises ForeignEnvError that names the nearest registered id, the module or attribute that does not exist, the option that is wrong
    or the `pip install` that is missing.
    """
    options = dict(options or {})
    time_limit = options.pop("time_limit", None)
    if time_limit is not None and (isinstance(time_limit, bool) or not isinstance(time_limit, int) or time_limit < 0):
        raise ForeignEnvError(f"{name}: time_limit must be an integer >= 0 (env steps, 0 for none), not {time_limit!r}")
    bare = name.removeprefix("gym:")
    module, colon, rest = bare.partition(":")
    spec = target = None
    if colon:
        _import(name, module)
        if rest in gymnasium.registry:
            spec = gymnasium.registry[rest]
        else:
            target = bare
            _check_target(name, module, rest)
    else:
        spec = _find_spec(name, bare)
    if spec is not None:
        _check_spec(name, spec)
    is_atari = spec is not None and isinstance(spec.entry_point, str) and spec.entry_point.startswith("ale_py")
    atari_options = _atari_options(name, options) if is_atari else None
    clip_reward = False
    if not is_atari:
        clip_reward = options.pop("clip_reward", False)
        if not isinstance(clip_reward, bool):
            raise ForeignEnvError(f"{name}: clip_reward must be true or false, not {clip_reward!r}")
    return Factory(
        name, spec=spec, target=target, kwargs=options, atari=atari_options, time_limit=time_limit, clip_reward=clip_reward, render=render
    )


def _find_spec(name: str, env_id: str) -> Any:
    namespace = env_id.partition("/")[0] if "/" in env_id else None
    if namespace == "ALE":
        _need(name, "ale_py")
    if importlib.util.find_spec("ale_py") and (namespace == "ALE" or env_id not in gymnasium.registry):
        importlib.import_module("ale_py")  # registers its ids
    if namespace == "MinAtar":
        _need(name, "minatar")
        if env_id not in gymnasium.registry:
            importlib.import_module("minatar.gym").register_envs()
    try:
        return gymnasium.registry[env_id] if env_id in gymnasium.registry else gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        known = {key.lower(): key for key in gymnasium.registry}
        near = difflib.get_close_matches(env_id.lower(), known, n=3, cutoff=0.6)
        hint = f"; nearest: {', '.join(known[key] for key in near)}" if near else "; for your own env write module:Class"
        raise ForeignEnvError(f"no Gymnasium env is registered as {env_id!r}{hint} ({error})") from None


def _check_spec(name: str, spec: Any) -> None:
    entry = spec.entry_point
    if isinstance(entry, str):
        for prefix, package in _ENTRY_POINTS.items():
            if entry.startswith(prefix):
                _need(name, package)
    elif callable(entry) and getattr(entry, "__name__", "").startswith("_raise"):  # how Gymnasium marks its retired MuJoCo ids
        newest = max(key for key in gymnasium.registry if key.startswith(spec.name + "-v"))
        raise ForeignEnvError(f"{name} is retired in Gymnasium {gymnasium.__version__}; use {newest}")
    elif getattr(entry, "__module__", None) == "__main__":
        raise ForeignEnvError(f"{name} is registered from __main__, which a worker process cannot import; put the env into a module")
    try:
        pickle.dumps(spec)
    except Exception as error:
        raise ForeignEnvError(
            f"{name} cannot be sent to a worker process ({error}); register it with entry_point='module:Class' instead of {entry!r}"
        ) from None


def _need(name: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ForeignEnvError(f"{name} needs {package}, which is not installed; run: {_DEPENDENCIES[package]}")


def _import(name: str, module: str) -> None:
    if module == "__main__":
        raise ForeignEnvError(f"{name}: a worker process cannot import __main__; put the env into a module of its own")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` would: the `rl` script itself does not look in the current folder
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            near = difflib.get_close_matches(module, {found.name for found in pkgutil.iter_modules()}, n=1, cutoff=0.75)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ForeignEnvError(f"{name}: there is no module {error.name!r} (looked in {os.getcwd()} too){hint}") from None
        pip = _DEPENDENCIES.get(error.name or "", f"pip install {error.name}")
        raise ForeignEnvError(f"{name}: module {module!r} needs {error.name}, which is not installed; run: {pip}") from error
    except Exception as error:
        raise ForeignEnvError(f"{name}: importing {module!r} failed: {type(error).__name__}: {error}") from error


def _check_target(name: str, module: str, path: str) -> None:
    try:
        found = load(f"{module}:{path}")
    except AttributeError:
        near = difflib.get_close_matches(path, [*vars(sys.modules[module]), *gymnasium.registry], n=1, cutoff=0.6)
        hint = f"; did you mean {module}:{near[0]}?" if near else ""
        raise ForeignEnvError(f"{name}: module {module!r} has no attribute {path!r}{hint}") from None
    if not callable(found):
        raise ForeignEnvError(f"{name}: {path!r} is a {type(found).__name__}; a gymnasium.Env class or a function that makes one is needed")
    if not isinstance(found, type) and not _makes_env(found):
        # A name may come from a stranger's config.yaml: os.system is a function too.
        raise ForeignEnvError(f"{name}: function {path} must say that it makes an env: def {path}(...) -> gymnasium.Env")
    if isinstance(found, type) and not issubclass(found, (gymnasium.Env, gymnasium.vector.VectorEnv)):  # the latter: `build` explains
        raise ForeignEnvError(f"{name}: class {path} does not derive from gymnasium.Env")


def _makes_env(function: Any) -> bool:
    try:
        made = typing.get_type_hints(function).get("return")
    except Exception:  # hints that cannot be read promise nothing
        return False
    made = typing.get_origin(made) or made
    return isinstance(made, type) and issubclass(made, (gymnasium.Env, gymnasium.vector.VectorEnv))


def _atari_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Take the preprocessing options out of `options`, and put into it what ALE itself must be told."""
    for theirs, ours in (("frameskip", "frame_skip"), ("repeat_action_probability", "sticky"), ("obs_type", "grayscale")):
        if theirs in options:
            raise ForeignEnvError(f"{name}: use {ours} instead of ALE's {theirs}; the preprocessing has to know it")
    chosen = {key: options.pop(key, default) for key, default in atari.DEFAULTS.items()}
    sticky = options.pop("sticky", 0.0)
    for key in options:
        near = difflib.get_close_matches(key, (*ATARI_KEYS, "time_limit"), n=1, cutoff=0.7)
        if near:
            raise ForeignEnvError(f"{name}: unknown option {key!r}; did you mean {near[0]!r}?")
    if isinstance(sticky, bool) or not isinstance(sticky, (int, float)) or not 0 <= sticky <= 1:
        raise ForeignEnvError(f"{name}: sticky must be a probability, not {sticky!r}")
    try:
        atari.validate(chosen)
    except (ValueError, TypeError) as error:
        raise ForeignEnvError(f"{name}: {error}") from None
    obs_type = "grayscale" if chosen["grayscale"] else "rgb"
    options.update(frameskip=1, repeat_action_probability=float(sticky), obs_type=obs_type)
    return chosen
