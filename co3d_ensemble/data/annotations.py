"""Frame annotations of a CO3Dv2 category: from what the JSON says to checked records.

What cannot be understood (a path out of the root, a name that is none, a part of another type) is an error that names file, frame
and key. Numbers are taken as they are, NaN for what is none: one bad camera must not hide the others, and ``audit.py`` names it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from co3d_ensemble.base.messages import shown
from co3d_ensemble.base.paths import inside, plain_part
from co3d_ensemble.data.json_files import read_json
from co3d_ensemble.functional.cameras import pinhole_from_ndc
from co3d_ensemble.functional.types import PinholeCamera

FRAME_ANNOTATIONS_FILE = "frame_annotations.jgz"
DEFAULT_INTRINSICS_FORMAT = "ndc_norm_image_bounds"  # what Implicitron assumes where the annotation gives none
MAX_FRAME_NUMBER = 2**53  # every integer up to here is exact in a float, which some programs write, and fits a tensor
MAX_SIDE = 65_535  # pixels: what JPEG can hold

FrameKey = tuple[str, int]


@dataclass(frozen=True)
class FrameRecord:
    """One frame annotation; nothing is opened or checked (see ``audit.py``).

    Attributes:
        frame_number: the dataset's number, not the one in the file's name.
        image_path, mask_path, depth_path, depth_mask_path: under the root; None where the annotation names no file.
        mask_mass: soft number of mask pixels, None when not annotated.
        depth_scale_adjustment: factor from the depth PNG's float16 to world units.
        height, width: annotated picture size in pixels, 0 when the annotation gives none.
        R: rotation as three rows, T: translation, ``X_view = X_world @ R + T``; NaN where the annotation is malformed.
        focal, principal: normalised as ``intrinsics_format`` says.
        frame_type: e.g. ``dev_known``, ``test_unseen``; empty when not annotated.
    """

    category: str
    sequence_name: str
    frame_number: int
    frame_timestamp: float
    image_path: Path
    mask_path: Path | None
    mask_mass: float | None
    depth_path: Path | None
    depth_mask_path: Path | None
    depth_scale_adjustment: float
    height: int
    width: int
    R: tuple[tuple[float, ...], ...]
    T: tuple[float, ...]
    focal: tuple[float, ...]
    principal: tuple[float, ...]
    intrinsics_format: str
    frame_type: str

    @property
    def name(self) -> str:
        return f"{self.sequence_name}/{self.frame_number}"

    @property
    def key(self) -> FrameKey:
        return self.sequence_name, self.frame_number

    def camera(self) -> PinholeCamera:
        """Float32 camera with intrinsics in pixels of the annotated picture size."""
        return pinhole_from_ndc(
            torch.tensor(self.R),
            torch.tensor(self.T),
            torch.tensor(self.focal),
            torch.tensor(self.principal),
            height=self.height,
            width=self.width,
            intrinsics_format=self.intrinsics_format,
        )


class CategoryAnnotations:
    """Parsed frame annotations of a category; records are built when asked for, as a category may have 100,000 frames.

    Raises:
        ValueError: the file is missing, corrupt or no list of annotations, naming the entry and the key.
    """

    def __init__(self, root: Path, category: str) -> None:
        self.root, self.category = root, category
        self.path = root / category / FRAME_ANNOTATIONS_FILE
        entries = read_json(self.path)
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{self.path}: expected a non-empty list of frame annotations")
        self.by_key: dict[FrameKey, dict[str, Any]] = {}
        self.repeated: set[FrameKey] = set()
        self.keys_of_path: dict[str, list[FrameKey]] = {}
        self._records: dict[FrameKey, FrameRecord] = {}
        for i, entry in enumerate(entries):
            try:
                key, path = _identity(entry, root)
            except ValueError as error:
                raise ValueError(f"{self.path}: entry {i} {error}") from error
            if key in self.by_key:
                self.repeated.add(key)  # the first one counts
                continue
            self.by_key[key] = entry
            self.keys_of_path.setdefault(path, []).append(key)

    def record(self, key: FrameKey) -> FrameRecord | None:
        """The frame's record, or None where it is not annotated.

        Raises:
            ValueError: a part of it is of another type, or a path leads out of the root.
        """
        if key not in self._records:
            if key not in self.by_key:
                return None
            try:
                self._records[key] = _record_from_annotation(self.by_key[key], key, self.category, self.root)
            except ValueError as error:
                raise ValueError(f"{self.path}: frame {key[0]}/{key[1]}: {error}") from error
        return self._records[key]


def frame_key(sequence_name: Any, frame_number: Any) -> FrameKey:
    """The identity of a frame as annotations and lists give it.

    Raises:
        ValueError: a name that cannot be a folder's, or a number that is no integer (3.0 is one, 3.7, true and "3" are not).
    """
    name = plain_part(sequence_name, "sequence_name")
    is_number = isinstance(frame_number, (int, float)) and not isinstance(frame_number, bool)
    if not is_number or not abs(frame_number) <= MAX_FRAME_NUMBER or frame_number != int(frame_number):
        raise ValueError(f"frame_number={shown(frame_number)}: expected an integer")
    return name, int(frame_number)


def _identity(entry: Any, root: Path) -> tuple[FrameKey, str]:
    """(sequence, frame number) and the picture's path, normalised, relative to the root; errors are predicates of the entry."""
    if not isinstance(entry, dict):
        raise ValueError(f"is no object: {shown(entry)}")
    image = entry.get("image")
    lacking = [name for name in ("sequence_name", "frame_number") if name not in entry]
    if not isinstance(image, dict) or "path" not in image:
        lacking.append("image.path")
    if lacking:
        raise ValueError(f"lacks {', '.join(lacking)}")
    try:
        _path(root, image["path"], "image.path")
        return frame_key(entry["sequence_name"], entry["frame_number"]), os.path.normpath(image["path"])
    except ValueError as error:
        raise ValueError(f"is malformed: {error}") from error


