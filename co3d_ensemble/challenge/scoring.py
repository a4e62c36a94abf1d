"""Scores of a submission archive's own bytes against the ground truth of a data set, as the challenge computes them.

The mean runs over the frames of a subset, then over the subsets. Where the official package scores a missing subset as a
blank prediction, this stops with the list of missing frames.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from co3d_ensemble.challenge.archive import read_archive
from co3d_ensemble.challenge.targets import Target
from co3d_ensemble.data.co3d import FrameRecord
from co3d_ensemble.functional.metrics import METRIC_NAMES, challenge_metrics
from co3d_ensemble.functional.types import RenderedView

logger = logging.getLogger(__name__)

NO_DEPTH, NO_FRAME = "no ground-truth depth", "no frame in the archive"

FrameScores = dict[str, float | None]


class GroundTruthError(ValueError):
    """A frame cannot be scored for lack of ground truth; the message names the file."""


class GroundTruth(NamedTuple):
    """What a frame is scored against, float32.

    Attributes:
        rgb: unmasked photograph in [0, 1], shape (3, H, W).
        mask: foreground probability in [0, 1], shape (1, H, W).
        depth: z, 0 = unknown, shape (1, H, W), or None.
        depth_mask: 0/1 validity of ``depth``, shape (1, H, W), or None.
    """

    rgb: Tensor
    mask: Tensor
    depth: Tensor | None
    depth_mask: Tensor | None


def load_ground_truth(record: FrameRecord, *, apply_scale_adjustment: bool = False) -> GroundTruth:
    """Ground truth of one frame as the challenge's evaluation loads it.

    Args:
        apply_scale_adjustment: multiply depth by the annotated factor, which gives world units. The challenge's evaluation
            takes the PNG's values as they are, and ``depth_abs_fg`` is proportional to them.

    Raises:
        GroundTruthError: image or mask missing or broken, or planes that differ in size. A missing depth or depth mask is None.
    """
    if record.mask_path is None:
        raise GroundTruthError(f"{record.image_path}: the annotation names no mask")
    rgb = _read(record.image_path, "RGB").transpose(2, 0, 1).astype(np.float32) / 255
    size = rgb.shape[1:]
    mask = _read(record.mask_path, None, size).astype(np.float32) / 255
    depth = depth_mask = None
    if record.depth_path is not None and record.depth_path.is_file():
        depth = _read(record.depth_path, None, size).astype(np.uint16).view(np.float16).astype(np.float32)
        if apply_scale_adjustment:
            depth *= record.depth_scale_adjustment
        depth[~np.isfinite(depth)] = 0
        if record.depth_mask_path is not None and record.depth_mask_path.is_file():
            depth_mask = (_read(record.depth_mask_path, "L", size) > 0).astype(np.float32)
    planes = (None if plane is None else torch.from_numpy(plane)[None] for plane in (mask, depth, depth_mask))
    return GroundTruth(torch.from_numpy(rgb), *planes)


def score_view(view: RenderedView, truth: GroundTruth) -> FrameScores:
    """The challenge's metrics of one frame; ``depth_abs_fg`` is None without ground-truth depth."""
    return challenge_metrics(view.rgb, view.mask, view.depth, truth.rgb, truth.mask, truth.depth, truth.depth_mask)


