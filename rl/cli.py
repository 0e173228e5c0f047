"""The command `rl`. Only click and the registry are imported here: everything heavy waits until a command needs it.

Exit status: 0 it did what was asked, 2 the words were wrong, 1 it failed while working, 130 it was interrupted. With `--json`
standard output carries one JSON object and nothing else; progress and messages go to standard error.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from rl import __version__, registry
from rl.errors import ConfigError, RunError, WrongWords
from rl.output import clean_stdout, listed, print_json, print_table, word

# Unknown options are handed on as words, so that `--lr 3e-4` can be answered with "write lr=3e-4".
_WORDS: dict[str, Any] = {"ignore_unknown_options": True}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        result = command.main(args=None if argv is None else list(argv), prog_name="rl", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except WrongWords as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo(f"interrupted{_how_to_go_on(error.__cause__ or error)}", err=True)  # click's Abort has the interrupt as its cause
        return 130
    except RunError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if isinstance(error, ImportError) and "pip install" in str(error):  # a missing extra, and what to do about it
            click.echo(f"error: {error}", err=True)
            return 1
        import traceback

        traceback.print_exc()
        click.echo(f"\nThis is a bug, in rl-suite {__version__} or in code it was asked to load: please report the lines above.", err=True)
        return 1


@click.group("rl", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rl-suite")
def command() -> None:
    """Reinforcement learning: train, evaluate and watch agents.

    \b
    rl train algo=ppo env=CartPole      train, with checkpoints and a final evaluation
    rl list                             algorithms and environments
    """


_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output, and nothing else there.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
_words = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
_run = click.argument("run", metavar="RUN")


@command.command(context_settings=_WORDS)
@_words
@_quiet
@_json
@click.option("--dry-run", is_flag=True, help="Print every setting and where it comes from; train nothing.")
def train(words: tuple[str, ...], quiet: bool, as_json: bool, dry_run: bool) -> None:
    """Train an agent: rl train algo=ppo env=CartPole [KEY=VALUE]...

    \b
    seed=1  total_steps=1e6  num_envs=64  device=auto|cpu|cuda  threads=1  run_dir=FOLDER
    stop_at_threshold=true   preset=debug  config=FILE  env.time_limit=300
    --dry-run shows all of them, with the algorithm's own.
    """
    with clean_stdout(as_json):
        from rl.config import resolve

        resolved = resolve(words)
        if not dry_run:
            from rl.display import make_display
            from rl.trainer import run_train

            with _resumable(resolved.folder), make_display(_mode(quiet, as_json), resolved.common.total_steps) as display:
                result = run_train(resolved, display)
    if dry_run:
        settings = resolved.to_dict()
        if as_json:
            print_json({"settings": settings, "sources": resolved.sources})
        else:
            rows = [(key, word(value), resolved.sources.get(key, "default")) for key, value in settings.items()]
            print_table(("setting", "value", "from"), rows)
    elif as_json:
        print_json(result.to_json())
    elif not quiet:
        click.echo(result.summary())


@command.command(context_settings=_WORDS)
@_run
@_words
@_quiet
@_json
def resume(run: str, words: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Go on with a run exactly where it stopped: rl resume RUN [total_steps=...]"""
    with clean_stdout(as_json):
        from rl.config import read_run
        from rl.words import split

        overrides = split(words)
        resolved = read_run(run, overrides)

        from rl.display import make_display
        from rl.trainer import run_resume

        with _resumable(Path(run)), make_display(_mode(quiet, as_json), resolved.common.total_steps) as display:
            result = run_resume(Path(run), overrides, display)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        click.echo(result.summary())


@command.command("eval", context_settings=_WORDS)
@_run
@_words
@_json
def evaluate(run: str, words: tuple[str, ...], as_json: bool) -> None:
    """Evaluate a run's policy: rl eval RUN [episodes=100] [seed=N] [checkpoint=best|last|STEP]"""
    with clean_stdout(as_json):
        given = _read_words(words, {"episodes": _count, "seed": _integer, "checkpoint": _checkpoint})
        folder = _run_folder(run)
        from rl.evaluation import evaluate_run

        report = evaluate_run(folder, given.get("episodes", 100), given.get("seed"), given.get("checkpoint", "best"))
    if as_json:
        print_json(report)
    else:
        for key, value in report.items():
            click.echo(f"{key:<16}  {word(value)}")


@command.command(context_settings=_WORDS)
@_run
@_words
@click.option("--ansi", is_flag=True, help="Draw in the terminal instead of writing a film.")
def watch(run: str, words: tuple[str, ...], ansi: bool) -> None:
    """Film a run's policy: rl watch RUN [episodes=1] [out=FILE.gif|FILE.mp4] [seed=N] [checkpoint=best|last|STEP]"""
    given = _read_words(words, {"episodes": _count, "out": _film, "seed": _integer, "checkpoint": _checkpoint})
    folder = _run_folder(run)
    from rl.watch import watch_run

    click.echo(watch_run(folder, ansi=ansi, **({"episodes": 1} | given)))  # type: ignore[arg-type]


