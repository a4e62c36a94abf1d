"""The data set that ``launch/evaluate_mine.py`` names, as source pictures with their views and depths."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from co3d_ensemble.mine.clip_pairs import ClipFrames, draw_clip_pairs, read_clip_pairs
from co3d_ensemble.mine.protocols import RULES, ClipTasks, PairTasks, ScoreRules, SourceTasks, rules_of
from co3d_ensemble.mine.training_data import SPLIT_ARGUMENTS, check_types

# module (imported when it is asked for, some need more than others) and class; arguments that its test split has
_PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "generated": ("generated", "GeneratedPairs", {"first_scene": 1_000_000, "n_scenes": 20, "random_target": False}),
    "co3d": ("co3d_pairs", "CO3DPairs", {"split": "val", "random_target": False}),
    "realestate10k": ("realestate10k", "RealEstate10K", {"split": "test"}),
    "kitti_raw": ("kitti_raw", "KITTIRaw", {"split": "test", "sources": "left"}),
    "llff": ("llff", "LLFF", {"split": "val", "random_target": False}),
    "flowers": ("flowers", "Flowers", {"split": "test", "random_target": False}),
    "nyu_depth": ("nyu_depth", "NYUDepth", {"split": "test"}),
    "ibims": ("ibims", "IBims", {}),
}
TEST_SETS = tuple(_PAIRS)
DEPTH_ONLY = ("nyu_depth", "ibims")
NOT_OF_CLIPS = ("max_frame_distance", "frame_distance", "sources_per_clip", "random_target")  # what RealEstate10K's protocol decides


def open_test_set(dataset: str, settings: Any, run: Any) -> tuple[SourceTasks, ScoreRules, list[str]]:
    """Opens a data set's test split at the network's size.

    Args:
        dataset: one of ``TEST_SETS``.
        settings: an ``EvaluateConfig``.
        run: the trained run's configuration; where it was trained on this data set, its root counts and so do its options, but not
            those that chose what it was validated on.

    Returns:
        The sources, how they are scored, and notes for the table.

    Raises:
        ValueError: no root, or one that nothing is read from, options that the data set does not have, that are of another type or
            that its protocol decides, a list of pairs for another data set than RealEstate10K, or what the data set raises itself.
    """
    module, name, _ = _PAIRS[dataset]
    data_class = getattr(importlib.import_module(f"co3d_ensemble.mine.{module}"), name)
    options = test_options(dataset, settings, run)
    root = test_root(dataset, settings, run)
    accepted = inspect.signature(data_class).parameters
    unknown = sorted(options.keys() - accepted.keys() | options.keys() & {"root"})
    if unknown:
        raise ValueError(f"options.{unknown[0]}: {name} has {', '.join(key for key in accepted if key != 'root')}")
    check_types(data_class, "options", settings.options)
    decided = sorted(set(NOT_OF_CLIPS) & settings.options.keys()) if dataset == "realestate10k" else []
    if decided:
        raise ValueError(f"options.{decided[0]}: the protocol chooses the pairs, see pair_list and pairs_per_clip")
    if settings.pair_list is not None and dataset != "realestate10k":
        raise ValueError(f"pair_list={settings.pair_list}: only dataset=realestate10k has such lists, not {dataset}")
    if "root" in accepted:
        if root is None:
            raise ValueError(f"root is missing: {dataset} is read from a folder (root=FOLDER)")
        options["root"] = root
    elif settings.root is not None:
        raise ValueError(f"root={settings.root}: {dataset} pictures are read from no folder; dataset=NAME says what the folder holds")
    pairs = data_class(**options)
    rules = rules_of(dataset)
    if dataset not in RULES:
        rules = replace(rules, depth_alignment=run.evaluation.depth_alignment)
    if dataset == "realestate10k":
        tasks, notes = _clips(pairs, settings)
        return tasks, rules, notes
    return PairTasks(pairs, row=None if dataset in DEPTH_ONLY else rules.row, seed=settings.seed), rules, []


def test_root(dataset: str, settings: Any, run: Any) -> str | None:
    """The folder that is read: the settings' own, else that of the training where it was on this data set."""
    return settings.root or (run.data.root if run.data.kind == dataset else None)


def test_options(dataset: str, settings: Any, run: Any) -> dict[str, Any]:
    """Arguments of the data set's test split, but for its root; see :func:`open_test_set`."""
    defaults = _PAIRS[dataset][2]
    options: dict[str, Any] = {"height": run.data.height, "width": run.data.width, "n_points": run.data.n_points, **defaults}
    if run.data.kind == dataset:
        options |= _of_the_run(run.data, defaults)
    if settings.scale == "none":
        options["n_points"] = 0
    return options | settings.options


def _of_the_run(data: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a training that hold for the test split as well."""
    both, val = (OmegaConf.to_container(group, resolve=True) for group in (data.options, data.val_options))
    chosen = {**{name: value for name, value in val.items() if name not in defaults}, **both}
    return {name: value for name, value in chosen.items() if name not in SPLIT_ARGUMENTS}


def _clips(dataset: Any, settings: Any) -> tuple[ClipTasks, list[str]]:
    """RealEstate10K's protocol: its targets are chosen here, the data set only loads the frames."""
    clips = {name: ClipFrames(clip.numbers.tolist(), clip.timestamps) for name, clip in dataset.clips.items()}
    if settings.pair_list is None:
        pairs = draw_clip_pairs(clips, per_clip=settings.pairs_per_clip, seed=settings.seed)
        notes = [f"pairs: drawn from {len(clips)} clips, {settings.pairs_per_clip} sources each, seed {settings.seed}"]
        if not pairs:
            raise ValueError(f"none of {len(clips)} clips has a frame with others within 5 lines after it")
    else:
        pairs, n_missing = read_clip_pairs(settings.pair_list, clips)
        notes = [
            f"pairs: {len(pairs)} of {len(pairs) + n_missing} of {settings.pair_list}, the others' clips, frames or points are not there"
        ]
    return ClipTasks(dataset.clip_view, pairs, n_points=dataset.n_points, seed=settings.seed), notes
