"""From words to typed values: splitting `key=value`, naming the nearest key, and OmegaConf's types with our own messages."""

import dataclasses
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl.errors import ConfigError
from rl.registry import nearest

# Words other libraries use for the same thing. A suggestion names only what exists in the namespace at hand.
_SYNONYMS = (
    ("lr", "learning_rate", "alpha", "step_size"),
    ("num_envs", "n_envs", "nenvs", "envs", "num_env", "n_env", "num_workers", "n_workers"),
    ("total_steps", "timesteps", "total_timesteps", "n_timesteps", "num_timesteps", "steps", "max_steps", "num_steps_total", "frames"),
    ("rollout_steps", "rollout_length", "num_steps", "n_steps", "horizon", "unroll_length", "steps_per_rollout", "rollout"),
    ("entropy_coef", "ent_coef", "entropy_coefficient", "ent_weight", "entropy_cost", "beta_entropy"),
    ("value_coef", "vf_coef", "value_coefficient", "value_loss_coef", "critic_coef", "vf_cost"),
    ("clip", "clip_range", "clip_eps", "clip_epsilon", "clip_coef", "clip_ratio"),
    ("value_clip", "clip_range_vf", "clip_vloss", "clip_value"),
    ("max_grad_norm", "grad_clip", "grad_norm", "clip_grad", "gradient_clip"),
    ("gae_lambda", "lam", "lambda", "lmbda", "gae_lam", "td_lambda"),
    ("gamma", "discount", "discount_factor"),
    ("epochs", "n_epochs", "num_epochs", "update_epochs", "k_epochs"),
    ("minibatches", "num_minibatches", "n_minibatches", "nminibatches", "num_mini_batch"),
    ("batch_size", "minibatch_size", "mini_batch_size", "batch"),
    ("target_kl", "kl_target", "max_kl"),
    ("hidden", "hidden_sizes", "hidden_size", "net_arch", "layers", "hidden_dims", "units"),
    ("env", "env_id", "env_name", "environment", "game", "task"),
    ("algo", "algorithm", "agent", "alg"),
    ("run_dir", "logdir", "log_dir", "output", "out", "save_dir", "folder", "dir", "path", "output_dir"),
    ("device", "gpu", "cuda"),
    ("threads", "num_threads", "torch_threads", "n_threads"),
    ("eval_every", "eval_freq", "eval_interval", "evaluation_interval"),
    ("eval_episodes", "n_eval_episodes", "num_eval_episodes", "episodes"),
    ("checkpoint_seconds", "save_freq", "save_every", "checkpoint_every", "checkpoint_interval"),
    ("log_every", "log_interval", "log_freq"),
    ("normalize_obs", "norm_obs", "obs_norm", "normalise_obs", "obs_normalise", "obs_normalize"),
    ("normalize_reward", "norm_reward", "reward_norm", "normalise_reward", "reward_normalise", "reward_normalize"),
    ("normalize_advantage", "norm_adv", "normalise_advantage", "adv_norm", "advantage_norm"),
    ("anneal_lr", "lr_anneal", "lr_schedule", "linear_lr"),
    ("lstm_size", "lstm", "recurrent", "use_lstm", "rnn", "lstm_hidden"),
    ("config", "config_file", "cfg", "file"),
    ("env.time_limit", "time_limit", "max_episode_steps"),
)


def split(words: Sequence[str]) -> dict[str, str]:
    """`["lr=3e-4"]` to `{"lr": "3e-4"}`, with the mistakes people make named."""
    out: dict[str, str] = {}
    for i, word in enumerate(words):
        key, equals, value = word.partition("=")
        bare = key.lstrip("-").replace("-", "_")
        if not equals:
            following = words[i + 1] if i + 1 < len(words) else ""
            example = following if following and "=" not in following and not following.startswith("--") else "VALUE"
            raise ConfigError(f"{word!r} has no value: write {bare or 'key'}={example}")
        if not bare:
            raise ConfigError(f"{word!r} has no key: words are key=value")
        if key.startswith("-"):
            raise ConfigError(f"settings are words, not options: write {bare}={value} instead of {word}")
        if key in out:
            raise ConfigError(f"{key} is given twice: {key}={out[key]} and {word}")
        out[key] = value
    return out


def suggest(key: str, known: Iterable[str]) -> str:
    """The hint "; did you mean 'lr'?": first by meaning, then by spelling."""
    known = list(known)
    low = key.lower().replace("-", "_")
    if low in known:
        return f"; did you mean {low!r}?"
    for group in _SYNONYMS:
        if low in group:
            meant = next((word for word in group if word in known), None)
            if meant:
                return f"; did you mean {meant!r}?"
    return nearest(low, known)


def unknown_key(key: str, known: Iterable[str], where: str = "") -> ConfigError:
    """The error for a key that is not in the namespace; `where` says which file or preset holds it."""
    return ConfigError(f"{where}unknown key {key!r}{suggest(key, known)}")


def parse_yaml_value(text: str) -> Any:
    """A value as the command line writes it: `3e-4`, `true`, `[64,64]`, `null`, or a text."""
    try:
        node = OmegaConf.from_dotlist([f"v={text}"])
        return OmegaConf.to_container(node, resolve=False)["v"]  # type: ignore[index]
    except Exception:  # yaml's own error types: what is not YAML is a text
        return text