@command.command("list")
@click.argument("what", required=False, type=click.Choice(["algos", "envs"]))
@_json
def list_parts(what: str | None, as_json: bool) -> None:
    """Show the algorithms and environments."""
    algos = registry.algos() if what != "envs" else ()
    envs = registry.envs() if what != "algos" else ()
    presets = {entry.name: registry.preset_names(entry) for entry in registry.algos()}
    for line in registry.entry_point_failures():
        click.echo(f"warning: {line}", err=True)
    if as_json:
        from dataclasses import asdict

        out: dict[str, Any] = {}
        if what != "envs":
            out["algos"] = [asdict(entry) | {"presets": presets[entry.name]} for entry in algos]
        if what != "algos":
            out["envs"] = [asdict(entry) | {"id": entry.id, "presets": _with_preset(entry, presets)} for entry in envs]
        print_json(out)
        return
    if algos:
        rows = [(a.name, listed(a.action_kinds), listed(a.observation_kinds), listed(presets[a.name]), a.summary) for a in algos]
        print_table(("algo", "actions", "observations", "presets", ""), rows)
    if envs:
        click.echo() if algos else None
        rows = [
            (e.name, listed((e.action_kind or "?",)), word(e.time_limit), word(e.threshold), listed(_with_preset(e, presets)), e.summary)
            for e in envs
        ]
        print_table(("env", "actions", "limit", "threshold", "presets", ""), rows)
        click.echo("\nand any other: env=gym:LunarLander-v3  env=ALE/Pong-v5  env=Hopper-v5  env=module:Class")


@command.group()
def env() -> None:
    """Check and measure environments."""


@env.command(context_settings=_WORDS)
@click.argument("name", metavar="ENV")
@_words
@_json
def check(name: str, words: tuple[str, ...], as_json: bool) -> int:
    """Look for the faults that spoil learning in silence: rl env check ENV [KEY=VALUE]..., the words being the env's options.

    Exit status 1 when something fails.
    """
    with clean_stdout(as_json):
        options = _env_options(words)
        entry = registry.find_env(name)
        from rl.envs import check as checks

        if entry.family == "foreign":
            findings = checks.check_env(entry.name, options)
        else:
            from rl.envs import make_vec

            findings = checks.check_vector_env(lambda: make_vec(entry.name, 1, options=options))
    failed = any(finding.level == "fail" for finding in findings)
    if as_json:
        from dataclasses import asdict

        print_json({"env": entry.name, "ok": not failed, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            click.echo(finding)
        click.echo(f"{entry.name}: {'failed' if failed else 'ok'}")
    return int(failed)


@env.command(context_settings=_WORDS)
@click.argument("name", metavar="ENV")
@_words
@_json
def bench(name: str, words: tuple[str, ...], as_json: bool) -> None:
    """Measure steps per second: rl env bench ENV [batch=1,64,1024,16384] [backend=NAME,...] [seconds=1]"""
    with clean_stdout(as_json):
        given = _read_words(words, {"batch": _counts, "backend": _names, "seconds": _seconds})
        registry.find_env(name)
        from rl.envs.bench import bench_env

        rows = bench_env(name, given.get("batch", [1, 64, 1024, 16384]), given.get("backend"), given.get("seconds", 1.0))
    if as_json:
        print_json({"env": name, "results": rows})
    elif rows:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print_table(columns, [[word(row.get(key)) for key in columns] for row in rows])


# --- words of the smaller commands ------------------------------------------------------------------------------------------


def _read_words(words: Sequence[str], readers: Mapping[str, Callable[[str, str], Any]]) -> dict[str, Any]:
    from rl.words import split, unknown_key

    out = {}
    for key, text in split(words).items():
        if key not in readers:
            raise unknown_key(key, readers)
        out[key] = readers[key](key, text)
    return out


def _integer(key: str, text: str) -> int:
    try:
        value = float(text.replace("_", ""))
        if value == int(value) >= 0:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"{key} must be a whole number, not {text!r}")


def _count(key: str, text: str) -> int:
    if (value := _integer(key, text)) == 0:
        raise ConfigError(f"{key} must be at least 1, not 0")
    return value


def _counts(key: str, text: str) -> list[int]:
    return [_count(key, part) for part in _names(key, text)]


def _names(key: str, text: str) -> list[str]:
    return [part.strip() for part in text.strip("[]()").split(",") if part.strip()]


def _seconds(key: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise ConfigError(f"{key} must be a number above 0, not {text!r}")


def _checkpoint(key: str, text: str) -> str:
    if text in ("best", "last"):
        return text
    try:
        return str(_integer(key, text))
    except ConfigError:
        near = registry.nearest(text, ("best", "last"))
        raise ConfigError(f"{key} must be best, last or a number of env steps, not {text!r}{near}") from None


def _film(key: str, text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise ConfigError(f"{key} must end in .gif or .mp4, not {text!r}")
    return path


def _env_options(words: Sequence[str]) -> dict[str, Any]:
    if not words:
        return {}
    from rl.words import parse_yaml_value, split

    return {key.removeprefix("env."): parse_yaml_value(text) for key, text in split(words).items()}


def _run_folder(run: str) -> Path:
    if not (Path(run) / "config.yaml").is_file():
        from rl.config import read_run

        read_run(run)  # says what is wrong
    return Path(run)


def _mode(quiet: bool, as_json: bool) -> Any:
    return "quiet" if quiet else "json" if as_json else "auto"


def _with_preset(entry: registry.EnvEntry, presets: Mapping[str, Sequence[str]]) -> list[str]:
    """The algorithms that hold a preset for this env."""
    return [algo for algo, names in presets.items() if entry.name in names or f"class:{entry.family}" in names]


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """An interrupt that passes through here knows which run it stopped."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(str(folder))
        raise


def _how_to_go_on(error: BaseException) -> str:
    for folder in map(Path, getattr(error, "__notes__", ())):
        checkpoints = folder / "checkpoints"
        if checkpoints.is_dir() and any(checkpoints.glob("step_*")):
            return f": `rl resume {folder}` goes on from the last checkpoint"
        return f" before the first checkpoint: `rl resume {folder}` begins again"
    return ""
