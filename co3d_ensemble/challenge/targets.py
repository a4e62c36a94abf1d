"""The frames that a submission holds, and what their files are called."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from co3d_ensemble.base.paths import plain_part
from co3d_ensemble.base.pictures import PictureError, photo_size
from co3d_ensemble.data.co3d import SUBSET_LIST_FILE, CO3DIndex, FrameRecord

TASKS, SEQUENCE_SETS = ("manyview", "fewview"), ("dev", "test")


@dataclass(frozen=True)
class Target:
    """A frame to submit, with its picture's size in pixels."""

    category: str
    subset_name: str
    sequence_name: str
    frame_number: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for what in ("category", "subset_name", "sequence_name"):
            plain_part(getattr(self, what), what)
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a picture of {self.height} x {self.width} pixels ({self})")

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def folder(self) -> str:
        return f"{self.category}/{self.subset_name}"

    def path(self, kind: str) -> str:
        """Path in the archive of the ``image``, ``mask`` or ``depth``."""
        return f"{self.folder}/{self.category}_{self.sequence_name}_{self.frame_number}_{kind}.png"


def archive_name(task: str, sequence_set: str) -> str:
    """``submission_manyview_dev.hdf5`` and its like."""
    if task not in TASKS or sequence_set not in SEQUENCE_SETS:
        raise ValueError(f"task={task!r}, sequence_set={sequence_set!r}: expected one of {TASKS} and one of {SEQUENCE_SETS}")
    return f"submission_{task}_{sequence_set}.hdf5"


def targets_with_records(
    index: CO3DIndex, *, task: str, sequence_set: str, only: Collection[tuple[str, str]] | None = None
) -> dict[Target, FrameRecord]:
    """The frames that a submission holds, in the index's order, each once, with where their ground truth lies.

    Args:
        only: (category, subset name) of the subsets to take; None: all of the set. Others are not read.

    Raises:
        ValueError: the data set has no such subset, or a target without annotated size has no picture either.
    """
    archive_name(task, sequence_set)
    subsets = [pair for pair in index.all_subsets(sequence_set=[sequence_set], task=task) if only is None or pair in only]
    if not subsets:
        among = "" if only is None else " among the chosen ones"
        raise ValueError(f"{index.root / SUBSET_LIST_FILE} has no subset {task}_{sequence_set}{among}")
    records = {}
    for category, name in subsets:
        for record in index.subset(category, name).targets:
            height, width = _picture_size(record)
            records[Target(category, name, record.sequence_name, record.frame_number, height, width)] = record
    return records


def _picture_size(record: FrameRecord) -> tuple[int, int]:
    if record.height and record.width:
        return record.height, record.width
    try:
        return photo_size(record.image_path)
    except (FileNotFoundError, PictureError) as error:
        raise ValueError(f"{error}; its annotation gives no size") from error
