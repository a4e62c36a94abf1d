"""Child processes of the tests."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def environment_of_child(*, threads: int | None = 1) -> dict[str, str]:
    """This process's environment for a child that imports this checkout, and what else this process has on its ``PYTHONPATH``:
    where there is no index to install from, PyTorch3D's Python files lie in such a folder.

    Args:
        threads: of OpenMP; None: as here.
    """
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**os.environ, "PYTHONPATH": path, **own}