class Slots:
    """The flat namespace of several config dataclasses: every field's type and default, and typed conversion by OmegaConf."""

    def __init__(self, *classes: type) -> None:
        self.owner: dict[str, type] = {}
        self.hints: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        for cls in classes:
            hints = typing.get_type_hints(cls)
            blank = cls()
            for field in dataclasses.fields(cls):
                if field.name in self.owner:
                    raise TypeError(f"{cls.__module__}.{cls.__name__}.{field.name}: {self.owner[field.name].__name__} has this field too")
                self.owner[field.name] = cls
                self.hints[field.name] = hints[field.name]
                self.defaults[field.name] = getattr(blank, field.name)
        flat = dataclasses.make_dataclass(
            "Words",
            [(name, _omega_type(hint), _default(self.defaults[name])) for name, hint in self.hints.items()],
        )
        self._typed = OmegaConf.structured(flat)

    def __contains__(self, key: str) -> bool:
        return key in self.hints

    def __iter__(self):
        return iter(self.hints)

    def convert(self, key: str, value: Any, where: str = "") -> Any:
        """`value` as the type of field `key`; a text is read as the command line writes values."""
        hint = self.hints[key]
        inner, optional, choices = _unwrap(hint)
        given = value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if optional and isinstance(value, str) and value.strip().lower() in ("", "null", "none"):
            value = None
        if isinstance(value, str) and inner is not str:
            value = parse_yaml_value(value)
        value = _loosen(value, inner)
        wrong = ConfigError(f"{where}{key} must be {describe(hint)}, not {_show(given)}")
        if value is None:
            if optional:
                return None
            raise wrong
        if inner in (int, float) and (isinstance(value, bool | str) or value != value):  # a str here: no number (nan, inf, words)
            raise wrong
        try:
            self._typed[key] = _plain(value)
            typed: Any = self._typed[key]
            if OmegaConf.is_config(typed):
                typed = OmegaConf.to_container(typed, resolve=True)
        except (OmegaConfBaseException, ValueError, TypeError):
            raise wrong from None
        if choices and typed not in choices:
            raise ConfigError(f"{where}{key} must be {describe(hint)}, not {_show(given)}{nearest(str(typed), map(str, choices))}")
        return tuple(typed) if (typing.get_origin(inner) or inner) is tuple else typed

    def build(self, cls: type, values: Mapping[str, Any]) -> Any:
        """An instance of one of the classes from the flat values; what its own check refuses is an error of the words."""
        try:
            return cls(**{name: values[name] for name, owner in self.owner.items() if owner is cls})
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from None


def describe(hint: Any) -> str:
    """A type in words."""
    inner, optional, choices = _unwrap(hint)
    origin = typing.get_origin(inner) or inner
    if choices:
        text = "one of " + ", ".join(map(str, choices))
    elif origin in (tuple, list):
        text = {int: "a list of whole numbers such as [64,64]", float: "a list of numbers such as [0.1,0.2]"}.get(_item(inner), "a list")
    else:
        text = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}.get(origin, str(inner))
    return f"{text} or null" if optional else text


def _unwrap(hint: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """Type without Optional, whether it was optional, and a Literal's choices (whose type is then that of the first)."""
    optional = False
    if typing.get_origin(hint) in (Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if len(rest) != 1:
            raise TypeError(f"a config field may be of one type or None, not {hint}")
        optional, hint = True, rest[0]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return type(choices[0]), optional, choices
    return hint, optional, ()


def _item(hint: Any) -> Any:
    args = [arg for arg in typing.get_args(hint) if arg is not Ellipsis]
    return args[0] if args else str


def _omega_type(hint: Any) -> Any:
    """The type as every supported OmegaConf knows it (2.3 has neither Literal nor tuple[int, ...] as plain values)."""
    inner, optional, _ = _unwrap(hint)
    origin = typing.get_origin(inner) or inner
    if origin in (tuple, list):
        inner = list[_item(inner)]
    elif origin is dict:
        inner = dict[str, Any]
    elif origin not in (bool, int, float, str):
        raise TypeError(f"a config field cannot be of type {hint}")
    return inner | None if optional else inner


def _default(value: Any) -> Any:
    return dataclasses.field(default_factory=lambda: _plain(value))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _loosen(value: Any, inner: Any) -> Any:
    """What people write and mean: 1e6 where a whole number is asked for, 64 or 64,64 where a list is."""
    origin = typing.get_origin(inner) or inner
    if origin in (tuple, list):
        if isinstance(value, str):
            value = [parse_yaml_value(part) for part in value.strip("()").split(",") if part.strip()]
        elif isinstance(value, bool | int | float):
            value = [value]
        if isinstance(value, list | tuple):
            return [_loosen(part, _item(inner)) for part in value]
        return value
    if inner is float and type(value) is int:
        return float(value)
    if inner is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if inner is int and isinstance(value, float):
        return repr(value)  # OmegaConf might round it: as a text it refuses
    return value


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)
