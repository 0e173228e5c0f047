"""Environments: the suite's own, compiled, and everybody else's behind the same interface.

`make_vec` is the one door. Importing this package loads neither torch nor numba nor gymnasium. `import rl.envs.registration` makes
ours known to Gymnasium as `rl/CartPole-v1` and so on.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rl.types import VectorEnv

__all__ = ["make_vec"]


def make_vec(
    name: str,
    num_envs: int = 1,
    *,
    seed: int = 0,
    device: "str | torch.device" = "cpu",
    threads: int = 1,
    backend: str = "auto",
    autoreset: str = "same_step",
    time_limit: int | str | None = "spec",
    options: Mapping[str, Any] | None = None,
    **more_options: Any,
) -> "VectorEnv":
    """`num_envs` copies of the env of this name: ours (`CartPole`) or a foreign one (`gym:LunarLander-v3`, `module:Class`).

    Args:
        name: as `rl.registry.find_env` takes it.
        num_envs: how many run side by side.
        seed: everything random in the envs follows from it.
        device: where the tensors live; ours run there too.
        threads: CPU threads that step envs of ours; foreign ones have worker processes, option `workers`.
        backend, autoreset: see `rl.envs.vector.NativeVecEnv`; foreign envs know only the defaults.
        time_limit: env steps until truncation; "spec" for the env's own, None for none.
        options: the env's own options, also as keywords. An option `time_limit` counts as the argument (0: none).

    Raises:
        rl.errors.WrongWords: for a name or option that does not exist.
        ValueError: for an argument out of its range.
    """
    from rl import registry
    from rl.errors import ConfigError

    chosen = {**(options or {}), **more_options}
    if "time_limit" in chosen:
        asked = chosen.pop("time_limit")
        if time_limit != "spec":
            raise ConfigError("time_limit is given twice")
        time_limit = asked if asked != 0 or isinstance(asked, bool) else None
    entry = registry.find_env(name)
    if entry.family == "foreign":
        for word, value, default in (("backend", backend, "auto"), ("autoreset", autoreset, "same_step")):
            if value != default:
                raise ConfigError(f"{name}: {word}={value!r} is for the suite's own envs")
        from rl.envs.foreign import make_foreign

        how = {word: chosen.pop(word) for word in ("workers", "hang_timeout", "render") if word in chosen}
        if time_limit != "spec":
            chosen["time_limit"] = 0 if time_limit is None else time_limit
        return make_foreign(entry.name, num_envs, seed=seed, device=device, options=chosen, **how)  # type: ignore[return-value]
    if chosen:
        word = next(iter(chosen))
        raise ConfigError(f"{entry.name} has no option {word!r}{registry.nearest(word, ['time_limit'])}")
    spec = registry.load(entry.entry)
    from rl.envs.vector import NativeVecEnv

    return NativeVecEnv(
        spec, num_envs, seed=seed, device=device, threads=threads, backend=backend, autoreset=autoreset, time_limit=time_limit
    )
