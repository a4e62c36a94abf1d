"""pycolmap in a process of its own: from 4.1 on it breaks Pillow where both are loaded (saving a PNG aborts or never ends).

The parent calls :func:`run_pycolmap`; the child is this file, which imports nothing of the package and neither torch nor Pillow.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

INSTALL = "pycolmap is needed to triangulate points: pip install 'co3d_ensemble[points]'"
SHOWN_LINES = 5  # of a failed child's output


def require_pycolmap() -> None:
    """ModuleNotFoundError that says what to install, without loading it."""
    if importlib.util.find_spec("pycolmap") is None:
        raise ModuleNotFoundError(INSTALL)


def run_pycolmap(task: str, what: Path, **arguments: str | list[str] | dict[str, str]) -> None:
    """Runs ``extract`` or ``triangulate`` (see below) in a child process.

    Args:
        what: the folder that it is about, for messages.

    Raises:
        ModuleNotFoundError: pycolmap is not installed.
        ValueError: the child failed; names ``what``, with the last lines that the child wrote.
    """
    require_pycolmap()
    # -P: the child's own folder, which has modules of other people's names, is not searched
    command = [sys.executable, "-P", str(Path(__file__).resolve()), task]
    done = subprocess.run(command, input=json.dumps(arguments), capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-SHOWN_LINES:]
        raise ValueError(f"{what}: pycolmap failed to {task} ({done.returncode}): {' | '.join(last)}")


def extract(pycolmap: Any, database: str, pictures: str, names: list[str]) -> None:
    """Features of the pictures ``names`` of a folder into a new database, a camera each."""
    pycolmap.extract_features(database, pictures, image_names=names, camera_mode=pycolmap.CameraMode.PER_IMAGE)


def triangulate(pycolmap: Any, database: str, pictures: str, known: str, found: str, renamed: dict[str, str]) -> None:
    """Matches neighbours in the order of names and triangulates them in the model ``known``, into the folder ``found``.

    Args:
        renamed: names that the images get in the end.
    """
    pycolmap.match_sequential(database)
    model = pycolmap.triangulate_points(pycolmap.Reconstruction(known), database, pictures, found)
    for image in model.images.values():
        image.name = renamed[image.name]
    model.write(found)


def _main() -> None:
    import pycolmap

    {"extract": extract, "triangulate": triangulate}[sys.argv[1]](pycolmap, **json.load(sys.stdin))


if __name__ == "__main__":
    _main()
