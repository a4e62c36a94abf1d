"""Photographs of a CO3Dv2 root through Implicitron's dataset classes, as :class:`Frame`; cameras to PyTorch3D and back.

Cameras come through Implicitron's dataset classes. Pictures are read by ``base/pictures.py`` at their original size, then averaged
down here: Implicitron's own resize pads to a square and is not area-true. The camera follows the picture exactly.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pytorch3d.implicitron.dataset.json_index_dataset import JsonIndexDataset
from pytorch3d.implicitron.dataset.types import (
    DepthAnnotation,
    FrameAnnotation,
    ImageAnnotation,
    MaskAnnotation,
    SequenceAnnotation,
    ViewpointAnnotation,
)
from pytorch3d.implicitron.tools.config import expand_args_fields
from pytorch3d.renderer.cameras import PerspectiveCameras
from torch import Tensor

from co3d_ensemble.base.paths import plain_part
from co3d_ensemble.base.pictures import PictureError, exactly, read_mask, read_photo
from co3d_ensemble.data.annotations import FRAME_ANNOTATIONS_FILE, CategoryAnnotations, FrameKey, FrameRecord
from co3d_ensemble.data.audit import camera_faults
from co3d_ensemble.data.co3d import read_subset
from co3d_ensemble.data.depth_maps import load_depth
from co3d_ensemble.functional.cameras import ndc_from_pinhole, pinhole_from_ndc
from co3d_ensemble.functional.types import Frame, PinholeCamera

logger = logging.getLogger(__name__)


def load_frames(
    dataset_root: str,
    category: str,
    subset_name: str,
    keys: Sequence[FrameKey],
    *,
    longest_side: int | None = None,
    load_depths: bool | Literal["auto"] = "auto",
) -> list[Frame]:
    """Decodes frames of one subset, in the order of ``keys``.

    Args:
        dataset_root: CO3Dv2 root folder.
        category, subset_name: e.g. "cape", "manyview_dev_0".
        keys: (sequence_name, frame_number) of frames in the subset's lists or eval batches.
        longest_side: area-average pictures and masks (depth: nearest) down to this longest side in pixels; smaller
            pictures are left alone; None: original size.
        load_depths: True: depth and its mask, required; False: neither; "auto": both where the annotation names them
            and the files are there, sound, and say anything.

    Raises:
        ValueError: the root, category or subset is not there or malformed, a key is in none of the lists, or a frame has no mask, no
            usable camera or a file that cannot be read; the message names the frame and the file.
    """
    subset = _opened(str(dataset_root), category, subset_name)
    return [_load_frame(subset, key, longest_side=longest_side, load_depths=load_depths) for key in keys]


def pinhole_camera(cameras: PerspectiveCameras, index: int, *, height: int, width: int) -> PinholeCamera:
    """Camera ``index`` of NDC ``cameras`` for a picture of ``height x width`` pixels."""
    return pinhole_from_ndc(
        cameras.R[index], cameras.T[index], cameras.focal_length[index], cameras.principal_point[index], height=height, width=width
    )


def pytorch3d_cameras(cameras: Sequence[PinholeCamera]) -> PerspectiveCameras:
    """A batch of PyTorch3D cameras in NDC, on the device of the first camera; sizes may differ."""
    ndc = [ndc_from_pinhole(camera) for camera in cameras]
    sizes = [(camera.height, camera.width) for camera in cameras]
    return PerspectiveCameras(
        R=torch.stack([camera.R for camera in cameras]),
        T=torch.stack([camera.T for camera in cameras]),
        focal_length=torch.stack([focal for focal, _ in ndc]),
        principal_point=torch.stack([principal for _, principal in ndc]),
        image_size=torch.tensor(sizes, device=cameras[0].R.device),
        in_ndc=True,
        device=cameras[0].R.device,
    )


def area_average(picture: Tensor, height: int, width: int) -> Tensor:
    """Exact box filter: each output pixel is the mean of ``picture`` (C, H, W) over the area that it covers."""
    rows = _overlap(picture.shape[-2], height, picture)
    columns = _overlap(picture.shape[-1], width, picture)
    return rows @ picture @ columns.T


def _overlap(n_in: int, n_out: int, like: Tensor) -> Tensor:
    """(n_out, n_in): share of output pixel i that input pixel j fills; rows sum to 1."""
    ratio = n_in / n_out
    low = torch.arange(n_out, device=like.device, dtype=torch.float64)[:, None] * ratio
    pixel = torch.arange(n_in, device=like.device, dtype=torch.float64)
    overlap = torch.minimum(low + ratio, pixel + 1) - torch.maximum(low, pixel)
    return (overlap.clamp_min(0) / ratio).to(like.dtype)


class _CheckedDataset(JsonIndexDataset):
    """Implicitron's data set over frames that the index has read and checked.

    The stock one parses the annotations itself: where they are not as it expects, it ends in a traceback that names no file, or
    reads something else in silence (one rotation of two rows cuts those of all frames).
    """

    records: Any = ()  # of the frames, in order

    def _load_frames(self) -> None:
        self.frame_annots = [{"frame_annotation": _annotation(record, self.dataset_root), "subset": None} for record in self.records]

    def _load_sequences(self) -> None:
        self.seq_annots = {record.sequence_name: SequenceAnnotation(record.sequence_name, record.category) for record in self.records}


def _annotation(record: FrameRecord, root: str) -> FrameAnnotation:
    """What Implicitron reads a frame by."""

    def relative(path: Path | None) -> str | None:
        return None if path is None else os.path.relpath(path, root)

    mask, depth = relative(record.mask_path), relative(record.depth_path)
    return FrameAnnotation(
        sequence_name=record.sequence_name,
        frame_number=record.frame_number,
        frame_timestamp=record.frame_timestamp,
        image=ImageAnnotation(relative(record.image_path), (record.height, record.width)),
        mask=None if mask is None else MaskAnnotation(mask, record.mask_mass),
        depth=None if depth is None else DepthAnnotation(depth, record.depth_scale_adjustment, relative(record.depth_mask_path)),
        viewpoint=ViewpointAnnotation(record.R, record.T, record.focal, record.principal, record.intrinsics_format),
        meta={"frame_type": record.frame_type},
    )


@dataclass(frozen=True)
class _Subset:
    """The annotated frames of a subset: Implicitron's data set, and each frame's place in it and record by key."""

    dataset: JsonIndexDataset
    places: dict[FrameKey, int]
    records: tuple[FrameRecord, ...]


def _opened(dataset_root: str, category: str, subset_name: str) -> _Subset:
    """What :func:`_cached` holds, read again where a file has changed."""
    folder = Path(dataset_root) / plain_part(category, "category")
    plain_part(subset_name, "subset_name")
    files = [
        folder / FRAME_ANNOTATIONS_FILE,
        folder / "set_lists" / f"set_lists_{subset_name}.json",
        folder / "eval_batches" / f"eval_batches_{subset_name}.json",
    ]
    stamps = tuple((path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None for path in files)
    return _cached(dataset_root, category, subset_name, stamps)


@functools.lru_cache(maxsize=2)  # the annotations of a large category take seconds to parse and gigabytes to keep
def _cached(dataset_root: str, category: str, subset_name: str, stamps: tuple[tuple[int, int] | None, ...]) -> _Subset:
    """``stamps`` only tell changed files from known ones."""
    subset = read_subset(Path(dataset_root), subset_name, CategoryAnnotations(Path(dataset_root), category))
    sources = [source for batch in subset.eval_batches for source in batch.sources]
    records = tuple({record.key: record for record in (*subset.known, *subset.val, *subset.targets, *sources)}.values())
    expand_args_fields(_CheckedDataset)
    dataset = _CheckedDataset(
        records=records,
        dataset_root=dataset_root,
        load_images=False,  # read by base/pictures.py: Implicitron's readers make 16-bit photographs white and 1-bit masks empty
        load_masks=False,
        load_depths=False,
        load_depth_masks=False,
        image_height=None,
        image_width=None,
        box_crop=False,
        remove_empty_masks=False,  # targets of test sequences may have none
    )
    return _Subset(dataset, {record.key: place for place, record in enumerate(records)}, records)


def _load_frame(subset: _Subset, key: FrameKey, *, longest_side: int | None, load_depths: bool | Literal["auto"]) -> Frame:
    name = f"{key[0]}/{key[1]}"
    if tuple(key) not in subset.places:
        raise ValueError(f"frame {name}: not among the annotated frames of the subset")
    place = subset.places[tuple(key)]
    record = subset.records[place]
    for _, what in camera_faults(record):
        raise ValueError(f"frame {name}: the camera of {record.image_path} {what}")
    size = (record.height, record.width)
    try:
        if record.mask_path is None:
            raise ValueError(f"the annotation of {record.image_path} gives no mask")
        rgb = np.asarray(read_photo(record.image_path, exactly(size, "annotated as")))
        mask = np.asarray(read_mask(record.mask_path, exactly(size, "its picture")))
        depth, depth_mask = _load_depth(record, load_depths)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"frame {name}: {error}") from error
    height, width = _resized_size(*size, longest_side)
    return Frame(
        name=name,
        sequence_name=record.sequence_name,
        frame_number=record.frame_number,
        rgb=_to_uint8(torch.tensor(rgb).permute(2, 0, 1), height, width),
        mask=_to_uint8(torch.tensor(mask)[None], height, width),
        camera=pinhole_camera(subset.dataset[place].camera, 0, height=size[0], width=size[1]).resized(height, width),
        depth=None if depth is None else _nearest(depth, height, width),
        depth_mask=None if depth_mask is None else _nearest(depth_mask, height, width),
    )


def _load_depth(record: FrameRecord, load_depths: bool | Literal["auto"]) -> tuple[Tensor | None, Tensor | None]:
    """Depth in world units and its mask, or None twice; what is spoilt costs no more than the depth unless that is required."""
    if load_depths is False:
        return None, None
    if record.depth_path is None or record.depth_mask_path is None:
        if load_depths is True:
            raise ValueError(f"the annotation has no {'depth map' if record.depth_path is None else 'depth mask'}")
        return None, None
    try:
        size = (record.height, record.width)
        return load_depth(record.depth_path, record.depth_mask_path, size, scale=record.depth_scale_adjustment)
    except (PictureError, FileNotFoundError) as error:
        if load_depths is True:
            raise
        logger.warning("frame %s: %s, so this frame has no depth", record.name, error)
        return None, None


def _resized_size(height: int, width: int, longest_side: int | None) -> tuple[int, int]:
    longest = max(height, width)
    if longest_side is None or longest <= longest_side:
        return height, width
    return max(1, round(height * longest_side / longest)), max(1, round(width * longest_side / longest))


def _to_uint8(picture: Tensor, height: int, width: int) -> Tensor:
    if picture.shape[-2:] == (height, width):
        return picture
    return (area_average(picture.float() / 255, height, width).clamp(0, 1) * 255).round().to(torch.uint8)


def _nearest(values: Tensor, height: int, width: int) -> Tensor:
    return torch.nn.functional.interpolate(values[None], size=(height, width), mode="nearest-exact")[0]
