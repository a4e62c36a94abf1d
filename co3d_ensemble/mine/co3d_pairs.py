"""Pairs of neighbouring frames of CO3Dv2 sequences, with masks, and sparse points where the root has depth or point clouds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from co3d_ensemble.base.pictures import PictureError, exactly, read_mask, read_photo
from co3d_ensemble.data.audit import audit_subset, usable_frames
from co3d_ensemble.data.co3d import SUBSET_LIST_FILE, CO3DIndex, FrameRecord
from co3d_ensemble.functional.cameras import opencv_from_pinhole
from co3d_ensemble.mine.co3d_points import SEQUENCE_ANNOTATIONS_FILE, SequenceClouds, has_depth, known_depths, read_depth
from co3d_ensemble.mine.pictures import check_settings, fit_size
from co3d_ensemble.mine.views import View, ViewPairs

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
POINTS = ("auto", "depth", "cloud")
MIN_FRAMES = 2
SHOWN_SUBSETS = 3  # in errors


class CO3DPairs(ViewPairs):
    """Frames of a CO3Dv2 root that lie at most ``max_frame_distance`` frame numbers apart in one sequence.

    In ``train`` source and target are known frames. In ``val`` the source is a val frame, which training never shows to the
    network, and the target any known or val frame near it. Targets of the challenge are left alone. Broken frames are
    dropped with a warning that names the file (``data/audit.py``).

    Pictures, masks and depth are read straight from the index's records: Implicitron's dataset classes, which
    ``plugin/frames.py`` goes through, parse a category's annotations once more for every subset and keep only two of them,
    too slow for pairs from many. A test holds both ways against each other.

    Args:
        root: CO3Dv2 root folder.
        subsets: ``category/subset_name``, as in ``cape/manyview_dev_0``; None: all of the root.
        split: ``train`` | ``val``.
        height, width: picture size in pixels; ``fit``: ``crop`` to its shape or ``stretch``.
        points: where sparse points come from: ``depth`` maps, the sequence's point ``cloud`` (points behind others are left
            out), or ``auto``: depth, else cloud; where some frames have either, those that have none are left out with a warning.
        check: ``headers`` | ``decode``: how far the audit of the files goes.

    Raises:
        ValueError: naming the setting, or the file and what is wrong with it.
    """

    def __init__(
        self,
        root: str | Path,
        subsets: Sequence[str] | None = None,
        *,
        split: str = "train",
        height: int,
        width: int,
        fit: str = "crop",
        max_frame_distance: int = 5,
        n_points: int = 256,
        points: str = "auto",
        random_target: bool = True,
        check: str = "headers",
        cache_megabytes: float = 512,
    ) -> None:
        super().__init__(n_points=n_points, random_target=random_target, cache_megabytes=cache_megabytes)
        check_settings(height=height, width=width, fit=fit, check=check, n_points=n_points)
        if max_frame_distance < 1:
            raise ValueError(f"max_frame_distance={max_frame_distance}: must be at least 1")
        for name, value, allowed in (("split", split, SPLITS), ("points", points, POINTS)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
        self.height, self.width, self.fit, self.points = height, width, fit, points
        self.root, self._index = Path(root), CO3DIndex(root)
        self._clouds = SequenceClouds(self.root)
        self._pairs: list[tuple[FrameRecord, tuple[FrameRecord, ...]]] = []
        chosen = self._chosen(subsets)
        for category, name in chosen:
            subset = self._index.subset(category, name)
            subset = usable_frames(subset, audit_subset(self._index, subset, decode=check == "decode"), min_known_frames=MIN_FRAMES)
            sources = subset.known if split == "train" else subset.val
            self._pairs += _neighbours(sources, subset.known if split == "train" else subset.known + subset.val, max_frame_distance)
        if not self._pairs:
            listed = ", ".join("/".join(pair) for pair in chosen[:SHOWN_SUBSETS]) + (", ..." if len(chosen) > SHOWN_SUBSETS else "")
            raise ValueError(f"{self.root}: {listed}: no two {split} frames within max_frame_distance={max_frame_distance} of each other")
        if n_points and points != "auto":
            self._require_points()
        elif n_points:
            self._leave_out_what_has_no_points()

    def load(self, key: FrameRecord) -> View:  # type: ignore[override]
        size = (key.height, key.width)
        image = read_photo(key.image_path, exactly(size, "annotated as"))
        fit = fit_size((key.height, key.width), height=self.height, width=self.width, mode=self.fit)
        K, R, t = opencv_from_pinhole(key.camera())
        K = fit.intrinsics(K.double())
        mask = fit.picture(read_mask(key.mask_path, exactly(size, "its picture"))) if key.mask_path else None
        depth = self._depth(key)
        depth = None if depth is None else fit.nearest(depth)
        points = self._points(key, K, R.double(), t.double(), depth)
        name = f"{key.category}/{key.sequence_name}"
        return View(name, str(key.frame_number), fit.picture(image), K, R.double(), t.double(), points=points, depth=depth, mask=mask)

    def _depth(self, record: FrameRecord) -> Tensor | None:
        """The frame's depth; one that cannot be used costs no more where points come from the cloud or are not wanted."""
        if not has_depth(record):
            return None
        try:
            return read_depth(record)
        except PictureError as error:
            if self.n_points and (self.points == "depth" or self._cloud_path(record) is None):
                raise PictureError(f"{error}; check=decode leaves such frames out, n_points=0 does without points") from error
            logger.warning("frame %s has no depth: %s", record.name, error)
            return None

    def _chosen(self, subsets: Sequence[str] | None) -> list[tuple[str, str]]:
        if subsets is None:
            found = [(category, name) for category in self._index.categories() for name in self._index.subsets(category)]
            if not found:
                raise ValueError(f"{self.root / SUBSET_LIST_FILE} lists no subset")
            return found
        if isinstance(subsets, str) or any(entry.count("/") != 1 for entry in subsets):
            raise ValueError(f"subsets={subsets!r}: expected a list such as ['cape/manyview_dev_0']")
        return [tuple(entry.split("/")) for entry in subsets]  # type: ignore[misc]

    def _require_points(self) -> None:
        for record in self._records():
            if self.points == "depth" and not has_depth(record):
                raise ValueError(f"points='depth': frame {record.name} has no depth map; picture {record.image_path}")
            if self.points == "cloud" and self._cloud_path(record) is None:
                path = self.root / record.category / SEQUENCE_ANNOTATIONS_FILE
                raise ValueError(f"points='cloud': {path} gives sequence {record.sequence_name} no point cloud")

    def _leave_out_what_has_no_points(self) -> None:
        """A batch has points for all of its pictures or for none, and a pair without them has no unit of length."""
        records = self._records()
        lacking = {record for record in records if not has_depth(record) and self._cloud_path(record) is None}
        if not lacking or len(lacking) == len(records):
            return
        there = [(source, tuple(target for target in targets if target not in lacking)) for source, targets in self._pairs]
        self._pairs = [(source, targets) for source, targets in there if source not in lacking and targets]
        example = min(record.name for record in lacking)
        if not self._pairs:
            raise ValueError(f"{self.root}: no two neighbouring frames have sparse points; {example}, for one, has none")
        logger.warning("%d of %d frames have neither depth nor point cloud, such as %s: left out", len(lacking), len(records), example)

    def _records(self) -> set[FrameRecord]:
        return {record for source, targets in self._pairs for record in (source, *targets)}

    def _points(self, record: FrameRecord, K: Tensor, R: Tensor, t: Tensor, depth: Tensor | None) -> Tensor | None:
        if self.n_points == 0:
            return None
        if depth is not None and self.points != "cloud":
            return known_depths(depth)
        path = self._cloud_path(record) if self.points != "depth" else None
        return None if path is None else self._clouds.seen(path, K, R, t, height=self.height, width=self.width)

    def _cloud_path(self, record: FrameRecord) -> Path | None:
        return self._clouds.path(record, required=self.points == "cloud")


def _neighbours(
    sources: Sequence[FrameRecord], targets: Sequence[FrameRecord], max_distance: int
) -> list[tuple[FrameRecord, tuple[FrameRecord, ...]]]:
    """Every source that has targets, with them, the nearest frame number first."""
    by_sequence: dict[str, dict[int, FrameRecord]] = {}
    for record in targets:
        by_sequence.setdefault(record.sequence_name, {})[record.frame_number] = record
    pairs = []
    for source in sources:
        frames = by_sequence.get(source.sequence_name, {})
        offsets = [sign * step for step in range(1, max_distance + 1) for sign in (1, -1)]
        near = tuple(frames[source.frame_number + offset] for offset in offsets if source.frame_number + offset in frames)
        if near:
            pairs.append((source, near))
    return pairs
