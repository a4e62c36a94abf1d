"""Index of a CO3Dv2 root: categories, subsets, and which frame is known, validation or target.

Reads the JSON only, never a picture; ``audit.py`` looks at the files. Format: https://github.com/facebookresearch/co3d
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from co3d_ensemble.functional.cameras import pinhole_from_ndc
from co3d_ensemble.functional.types import PinholeCamera

logger = logging.getLogger(__name__)

SUBSET_LIST_FILE = "category_to_subset_name_list.json"
FRAME_ANNOTATIONS_FILE = "frame_annotations.jgz"
KNOWN, VAL, TARGET, SOURCE = "known", "val", "target", "source"  # the roles; SOURCE: few-view input of a target
DEFAULT_INTRINSICS_FORMAT = "ndc_norm_image_bounds"  # what Implicitron assumes where the annotation gives none

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


@dataclass(frozen=True)
class ListFault:
    """What a set list or the eval batches say that the frame annotations contradict.

    Attributes:
        kind: ``unknown_frame`` | ``label_mismatch`` | ``duplicate``.
        role: the role of the list that holds the entry.
        path: picture path as the list gives it, else the list's own path, relative to the root.
    """

    kind: str
    role: str
    key: FrameKey
    path: str
    message: str


@dataclass(frozen=True)
class EvalBatch:
    """One evaluation: a target, and in few-view the frames it may be rendered from."""

    target: FrameRecord
    sources: tuple[FrameRecord, ...]


@dataclass(frozen=True)
class Subset:
    """The frames of one subset. ``known``, ``val`` and ``targets`` share no (sequence, frame number).

    Attributes:
        known: frames to train on, in the set list's order.
        val: frames to validate on.
        targets: frames to render, each once, in the eval batches' order.
        eval_batches: with the sources of few-view; a target may stand in several.
        list_faults: entries that contradict the annotations or each other.
        scorable: keys of targets with a usable picture and mask; None until ``audit.usable_frames`` has run.
    """

    category: str
    name: str
    known: tuple[FrameRecord, ...]
    val: tuple[FrameRecord, ...]
    targets: tuple[FrameRecord, ...]
    eval_batches: tuple[EvalBatch, ...] = ()
    list_faults: tuple[ListFault, ...] = ()
    scorable: frozenset[FrameKey] | None = None

    @property
    def sequence_names(self) -> tuple[str, ...]:
        """Sequences of all frames, sorted."""
        return tuple(sorted({record.sequence_name for record in self.known + self.val + self.targets}))

    @property
    def sequence_name(self) -> str:
        """The one sequence of a many-view subset.

        Raises:
            ValueError: the subset has none or several.
        """
        if len(self.sequence_names) != 1:
            raise ValueError(f"{self.category}/{self.name} has {len(self.sequence_names)} sequences, expected 1: {self.sequence_names}")
        return self.sequence_names[0]


class CO3DIndex:
    """A CO3Dv2 root folder. Annotations are parsed once per category and kept.

    Raises:
        ValueError: ``root`` is not a CO3Dv2 root; the message says where the root seems to be.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._annotations: dict[str, _CategoryAnnotations] = {}
        path = self.root / SUBSET_LIST_FILE
        if not path.is_file():
            raise ValueError(_wrong_root_message(self.root))
        subsets = _read_json(path)
        well_formed = isinstance(subsets, dict) and all(isinstance(names, list) for names in subsets.values())
        if not well_formed or not subsets:
            raise ValueError(f"{path}: expected a non-empty object {{category: [subset name, ...]}}")
        self._subsets: dict[str, list[str]] = subsets

    def categories(self) -> list[str]:
        return list(self._subsets)

    def subsets(self, category: str) -> list[str]:
        """Subset names of a category; ValueError lists the categories when it is unknown."""
        if category not in self._subsets:
            raise ValueError(f"category {category!r} is not in {self.root / SUBSET_LIST_FILE}; available: {', '.join(self._subsets)}")
        return list(self._subsets[category])

    def all_subsets(self, sequence_set: Iterable[str], task: str = "manyview") -> list[tuple[str, str]]:
        """(category, subset name) of every subset of the given sets, with an index (``manyview_dev_0``) or without.

        Args:
            sequence_set: e.g. ``["dev", "test"]``.
            task: ``manyview`` or ``fewview``.
        """
        if isinstance(sequence_set, str):
            raise ValueError(f"sequence_set={sequence_set!r}: expected a list such as ['dev', 'test']")
        prefixes = [f"{task}_{name}" for name in sequence_set]
        return [
            (category, name)
            for category, names in self._subsets.items()
            for name in names
            if any(name == prefix or name.startswith(prefix + "_") for prefix in prefixes)
        ]

    def frame(self, category: str, sequence_name: str, frame_number: int) -> FrameRecord:
        """One annotated frame; ValueError when the annotations lack it."""
        annotations = self._category(category)
        record = annotations.record((sequence_name, frame_number))
        if record is None:
            raise ValueError(f"{annotations.path}: no frame {frame_number} of sequence {sequence_name!r}")
        return record

    def subset(self, category: str, name: str) -> Subset:
        """Frames of a subset by role.

        Targets are the first entries of the eval batches; known is the set list's ``train`` without the targets, val its
        ``val`` without both. Frame keys are the only identity, so an entry listed twice has one role.

        Raises:
            ValueError: unknown category or subset, or a missing or corrupt file, which it names.
        """
        if name not in self.subsets(category):
            raise ValueError(f"subset {name!r} of {category!r} does not exist; available: {', '.join(self.subsets(category))}")
        lists_path = self.root / category / "set_lists" / f"set_lists_{name}.json"
        lists = _read_json(lists_path)
        if not isinstance(lists, dict) or "train" not in lists:
            raise ValueError(f"{lists_path}: expected an object with the lists train, val and test")
        batches_path = self.root / category / "eval_batches" / f"eval_batches_{name}.json"
        if batches_path.is_file():
            raw_batches = _read_json(batches_path)
        else:
            logger.warning("%s is missing: the targets are the list 'test' of %s", batches_path, lists_path)
            raw_batches, batches_path = [[entry] for entry in lists.get("test") or []], lists_path

        reader = _ListReader(self.root, self._category(category))
        batches = reader.eval_batches(raw_batches, batches_path)
        targets = reader.claim(TARGET, [batch.target for batch in batches])
        known = reader.claim(KNOWN, reader.records(lists["train"], lists_path, KNOWN))
        val = reader.claim(VAL, reader.records(lists.get("val") or [], lists_path, VAL))
        return Subset(category, name, known, val, targets, tuple(batches), tuple(reader.faults))

    def _category(self, category: str) -> _CategoryAnnotations:
        if category not in self._annotations:
            self.subsets(category)  # names the available ones
            self._annotations[category] = _CategoryAnnotations(self.root, category)
        return self._annotations[category]


