"""The layout of the source (design sections 2 and 3): who may import whom, and what nobody may use."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "rl").rglob("*.py"))
LINKS = ("envs", "algos", "search", "worldmodels", "kernels")

# Layers from below: a part imports from itself and from those named, and from the shared files `rl/*.py`.
BELOW = {
    "kernels": (),
    "envs": ("kernels",),
    "search": ("kernels", "envs"),
    "worldmodels": ("kernels",),
    "algos": ("kernels", "envs", "search", "worldmodels"),
}
# What the shared files may take from envs: the door, and nothing behind it. The command is above everything.
DOOR = {"rl.envs"}
TOP = {"cli", "__main__"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> list[str]:
    """Every module a file imports, wherever in it, apart from what is for type checkers only; `from rl import x` counts as rl.x."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for child in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            is_package = (ROOT / module.replace(".", "/")).is_dir()
            found += [f"{module}.{alias.name}" if is_package and is_module(module, alias.name) else module for alias in node.names]
    return found


def is_module(package: str, name: str) -> bool:
    base = ROOT / package.replace(".", "/") / name
    return base.is_dir() or base.with_suffix(".py").is_file()


def violations(path: Path) -> list[str]:
    parts = name_of(path).split(".")
    part = parts[1] if len(parts) > 1 else ""
    wrong = []
    for module in imported(path):
        words = module.split(".")
        if words[0] in LINKS:
            wrong.append(f"{module}: through a link at the top")
        if words[0] != "rl" or len(words) < 2:
            continue
        target = words[1]
        if part in BELOW:
            if target in BELOW and target != part and target not in BELOW[part]:
                wrong.append(f"{module}: {part} is not above {target}")
            if target in TOP:
                wrong.append(f"{module}: the command is above all")
        elif part not in TOP and target in BELOW and target != "kernels" and module not in DOOR:
            wrong.append(f"{module}: shared parts look algorithms and envs up by name")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    assert violations(path) == []


def test_the_rule_finds_what_it_forbids(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    cases = {
        "rl/kernels/a.py": ("from rl.envs import make_vec", "kernels is not above envs"),
        "rl/envs/a.py": ("def f():\n    import rl.algos.ppo", "envs is not above algos"),
        "rl/loops.py": ("from rl.algos.ppo import PPO", "look algorithms and envs up"),
        "rl/trainer.py": ("from rl.envs.cartpole import SPEC", "look algorithms and envs up"),
        "rl/algos/a.py": ("from rl import cli", "the command is above all"),
        "rl/b.py": ("from kernels.returns import gae", "through a link"),
        "rl/fine.py": ("from rl.envs import make_vec\nfrom rl.kernels.returns import gae", None),
        "rl/algos/fine.py": ("from rl.envs.spec import Spec\nfrom rl.optim import FlatAdam", None),
    }
    (tmp_path / "rl/envs").mkdir(parents=True)
    for name in ("rl/cli.py", "rl/envs/cartpole.py"):
        (tmp_path / name).write_text("")
    for name, (text, says) in cases.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        found = violations(path)
        assert (found == []) if says is None else (len(found) == 1 and says in found[0]), (name, found)


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_through_the_links(path):
    names = {node.name for tree in [ast.parse(path.read_text())] for n in ast.walk(tree) if isinstance(n, ast.Import) for node in n.names}
    names |= {n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module}
    assert not {name for name in names if name.split(".")[0] in LINKS}


# Pickle reads what runs; only where nobody else can have written it. A kernel's cache lies beside the code it is made from and is
# checked by content (kernels/jit.py); a foreign env's worker is our own child, behind a socket pair.
PICKLERS = {"rl/kernels/jit.py", "rl/envs/foreign.py", "rl/envs/foreign_worker.py", "rl/envs/foreign_names.py"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}

UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load", "numpy.load", "yaml.load", "os.system",
}  # fmt: skip


def unsafe(path: Path) -> set[str]:
    found = {m.split(".")[0] for m in imported(path)} & UNSAFE_MODULES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_CALLS:
                found.add(called)
            if any(word.arg == "shell" for word in node.keywords):
                found.add("shell=")
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_that_runs_what_it_reads(path):
    relative = str(path.relative_to(ROOT))
    allowed = {"pickle"} if relative in PICKLERS else set()
    if relative == "rl/kernels/jit.py":
        allowed |= {"exec", "eval", "compile"}
    assert unsafe(path) <= allowed


def test_the_safety_rule_finds_what_it_forbids(tmp_path):
    texts = ("import pickle", "from pickle import loads", "eval('1')", "exec('')", "import torch\ntorch.load('x')", "run('ls', shell=True)")
    for text in texts:
        path = tmp_path / "a.py"
        path.write_text(text)
        assert unsafe(path), text
    path.write_text("agent.eval()\nre.compile('x')")
    assert not unsafe(path)


def test_links_at_the_top_point_into_the_package():
    if not (ROOT / ".git").exists() and not (ROOT / "pyproject.toml").exists():
        pytest.skip("not in the repository")
    for name in LINKS:
        if (ROOT / "rl" / name).is_dir():
            assert (ROOT / name).is_symlink(), f"ln -s rl/{name} {name}"
            assert (ROOT / name).resolve() == (ROOT / "rl" / name).resolve()
        else:
            assert not (ROOT / name).is_symlink(), f"{name} points to nothing"


def test_only_the_package_is_installed():
    import tomllib

    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["rl", "rl.*"]


def test_every_module_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


def test_loops_and_algorithms_keep_their_size():
    """Design: a loop under 120 lines, no class with behaviour to inherit from among the algorithms."""
    loops = ast.parse((ROOT / "rl/loops.py").read_text())
    for node in loops.body:
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 120, node.name
    for path in sorted((ROOT / "rl/algos").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                roots = {ast.unparse(base).split(".")[0] for base in node.bases}
                assert roots <= {"nn", "NamedTuple", "Protocol"}, f"{path}: {node.name}"
