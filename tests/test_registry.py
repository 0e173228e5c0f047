"""Names to parts, without importing the parts."""

import importlib.metadata
import sys
from dataclasses import replace

import pytest

from rl import registry
from rl.registry import AlgoEntry, EnvEntry, UnknownName, find_algo, find_env


@pytest.fixture(autouse=True)
def own_tables(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_env_table", dict(registry._env_table))
    monkeypatch.setattr(registry, "_algo_table", dict(registry._algo_table))
    monkeypatch.setattr(registry, "_entry_points_read", True)
    monkeypatch.setattr(registry, "_entry_point_failures", [])


@pytest.mark.parametrize("name", ["CartPole", "cartpole", "CARTPOLE", "CartPole-v1", "rl/CartPole-v1", "rl/cartpole", " CartPole "])
def test_a_resident_answers_to_all_its_names(name):
    assert find_env(name).entry == "rl.envs.cartpole:SPEC"


@pytest.mark.parametrize(
    "name, entry, subfamily",
    [
        ("gym:CartPole-v1", "gym:CartPole-v1", ""),  # Gymnasium's own, not ours
        ("gym:LunarLander-v3", "gym:LunarLander-v3", ""),
        ("Hopper-v5", "gym:Hopper-v5", "mujoco"),
        ("gym:Hopper-v5", "gym:Hopper-v5", "mujoco"),
        ("ALE/Pong-v5", "gym:ALE/Pong-v5", "atari"),
        ("MinAtar/Breakout-v1", "gym:MinAtar/Breakout-v1", "minatar"),
        ("some.module:MyEnv", "some.module:MyEnv", ""),
        ("FrozenLake8x8-v1", "gym:FrozenLake8x8-v1", ""),
    ],
)
def test_foreign_envs(name, entry, subfamily):
    found = find_env(name)
    assert (found.name, found.entry, found.family, found.subfamily) == (name, entry, "foreign", subfamily)
    assert found.action_kind is None and found.observation_kind is None and found.players is None


@pytest.mark.parametrize(
    "name, says",
    [
        ("CartPol", "did you mean 'CartPole'"),
        ("rl/Pendulun-v1", "did you mean 'Pendulum'"),
        ("CartPole-v0", "gym:CartPole-v0"),
        ("xyzzy", "`rl list envs`"),
        ("", "unknown env"),
        ("gym:", "unknown env"),
    ],
)
def test_an_unknown_env_names_the_nearest(name, says):
    with pytest.raises(UnknownName, match="unknown env") as caught:
        find_env(name)
    assert says in str(caught.value)


def test_algos():
    assert find_algo("PPO").entry == "rl.algos.ppo:PPO"
    assert find_algo("my.module:Agent").entry == "my.module:Agent"
    with pytest.raises(UnknownName, match=r"did you mean 'ppo'.*rl list algos"):
        find_algo("ppoo")


def test_outside_code_registers_and_names_are_taken_once():
    entry = EnvEntry("Maze", "maze:SPEC", "grid", "discrete", "vector", version=2)
    registry.register_env(entry)
    registry.register_env(entry)  # the same again is no clash
    assert find_env("maze") is entry and find_env("Maze-v2") is entry and entry.id == "rl/Maze-v2"
    with pytest.raises(ValueError, match="taken"):
        registry.register_env(replace(entry, entry="other:SPEC"))
    registry.register_algo(AlgoEntry("mine", "mine:Agent", "on_policy", ("discrete",), ("vector",)))
    assert find_algo("Mine").entry == "mine:Agent"


class _Point:
    def __init__(self, name, value):
        self.name, self.value = name, name
        self._value = value

    def load(self):
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


class _Points:
    def __init__(self, **groups):
        self._groups = groups

    def select(self, group):
        return self._groups.get(group.replace("rl.", ""), [])


def test_entry_points_are_read_only_when_a_name_is_missing(monkeypatch):
    calls = []
    maze = EnvEntry("Maze", "maze:SPEC", "grid", "discrete", "vector")
    ids = EnvEntry("Odd/Name-v3", "odd:SPEC", "grid", "discrete", "vector")

    def entry_points():
        calls.append(1)
        return _Points(envs=[_Point("bad", ImportError("boom")), _Point("odd", 3), _Point("maze", maze), _Point("id", ids)])

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.setattr(registry, "_entry_points_read", False)
    find_env("CartPole")
    find_env("gym:CartPole-v1")
    find_algo("ppo")
    assert not calls
    assert find_env("Maze") is maze
    assert find_env("Odd/Name-v3") is ids
    assert maze in registry.envs()
    assert len(calls) == 1
    failures = registry.entry_point_failures()  # one broken package is named and does not hide the others
    assert len(failures) == 2 and "boom" in failures[0] and "not an EnvEntry" in failures[1]


def test_load():
    assert registry.load("rl.registry:EnvEntry") is EnvEntry
    with pytest.raises(UnknownName, match="cannot import 'no_such_module_here'"):
        registry.load("no_such_module_here:X")
    with pytest.raises(UnknownName, match="did you mean 'EnvEntry'"):
        registry.load("rl.registry:EnvEntri")


def test_load_looks_into_the_working_directory_and_leaves_inner_import_errors_alone(tmp_path, monkeypatch):
    (tmp_path / "module_of_a_user.py").write_text("class Agent: pass\n")
    (tmp_path / "module_that_lacks.py").write_text("import a_missing_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert registry.load("module_of_a_user:Agent").__name__ == "Agent"
    with pytest.raises(ModuleNotFoundError, match="a_missing_dependency"):
        registry.load("module_that_lacks:Agent")


def test_preset_names_come_from_the_source():
    names = registry.preset_names(AlgoEntry("fake", "fake_algo:Fake", "on_policy", ("discrete",), ("vector",)))
    assert set(names) == {"CartPole", "class:classic", "class:mujoco", "class:foreign", "debug", "wide", "broken"}
    assert registry.preset_names(AlgoEntry("none", "no.such:Thing", "on_policy", ("discrete",), ("vector",))) == ("debug",)


def test_every_resident_says_what_it_must():
    for entry in registry.envs():
        assert entry.action_kind and entry.observation_kind and entry.summary, entry.name
        assert entry.threshold is None or any(reference.score == entry.threshold for reference in entry.references), entry.name
        assert all(reference.source for reference in entry.references)
    for entry in registry.algos():
        assert entry.summary and entry.paper, entry.name
