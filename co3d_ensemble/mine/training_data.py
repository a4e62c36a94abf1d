"""The pairs that a run trains and validates on, by the settings under ``data``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from torch.utils.data import Dataset

from co3d_ensemble.mine.config import check_points
from co3d_ensemble.mine.pairs import Pair

# module (imported when it is asked for, some need more than others) and class; arguments of its training and validation splits.
# RealEstate10K has no third split: a few of its test clips are validated on, as in the reference.
_PAIRS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "generated": ("generated", "GeneratedPairs", {}, {"first_scene": 500_000, "n_scenes": 8, "random_target": False}),
    "co3d": ("co3d_pairs", "CO3DPairs", {"split": "train"}, {"split": "val", "random_target": False}),
    "realestate10k": (
        "realestate10k",
        "RealEstate10K",
        {"split": "train"},
        {"split": "test", "sources_per_clip": 1, "random_target": False},
    ),
    "kitti_raw": ("kitti_raw", "KITTIRaw", {"split": "train"}, {"split": "val", "sources": "left"}),
    "llff": ("llff", "LLFF", {"split": "train"}, {"split": "val", "random_target": False}),
    "flowers": ("flowers", "Flowers", {"split": "train"}, {"split": "val", "random_target": False}),
}
# arguments that tell one split from another: what gave them to both would validate on what is trained on
SPLIT_ARGUMENTS = ("split", "first_scene", "sequences", "files")


def open_pairs(config: Any) -> tuple[Dataset[Pair], Dataset[Pair]]:
    """Training and validation pairs of a ``MINEConfig``.

    Raises:
        ValueError: an option that the data set does not have, that is of another type or that would give both splits the same
            scenes, a root that nothing is read from, no pair in a split, losses or a scale that need sparse points where the data
            have none, naming the setting; or what the data set raises itself.
    """
    data = config.data
    module, name, train, val = _PAIRS[data.kind]
    data_class = getattr(importlib.import_module(f"co3d_ensemble.mine.{module}"), name)
    options, train_options, val_options = (
        OmegaConf.to_container(group, resolve=True) if OmegaConf.is_config(group) else dict(group)
        for group in (data.options, data.train_options, data.val_options)
    )
    common: dict[str, Any] = {"height": data.height, "width": data.width, "n_points": data.n_points}
    if "root" in inspect.signature(data_class).parameters:
        common["root"] = data.root
    elif data.root is not None:
        raise ValueError(f"data.root={data.root}: data.kind={data.kind} is read from no folder; experiment=NAME says what the folder holds")
    for key, given in (("options", options), ("train_options", train_options), ("val_options", val_options)):
        _check_options(data_class, f"data.{key}", given, taken=common)
    shared = [name for name in SPLIT_ARGUMENTS if name in options]
    if shared:
        name = shared[0]
        raise ValueError(f"data.options.{name}: would be that of both splits; it belongs under data.train_options or data.val_options")
    for name in ("sequences", "files"):
        twice = sorted(set(train_options.get(name) or ()) & set(val_options.get(name) or ()))
        if twice:
            raise ValueError(f"data.train_options.{name} and data.val_options.{name}: both have {twice[0]}")
    splits = {
        "training": data_class(**common, **{**train, **options, **train_options}),
        "validation": data_class(**common, **{**val, **options, **val_options}),
    }
    for split, pairs in splits.items():
        if len(pairs) == 0:
            raise ValueError(f"data.kind={data.kind}, data.root={data.root}: no {split} pair")
    if data.kind == "generated":
        _check_scenes_apart(splits["training"], splits["validation"])
    first: Pair = splits["training"][0]
    if tuple(first.source.shape[-2:]) != (data.height, data.width):
        raise ValueError(f"data.height={data.height}, data.width={data.width}: {first.name} has {tuple(first.source.shape[-2:])}")
    check_points(config, has_points=first.source_points is not None, why=f"data.kind={data.kind}: {first.name} has none")
    return splits["training"], splits["validation"]


def validation_options(data: Any) -> dict[str, Any]:
    """Arguments of a run's validation split that its ``MINEDataConfig`` or its kind of data says."""
    given = (OmegaConf.to_container(group, resolve=True) for group in (data.options, data.val_options))
    options = dict(_PAIRS[data.kind][3])
    for group in given:
        options |= group
    return options


def _check_scenes_apart(train: Any, val: Any) -> None:
    """Generated scenes are known by seed and number."""
    first, last = max(train.first_scene, val.first_scene), min(train.first_scene + train.n_scenes, val.first_scene + val.n_scenes)
    if train.seed == val.seed and first < last:
        raise ValueError(f"data.train_options and data.val_options: both have the generated scenes {first} to {last - 1}")


def _check_options(data_class: type, key: str, given: Mapping[str, Any], *, taken: Mapping[str, Any]) -> None:
    accepted = [name for name in inspect.signature(data_class).parameters if name not in taken]
    for name in given:
        if name in taken:
            raise ValueError(f"{key}.{name}: is data.{name}")
        if name not in accepted:
            raise ValueError(f"{key}.{name}: {data_class.__name__} has {', '.join(accepted)}")
    check_types(data_class, key, given)


def check_types(data_class: type, key: str, given: Mapping[str, Any]) -> None:
    """ValueError where one of some arguments of a data set, all of which it has, is not of the type that it declares."""
    types, declared = get_type_hints(data_class.__init__), inspect.signature(data_class).parameters  # type: ignore[misc]
    for name, value in given.items():
        if not _is_a(value, types[name]):
            raise ValueError(f"{key}.{name}={value!r}: expected {str(declared[name].annotation).replace('Sequence', 'list')}")


def _is_a(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_is_a(value, kind) for kind in get_args(hint))
    if get_origin(hint) is Sequence:
        return isinstance(value, (list, tuple)) and all(_is_a(entry, get_args(hint)[0]) for entry in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)
