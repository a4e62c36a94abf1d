"""The import rules of the package, read from the source of every module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "co3d_ensemble"
FLOORS = {
    "base": 0,
    "functional": 0,
    "fields": 1,
    "data": 1,
    "plugin": 2,
    "rendering": 3,
    "training": 4,
    "challenge": 4,
    "report": 4,
    "mine": 5,
    "assembly": 6,
    "composition": 7,
    "pipeline": 7,
    "fusing": 8,
    "ensemble": 9,
    "submission": 9,
    "ablation": 10,
    "fleet": 10,
    "scripts": 6,  # what launch scripts share
}
LEAVES = ("config", "config_checks", "files", "scripts", "settings")  # import only each other and base; all above floor 0 may import them
MAX_LAUNCH_LINES = 120
MODULES = sorted((REPOSITORY / PACKAGE).rglob("*.py"))
SCRIPTS = sorted((REPOSITORY / "launch").glob("*.py"))


def imported_modules(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of everything that ``source`` imports, at any depth, names of ``from`` included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What ``module`` (e.g. ``co3d_ensemble.fields.vm_field``) imports against the rules, one line each."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else ""
    if room and room not in LEAVES and room not in FLOORS:
        return [f"{module}: {room!r} has no floor in tests/test_floors.py"]
    found = []
    for line, name in imported_modules(source, module, is_package=is_package):
        problem = _problem(room, name)
        if problem:
            found.append(f"{module}:{line} imports {name}: {problem}")
    return found


def _problem(room: str, name: str) -> str | None:
    top, *rest = name.split(".")
    if top == "co3d":
        return "nothing imports co3d"
    if top == "pytorch3d" and room != "plugin":
        return "only plugin imports pytorch3d"
    if room == "functional" and top not in ("torch", PACKAGE) and top not in sys.stdlib_module_names:
        return "functional needs torch and the standard library only"
    if top != PACKAGE or not rest or rest[0] == room or rest[0].startswith("__"):
        return None
    target = rest[0]
    if target in LEAVES:
        return f"{room} imports nothing but itself" if room in ("base", "functional") else None
    if target not in FLOORS:
        return f"{target!r} has no floor"
    if room in ("", *LEAVES):
        return None if target == "base" else f"{room or PACKAGE} imports nothing of the package but base"
    if FLOORS[target] >= FLOORS[room]:
        return f"floor {FLOORS[room]} may only import below itself, {target} is on floor {FLOORS[target]}"
    return None


def _module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=_module_name)
def test_imports_go_strictly_downward(path):
    assert violations(path.read_text(encoding="utf-8"), _module_name(path), is_package=path.name == "__init__.py") == []


def test_the_package_was_found():
    assert len(MODULES) > 10


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_launch_scripts_are_thin(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LAUNCH_LINES
    tops = {name.split(".")[0] for _, name in imported_modules(source, path.stem)}
    assert not tops & {"pytorch3d", "co3d"}


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("functional.losses", "from co3d_ensemble.fields import vm_field", "below itself"),
        ("functional.losses", "import numpy as np", "standard library"),
        ("functional.losses", "from co3d_ensemble import config", "nothing but itself"),
        ("functional.losses", "from co3d_ensemble.base import precision", "below itself"),
        ("base.precision", "from co3d_ensemble.functional import types", "below itself"),
        ("base.precision", "from co3d_ensemble import files", "nothing but itself"),
        ("base.precision", "import pytorch3d", "only plugin"),
        ("fields.vm_field", "from ..data.ray_bank import RayBank", "below itself"),
        ("data.ray_bank", "from .. import fields", "below itself"),
        ("data.co3d", "def f():\n    from pytorch3d.renderer import cameras", "only plugin"),
        ("training.loop", "import importlib\nimportlib.import_module('pytorch3d._C')", "only plugin"),
        ("training.loop", "import co3d_ensemble.report.pictures", "below itself"),
        ("plugin.model", "from co3d_ensemble.rendering import render", "below itself"),
        ("plugin.model", "import co3d.utils", "nothing imports co3d"),
        ("mine.task", "from co3d_ensemble.fleet import jobs", "below itself"),
        ("fleet.run", "from co3d_ensemble.ablation import jobs", "below itself"),
        ("report.html", "from co3d_ensemble.pipeline import fuse_sequence", "below itself"),
        ("config", "from co3d_ensemble.functional import types", "nothing of the package"),
        ("attic.old", "import torch", "no floor"),
        ("pipeline", "from co3d_ensemble.attic import old", "no floor"),
    ],
)
def test_the_checker_catches(module, source, rule):
    found = violations(source, f"{PACKAGE}.{module}")
    assert len(found) == 1 and rule in found[0] and module.split(".")[0] in found[0]


def test_the_checker_reads_relative_imports_of_a_package_from_the_package_itself():
    source = "from . import vm\nfrom ..fields import vm_field"
    found = violations(source, f"{PACKAGE}.functional", is_package=True)
    assert [line.split(" imports ")[1].split(":")[0] for line in found] == [f"{PACKAGE}.fields.vm_field"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("functional.fusion", "import math\nimport torch\nfrom co3d_ensemble.functional.types import Frame\nfrom .metrics import iou"),
        ("fields.vm_field", "from co3d_ensemble.functional import vm\nfrom co3d_ensemble.config import NeRFConfig\nimport numpy"),
        ("config", "from co3d_ensemble.base.precision import AUTO\nfrom co3d_ensemble.settings import setting"),
        ("files", "from co3d_ensemble.base import precision"),
        ("plugin.renderer", "import pytorch3d\nfrom co3d_ensemble.data.ray_bank import RayBank"),
        ("pipeline", "from co3d_ensemble import mine, config, __version__\nimport co3d_ensemble.plugin"),
    ],
)
def test_the_checker_lets_pass(module, source):
    assert violations(source, f"{PACKAGE}.{module}") == []
