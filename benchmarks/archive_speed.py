"""Seconds per frame of storing and of evaluating a submission: this package's way, and the way that the challenge's own code goes.

    python benchmarks/archive_speed.py                                    # 12 frames of 400 x 400 and of 800 x 600
    python benchmarks/archive_speed.py --frames 30 --workers 8 --json FILE

The challenge's way is rebuilt from the description of its files and metrics: three PNGs per frame written to disk at PIL's default
compression, read back into one HDF5 file; to evaluate, the HDF5 file unpacked to disk, each PNG and the ground truth decoded, and
every metric computed by itself in NumPy, the depth's scale by sorting every pixel. Its package (which needs an installed copy of
itself) does more around it. Frames are an object with texture on black; ground truth is a JPEG, a mask and a depth map on disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from co3d_ensemble.challenge.archive import write_archive  # noqa: E402
from co3d_ensemble.challenge.scoring import score_archive  # noqa: E402
from co3d_ensemble.challenge.targets import Target  # noqa: E402
from co3d_ensemble.data.co3d import FrameRecord  # noqa: E402
from co3d_ensemble.functional.metrics import METRIC_NAMES  # noqa: E402
from co3d_ensemble.functional.types import RenderedView  # noqa: E402
from co3d_ensemble.scripts import run_script  # noqa: E402

SIZES = ((400, 400), (600, 800))  # height, width
REPETITIONS = 3  # of which the fastest counts
FOLDER = "manyview_dev_0"


def frame(folder: Path, size: tuple[int, int], number: int) -> tuple[Target, FrameRecord, RenderedView]:
    """A rendered view and, on disk, what it is scored against."""
    random, (height, width) = np.random.default_rng(number), size
    y, x = np.mgrid[:height, :width]
    distance = np.hypot((y - height / 2) / (0.4 * height), (x - width / 2) / (0.35 * width))
    mask = distance < 1
    waves = np.stack([np.sin(x / step + number) * np.cos(y / (step + 3)) for step in (5, 9, 23)])
    photo = (0.5 + 0.3 * waves + 0.03 * random.normal(size=waves.shape)).clip(0, 1)
    depth = np.where(mask, 5 - np.sqrt((1 - distance**2).clip(0)), 0)
    paths = [folder / f"{number}.{name}" for name in ("jpg", "mask.png", "depth.png", "valid.png")]
    truth = (depth + 0.02 * random.normal(size=size) * mask).astype(np.float16)
    pictures = (
        (photo.transpose(1, 2, 0) * 255).astype(np.uint8),
        mask.astype(np.uint8) * 255,
        truth.view(np.uint16),
        mask.astype(np.uint8) * 255,
    )
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    one = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
    image, masks, depths, valid = paths
    camera = {"R": one, "T": (0.0, 0.0, 5.0), "focal": (2.0, 2.0), "principal": (0.0, 0.0), "intrinsics_format": "ndc_isotropic"}
    files = {"image_path": image, "mask_path": masks, "mask_mass": None, "depth_path": depths, "depth_mask_path": valid}
    record = FrameRecord(
        "cape", "1_2_3", number, 0.0, **files, depth_scale_adjustment=1.0, height=height, width=width, **camera, frame_type=""
    )
    rendered = (
        (photo + 0.02 * random.normal(size=photo.shape)).clip(0, 1) * mask,
        1.5 * depth + 0.01 * random.normal(size=size) * mask,
        mask,
    )
    rgb, z, opacity = (torch.from_numpy(plane).float() for plane in rendered)
    return Target("cape", FOLDER, "1_2_3", number, height, width), record, RenderedView(rgb=rgb, depth=z[None], mask=opacity[None])


def official_store(path: Path, frames: list[tuple[Target, FrameRecord, RenderedView]], scratch: Path) -> None:
    names = []
    for target, _, view in frames:
        planes = {
            "image": (view.rgb.numpy().transpose(1, 2, 0) * 255).astype(np.uint8),
            "mask": (view.mask[0].numpy() * 255).astype(np.uint8),
            "depth": view.depth[0].numpy().astype(np.float16).view(np.uint16),
        }
        for kind, plane in planes.items():
            name = target.path(kind)
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(plane).save(scratch / name)
            names.append(name)
    with h5py.File(path, "w", libver="latest") as file:
        data = file.create_dataset("binary_data", (len(names),), dtype=h5py.vlen_dtype(np.uint8), compression="gzip")
        for i, name in enumerate(names):
            data[i] = np.fromfile(scratch / name, np.uint8)
            data.attrs[Path(name).name] = i
        file.create_dataset("filepaths", data=[name.encode() for name in names], dtype=h5py.string_dtype("utf-8", 4096), compression="gzip")


def official_evaluation(path: Path, frames: list[tuple[Target, FrameRecord, RenderedView]], scratch: Path) -> dict[str, float]:
    with h5py.File(path) as file:
        for name, content in zip(file["filepaths"][:], file["binary_data"][:], strict=True):
            (scratch / name.decode()).parent.mkdir(parents=True, exist_ok=True)
            content.tofile(scratch / name.decode())
    scores = [_official_metrics(scratch, target, record) for target, record, _ in frames]
    return {name: float(np.mean([score[name] for score in scores])) for name in METRIC_NAMES}


def _decoded(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def _official_metrics(scratch: Path, target: Target, record: FrameRecord) -> dict[str, float]:
    """Each metric from the whole pictures, one after the other."""
    rgb, mask, depth = (_decoded(scratch / target.path(kind)) for kind in ("image", "mask", "depth"))
    rgb, mask = rgb.transpose(2, 0, 1).astype(np.float64) / 255, mask / 255.0
    depth = depth.astype(np.uint16).view(np.float16).astype(np.float64)
    gt_rgb, gt_mask = _decoded(record.image_path).transpose(2, 0, 1).astype(np.float64) / 255, _decoded(record.mask_path) / 255.0
    gt_depth = _decoded(record.depth_path).astype(np.uint16).view(np.float16).astype(np.float64) * (_decoded(record.depth_mask_path) > 0)
    inside = (gt_mask > 0.5).astype(np.float64)

    def psnr(mse: float) -> float:
        return float(-10 * np.log10(max(mse, 1e-10)))

    both, either = ((mask >= 0.5) & (gt_mask > 0.5)).sum(), ((mask >= 0.5) | (gt_mask > 0.5)).sum()
    inner = (slice(5, -5), slice(5, -5))
    truth, predicted = (gt_depth * inside)[inner], depth[inner]
    counted = (truth > 0).astype(np.float64)
    ratios, weights = (truth / predicted.clip(1e-10)).ravel(), (np.abs(predicted) * counted).ravel()
    order = np.argsort(ratios)
    scale = ratios[order][np.argmax(2 * weights[order].cumsum() > weights.sum())]
    return {
        "psnr_masked": psnr(((rgb - gt_rgb * inside) ** 2).mean()),
        "psnr_fg": psnr((((rgb - gt_rgb) ** 2) * inside).sum() / (3 * inside.sum())),
        "psnr_full_image": psnr(((rgb - gt_rgb) ** 2).mean()),
        "depth_abs_fg": float((np.abs(truth - scale * predicted) * counted).sum() / counted.sum()),
        "iou": float(both / (either + 1e-4)),
    }


def fastest(action: Callable[[], Any], n_frames: int) -> tuple[dict[str, float], Any]:
    """Seconds per frame of the fastest repetition, by the clock and of all processors (child processes too), and the last result."""
    found, result = [], None
    for _ in range(REPETITIONS):
        began, before = time.perf_counter(), _cpu_seconds()
        result = action()
        found.append({"seconds": (time.perf_counter() - began) / n_frames, "cpu_seconds": (_cpu_seconds() - before) / n_frames})
    return {name: min(each[name] for each in found) for name in found[0]}, result


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measured(size: tuple[int, int], n_frames: int, workers: int | None, folder: Path) -> dict[str, Any]:
    frames = [frame(folder, size, number) for number in range(n_frames)]
    records = {target: record for target, record, _ in frames}
    ours, theirs, scratch = folder / "ours.hdf5", folder / "theirs.hdf5", folder / "scratch"
    store, _ = fastest(lambda: write_archive(ours, ((target, view) for target, _, view in frames)), n_frames)
    evaluate, scores = fastest(lambda: score_archive(ours, records, workers=workers), n_frames)
    official_store_, _ = fastest(lambda: official_store(theirs, frames, scratch), n_frames)
    shutil.rmtree(scratch)
    official_evaluate, official_scores = fastest(lambda: official_evaluation(theirs, frames, scratch), n_frames)
    of_theirs = score_archive(theirs, records, workers=workers)["mean"]
    return {
        "size": f"{size[1]}x{size[0]}",
        "frames": n_frames,
        "store": store,
        "evaluate": evaluate,
        "official_store": official_store_,
        "official_evaluate": official_evaluate,
        "bytes_ratio": ours.stat().st_size / theirs.stat().st_size,
        "largest_difference_of_scores": max(abs(of_theirs[name] - official_scores[name]) for name in METRIC_NAMES),
        "scores": {name: scores["mean"][name] for name in METRIC_NAMES},
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--workers", type=int, help="threads that evaluate; default: one per core, at most 8")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    results = []
    for size in SIZES:
        print(f"{given.frames} frames of {size[1]}x{size[0]}, {REPETITIONS} repetitions of each step", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found = measured(size, given.frames, given.workers, Path(folder))
        results.append(found)
        for step in ("store", "evaluate"):
            ours, theirs = found[step], found[f"official_{step}"]
            for unit, told in (("seconds", "by the clock"), ("cpu_seconds", "of processors")):
                times = f"{1e3 * ours[unit]:6.1f} ms per frame {told}, the challenge's way {1e3 * theirs[unit]:6.1f} ms"
                print(f"  {step:8s}  {times}: {theirs[unit] / ours[unit]:.1f} times faster")
        print(f"  archive {found['bytes_ratio']:.2f} times as large, scores differ by {found['largest_difference_of_scores']:.1g}")
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_script(main)
