"""The package as a whole: what is installed, who may import whom, what a start of the command loads."""

import ast
import functools
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path

import pytest

import rlflow
from rlflow.moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
MAPPED = ("envs", "rewards", "configs")
FOLDERS = {"rlflow": ROOT / "rlflow", **{f"rlflow.{name}": ROOT / name for name in MAPPED}}
MAX_LINES = 400

MAX_FILES, MAX_PACKAGE_LINES = 16, 3000

# Rooms from the ground up: a module may import its own room and those before it, and no others.
ROOMS = (
    *("moved", "rlflow", "types", "ranges", "files", "trust", "components", "registry", "failures", "console"),
    *("parallel", "flow"),
    *("models", "models.goals", "models.pretrained", "models.pretrained.families", "models.lerobot"),
    *("envs.captions", "rewards", "rewards.networks", "rewards.remote", "envs", "envs.demos", "envs.simulators"),
    *("rl.likelihoods", "rl", "rl.objectives", "rl.learners", "rl.off_policy", "rl.imitation"),
    *("config", "pretrain", "report", "comparison", "datasets", "evaluation", "assembly", "train"),
    *("deploy", "cost", "doctor", "bench", "commands", "cli", "__main__"),
)

# Slow to import and not needed to print help, list names or reject a misspelt key.
HEAVY = {
    *("torch", "scipy", "matplotlib", "tensorboard"),
    *("diffusers", "transformers", "peft", "rapidocr", "cv2", "gymnasium", "mujoco"),
}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module that installs."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The innermost room that a dotted name is in: "flow" for rlflow.flow.grid, "rlflow" for the package itself."""
    parts = module.split(".")[1:]
    found = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in ROOMS]
    return found[0] if found else "rlflow"