def score_archive(
    path: Path | str,
    records: Mapping[Target, FrameRecord],
    *,
    allow_missing: bool = False,
    apply_scale_adjustment: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """Scores every frame of an archive.

    Args:
        records: ground truth per frame, from ``targets_with_records``.
        allow_missing: score what is there; a subset without any frame has null scores and no part in the mean.
        apply_scale_adjustment: see ``load_ground_truth``.
        workers: threads.

    Returns:
        ``{"mean": {metric: value}, "subsets": {"<category>/<subset>": {metric: value, "n_frames": n, "n_missing": n}}}``;
        a metric without value is None, and ``"reasons"`` beside it says why.

    Raises:
        MissingTargets, ArchiveError: as ``read_archive``.
        GroundTruthError: as ``load_ground_truth``, or a redacted frame of a test set.
    """
    scores: dict[Target, FrameScores] = {}
    pending: deque[tuple[Target, Future[FrameScores]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for target, view in read_archive(path, records, allow_missing=allow_missing):
            pending.append((target, pool.submit(_score_target, target, view, records[target], apply_scale_adjustment)))
            if len(pending) > 2 * workers:  # bounds the decoded views in memory
                done, future = pending.popleft()
                scores[done] = future.result()
        scores.update((target, future.result()) for target, future in pending)
    return aggregate(scores, list(records))


def aggregate(scores: Mapping[Target, FrameScores], targets: Sequence[Target]) -> dict[str, Any]:
    """Means over frames, then over subsets, as ``score_archive`` returns them.

    Args:
        scores: of the frames that were scored.
        targets: all frames that should have been.
    """
    subsets: dict[str, dict[str, Any]] = {}
    for folder in dict.fromkeys(target.folder for target in targets):
        members = [target for target in targets if target.folder == folder]
        frames = [scores[target] for target in members if target in scores]
        means = _mean_of(frames, "frames", NO_DEPTH if frames else NO_FRAME)
        subsets[folder] = {**means, "n_frames": len(frames), "n_missing": len(members) - len(frames)}
    scored = [subset for subset in subsets.values() if subset["n_frames"]]
    mean = _mean_of(scored, "subsets", NO_DEPTH if scored else NO_FRAME)
    if len(scored) < len(subsets):
        mean["reasons"]["missing"] = f"mean over {len(scored)} of {len(subsets)} subsets, the others have {NO_FRAME}"
    return {"mean": mean, "subsets": subsets}


def format_table(result: Mapping[str, Any]) -> str:
    """Plain text: a row per subset and one of the mean, ``-`` where there is no value, then the reasons."""
    rows = [["subset", "frames", *METRIC_NAMES]]
    notes = []
    for name, scores in [*result["subsets"].items(), ("MEAN", result["mean"])]:
        frames = ""
        if "n_frames" in scores:
            total = scores["n_frames"] + scores["n_missing"]
            frames = str(total) if not scores["n_missing"] else f"{scores['n_frames']}/{total}"
        rows.append([name, frames, *("-" if scores[metric] is None else f"{scores[metric]:.4f}" for metric in METRIC_NAMES)])
        notes += [f"{name}: {metric}: {reason}" for metric, reason in scores["reasons"].items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *notes])


def _score_target(target: Target, view: RenderedView, record: FrameRecord, apply_scale_adjustment: bool) -> FrameScores:
    truth = load_ground_truth(record, apply_scale_adjustment=apply_scale_adjustment)
    if tuple(truth.rgb.shape[1:]) != target.size:
        raise GroundTruthError(f"{record.image_path}: has {tuple(truth.rgb.shape[1:])} pixels (H, W), its annotation says {target.size}")
    if not truth.rgb.any():
        if "test" in target.subset_name.split("_"):
            raise GroundTruthError(f"{record.image_path}: black, as targets of test sets are redacted: nothing to score against")
        logger.warning("%s is black, yet a target of %s: scored as the challenge does", record.image_path, target.folder)
    return score_view(view, truth)


def _mean_of(rows: Sequence[Mapping[str, Any]], unit: str, reason: str) -> dict[str, Any]:
    means: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for metric in METRIC_NAMES:
        values = [row[metric] for row in rows if row[metric] is not None]
        means[metric] = sum(values) / len(values) if values else None
        if not values:
            reasons[metric] = reason
        elif len(values) < len(rows):
            reasons[metric] = f"mean over {len(values)} of {len(rows)} {unit}, the others have {reason}"
    return {**means, "reasons": reasons}


def _read(path: Path, mode: str | None, size: tuple[int, ...] | None = None) -> np.ndarray:
    """Pixels of a picture, converted to ``mode`` unless None; checked to be (height, width) = ``size`` unless None."""
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert(mode) if mode else picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise GroundTruthError(f"{path}: cannot be read: {error}") from error
    if size is not None and pixels.shape != tuple(size):
        raise GroundTruthError(f"{path}: expected {tuple(size)} pixels (H, W) as the photograph has, got {pixels.shape}")
    return pixels
