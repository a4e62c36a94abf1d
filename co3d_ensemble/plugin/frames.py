"""Photographs of a CO3Dv2 root through Implicitron's dataset classes, as :class:`Frame`; cameras to PyTorch3D and back.

Pictures are read at their original size and uncropped, then averaged down here: Implicitron's own resize pads to a
square and is not area-true. The camera follows the picture exactly.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch3d.implicitron.dataset.frame_data import FrameData
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
from co3d_ensemble.data.annotations import FRAME_ANNOTATIONS_FILE, CategoryAnnotations, FrameKey, FrameRecord
from co3d_ensemble.data.audit import camera_faults
from co3d_ensemble.data.co3d import read_subset
from co3d_ensemble.functional.cameras import ndc_from_pinhole, pinhole_from_ndc
from co3d_ensemble.functional.types import Frame, PinholeCamera

logger = logging.getLogger(__name__)

# what Pillow, zlib and the dataset raise on a missing, truncated, foreign or wrongly sized file
_READ_ERRORS = (OSError, ValueError, SyntaxError, AssertionError, struct.error, zlib.error)


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
            and the files are there.

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
        load_depths=True,  # of each frame: see _load_frame
        load_depth_masks=True,
        mask_images=False,
        mask_depths=False,
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
    dataset, place = subset.dataset, subset.places[tuple(key)]
    entry, record = dataset.frame_annots[place], subset.records[place]
    annotation = entry["frame_annotation"]
    if annotation.mask is None:
        raise ValueError(f"frame {name}: the annotation of {annotation.image.path} gives no mask")
    for _, what in camera_faults(record):
        raise ValueError(f"frame {name}: the camera of {annotation.image.path} {what}")
    if not _wants_depth(annotation, dataset.dataset_root, load_depths, name):
        annotation = replace(annotation, depth=None)
    single = copy.copy(dataset)  # shares everything but the one annotation
    single.frame_annots = [{**entry, "frame_annotation": annotation}]
    try:
        with warnings.catch_warnings():
            # the box of an empty mask (redacted targets) is not used here
            warnings.filterwarnings("ignore", message="Empty masks_for_bbox")
            data = single[0]
    except _READ_ERRORS as error:
        files = [annotation.image.path, annotation.mask and annotation.mask.path, annotation.depth and annotation.depth.path]
        raise ValueError(f"frame {name}: cannot read {', '.join(filter(None, files))}: {error}") from error
    return _frame_from_data(data, name, longest_side)


def _wants_depth(annotation: FrameAnnotation, dataset_root: str, load_depths: bool | Literal["auto"], name: str) -> bool:
    if load_depths is False:
        return False
    depth = annotation.depth
    if depth is None or depth.mask_path is None:  # 0.7.4 cannot load a depth map without its mask
        if load_depths is True:
            raise ValueError(f"frame {name}: the annotation has no {'depth map' if depth is None else 'depth mask'}")
        return False
    absent = [path for path in (depth.path, depth.mask_path) if not os.path.isfile(os.path.join(dataset_root, path))]
    if absent and load_depths == "auto":
        logger.warning("frame %s: %s is not there, so this frame has no depth", name, ", ".join(absent))
        return False
    return True


def _frame_from_data(data: FrameData, name: str, longest_side: int | None) -> Frame:
    full_height, full_width = data.image_rgb.shape[-2:]
    height, width = _resized_size(full_height, full_width, longest_side)
    camera = pinhole_camera(data.camera, 0, height=full_height, width=full_width).resized(height, width)
    return Frame(
        name=name,
        sequence_name=data.sequence_name,
        frame_number=int(data.frame_number),
        rgb=_to_uint8(data.image_rgb, height, width),
        mask=_to_uint8(data.fg_probability, height, width),
        camera=camera,
        depth=None if data.depth_map is None else _nearest(data.depth_map, height, width),
        depth_mask=None if data.depth_map is None else _nearest(data.depth_mask, height, width),
    )


def _resized_size(height: int, width: int, longest_side: int | None) -> tuple[int, int]:
    longest = max(height, width)
    if longest_side is None or longest <= longest_side:
        return height, width
    return max(1, round(height * longest_side / longest)), max(1, round(width * longest_side / longest))


def _to_uint8(picture: Tensor | Any, height: int, width: int) -> Tensor:
    picture = torch.as_tensor(picture)  # 0.7.4 hands out numpy arrays
    if picture.shape[-2:] != (height, width):
        picture = area_average(picture, height, width)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def _nearest(values: Tensor | Any, height: int, width: int) -> Tensor:
    return torch.nn.functional.interpolate(torch.as_tensor(values)[None], size=(height, width), mode="nearest-exact")[0]
