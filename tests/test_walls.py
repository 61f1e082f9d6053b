"""Who may import whom: the house's walls, read off the syntax tree. An import inside a function counts as much as one at the top."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("attacks", "defenses", "models", "orchestrate")
FILES = sorted(str(f.relative_to(ROOT)) for room in ROOMS for f in (ROOT / room).rglob("*.py"))

RAY = {f"orchestrate/{name}.py" for name in ("cluster", "match", "train", "sweep")}
MLFLOW = {"orchestrate/track.py"}
DOOR = {"models/torchvision_door.py"}
# What `antidote --help` and `antidote ls` read.
QUICK = ("__init__", "__main__", "recipe", "recipes", "values", "plugins", "axes", "sweeps", "secrets")
QUICK += ("cli", "cli_audit", "cli_cluster", "cli_models", "cli_sweeps")
MAY = {
    "attacks": {"numpy", "pyarrow", "PIL"},
    "defenses": {"numpy", "torch", "ot", "scipy"},
    "models": {"numpy", "torch", "open_clip", "torchvision", "safetensors"},
}


def imports(tree: ast.AST, at_import: bool = False) -> Iterator[str]:
    """Dotted names that a module imports, by statement or by `import_module("name")`; `at_import`: only as it is imported itself."""
    for node in ast.iter_child_nodes(tree):
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides which room it enters"
            assert node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
        yield from imports(node, at_import)


def tops(file: str, at_import: bool = False) -> set[str]:
    return {name.partition(".")[0] for name in imports(ast.parse((ROOT / file).read_text()), at_import)}


def foreign(names: set[str]) -> set[str]:
    return names - set(sys.stdlib_module_names)


def test_the_reader_of_imports_sees_every_kind():
    code = """
import ray.data as data, os
from torch import nn
class A:
    import numpy
    def f(self):
        from mlflow.entities import Metric
        return importlib.import_module("open_clip"), __import__("ot")
"""
    found = set(imports(ast.parse(code)))
    assert found == {"ray.data", "os", "torch.nn", "numpy", "mlflow.entities.Metric", "open_clip", "ot"}
    assert set(imports(ast.parse(code), at_import=True)) == {"ray.data", "os", "torch.nn", "numpy"}


def test_every_room_is_read():
    assert len(FILES) > 40 and {file.split("/")[0] for file in FILES} == set(ROOMS)


@pytest.mark.parametrize(("package", "doors"), [("ray", RAY), ("mlflow", MLFLOW), ("open_clip", DOOR), ("torchvision", DOOR)])
def test_a_package_enters_by_its_doors_only(package: str, doors: set[str]):
    users = {file for file in FILES if package in tops(file)}
    assert users <= doors
    assert users, f"no door imports {package}: this test has gone blind"


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("orchestrate/")])
def test_a_method_or_model_knows_its_own_room_and_a_few_packages(file: str):
    room = file.split("/")[0]
    assert foreign(tops(file)) <= MAY[room] | {room}


@pytest.mark.parametrize("name", QUICK)
def test_what_answers_at_once_imports_nothing_slow(name: str):
    assert foreign(tops(f"orchestrate/{name}.py", at_import=True)) <= {"orchestrate"}


def test_workers_never_import_the_tracker():
    """mlflow is imported by the driver and controller; train.py names the tracker, what a worker or actor runs does not."""
    for file in ("orchestrate/match.py", "orchestrate/step.py", "orchestrate/evaluate.py", "orchestrate/prepared.py"):
        names = set(imports(ast.parse((ROOT / file).read_text())))
        assert not any(name.startswith("orchestrate.track") for name in names)


@pytest.mark.parametrize("words", [["--help"], ["ls"], ["run", "--help"], ["sweep", "--help"], ["audit", "--help"]])
def test_help_and_lists_take_neither_torch_nor_ray_nor_mlflow(words: list[str]):
    code = f"""
import sys
from orchestrate.cli import main
try:
    code = main({words!r})
except SystemExit as stop:
    code = stop.code
slow = sorted({{"torch", "ray", "mlflow", "open_clip", "numpy", "pyarrow"}} & set(sys.modules))
sys.exit(f"imported: {{slow}}" if slow or code else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "antidote" in done.stdout or "Recipes" in done.stdout


def test_a_stray_package_of_a_rooms_name_is_named(tmp_path: Path):
    """A user's own `models/` in front on the path stops antidote, and the message says which file shadows ours."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import orchestrate"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"the package `models` that Python finds is {tmp_path / 'models' / '__init__.py'}, not {ROOT / 'models'}" in done.stderr
