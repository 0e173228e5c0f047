"""Words to a resolved configuration: layers, types, round trip, and every error's message."""

import importlib
import os
import re
from dataclasses import fields, make_dataclass, replace
from pathlib import Path

import fake_algo
import pytest
from omegaconf import OmegaConf

from rl import record, registry
from rl.config import ConfigError, Resolved, TrainConfig, UnknownName, create_run_folder, read_run, resolve, rewrite_record
from rl.words import Slots, split

BASE = ("algo=fake_algo:Fake", "env=Acrobot")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def error_of(*words: str, base: tuple[str, ...] = BASE) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve([*base, *words])
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


# --- values -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, value",
    [
        ("total_steps=1e6", 1_000_000),
        ("total_steps=1_000_000", 1_000_000),
        ("total_steps=5000", 5000),
        ("checkpoint_seconds=5", 5.0),
        ("stop_at_threshold=true", True),
        ("stop_at_threshold=False", False),
        ("run_dir=007", "007"),  # a text stays as it was written
        ("run_dir=1e3", "1e3"),
        ("lr=3e-4", 3e-4),
        ("lr=1", 1.0),
        ("hidden=[32,16]", (32, 16)),
        ("hidden=32,16", (32, 16)),
        ("hidden=(32,16)", (32, 16)),
        ("hidden=128", (128,)),
        ("hidden=[1e2]", (100,)),
        ("activation=relu", "relu"),
        ("target_kl=0.02", 0.02),
        ("target_kl=null", None),
        ("max_updates=none", None),
        ("max_updates=1e1", 10),
    ],
)
def test_values_are_typed(word, value):
    done = resolve([*BASE, word])
    got = done.to_dict()[word.partition("=")[0]]
    assert (tuple(got) if isinstance(got, list) else got) == value
    assert type(got) is (list if isinstance(value, tuple) else type(value))
    assert isinstance(done.algo, fake_algo.Config) and isinstance(done.algo.hidden, tuple)


def test_python_values_do_as_well():
    done = resolve(
        {"algo": "fake_algo:Fake", "env": "cartpole", "hidden": (8, 8), "lr": "1e-2", "run_dir": Path("here"), "target_kl": None}
    )
    assert done.algo.hidden == (8, 8) and done.algo.lr == 1e-2 and done.common.run_dir == "here" and done.common.env == "CartPole"


@pytest.mark.parametrize(
    "word, expected, got",
    [
        ("total_steps=many", "a whole number", "'many'"),
        ("total_steps=0.5", "a whole number", "'0.5'"),
        ("total_steps=inf", "a whole number", "'inf'"),
        ("total_steps=true", "a whole number", "'true'"),
        ("total_steps=", "a whole number", "''"),
        ("lr=fast", "a number", "'fast'"),
        ("lr=null", "a number", "'null'"),
        ("lr=[1]", "a number", "'[1]'"),
        ("lr=true", "a number", "'true'"),
        ("tensorboard=perhaps", "true or false", "'perhaps'"),
        ("hidden=[a,b]", "a list of whole numbers such as [64,64]", "'[a,b]'"),
        ("hidden=[0.5]", "a list of whole numbers such as [64,64]", "'[0.5]'"),
        ("activation=tnah", "one of tanh, relu", "did you mean 'tanh'"),
        ("max_updates=0.3", "a whole number or null", "'0.3'"),
        ("lr=${nothing.there}", "a number", "${nothing.there}"),
        ("lr=???", "a number", "???"),
    ],
)
def test_a_wrong_type_names_key_expected_and_got(word, expected, got):
    message = error_of(word)
    assert message.startswith(f"{word.partition('=')[0]} must be {expected}") and got in message


# --- layers -----------------------------------------------------------------------------------------------------------------


def test_later_layers_win_and_say_so():
    Path("mine.yaml").write_text("gamma: 0.5\nentropy_coef: 0.25\nenv.gravity: 9.0\n")
    done = resolve(["algo=fake_algo:Fake", "env=CartPole", "preset=wide", "config=mine.yaml", "entropy_coef=0.125", "env.time_limit=300"])
    expected = {
        "rollout_steps": (128, "default"),
        "lr": (1e-3, "preset CartPole"),
        "num_envs": (16, "preset CartPole"),  # a preset sets the common fields too
        "hidden": ([512, 512], "preset=wide"),
        "gamma": (0.5, "file mine.yaml"),  # over the preset's 0.9, over CartPole's 0.98
        "entropy_coef": (0.125, "command line"),
        "env.gravity": (9.0, "file mine.yaml"),
        "env.time_limit": (300, "command line"),
    }
    settings = done.to_dict()
    assert {key: (settings[key], done.sources[key]) for key in expected} == expected
    assert done.common.env_options == {"gravity": 9.0, "time_limit": 300}