def is_type_checking(node: ast.AST) -> bool:
    """True for `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Dotted names of rlflow modules that a syntax tree imports when it runs, inside functions too."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = module.split(".")
                source = ".".join(parts[: len(parts) + is_package - node.level] + ([source] if source else []))
            found |= {f"{source}.{alias.name}" for alias in node.names}
        elif is_type_checking(node):
            found |= set().union(*(imports(part, module, is_package) for part in node.orelse))
        else:
            found |= imports(node, module, is_package)
    return {name for name in found if name.split(".")[0] == "rlflow"}


def forbidden(module: str, imported: str) -> bool:
    """True when `module` may not import `imported`."""
    return ROOMS.index(room(imported)) > ROOMS.index(room(module))


def circles(imported: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of names that import each other, directly or not (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in imported.get(name, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in imported:
        if name not in index:
            visit(name)
    return found


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter started in `cwd`."""
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def loaded_after(code: str, cwd: Path) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running code."""
    report = "import json, sys; print('\\n' + json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    result = run_python(f"{code}\n{report}", cwd)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_package_list_equals_the_tree():
    with_code = {
        ".".join([package, *path.parent.relative_to(folder).parts])
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
    }
    assert set(SETUPTOOLS["packages"]) == with_code, "edit [tool.setuptools] packages in pyproject.toml"
    assert with_code <= set(MODULES), "a folder with code has no __init__.py"


def test_package_dir_maps_the_folders():
    assert {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()} == FOLDERS


def test_version_is_the_distributions():
    assert rlflow.__version__ == PYPROJECT["project"]["version"]


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folder_refuses_to_be_a_top_level_package(folder, tmp_path):
    wrong = run_python(f"import {folder}", ROOT)
    assert wrong.returncode != 0
    assert f"ImportError: this folder installs as rlflow.{folder}" in wrong.stderr
    right = run_python(f"import rlflow.{folder}", tmp_path)
    assert right.returncode == 0, right.stderr


@pytest.mark.parametrize("folder", MAPPED)
def test_guard_is_the_first_statement(folder):
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    first = tree.body[1 if ast.get_docstring(tree) else 0]
    assert ast.unparse(first).startswith(f"if __name__ != 'rlflow.{folder}':\n    raise ImportError(")


@functools.cache
def imported_by(module: str) -> set[str]:
    """Dotted names of rlflow modules that a module imports anywhere."""
    path = MODULES[module]
    return imports(ast.parse(path.read_text()), module, path.name == "__init__.py")


def imported_modules(module: str, code: str | None = None) -> set[str]:
    """Modules of rlflow that a module, or `code` in its place, imports anywhere."""
    names = imported_by(module) if code is None else imports(ast.parse(code), module, False)
    found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return {name for name in found if name in MODULES and name != module}


def test_imports_point_downwards():
    upwards = {module: {name for name in imported_by(module) if forbidden(module, name)} for module in MODULES}
    assert not {module: names for module, names in upwards.items() if names}


def test_every_room_is_in_the_order():
    packages = {module.partition(".")[2] for module, path in MODULES.items() if path.name == "__init__.py"} - {
        "",
        "configs",
    }
    assert packages <= set(ROOMS)
    assert {room for room in ROOMS if room != "rlflow"} <= {module.partition(".")[2] for module in MODULES}


@pytest.mark.parametrize(
    ("module", "code", "upward"),
    [
        ("rlflow.flow.grid", "from rlflow.models.dit import DiT", True),
        ("rlflow.flow.grid", "from ..models import dit", True),
        ("rlflow.flow.grid", "def f():\n    import rlflow.config.schema", True),
        ("rlflow.flow.grid", "from rlflow import models", True),
        ("rlflow.flow.grid", "if TYPE_CHECKING:\n    from rlflow.models.dit import DiT", False),
        ("rlflow.flow.grid", "from .path import score\nfrom rlflow.types import Cond\nimport torch", False),
        ("rlflow.envs.prompt", "from rlflow.rl.collector import Collector", True),
        ("rlflow.envs.captions.scenes", "from rlflow.envs.base import VecEnv", True),
        ("rlflow.rewards.base", "import rlflow.train.trainer as t", True),
        ("rlflow.rl.objectives.clip", "from rlflow.rl.learners.pieces import Later", True),
        ("rlflow.rl.batch", "from rlflow.parallel import dist", False),
        ("rlflow.report.report", "from rlflow.train.trainer import Trainer", True),
        ("rlflow.train.trainer", "from rlflow.cli import main", True),
        ("rlflow.train.trainer", "from rlflow.rl.batch import Batch\nfrom rlflow.config.recipes import load", False),
        ("rlflow.__main__", "from rlflow.cli import main", False),
    ],
)
def test_an_upward_import_is_seen(module, code, upward):
    imported = imports(ast.parse(code), module, is_package=False)
    assert any(forbidden(module, name) for name in imported) == upward


def test_no_modules_import_each_other():
    """Not even one of them inside a function."""
    assert not circles({module: imported_modules(module) for module in MODULES})


def test_a_circle_is_seen():
    graph = {module: imported_modules(module) for module in MODULES}
    graph["rlflow.flow.path"] = imported_modules(
        "rlflow.flow.path", "def f():\n    from rlflow.flow.kernels import FlowSDE"
    )
    (found,) = circles(graph)
    assert {"rlflow.flow.path", "rlflow.flow.kernels"} <= set(found)


@pytest.mark.parametrize("package", sorted({module.rpartition(".")[0] for module in MODULES} - {""}))
def test_package_is_small_enough_to_know(package):
    files = [
        path for module, path in MODULES.items() if module.rpartition(".")[0] == package and path.name != "__init__.py"
    ]
    assert len(files) <= MAX_FILES, "group its files by what a person looks for"
    assert sum(len(path.read_text().splitlines()) for path in files) <= MAX_PACKAGE_LINES


def test_files_are_short_enough_to_read():
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert not {module: n for module, n in lines.items() if n > MAX_LINES}


@pytest.mark.parametrize("name", sorted(rlflow._HOMES))
def test_public_name_has_its_home(name):
    assert getattr(rlflow, name) is getattr(import_module(rlflow._HOMES[name]), name)
    assert name in dir(rlflow)


def test_a_former_name_is_the_module_of_today(monkeypatch):
    """The same module, not a second one with classes of its own, and whoever imports it is told."""
    here = {former: now for former, now in MOVED.items() if is_installed(now)}
    assert len(here) > 5
    for former, now in here.items():
        monkeypatch.delitem(sys.modules, former, raising=False)
        with pytest.warns(DeprecationWarning, match=f"^{former} is now {now}$"):
            assert import_module(former) is import_module(now)
        assert sys.modules[now].__spec__.name == now


def is_installed(module):
    """Whether the packages that a module needs are."""
    try:
        import_module(module)
    except ModuleNotFoundError:
        return False
    return True


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Trainerr'"):
        _ = rlflow.Trainerr


def test_importing_rlflow_loads_nothing_heavy(tmp_path):
    assert not loaded_after("import rlflow", tmp_path) & HEAVY


def test_help_loads_nothing_heavy(tmp_path):
    code = """
import sys
from rlflow.cli import main
sys.argv = ["rlflow", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert not loaded_after(code, tmp_path) & HEAVY


def test_command_is_installed():
    assert PYPROJECT["project"]["scripts"] == {"rlflow": "rlflow.cli:main"}
    assert callable(import_module("rlflow.cli").main)
