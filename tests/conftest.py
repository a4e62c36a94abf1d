"""What all tests share. Nothing of PyTorch3D is imported here: tests of floors 0 and 1 run without it."""

from __future__ import annotations

import atexit
import gc
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from co3d_ensemble.base import precision

REPOSITORY = Path(__file__).resolve().parent.parent
_IMPORTS_PYTORCH3D = re.compile(r"^\s*(import|from)\s+pytorch3d\b", re.MULTILINE)

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # what was compiled on another CPU, or for less of this one, may abort here
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="co3d_ensemble_compiled_")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

torch.set_num_threads(1)  # test tensors are small: more threads only wait for each other, ten times as long beside other processes


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> None:
    """A test file that imports PyTorch3D itself gets the stand-ins first, whatever the order of its imports."""
    if _IMPORTS_PYTORCH3D.search(module_path.read_text(encoding="utf-8")):
        from co3d_ensemble.plugin import compat

        compat.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is there by now stays: composing a configuration takes 13 % less time where no collection looks at all of PyTorch3D."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def never_waits() -> Any:
    """A context in which CUDA work that makes the host wait is an error."""

    @contextmanager
    def guard() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return guard


@pytest.fixture(scope="session", autouse=True)
def auto_is_float32() -> Iterator[None]:
    """``precision: auto`` is float32 in this process whatever its CPU: what a test asks of numbers holds on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Root of real sequences in CO3Dv2 layout, from ``CO3D_ENSEMBLE_TEST_DATA`` or beside the repository."""
    root = Path(os.environ.get("CO3D_ENSEMBLE_TEST_DATA") or REPOSITORY.parent / "shared" / "data" / "co3d")
    if not (root / "category_to_subset_name_list.json").is_file():
        pytest.skip("no real sequences here: set CO3D_ENSEMBLE_TEST_DATA to a CO3Dv2 root")
    return root


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A tiny generated data set with one sequence, to be left as it is."""
    from tests.tiny import generated

    return generated(tmp_path_factory.mktemp("root"), {"mug": ["manyview_dev_0"]})