@pytest.mark.parametrize(
    "env, lr, source",
    [
        ("CartPole", 1e-3, "preset CartPole"),
        ("Acrobot", 2e-3, "preset class:classic"),
        ("gym:CartPole-v1", 5e-3, "preset class:foreign"),
    ],
)
def test_the_env_or_its_family_chooses_the_preset(env, lr, source):
    done = resolve(["algo=fake_algo:Fake", f"env={env}"])
    assert (done.algo.lr, done.sources["lr"]) == (lr, source)


def test_a_known_kind_of_foreign_env_has_its_own_preset():
    pytest.importorskip("mujoco")
    assert resolve(["algo=fake_algo:Fake", "env=InvertedPendulum-v5"]).sources["lr"] == "preset class:mujoco"


def test_debug_exists_for_every_algorithm_under_its_own():
    done = resolve([*BASE, "preset=debug"])
    assert done.common.total_steps == 2_048 and done.algo.rollout_steps == 8 and done.algo.hidden == (8,)
    assert done.sources["total_steps"] == done.sources["rollout_steps"] == "preset=debug"


def test_common_and_algorithm_fields_never_clash():
    for entry in registry.algos():
        module = importlib.import_module(entry.entry.partition(":")[0])
        slots = Slots(TrainConfig, module.Config)  # raises TypeError for a clash or a type that words cannot express
        for name, preset in module.PRESETS.items():
            assert set(preset) <= set(slots), f"PRESETS[{name!r}] of {entry.name}"
            for key, value in preset.items():
                slots.convert(key, value)


def test_a_clash_is_found():
    with pytest.raises(TypeError, match=r"Clash\.seed: TrainConfig has this field too"):
        Slots(TrainConfig, make_dataclass("Clash", [("seed", int, 0)]))


def test_every_common_field_has_its_line_of_documentation():
    source = (Path(record.__file__).parent / "config.py").read_text()
    for slot in fields(TrainConfig):
        assert re.search(rf'^    {slot.name}: .*\n    """.+"""$', source, re.MULTILINE), slot.name


# --- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, says",
    [
        ("learning_rat=1", "unknown key 'learning_rat'"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'lr'?"),
        ("n_envs=4", "did you mean 'num_envs'?"),
        ("timesteps=4", "did you mean 'total_steps'?"),
        ("ent_coef=4", "did you mean 'entropy_coef'?"),
        ("clip_range=0.1", "unknown key 'clip_range'"),  # this algorithm has none to suggest
        ("gama=0.9", "did you mean 'gamma'?"),
        ("Gamma=0.9", "did you mean 'gamma'?"),
        ("max_episode_steps=9", "did you mean 'env.time_limit'?"),
        ("env_options={}", "unknown key 'env_options'"),
        ("env.=3", "unknown key 'env.'"),
    ],
)
def test_an_unknown_key_names_the_nearest(word, says):
    assert says in error_of(word)


def test_no_suggestion_names_a_key_that_does_not_exist():
    assert "did you mean 'clip'" not in error_of("clip_range=0.1")
    assert "did you mean" not in error_of("xyzzy=1")


@pytest.mark.parametrize(
    "words, says",
    [
        (["lr", "3e-4"], "write lr=3e-4"),
        (["--lr", "3e-4"], "write lr=3e-4"),
        (["--lr=3e-4"], "write lr=3e-4"),
        (["--total-steps", "1e6"], "write total_steps=1e6"),
        (["lr"], "write lr=VALUE"),
        (["lr", "gamma=0.9"], "write lr=VALUE"),
        (["=3"], "no key"),
        (["lr=1", "lr=2"], "given twice"),
    ],
)
def test_words_written_otherwise_are_explained(words, says):
    assert says in error_of(*words)


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "algo is missing: write algo=ppo"),
        (["env=CartPole"], "algo is missing"),
        (["algo=fake_algo:Fake"], "env is missing: write env=CartPole"),
        (["alog=ppo", "env=CartPole"], "unknown key 'alog'; did you mean 'algo'?"),
        (["algo=ppo", "env_id=CartPole"], "unknown key 'env_id'; did you mean 'env'?"),
    ],
)
def test_what_is_missing_is_named(words, says):
    assert says in error_of(*words, base=())


def test_unknown_parts():
    with pytest.raises(UnknownName, match="did you mean 'ppo'"):
        resolve(["algo=ppq", "env=CartPole"])
    with pytest.raises(UnknownName, match="did you mean 'CartPole'"):
        resolve(["algo=ppo", "env=CartPol"])
    with pytest.raises(UnknownName, match="did you mean 'Fake'"):
        resolve(["algo=fake_algo:Fak", "env=CartPole"])
    assert "CartPole-v1" in error_of(base=("algo=fake_algo:Fake", "env=CartPol-v1"))


