"""Whether a checkpoint was chosen by its scores on what it is scored on: what the reader of a table has to know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from co3d_ensemble.mine.training_data import validation_options

INSTEAD_OF_A_SPLIT, PARTS_OF_A_SPLIT = ("sequences", "files"), ("clips", "scenes", "subsets")  # lists that data sets take


def chosen_on_what_is_scored(settings: Any, dataset: str, options: Mapping[str, Any], run: Any) -> str | None:
    """A sentence for the table where ``best.pt`` was chosen on the split that is scored, else None.

    CO3D pairs and LLFF have no third split, and of RealEstate10K's test clips a few validate, as in the reference. The weights of a
    ``last.pt`` were not chosen.

    Args:
        settings: an ``EvaluateConfig``.
        dataset, options: what is scored, and the arguments of its test split.
        run: the trained run's configuration.
    """
    checkpoint = Path(settings.checkpoint)
    chosen = checkpoint.is_dir() or checkpoint.name == "best.pt"
    if not chosen or run.data.kind != dataset or _elsewhere(settings.root, run.data.root):
        return None
    validation = validation_options(run.data)
    if not (_scenes_shared if dataset == "generated" else _split_shared)(validation, options):
        return None
    split = f"split {options['split']!r} of {dataset}" if "split" in options else f"{dataset} scenes"
    return (
        f"best.pt is the best of its run's validations, which score {run.data.max_val_pairs} pairs at most of the very {split} scored "
        "here: these figures are not those of pictures that nothing was chosen on"
    )


def _elsewhere(root: str | None, trained: str | None) -> bool:
    """Whether a data set's folder is another than the training's; one that is gone may have been moved."""
    return root is not None and trained is not None and Path(trained).exists() and Path(root).resolve() != Path(trained).resolve()


def _scenes_shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    first, n, seed = zip(*((entry["first_scene"], entry["n_scenes"], entry.get("seed", 0)) for entry in (one, other)))
    return seed[0] == seed[1] and max(first) < min(first[0] + n[0], first[1] + n[1])


def _split_shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def common(names: tuple[str, ...]) -> list[bool]:
        both = [(one[name], other[name]) for name in names if one.get(name) is not None and other.get(name) is not None]
        return [bool(set(left) & set(right)) for left, right in both]

    instead = common(INSTEAD_OF_A_SPLIT)
    return any(instead) if instead else one.get("split") == other.get("split") and all(common(PARTS_OF_A_SPLIT))