def _record_from_annotation(entry: dict[str, Any], key: FrameKey, category: str, root: Path) -> FrameRecord:
    mask, depth, viewpoint, meta = (_section(entry, name) for name in ("mask", "depth", "viewpoint", "meta"))
    rows = viewpoint.get("R")
    height, width = (_side(value) for value in _numbers(entry["image"].get("size"), 2))
    return FrameRecord(
        category=category,
        sequence_name=key[0],
        frame_number=key[1],
        frame_timestamp=_number(entry.get("frame_timestamp")),
        image_path=_path(root, entry["image"]["path"], "image.path"),
        mask_path=_optional_path(root, mask.get("path"), "mask.path"),
        mask_mass=None if mask.get("mass") is None else _number(mask["mass"]),
        depth_path=_optional_path(root, depth.get("path"), "depth.path"),
        depth_mask_path=_optional_path(root, depth.get("mask_path"), "depth.mask_path"),
        depth_scale_adjustment=_number(depth.get("scale_adjustment", 1.0)),
        height=height,
        width=width,
        R=tuple(_numbers(row, 3) for row in (rows if isinstance(rows, list) and len(rows) == 3 else (None,) * 3)),
        T=_numbers(viewpoint.get("T"), 3),
        focal=_numbers(viewpoint.get("focal_length"), 2),
        principal=_numbers(viewpoint.get("principal_point"), 2),
        intrinsics_format=_text(viewpoint, "intrinsics_format", "viewpoint.") or DEFAULT_INTRINSICS_FORMAT,
        frame_type=_text(meta, "frame_type", "meta."),
    )


def _section(entry: dict[str, Any], name: str) -> dict[str, Any]:
    section = entry.get(name)
    if section is not None and not isinstance(section, dict):
        raise ValueError(f"{name}: expected an object or null, got {shown(section)}")
    return section or {}


def _text(section: dict[str, Any], name: str, prefix: str) -> str:
    value = section.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{prefix}{name}: expected text, got {shown(value)}")
    return value or ""


def _path(root: Path, value: Any, key: str) -> Path:
    try:
        return inside(root, value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _optional_path(root: Path, value: Any, key: str) -> Path | None:
    return None if value is None or value == "" else _path(root, value, key)


def _number(value: Any) -> float:
    """``value`` as a float; NaN where it is none or has no room in one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _numbers(values: Any, n: int) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != n:
        return (math.nan,) * n
    return tuple(_number(value) for value in values)


def _side(value: float) -> int:
    """A side of a picture in pixels, 0 for what cannot be one."""
    return int(value) if 1 <= value <= MAX_SIDE and value == int(value) else 0