def test_actions_that_do_not_fit():
    message = error_of(base=("algo=fake_algo:Fake", "env=Pendulum"))
    assert message == "algo=fake_algo:Fake takes discrete actions, env=Pendulum has continuous ones; it works with algo=ppo"
    assert resolve(["algo=fake_algo:Anything", "env=Pendulum"]).common.algo == "fake_algo:Anything"


def test_players_that_do_not_fit(monkeypatch):
    entry = registry.EnvEntry("Duel", "duel:SPEC", "board", "discrete", "vector", players=2)
    monkeypatch.setitem(registry._env_table, "duel", entry)
    assert "is for 1 player(s), env=Duel has 2" in error_of(base=("algo=fake_algo:Fake", "env=Duel"))


@pytest.mark.parametrize(
    "word", ["total_steps=0", "total_steps=-1e6", "num_envs=0", "threads=0", "seed=-1", "keep=0", "eval_every=-1", "eval_episodes=0"]
)
def test_counts_that_cannot_be(word):
    key, _, value = word.partition("=")
    assert re.match(rf"{key} must be at least [01], not {int(float(value))}$", error_of(word))


def test_what_the_algorithm_itself_refuses():
    assert error_of("gamma=1.5") == "gamma must be above 0 and at most 1, not 1.5"


def test_stop_at_threshold_needs_one():
    assert "no threshold" in error_of("stop_at_threshold=true", base=("algo=fake_algo:Fake", "env=Identity"))


@pytest.mark.parametrize(
    "device, says", [("gpu", "did you mean 'cuda'"), ("cpuu", "did you mean 'cpu'"), ("cuda:x", "cuda:N"), ("mps", "device must be")]
)
def test_a_device_that_is_none(device, says):
    assert says in error_of(f"device={device}")


def test_a_device_that_is_not_here(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in error_of("device=cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "there are 2, the last is cuda:1" in error_of("device=cuda:7")
    assert resolve([*BASE, "device=cuda:1"]).common.device == "cuda:1"


def test_presets_that_are_wrong():
    assert "unknown preset 'wied' of algo=fake_algo:Fake; did you mean 'wide'?" in error_of("preset=wied")
    assert "in preset 'broken' of fake_algo: unknown key 'learning_rat'" in error_of("preset=broken")


@pytest.mark.parametrize(
    "content, says",
    [
        ("gama: 1", "in bad.yaml: unknown key 'gama'; did you mean 'gamma'?"),
        ("lr: fast", "in bad.yaml: lr must be a number, not 'fast'"),
        ("a: [1", "is not YAML"),
        ("- 1\n- 2", "holds no key: value lines"),
        ("", "is empty"),
        ("lr: !!python/object/apply:os.system ['touch hacked']", "is not YAML"),
    ],
)
def test_files_that_are_wrong(content, says):
    Path("bad.yaml").write_text(content)
    assert says in error_of("config=bad.yaml")
    assert not Path("hacked").exists()


def test_a_file_that_is_not_there():
    assert "config file 'none.yaml': No such file" in error_of("config=none.yaml")


# --- folders ----------------------------------------------------------------------------------------------------------------


def test_the_default_folder_says_what_ran():
    done = resolve(["algo=fake_algo:Fake", "env=gym:CartPole-v1", "seed=7"])
    assert re.fullmatch(r"runs/gym-CartPole-v1/fake_algo-Fake/\d{8}-\d{6}-7", done.common.run_dir)
    assert not Path("runs").exists()  # resolving writes nothing


def test_two_runs_within_a_second_have_two_folders(monkeypatch):
    monkeypatch.setattr("rl.config.time.strftime", lambda *_: "20250101-000000")
    first = create_run_folder(resolve(BASE))
    second = create_run_folder(resolve(BASE))
    assert (first.name, second.name) == ("20250101-000000-0", "20250101-000000-0-2")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "checkpoints/"])
def test_a_folder_that_holds_a_run_is_not_overwritten(name):
    Path("old").mkdir()
    (Path("old") / name).mkdir() if name.endswith("/") else (Path("old") / name).write_text("x")
    assert "already holds a run: `rl resume old`" in error_of("run_dir=old")


def test_an_existing_folder_without_a_run_is_fine():
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("x")
    assert create_run_folder(resolve([*BASE, "run_dir=mine"])) == Path("mine")


def test_of_two_runs_that_want_one_folder_one_is_refused():
    first, second = resolve([*BASE, "run_dir=one"]), resolve([*BASE, "run_dir=one"])
    create_run_folder(first)
    before = Path("one/config.yaml").read_text()
    with pytest.raises(ConfigError, match="already holds a run"):
        create_run_folder(second)
    assert Path("one/config.yaml").read_text() == before and os.listdir("one") == ["config.yaml"]


