"""Implicitron's own trainer with our components registered::

    python -m co3d_ensemble.plugin.experiment --config-name co3d_nerf_small exp_dir=OUT KEY=VALUE ...

Tried with PyTorch3D 0.7.9's source, not compiled, torch 2.13 (CPU), hydra 1.3.8, accelerate 1.2.1, no visdom:

- ``co3d_nerf_small`` on CO3D's ``apple`` with ``dataset_length_train=150 max_epochs=2``: objective 2.9 at the first step, 0.38 on
  average over the second epoch; val photographs, checkpoints, plots; 0.05 s per step on one core. Also on a generated sequence,
  and resumed there. Category, ``exp_dir`` and the data root are all that must be set; no compiled op without stand-in is called.
- ``co3d_tensorf_small`` on ``cape``: objective 3.2 at the first step, 0.7 on average over the third epoch (60 steps, 0.05 s each);
  resumed. The optimizer has the factors at ``lr`` and the colour network at ``group_learning_rates``.
- ``accelerate`` is imported whatever the settings; ``visdom`` is optional: without it the trainer says so and goes on.
- The trainer must be of PyTorch3D's own version: 0.7.9's over 0.7.4's files ends with an AttributeError at its first line of
  figures (``Stats.get_status_string``). 0.7.4's own trains, validates and writes the checkpoint, then ends with a ValueError as
  it plots after the first epoch (``grid_b``, which matplotlib 3.11 refuses): it needs an older matplotlib.
- ``lr_policy`` Exponential and LinearExponential end with a TypeError (``verbose``, which torch removed from schedulers), its
  evaluator (``test_interval``, ``test_when_finished``, ``eval_only``) with a URLError where LPIPS cannot load its weights.
- With the implicit function's default ``density_bias`` 0, rays from 3 to 24 started opaque, and the last pass did not learn its
  mask in 60 steps: the files set -3.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import co3d_ensemble.plugin  # noqa: F401 - registers our components, which must precede the import of the trainer

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs" / "implicitron"
TRAINERS = ("pytorch3d.implicitron_trainer", "projects.implicitron_trainer")  # as installed; as in a clone of PyTorch3D
NEEDED_MODULES = ("experiment", "impl.model_factory", "impl.optimizer_factory", "impl.training_loop")
NEEDED_PACKAGES = {"hydra": "hydra-core", "accelerate": "accelerate"}  # the trainer cannot be imported without them
EXIT_MISSING = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Hands ``arguments`` (default: the command line) over to Implicitron's ``experiment``.

    Returns:
        0, or ``EXIT_MISSING`` after a message on stderr where the trainer or a package that it needs is not installed.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    trainer, problems = find_trainer()
    problems += [f"the package `{name}`: pip install {name}" for module, name in NEEDED_PACKAGES.items() if not _exists(module)]
    if trainer is None or problems:
        sys.stderr.write("Implicitron's trainer cannot run here. Missing:\n" + "".join(f"- {line}\n" for line in problems))
        return EXIT_MISSING
    sys.argv = [sys.argv[0], *with_config_path(arguments)]  # hydra reads the command line itself
    importlib.import_module(f"{trainer}.experiment").experiment()
    return 0


def find_trainer() -> tuple[str | None, list[str]]:
    """The importable name of a complete trainer, else None and what is missing and how to get it."""
    if _exists("projects"):  # PyTorch3D's wheels install an empty package of this name, which hides a clone's folder
        projects = importlib.import_module("projects")
        projects.__path__ = pkgutil.extend_path(projects.__path__, "projects")
    gaps = {}
    for trainer in TRAINERS:
        gaps[trainer] = [f"{trainer}.{name}" for name in NEEDED_MODULES if not _exists(f"{trainer}.{name}")]
        if not gaps[trainer]:
            return trainer, []
    found = [trainer for trainer in TRAINERS if len(gaps[trainer]) < len(NEEDED_MODULES)]
    # PyTorch3D's wheels have the trainer's entry point and nothing of what it imports
    missing = ", ".join(gaps[found[0]]) if found else " or ".join(TRAINERS)
    from pytorch3d import __version__

    return None, [
        f"{missing}: git clone --branch v{__version__} https://github.com/facebookresearch/pytorch3d CLONE, then either build and "
        "install it (its INSTALL.md), or, without compiling, put it on the path: PYTHONPATH=CLONE python -m ..."
    ]


def with_config_path(arguments: Sequence[str]) -> list[str]:
    """``arguments`` with an absolute ``--config-path``: the user's, else their ``--config-dir``, else ``CONFIG_DIR``.

    The trainer's own default, ``./configs/``, is one that hydra cannot find when the trainer is imported and not run as a
    file, and hydra takes a relative path as relative to the trainer's module, not to the working directory.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-path", "-cp")
    folders, others = parser.parse_known_args(list(arguments))
    primary = folders.config_path or folders.config_dir or str(CONFIG_DIR)
    options = ["--config-path", str(Path(primary).resolve())]
    if folders.config_path and folders.config_dir:
        options += ["--config-dir", str(Path(folders.config_dir).resolve())]
    return options + others


def _exists(module: str) -> bool:
    """Whether ``module`` can be found; imports its parents, not itself."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
