"""Sparse points of CO3Dv2 frames: from their depth maps, or from the point cloud of their sequence."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from co3d_ensemble.base.messages import shown
from co3d_ensemble.base.paths import inside
from co3d_ensemble.data.co3d import FrameRecord
from co3d_ensemble.data.depth_maps import load_depth
from co3d_ensemble.data.json_files import read_json
from co3d_ensemble.functional.cameras import opencv_from_pinhole, pixel_centers
from co3d_ensemble.functional.types import Frame
from co3d_ensemble.mine.point_cloud import read_ply_points, seen_points
from co3d_ensemble.mine.protocols import evenly_spread

logger = logging.getLogger(__name__)

SEQUENCE_ANNOTATIONS_FILE = "sequence_annotations.jgz"
CALIBRATED_ON = 8  # frames of a sequence: a pass of the network each, and their mean is within a few percent of all frames'
POINTS_PER_FRAME = 10_000
CLOUDS_KEPT = 256


class SequenceClouds:
    """Point clouds of a root's sequences; the last ``CLOUDS_KEPT`` that were read stay in memory."""

    def __init__(self, root: Path | str) -> None:
        self._root = Path(root)
        self._paths: dict[str, dict[str, Path]] = {}
        self._points: dict[Path, Tensor] = {}

    def path(self, record: FrameRecord, *, required: bool = False) -> Path | None:
        """The file of the frame's sequence, or None; with ``required`` also one that is named and missing, an error where it is read."""
        if record.category not in self._paths:
            self._paths[record.category] = _cloud_paths(self._root, record.category)
        path = self._paths[record.category].get(record.sequence_name)
        return path if path is not None and (required or path.is_file()) else None

    def seen(self, path: Path, K: Tensor, R: Tensor, t: Tensor, *, height: int, width: int) -> Tensor:
        """(x, y, z) of the cloud's points that a camera sees, see :func:`seen_points`."""
        if path not in self._points:
            if len(self._points) == CLOUDS_KEPT:
                self._points.pop(next(iter(self._points)))
            self._points[path] = read_ply_points(path)
        return seen_points(self._points[path] @ R.T + t, K, height=height, width=width)


def _cloud_paths(root: Path, category: str) -> dict[str, Path]:
    """Point cloud of each sequence that names one; empty where there are no sequence annotations.

    Raises:
        ValueError: the annotations are no list of objects, or a path leads out of the root, naming file, entry and key.
    """
    path = root / category / SEQUENCE_ANNOTATIONS_FILE
    if not path.is_file():
        return {}
    entries, found = read_json(path), {}
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of sequence annotations, got {shown(entries)}")
    for i, entry in enumerate(entries):
        cloud = entry.get("point_cloud") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(entry.get("sequence_name"), str) or not isinstance(cloud, dict | None):
            raise ValueError(f"{path}: entry {i} is not an object with a sequence_name and a point_cloud or null: {shown(entry)}")
        if cloud and cloud.get("path") is not None:
            try:
                found[entry["sequence_name"]] = inside(root, cloud["path"])
            except ValueError as error:
                raise ValueError(f"{path}: entry {i} ({shown(entry['sequence_name'])}): point_cloud.path: {error}") from error
    return found


def has_depth(record: FrameRecord) -> bool:
    return record.depth_path is not None and record.depth_path.is_file()


def read_depth(record: FrameRecord) -> Tensor:
    """z in world units, 0 where the depth map or its mask says unknown, float32, shape (1, H, W).

    Raises:
        FileNotFoundError, PictureError: naming the file that is missing, spoilt, or says nothing.
    """
    assert record.depth_path is not None
    mask_path = record.depth_mask_path if record.depth_mask_path is not None and record.depth_mask_path.is_file() else None
    depth, mask = load_depth(record.depth_path, mask_path, (record.height, record.width), scale=record.depth_scale_adjustment)
    return (depth if mask is None else depth * mask).clamp_min(0)


def known_depths(depth: Tensor) -> Tensor:
    """(x, y, z) of the pixels of a depth map (1, H, W) whose z is known, shape (n, 3)."""
    return torch.cat((pixel_centers(*depth.shape[1:]), depth.reshape(-1, 1)), dim=1)[depth.flatten() > 0]


def points_of_frames(frames: Sequence[Frame], records: Iterable[FrameRecord], clouds: SequenceClouds) -> dict[str, Tensor]:
    """Sparse points (x, y, z) of at most ``CALIBRATED_ON`` of a sequence's frames, in pixels of the frames' own size, by frame name.

    Depth maps go before the sequence's point cloud; frames that have neither are left out, and with a warning that names the
    file those whose points cannot be read.

    Args:
        records: of these frames, in any order.
    """
    by_key = {record.key: record for record in records}
    pairs = [(frame, by_key[frame.sequence_name, frame.frame_number]) for frame in frames]
    known = [(frame, record) for frame, record in pairs if has_depth(record) or clouds.path(record) is not None]
    found = {}
    for frame, record in [known[index] for index in evenly_spread(len(known), CALIBRATED_ON)]:
        try:
            points = _points_of(frame, record, clouds)
        except (ValueError, FileNotFoundError) as error:  # of a photograph that is otherwise fine
            logger.warning("frame %s: its points are left out: %s", frame.name, error)
            continue
        if len(points):
            found[frame.name] = points[:: -(-len(points) // POINTS_PER_FRAME)]
    return found


def _points_of(frame: Frame, record: FrameRecord, clouds: SequenceClouds) -> Tensor:
    height, width = frame.rgb.shape[-2:]
    if has_depth(record):
        depth = read_depth(record)
        return known_depths(depth) * torch.tensor([width / depth.shape[2], height / depth.shape[1], 1.0])
    K, R, t = (part.double() for part in opencv_from_pinhole(frame.camera))
    path = clouds.path(record)
    assert path is not None
    return clouds.seen(path, K, R, t, height=height, width=width)