def test_a_folder_that_cannot_be_written(monkeypatch):
    Path("file").write_text("x")
    assert "'file' is a file, not a folder" in error_of("run_dir=file/run")
    done = resolve([*BASE, "run_dir=locked/run"])
    with monkeypatch.context() as patch:  # permissions do not bind root, who runs the tests in containers
        patch.setattr("rl.config.os.access", lambda *_: False)
        assert "no permission to write" in error_of("run_dir=locked/run")
    with pytest.raises(ConfigError, match="cannot write into the run folder '/proc/nothing/run'"):
        create_run_folder(replace(done, common=replace(done.common, run_dir="/proc/nothing/run")))


# --- round trip -------------------------------------------------------------------------------------------------------------


def settings_of(done: Resolved, *but: str) -> dict:
    return {key: value for key, value in done.to_dict().items() if key not in ("run_dir", "config", *but)}


def test_the_record_of_a_run_reproduces_it():
    words = [
        "algo=fake_algo:Fake",
        "env=CartPole",
        "preset=wide",
        "total_steps=1e5",
        "env.time_limit=300",
        "target_kl=0.01",
        "lr=1e-5",
        "seed=3",
    ]
    first = resolve([*words, "activation=relu", "env.wind=1e-7", "run_dir=first"])
    create_run_folder(first, ["rl", "train", *words])
    again = resolve(["config=first/config.yaml"])
    assert settings_of(again) == settings_of(first)
    assert again.algo == first.algo and again.common.env_options == {"time_limit": 300, "wind": 1e-7}
    assert again.folder != first.folder and again.sources["lr"] == "file first/config.yaml"
    assert settings_of(resolve(["config=first"])) == settings_of(first)  # the folder stands for its record
    other = resolve(["config=first/config.yaml", "seed=4", "run_dir=second"])
    assert settings_of(other, "seed") == settings_of(first, "seed") and other.common.seed == 4
    create_run_folder(other)
    assert settings_of(resolve(["config=second/config.yaml"]), "seed") == settings_of(first, "seed")
    assert "preset=debug would change nothing" in error_of("config=first/config.yaml", "preset=debug", base=())


def test_a_run_read_back_keeps_its_folder_and_takes_some_words():
    first = resolve([*BASE, "run_dir=first", "hidden=[4]"])
    create_run_folder(first)
    again = read_run("first", {"total_steps": "2e5"})
    assert again.algo == first.algo and again.common == replace(first.common, total_steps=200_000)
    assert again.sources["total_steps"] == "command line"
    rewrite_record(again)
    assert read_run("first").common.total_steps == 200_000 and os.listdir("first") == ["config.yaml"]
    with pytest.raises(ConfigError, match="seed is fixed"):
        read_run("first", ["seed=1"])
    with pytest.raises(ConfigError, match="env is fixed once a run has begun"):
        read_run("first", ["env=CartPole"])
    with pytest.raises(ConfigError, match=r"env\.gravity is fixed"):
        read_run("first", ["env.gravity=1"])
    with pytest.raises(ConfigError, match="no run in 'nowhere': there is no such folder"):
        read_run("nowhere")
    Path("runs/a/b/c").mkdir(parents=True)
    Path("runs/a/b/c/config.yaml").write_text("algo: ppo\n")
    with pytest.raises(ConfigError, match="the latest is runs/a/b/c"):
        read_run("runs/a/b")


def test_the_record_says_what_it_ran_on():
    done = resolve([*BASE, "run_dir=first"])
    meta = OmegaConf.create(done.to_yaml(["rl", "train", "a b=c"])).meta
    assert set(meta["versions"]) == {"rl", "python", "torch", "numba", "numpy", "gymnasium"}
    assert all(meta["versions"].values()) and meta["platform"] and meta["command"] == "rl train 'a b=c'"
    assert set(meta) == {"versions", "git", "platform", "command", "date"}


def test_the_git_revision_is_that_of_the_source_tree_and_says_dirty(tmp_path):
    import subprocess

    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    assert record.git_revision(tmp_path) is None
    git("init")
    assert record.git_revision(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    found = record.git_revision(tmp_path)
    assert found and re.fullmatch("[0-9a-f]{40}", found["revision"]) and not found["dirty"]
    (tmp_path / "a").write_text("2")
    found = record.git_revision(tmp_path)
    assert found and found["dirty"]
    (tmp_path / "sub").mkdir()
    assert record.git_revision(tmp_path / "sub") is None  # installed inside somebody's repository


def test_split_keeps_equal_signs_of_the_value():
    assert split(["run_dir=a=b", "env.x=1"]) == {"run_dir": "a=b", "env.x": "1"}


def test_the_evaluation_interval():
    assert replace(TrainConfig(), total_steps=1000).eval_interval == 50
    assert replace(TrainConfig(), total_steps=3).eval_interval == 1
    assert replace(TrainConfig(), eval_every=7).eval_interval == 7
