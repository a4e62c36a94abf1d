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
import sys
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pytorch3d.implicitron.dataset.frame_data import FrameData
from pytorch3d.implicitron.dataset.json_index_dataset import JsonIndexDataset
from pytorch3d.implicitron.dataset.json_index_dataset_map_provider_v2 import JsonIndexDatasetMapProviderV2
from pytorch3d.implicitron.dataset.types import FrameAnnotation
from pytorch3d.implicitron.tools.config import expand_args_fields
from pytorch3d.renderer.cameras import PerspectiveCameras
from torch import Tensor

from co3d_ensemble.functional.cameras import ndc_from_pinhole, pinhole_from_ndc
from co3d_ensemble.functional.types import Frame, PinholeCamera

logger = logging.getLogger(__name__)

FrameKey = tuple[str, int]  # (sequence_name, frame_number)

# A dataset that counts as filtered accepts set lists with frames that it does not hold; this filter removes nothing.
_ALLOW_MISSING = {"limit_sequences_to": sys.maxsize}

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
        keys: (sequence_name, frame_number) of frames in the subset's train, val or test list.
        longest_side: area-average pictures and masks (depth: nearest) down to this longest side in pixels; smaller
            pictures are left alone; None: original size.
        load_depths: True: depth and its mask, required; False: neither; "auto": both where the annotation names them
            and the files are there.

    Raises:
        ValueError: the root, category or subset is not there, a key is in none of the lists, or a file cannot be read;
            the message names the frame and the file.
    """
    datasets = _datasets(str(dataset_root), category, subset_name)
    return [_load_frame(datasets, key, longest_side=longest_side, load_depths=load_depths) for key in keys]


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


class _SubsetProvider(JsonIndexDatasetMapProviderV2):
    """The stock provider stops on one wrong line of a set list; this one leaves lines to the audit of the data.

    A line whose path differs from the annotation's is kept under its (sequence, frame number): the annotation decides
    what is read. A line without an annotation is left out (``_ALLOW_MISSING``), and asking for that frame is then the error.
    """

    def _load_annotation_json(self, json_filename: str) -> Any:
        loaded = super()._load_annotation_json(json_filename)
        if "set_lists" not in json_filename:
            return loaded
        return {split: [(str(line[0]), int(line[1])) for line in loaded.get(split, [])] for split in ("train", "val", "test")}


def _datasets(dataset_root: str, category: str, subset_name: str) -> dict[FrameKey, tuple[JsonIndexDataset, int]]:
    folder = os.path.join(dataset_root, category)
    files = [
        os.path.join(folder, "frame_annotations.jgz"),
        os.path.join(folder, "sequence_annotations.jgz"),
        os.path.join(folder, "set_lists", f"set_lists_{subset_name}.json"),
    ]
    for path in files:
        if not os.path.isfile(path):
            raise ValueError(
                f"{path} is not there: check dataset_root={dataset_root!r}, category={category!r}, subset_name={subset_name!r}"
            )
    stamps = tuple((os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in files)
    return _cached_datasets(dataset_root, category, subset_name, stamps)


@functools.lru_cache(maxsize=2)  # the annotations of a large category take a minute to parse and gigabytes to keep
def _cached_datasets(
    dataset_root: str, category: str, subset_name: str, stamps: tuple[tuple[int, int], ...]
) -> dict[FrameKey, tuple[JsonIndexDataset, int]]:
    """(dataset, index) of every annotated frame of the subset; ``stamps`` only tell changed files from known ones."""
    expand_args_fields(_SubsetProvider)
    provider = _SubsetProvider(
        category=category,
        subset_name=subset_name,
        dataset_root=dataset_root,
        load_eval_batches=False,
        dataset_JsonIndexDataset_args={
            "load_depths": True,  # of each frame: see _load_frame
            "load_depth_masks": True,
            "mask_images": False,
            "mask_depths": False,
            "image_height": None,
            "image_width": None,
            "box_crop": False,
            "remove_empty_masks": False,  # targets of test sequences may have none
            **_ALLOW_MISSING,
        },
    )
    splits = provider.get_dataset_map()
    return {
        (entry["frame_annotation"].sequence_name, entry["frame_annotation"].frame_number): (dataset, index)
        for dataset in (splits.train, splits.val, splits.test)
        for index, entry in enumerate(dataset.frame_annots)
    }


def _load_frame(
    datasets: dict[FrameKey, tuple[JsonIndexDataset, int]],
    key: FrameKey,
    *,
    longest_side: int | None,
    load_depths: bool | Literal["auto"],
) -> Frame:
    name = f"{key[0]}/{key[1]}"
    if tuple(key) not in datasets:
        raise ValueError(f"frame {name}: not among the annotated frames of the subset")
    dataset, index = datasets[tuple(key)]
    entry = dataset.frame_annots[index]
    annotation = entry["frame_annotation"]
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
    missing = [field for field in ("image_rgb", "fg_probability", "camera") if getattr(data, field) is None]
    if missing:
        raise ValueError(f"frame {name}: the annotation of {annotation.image.path} gives no {', '.join(missing)}")
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
