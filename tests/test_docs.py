"""What the documents promise: their commands parse, their code runs, their links lead somewhere."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import click
import pytest

from rl import cli, registry
from rl.config import resolve

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PROMISED = (
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/rl train algo=ppo env=CartPole",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
)


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _commands() -> list[list[str]]:
    lines = (line.partition("#")[0].split() for block in _blocks(README, "sh") for line in block.splitlines())
    return [words[1:] for words in lines if words and words[0] == "rl"]


def test_readme_holds_the_two_commands_and_ci_runs_just_these():
    lines = [line for line in README.splitlines() if line.startswith("python3 ")]
    assert tuple(lines) == PROMISED
    script = (REPO / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -E '([^']+)' README\.md", script)
    assert pattern is not None, ".ci/run no longer reads the commands from README.md"
    assert [line for line in README.splitlines() if re.match(pattern[1], line)] == list(PROMISED)
    assert '-c "$train_line total_steps=5000' in script
    after = script.split('bash -euo pipefail -c "$test_line"\n')[1]
    assert after == 'exit "${#failed[@]}"\n', "the tests come last, so that pytest's summary closes"


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_ci_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(REPO / ".ci" / "run")], check=True)


def test_readme_shows_every_command():
    shown = {" ".join(words[:2]) if words[0] == "env" else words[0] for words in _commands()}
    there = {name for name in cli.command.commands if name != "env"} | {f"env {name}" for name in cli.env.commands}
    assert shown == there


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_readme_command_parses(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group: click.Group = cli.command
    name, rest = words[0], words[1:]
    if name == "env":
        group, name, rest = cli.env, rest[0], rest[1:]
    command = group.commands[name]
    with command.make_context(name, list(rest)) as context:
        settings = [word for word in context.params.get("words") or () if "=" in word]
    if name == "train" and not any("RUN" in word for word in rest):
        resolve(settings)
    else:
        for word in settings:
            if name != "train":
                assert f"{word.partition('=')[0]}=" in (command.help or ""), f"{word} is not in `rl {name} --help`"


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = _blocks(README, "python")
    (tmp_path / "example.py").write_text(block.replace("total_steps=20_000", 'preset="debug", quiet=True'))
    assert 'preset="debug"' in (tmp_path / "example.py").read_text()
    found = runpy.run_path(str(tmp_path / "example.py"))
    assert found["action"].shape == (4,)
    assert found["many"].num_envs == 4


def test_readme_tables_agree_with_the_registry():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("| ")]
    for entry in registry.envs():
        if entry.family == "classic" and entry.entry.startswith("rl."):
            (row,) = [row for row in rows if row[0] == entry.name and f"Gymnasium's {entry.name}" in row[-1]]
            assert row[1] == str(entry.action_kind)
            assert (row[2], row[3]) == (str(entry.time_limit), f"{entry.threshold:g}")
            assert row[4] == f"as Gymnasium's {entry.name}-v{entry.version}"
    for algo in registry.algos():
        if algo.entry.startswith("rl."):
            assert any(row[0] == algo.name for row in rows), f"README's table of algorithms lacks {algo.name}"


def test_extras_named_in_the_documents_exist():
    import tomllib

    extras = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for document in DOCUMENTS:
        for names in re.findall(r"'\.\[([\w,-]+)\]'", (REPO / document).read_text(encoding="utf-8")):
            assert set(names.split(",")) <= set(extras), document


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (REPO / document).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", target)]
    assert all((REPO / target.partition("#")[0]).exists() for target in targets), targets


def test_contributing_is_short():
    """Each of the two instructions takes less than 20 lines, the example env aside."""
    for title in ("Add an environment", "Add an algorithm"):
        section = CONTRIBUTING.split(f"## {title}\n")[1].split("\n## ")[0]
        lines = [line for line in re.sub(r"```.*?```", "", section, flags=re.DOTALL).splitlines() if line.strip()]
        assert len(lines) < 20, title


def test_the_example_env_of_contributing_works(tmp_path, monkeypatch):
    """It passes the suite's own checks, and PPO trains in it."""
    import torch

    import rl
    from rl.envs import make_vec
    from rl.envs.check import check_vector_env

    (block,) = _blocks(CONTRIBUTING, "python")
    (tmp_path / "corridor.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_env_table", dict(registry._env_table))
    import corridor  # type: ignore[import-not-found]

    registry.register_env(corridor.ENTRY)
    findings = check_vector_env(lambda: make_vec("Corridor", 1))
    assert not [finding for finding in findings if finding.level == "fail"], findings
    env = make_vec("Corridor", 3)
    first = env.reset(seed=1).clone()
    assert ((first >= 0) & (first < 0.5)).all()
    rewards = torch.zeros(3)
    for _ in range(7):  # from any of the first four cells
        step = env.step(torch.ones(3, dtype=torch.int64))
        rewards += step.reward
    assert (rewards >= 1).all()
    result = rl.train(algo="ppo", env="Corridor", preset="debug", quiet=True)
    assert result.env_steps >= 2_048


def test_reports_tables_are_up_to_date():
    """README's figures are those of benchmarks/results, not older ones."""
    spec = importlib.util.spec_from_file_location("benchmark_report", REPO / "benchmarks" / "report.py")
    assert spec is not None and spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    assert report.filled(README) == README, "run python benchmarks/report.py"
