"""`rl env check`: each mistake is reported, by an env that makes only that one, and sound envs pass clean."""

import sys
from pathlib import Path

import pytest

from rl.envs.check import Finding, check_env, check_vector_env
from rl.envs.foreign import ForeignEnvError, make_foreign

sys.path.insert(0, str(Path(__file__).parent))


@pytest.mark.parametrize(
    "name", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "MountainCar-v0", "foreign_zoo:Walk", "foreign_zoo:make_walk"]
)
def test_sound_envs_pass(name: str) -> None:
    assert check_env(name) == []


@pytest.mark.parametrize(
    ("env", "check", "level", "word"),
    [
        ("LostFinal", "final observation", "fail", "next episode's first"),
        ("HiddenFinal", "final observation", "fail", "terminal_observation"),
        ("IgnoresSeed", "seed", "fail", "ignores its seed"),
        ("SameForEverySeed", "seed", "warn", "every seed"),
        ("Nondeterministic", "determinism", "fail", "part at step 1"),
        ("StaleState", "determinism", "fail", "in the same env"),
        ("MergedLimit", "terminated/truncated", "fail", "max_steps = 25"),
        ("MergedQuietly", "terminated/truncated", "warn", "after 25 steps"),
        ("MergedInInfo", "terminated/truncated", "fail", "TimeLimit.truncated"),
        ("OutOfBounds", "observation", "fail", "outside [-0.5, 3.0]"),
        ("WrongDtype", "observation", "fail", "dtype float64, declared float32"),
        ("NanReward", "reward", "fail", "nan"),
        ("ArrayReward", "reward", "fail", "ndarray"),
        ("IntFlags", "flags", "fail", "terminated is a int"),
        ("OldStep", "signature", "fail", "a tuple of 4"),
        ("OldReset", "signature", "fail", "a ndarray"),
        ("Aliasing", "aliasing", "warn", "already returned"),
        ("Raises", "raises", "fail", "third wheel"),
        ("Endless", "never ends", "warn", "no episode ended"),
        ("Unbuildable", "raises", "fail", "no licence file"),
        ("VectorWithoutFinal", "final observation", "fail", "without info['final_obs']"),
    ],
)
def test_each_mistake_is_reported_and_nothing_else(env: str, check: str, level: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.envs.check.MAX_STEPS", 3000)
    found = check_env(f"foreign_zoo:{env}")
    assert (check, level) in [(finding.check, finding.level) for finding in found]
    assert any(word in str(finding) for finding in found)
    assert all(finding.mend for finding in found)
    if env != "VectorWithoutFinal":  # that one is also not a single env
        assert len(found) == 1, [str(finding) for finding in found]


def test_wrong_shape_is_reported() -> None:
    assert any("declared [3]" in str(f) or "declares" in str(f) for f in check_env("foreign_zoo:WrongShape"))


def test_a_time_limit_wrapper_is_no_merge() -> None:
    """The same env under Gymnasium's TimeLimit truncates, and that is right."""
    assert check_env("foreign_zoo:Endless", {"time_limit": 25}) == []
    assert check_env("foreign_zoo:MergedLimit", {"time_limit": 10}) == []


def test_lost_final_obs_of_an_env_that_starts_anywhere() -> None:
    """Pendulum begins all over its circle; the leap of the last step gives a self-resetting one away."""
    assert [f.check for f in check_env("foreign_zoo:LostPendulum")] == ["final observation"]


def test_the_adapter_itself_passes_as_a_vector_env() -> None:
    assert check_vector_env(lambda: make_foreign("CartPole-v1", 1)) == []


def test_a_vector_env_that_loses_final_obs_is_caught() -> None:
    class Loses:
        """A vector env whose final_obs is the next episode's first observation."""

        def __init__(self) -> None:
            self.env = make_foreign("CartPole-v1", 1)

        def __getattr__(self, name: str):
            return getattr(self.env, name)

        def step(self, action):
            result = self.env.step(action)
            return result._replace(final_obs=result.obs)

    assert [f.check for f in check_vector_env(Loses)] == ["final observation"]


def test_unknown_names_raise() -> None:
    with pytest.raises(ForeignEnvError, match="CartPole-v1"):
        check_env("CartPol-v1")


def test_a_finding_reads_well() -> None:
    text = str(Finding("seed", "fail", "wrong words", "seen words", "mend words"))
    assert text == "FAIL seed: wrong words\n  seen: seen words\n  mend: mend words"
