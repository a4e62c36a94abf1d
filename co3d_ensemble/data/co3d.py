"""Index of a CO3Dv2 root: categories, subsets, and which frame is known, validation or target.

Reads the JSON only, never a picture; ``audit.py`` looks at the files. Format: https://github.com/facebookresearch/co3d
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from co3d_ensemble.base.messages import shown
from co3d_ensemble.base.paths import inside, listed, plain_part
from co3d_ensemble.data.annotations import FRAME_ANNOTATIONS_FILE, CategoryAnnotations, FrameKey, FrameRecord, frame_key
from co3d_ensemble.data.json_files import read_json

logger = logging.getLogger(__name__)

SUBSET_LIST_FILE = "category_to_subset_name_list.json"
KNOWN, VAL, TARGET, SOURCE = "known", "val", "target", "source"  # the roles; SOURCE: few-view input of a target


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
        self._annotations: dict[str, CategoryAnnotations] = {}
        path = self.root / SUBSET_LIST_FILE
        if not path.is_file():
            raise ValueError(_wrong_root_message(self.root))
        self._subsets = _checked_subsets(read_json(path), path)

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
        self._require(category, name)
        return read_subset(self.root, name, self._category(category))

    def n_listed(self, category: str, name: str) -> int:
        """Frames that a subset's set list gives to train on, whatever the annotations say of them.

        Raises:
            ValueError: as :meth:`subset`, of the set list alone.
        """
        self._require(category, name)
        return len(_set_lists(self.root, category, name)[1]["train"])

    def _require(self, category: str, name: str) -> None:
        if name not in self.subsets(category):
            there = ", ".join(self.subsets(category)) or "none"
            raise ValueError(f"subset {name!r} of {category!r} is not in {self.root / SUBSET_LIST_FILE}; available: {there}")

    def _category(self, category: str) -> CategoryAnnotations:
        if category not in self._annotations:
            self.subsets(category)  # names the available ones
            self._annotations[category] = CategoryAnnotations(self.root, category)
        return self._annotations[category]


def read_subset(root: Path, name: str, annotations: CategoryAnnotations) -> Subset:
    """See :meth:`CO3DIndex.subset`; also for a root without a list of subsets."""
    category = annotations.category
    lists_path, lists = _set_lists(root, category, name)
    batches_path = root / category / "eval_batches" / f"eval_batches_{name}.json"
    if batches_path.is_file():
        raw_batches = _checked_list(read_json(batches_path), batches_path)
    else:
        logger.warning("%s is missing: the targets are the list 'test' of %s", batches_path, lists_path)
        raw_batches, batches_path = [[entry] for entry in lists["test"]], lists_path

    reader = _ListReader(root, annotations)
    batches = reader.eval_batches(raw_batches, batches_path)
    targets = reader.claim(TARGET, [batch.target for batch in batches])
    known = reader.claim(KNOWN, reader.records(lists["train"], lists_path, KNOWN))
    val = reader.claim(VAL, reader.records(lists["val"], lists_path, VAL))
    return Subset(category, name, known, val, targets, tuple(batches), tuple(reader.faults))


def _set_lists(root: Path, category: str, name: str) -> tuple[Path, dict[str, list[Any]]]:
    """The file and its lists by split; val and test are empty where the file has null or nothing."""
    path = root / category / "set_lists" / f"set_lists_{name}.json"
    lists = read_json(path)
    if not isinstance(lists, dict) or "train" not in lists:
        raise ValueError(f"{path}: expected an object with the lists train, val and test")
    found = {"train": lists["train"]} | {split: [] if lists.get(split) is None else lists[split] for split in ("val", "test")}
    return path, {split: _checked_list(entries, path, f" under {split!r}") for split, entries in found.items()}


class _Entry(NamedTuple):
    """An entry of a set list or an eval batch, ``[sequence, frame number, picture path]``; the path may be left out."""

    key: FrameKey
    picture: str | None
    list_path: Path

    @classmethod
    def parse(cls, raw: Any, root: Path, list_path: Path) -> _Entry:
        if not isinstance(raw, list) or len(raw) not in (2, 3):
            raise ValueError(f"{list_path}: entry {shown(raw)} is not [sequence, frame number, picture path]")
        try:
            picture = raw[2] if len(raw) == 3 else None
            if picture is not None:
                inside(root, picture)
                picture = os.path.normpath(picture)
            return cls(frame_key(raw[0], raw[1]), picture, list_path)
        except ValueError as error:
            raise ValueError(f"{list_path}: entry {shown(raw)} is not [sequence, frame number, picture path]: {error}") from error


class _ListReader:
    """Turns list entries into records, noting what contradicts the annotations; holds which frame is taken by which role."""

    def __init__(self, root: Path, annotations: CategoryAnnotations) -> None:
        self.root, self.annotations = root, annotations
        self.faults: list[ListFault] = []
        self._role_of: dict[FrameKey, str] = {}

    def eval_batches(self, raw: Sequence[Any], path: Path) -> list[EvalBatch]:
        batches: list[EvalBatch] = []
        seen = set()
        for i, entries in enumerate(raw):
            if not isinstance(entries, list) or not entries:
                raise ValueError(f"{path}: batch {i} is not a non-empty list of entries: {shown(entries)}")
            target = self.records(entries[:1], path, TARGET)
            sources = self.records(entries[1:], path, SOURCE)
            if not target:
                continue
            batch = EvalBatch(target[0], tuple(sources))
            identity = (batch.target.key, tuple(source.key for source in sources))
            if identity in seen:
                entry = _Entry.parse(entries[0], self.root, path)
                self._fault("duplicate", TARGET, entry, "stands twice in the eval batches; it is rendered once")
                continue
            seen.add(identity)
            batches.append(batch)
        return batches

    def records(self, raw: Sequence[Any], path: Path, role: str) -> list[FrameRecord]:
        """Records of ``[sequence, frame number, picture path]`` entries; entries without annotation become faults."""
        records = []
        for raw_entry in raw:
            entry = _Entry.parse(raw_entry, self.root, path)
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


def _checked_list(raw: Any, path: Path, where: str = "") -> list[Any]:
    if not isinstance(raw, list):
        raise ValueError(f"{path}: expected a list of entries, got {type(raw).__name__}{where}")
    return raw


def _checked_subsets(content: Any, path: Path) -> dict[str, list[str]]:
    """Subset names by category, each once. Runs and renders go to folders of these names, so each is one plain part of a path."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected a non-empty object {{category: [subset name, ...]}}")
    subsets = {}
    for category, names in content.items():
        plain_part(category, f"{path}: category")
        if not isinstance(names, list):
            raise ValueError(f"{path}: category {category!r}: expected a list of subset names, got {shown(names)}")
        subsets[category] = list(dict.fromkeys(plain_part(name, f"{path}: category {category!r}, subset name") for name in names))
    return subsets


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
    below = listed(root, f"*/{SUBSET_LIST_FILE}")
    return message + (f"; use {below[0].parent}, one level deeper" if below else "")
