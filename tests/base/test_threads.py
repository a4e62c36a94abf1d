"""Waiting threads sleep: what is set, when it is too late, and that every script comes in time."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from co3d_ensemble.base.threads import SPINS, sleep_when_waiting

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for folder in ("launch", "benchmarks")
    for path in (REPOSITORY / folder).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


def test_threads_sleep_soon_unless_the_user_chose_otherwise():
    environment = {}
    sleep_when_waiting(environment)
    assert environment == {"GOMP_SPINCOUNT": str(SPINS), "KMP_BLOCKTIME": "0"}
    for name, value in (("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "200")):
        chosen = {name: value}
        sleep_when_waiting(chosen)
        assert chosen == {name: value}


def test_importing_the_package_first_is_in_time():
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")}
    code = "import sys, os, co3d_ensemble; assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    answer = subprocess.run([sys.executable, "-c", code], env={**kept, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert answer.stdout.split() == [str(SPINS)], answer.stderr


def test_it_says_when_torch_was_there_before():
    assert sleep_when_waiting({}) is ("torch" not in sys.modules)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_script_imports_the_package_before_torch(script):
    """A script that imports torch first could not have its threads sleep; what only scripts import is imported after them."""
    names = []
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    heavy = [root for name in names if (root := name.partition(".")[0]) in ("torch", "torchvision", "lpips", "pytorch3d", "co3d_ensemble")]
    assert heavy[:1] in ([], ["co3d_ensemble"])
