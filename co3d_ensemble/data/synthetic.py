"""Generated sequences in CO3Dv2 layout: the embedded demo data and the tests' ground truth.

``plan_sequence`` decides the scene, the camera path and the splits, ``generate_sequence`` photographs and writes one
sequence, ``generate_dataset`` many. Everything follows from the seed and the names. Annotation files are merged and
replaced whole, so a reader never sees half of one; two writers of one category at once are not supported.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from co3d_ensemble.base.progress import tracked
from co3d_ensemble.data.synthetic_objects import OBJECTS
from co3d_ensemble.data.synthetic_plan import SequencePlan, SyntheticConfig, plan_sequence, random_numbers
from co3d_ensemble.data.synthetic_view import SyntheticView, render_view, render_views
from co3d_ensemble.files import remove_temporaries
from co3d_ensemble.functional.cameras import ndc_from_pinhole
from co3d_ensemble.functional.types import PinholeCamera

__all__ = [
    "OBJECTS",
    "SequencePlan",
    "SyntheticConfig",
    "generate_dataset",
    "generate_sequence",
    "plan_sequence",
    "render_view",
    "render_views",
]

SUBSET_NAME = re.compile(r"manyview_(dev|test)(_\d+)?")
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # names become folders and parts of file names
JPEG_QUALITY = 95
SECONDS_PER_FRAME = 1 / 30
RAYS_PER_BATCH = 2**18  # bounds the memory of rendering


def generate_sequence(
    root: str | os.PathLike[str], category: str, sequence_name: str, subset_name: str, config: SyntheticConfig
) -> Path:
    """Photographs one sequence and adds it to a CO3Dv2 root; a sequence of the same name is replaced.

    Files of targets in ``manyview_test*`` are redacted: black picture, mask, depth and depth mask, as in the challenge.

    Returns:
        The root.

    Raises:
        ValueError: a bad name, or the subset already belongs to another sequence.
    """
    root = Path(root)
    _check_names(category, sequence_name, subset_name)
    lists_path = root / category / "set_lists" / f"set_lists_{subset_name}.json"
    if lists_path.exists():
        owners = {entry[0] for entries in json.loads(lists_path.read_text()).values() for entry in entries}
        if owners - {sequence_name}:
            raise ValueError(f"subset_name={subset_name!r} of {category!r} belongs to sequence {sorted(owners)}: not replaced")
    plan = plan_sequence(category, sequence_name, config)
    folder = f"{category}/{sequence_name}"
    for name in ("images", "masks", "depths", "depth_masks"):
        (root / folder / name).mkdir(parents=True, exist_ok=True)
    frames = []
    shown = tracked(_views(plan, config), f"photographing {category}", "frames", total=len(plan.cameras))
    for i, view in enumerate(shown):
        frames.append(_write_frame(root, folder, i, view, plan, subset_name, config))
    lists: dict[str, list[list[Any]]] = {"train": [], "val": [], "test": []}
    for frame, split in zip(frames, plan.splits):
        lists[split].append([sequence_name, frame["frame_number"], frame["image"]["path"]])
    sequence = {"sequence_name": sequence_name, "category": category, "video": None, "point_cloud": None}
    sequence["viewpoint_quality_score"] = None
    _merge_annotations(root / category / "frame_annotations.jgz", sequence_name, frames)
    _merge_annotations(root / category / "sequence_annotations.jgz", sequence_name, [sequence])
    _write(lists_path, json.dumps(lists).encode())
    batches = [[target] for target in lists["test"]]
    _write(root / category / "eval_batches" / f"eval_batches_{subset_name}.json", json.dumps(batches).encode())
    index_path = root / "category_to_subset_name_list.json"
    index = json.loads(index_path.read_text()) if index_path.exists() else {}
    index[category] = sorted({*index.get(category, []), subset_name})
    _write(index_path, json.dumps(index, indent=1).encode())
    return root


def generate_dataset(
    root: str | os.PathLike[str], subsets: Mapping[str, Sequence[str]], config: SyntheticConfig | None = None
) -> Path:
    """One sequence, ``synthetic_<subset_name>``, per category and subset; see :func:`generate_sequence`.

    Args:
        subsets: subset names per category, e.g. ``{"mug": ["manyview_dev_0", "manyview_test_0"]}``.
        config: default: ``SyntheticConfig()``.
    """
    config = config or SyntheticConfig()
    for category, names in subsets.items():
        if isinstance(names, str):
            raise ValueError(f"subsets[{category!r}]={names!r}: expected a list of subset names")
        for subset_name in names:
            _check_names(category, f"synthetic_{subset_name}", subset_name)
    if Path(root).is_dir():
        remove_temporaries(Path(root))  # of a killed process; there is one writer at a time
    for category, names in subsets.items():
        for subset_name in names:
            generate_sequence(root, category, f"synthetic_{subset_name}", subset_name, config)
    return Path(root)


def _check_names(category: str, sequence_name: str, subset_name: str) -> None:
    for key, value in (("category", category), ("sequence_name", sequence_name)):
        if not SAFE_NAME.fullmatch(value):
            raise ValueError(f"{key}={value!r}: expected letters, digits, '_' and '-'")
    if not SUBSET_NAME.fullmatch(subset_name):
        raise ValueError(f"subset_name={subset_name!r}: expected manyview_dev[_i] or manyview_test[_i]")


def _with_mask_noise(mask: Tensor, mask_noise: float, rng: np.random.Generator) -> Tensor:
    """Mask (1, H, W) whose boundary is pushed in and out by up to ``mask_noise`` shorter sides, smoothly along it."""
    coarse = torch.from_numpy(rng.uniform(0.05, 0.95, size=(1, 1, 6, 6)))
    if mask_noise == 0:
        return mask
    reach = max(1, round(mask_noise * min(mask.shape[1:])))
    padded = torch.nn.functional.pad(mask[None], (reach,) * 4, mode="replicate")
    soft = torch.nn.functional.avg_pool2d(padded, 2 * reach + 1, stride=1)[0]
    threshold = torch.nn.functional.interpolate(coarse, size=mask.shape[1:], mode="bilinear", align_corners=True)[0]
    return (soft > threshold).to(mask.dtype)


def _views(plan: SequencePlan, config: SyntheticConfig) -> Iterable[SyntheticView]:
    step = max(1, RAYS_PER_BATCH // (config.height * config.width * config.supersample**2))
    for start in range(0, len(plan.cameras), step):
        yield from render_views(plan.scene, plan.cameras[start : start + step], supersample=config.supersample)


def _write_frame(
    root: Path, folder: str, i: int, view: SyntheticView, plan: SequencePlan, subset_name: str, config: SyntheticConfig
) -> dict[str, Any]:
    """Writes the files of one frame and returns its annotation."""
    category, sequence_name = folder.split("/")
    kind, split = subset_name.split("_")[1], plan.splits[i]
    stem, image_name = f"frame{i + 1:06d}", f"frame{i + 1:06d}.{config.image_format}"
    paths = {
        "image": f"{folder}/images/{image_name}",
        "mask": f"{folder}/masks/{stem}.png",
        "depth": f"{folder}/depths/{image_name}.geometric.png",
        "depth_mask": f"{folder}/depth_masks/{stem}.png",
    }
    mask = view.mask
    if split == "train":
        mask = _with_mask_noise(mask, config.mask_noise, random_numbers(config.seed, category, sequence_name, stem))
    seen = 0.0 if kind == "test" and split == "test" else 1.0
    rgb = (view.rgb * seen * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    _write(root / paths["image"], _encode(rgb, config.image_format))
    _write(root / paths["mask"], _encode((mask[0] * seen * 255).to(torch.uint8).numpy()))
    _write(root / paths["depth"], _encode((view.depth[0] * seen).numpy().astype(np.float16).view(np.uint16)))
    _write(root / paths["depth_mask"], _encode(((view.depth[0] > 0) * seen * 255).to(torch.uint8).numpy()))
    # as in the released data, a dev sequence's validation frames count as unseen; a test sequence's are given, so known
    unseen = split == "test" or (split == "val" and kind == "dev")
    return {
        "sequence_name": sequence_name,
        "frame_number": plan.frame_numbers[i],
        "frame_timestamp": i * SECONDS_PER_FRAME,
        "image": {"path": paths["image"], "size": [config.height, config.width]},
        "depth": {"path": paths["depth"], "scale_adjustment": 1.0, "mask_path": paths["depth_mask"]},
        # kept for redacted targets: Implicitron's remove_empty_masks would drop frames of mass 0
        "mask": {"path": paths["mask"], "mass": float(mask.sum())},
        "viewpoint": _viewpoint(plan.annotated_cameras[i], config.intrinsics_format),
        "meta": {"frame_type": f"{kind}_{'unseen' if unseen else 'known'}", "frame_splits": [], "eval_batch_maps": []},
    }


def _viewpoint(camera: PinholeCamera, intrinsics_format: str) -> dict[str, Any]:
    focal, principal = ndc_from_pinhole(camera)
    if intrinsics_format == "ndc_norm_image_bounds":
        side = focal.new_tensor([camera.width, camera.height]) / min(camera.width, camera.height)
        focal, principal = focal / side, principal / side
    return {
        "R": camera.R.tolist(),
        "T": camera.T.tolist(),
        "focal_length": focal.tolist(),
        "principal_point": principal.tolist(),
        "intrinsics_format": intrinsics_format,
    }


def _merge_annotations(path: Path, sequence_name: str, entries: list[dict[str, Any]]) -> None:
    """Replaces the entries of one sequence in an annotation file."""
    kept = json.loads(gzip.decompress(path.read_bytes())) if path.exists() else []
    merged = [entry for entry in kept if entry["sequence_name"] != sequence_name] + entries
    _write(path, gzip.compress(json.dumps(merged).encode(), compresslevel=6, mtime=0))


def _encode(pixels: np.ndarray, image_format: str = "png") -> bytes:
    buffer = io.BytesIO()
    options = {"quality": JPEG_QUALITY} if image_format == "jpg" else {"compress_level": 3}
    Image.fromarray(pixels).save(buffer, "JPEG" if image_format == "jpg" else "PNG", **options)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: written beside its place, then moved there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