class _CategoryAnnotations:
    """Parsed frame annotations of a category; records are built when asked for, as a category may have 100,000 frames."""

    def __init__(self, root: Path, category: str) -> None:
        self.root, self.category = root, category
        self.path = root / category / FRAME_ANNOTATIONS_FILE
        entries = _read_json(self.path)
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{self.path}: expected a non-empty list of frame annotations")
        self.by_key: dict[FrameKey, dict[str, Any]] = {}
        self.repeated: set[FrameKey] = set()
        self.keys_of_path: dict[str, list[FrameKey]] = {}
        self._records: dict[FrameKey, FrameRecord] = {}
        for i, entry in enumerate(entries):
            try:
                key = (str(entry["sequence_name"]), int(entry["frame_number"]))
                path = os.path.normpath(entry["image"]["path"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.path}: entry {i} lacks sequence_name, frame_number or image.path ({error!r})") from error
            if key in self.by_key:
                self.repeated.add(key)  # the first one counts
                continue
            self.by_key[key] = entry
            self.keys_of_path.setdefault(path, []).append(key)

    def record(self, key: FrameKey) -> FrameRecord | None:
        if key not in self._records:
            if key not in self.by_key:
                return None
            self._records[key] = _record_from_annotation(self.by_key[key], self.category, self.root)
        return self._records[key]


class _Entry(NamedTuple):
    """An entry of a set list or an eval batch, ``[sequence, frame number, picture path]``; the path may be left out."""

    key: FrameKey
    picture: str | None
    list_path: Path

    @classmethod
    def parse(cls, raw: Any, list_path: Path) -> _Entry:
        try:
            picture = os.path.normpath(raw[2]) if len(raw) > 2 else None
            return cls((str(raw[0]), int(raw[1])), picture, list_path)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{list_path}: entry {raw!r} is not [sequence, frame number, picture path]") from error


class _ListReader:
    """Turns list entries into records, noting what contradicts the annotations; holds which frame is taken by which role."""

    def __init__(self, root: Path, annotations: _CategoryAnnotations) -> None:
        self.root, self.annotations = root, annotations
        self.faults: list[ListFault] = []
        self._role_of: dict[FrameKey, str] = {}

    def eval_batches(self, raw: Any, path: Path) -> list[EvalBatch]:
        batches: list[EvalBatch] = []
        seen = set()
        for i, entries in enumerate(_checked_list(raw, path)):
            if not isinstance(entries, list) or not entries:
                raise ValueError(f"{path}: batch {i} is not a non-empty list of entries: {entries!r}")
            target = self.records(entries[:1], path, TARGET)
            sources = self.records(entries[1:], path, SOURCE)
            if not target:
                continue
            batch = EvalBatch(target[0], tuple(sources))
            identity = (batch.target.key, tuple(source.key for source in sources))
            if identity in seen:
                entry = _Entry.parse(entries[0], path)
                self._fault("duplicate", TARGET, entry, "stands twice in the eval batches; it is rendered once")
                continue
            seen.add(identity)
            batches.append(batch)
        return batches

    def records(self, raw: Any, path: Path, role: str) -> list[FrameRecord]:
        """Records of ``[sequence, frame number, picture path]`` entries; entries without annotation become faults."""
        records = []
        for raw_entry in _checked_list(raw, path):
            entry = _Entry.parse(raw_entry, path)
            record = self.annotations.record(entry.key)
            picture = entry.picture or (relative_path(record.image_path, self.root) if record else None)
            owners = [key for key in self.annotations.keys_of_path.get(picture, ()) if key != entry.key]
            self._check_label(record, entry, owners, role)
            if role == TARGET:  # a mislabelled target also withholds the frame whose picture it names
                self._role_of.update({owner: TARGET for owner in owners})
            if record is not None:
                records.append(record)
        return records

    def claim(self, role: str, records: Sequence[FrameRecord]) -> tuple[FrameRecord, ...]:
        """The records that no earlier role has, each once: the one place that makes the roles disjoint."""
        claimed: dict[FrameKey, FrameRecord] = {}
        for record in records:
            owner = self._role_of.get(record.key)
            if record.key in claimed:
                if role != TARGET:  # few-view repeats a target per number of sources; true repeats are noted in eval_batches
                    self._note_repeat(record, role, f"stands twice in the {role} list")
            elif owner is not None and role != TARGET:
                self._note_repeat(record, role, f"is listed as {role} but stays {owner}")
            else:
                claimed[record.key] = record
        self._role_of.update({key: role for key in claimed})
        return tuple(claimed.values())

    def _note_repeat(self, record: FrameRecord, role: str, what: str) -> None:
        path = relative_path(record.image_path, self.root)
        self.faults.append(ListFault("duplicate", role, record.key, path, f"{path}: frame {record.name} {what}"))

    def _check_label(self, record: FrameRecord | None, entry: _Entry, owners: list[FrameKey], role: str) -> None:
        if record is None and owners:
            owner = f"{owners[0][0]}/{owners[0][1]}"
            self._fault("label_mismatch", role, entry, f"is not annotated; the annotations give this picture to {owner}")
        elif record is None:
            self._fault("unknown_frame", role, entry, f"is not in {FRAME_ANNOTATIONS_FILE}")
        else:
            annotated = relative_path(record.image_path, self.root)
            if entry.picture is not None and entry.picture != annotated:
                self._fault("label_mismatch", role, entry, f"has the picture {annotated} in the annotations")
            elif owners:
                self._fault("label_mismatch", role, entry, f"shares its picture with {owners[0][0]}/{owners[0][1]} in the annotations")
        if entry.key in self.annotations.repeated:
            self._fault("duplicate", role, entry, f"is annotated twice in {FRAME_ANNOTATIONS_FILE}; the first counts")

    def _fault(self, kind: str, role: str, entry: _Entry, what: str) -> None:
        list_name = relative_path(entry.list_path, self.root)
        picture = entry.picture or list_name
        message = f"{picture}: frame {entry.key[0]}/{entry.key[1]} of {list_name} {what}"
        self.faults.append(ListFault(kind, role, entry.key, picture, message))


def relative_path(path: Path | str, root: Path | str) -> str:
    """``path`` as messages show it: relative to the root."""
    return os.path.relpath(path, root)


def _record_from_annotation(entry: dict[str, Any], category: str, root: Path) -> FrameRecord:
    mask, depth, viewpoint, meta = (_section(entry, name) for name in ("mask", "depth", "viewpoint", "meta"))
    rows = viewpoint.get("R")
    height, width = _numbers(entry["image"].get("size"), 2)
    return FrameRecord(
        category=category,
        sequence_name=str(entry["sequence_name"]),
        frame_number=int(entry["frame_number"]),
        frame_timestamp=_number(entry.get("frame_timestamp")),
        image_path=root / entry["image"]["path"],
        mask_path=_optional_path(root, mask.get("path")),
        mask_mass=mask.get("mass"),
        depth_path=_optional_path(root, depth.get("path")),
        depth_mask_path=_optional_path(root, depth.get("mask_path")),
        depth_scale_adjustment=_number(depth.get("scale_adjustment", 1.0)),
        height=int(height) if math.isfinite(height) else 0,
        width=int(width) if math.isfinite(width) else 0,
        R=tuple(_numbers(row, 3) for row in (rows if isinstance(rows, list) and len(rows) == 3 else (None,) * 3)),
        T=_numbers(viewpoint.get("T"), 3),
        focal=_numbers(viewpoint.get("focal_length"), 2),
        principal=_numbers(viewpoint.get("principal_point"), 2),
        intrinsics_format=viewpoint.get("intrinsics_format") or DEFAULT_INTRINSICS_FORMAT,
        frame_type=meta.get("frame_type") or "",
    )


def _section(entry: dict[str, Any], name: str) -> dict[str, Any]:
    section = entry.get(name)
    return section if isinstance(section, dict) else {}


def _optional_path(root: Path, value: Any) -> Path | None:
    return root / value if isinstance(value, str) and value else None


def _number(value: Any) -> float:
    """``value`` as a float, NaN when it is none: one bad frame must not hide the others, and the audit names it."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def _numbers(values: Any, n: int) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != n:
        return (math.nan,) * n
    return tuple(_number(value) for value in values)


def _checked_list(raw: Any, path: Path) -> list[Any]:
    if not isinstance(raw, list):
        raise ValueError(f"{path}: expected a list of entries, got {type(raw).__name__}")
    return raw


def _read_json(path: Path) -> Any:
    """Content of a .json or gzipped .jgz file; ValueError names the file when it is missing or corrupt."""
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".jgz" else data)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _wrong_root_message(root: Path) -> str:
    message = f"{root} is not a CO3Dv2 root: "
    if not root.is_dir():
        return message + "no such folder"
    message += f"it has no {SUBSET_LIST_FILE}"
    if (root / FRAME_ANNOTATIONS_FILE).is_file():
        message += " but is a category folder"
    absolute = root.resolve()
    above = [parent for parent in absolute.parents if (parent / SUBSET_LIST_FILE).is_file()]
    if above:
        return message + f"; it lies too deep, use {above[0]}"
    if (root / FRAME_ANNOTATIONS_FILE).is_file():
        return message + f"; the root is the folder above it, {absolute.parent}, which lacks {SUBSET_LIST_FILE} as well"
    below = sorted(root.glob(f"*/{SUBSET_LIST_FILE}"))
    return message + (f"; use {below[0].parent}, one level deeper" if below else "")
