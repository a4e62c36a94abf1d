"""Scores of a submission archive's own bytes against the ground truth of a data set, as the challenge computes them.

The mean runs over the frames of a subset, then over the subsets. Where the official package scores a missing subset as a
blank prediction, this stops with the list of missing frames. Where it stops at a broken picture, or scores a redacted one as
if black were the truth, this leaves the frame out and says so.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from co3d_ensemble.base.pictures import PictureError, exactly, read_mask, read_photo
from co3d_ensemble.challenge.archive import archive_pictures, decode_pictures
from co3d_ensemble.challenge.targets import Target
from co3d_ensemble.data.audit import mask_fault
from co3d_ensemble.data.co3d import FrameRecord
from co3d_ensemble.data.depth_maps import load_depth
from co3d_ensemble.functional.metrics import METRIC_NAMES, challenge_metrics
from co3d_ensemble.functional.types import RenderedView

logger = logging.getLogger(__name__)

NO_DEPTH, NO_FRAME, NO_TRUTH = "no ground-truth depth", "no frame in the archive", "no frame with ground truth"
WITHOUT_TRUTH = "without_truth"  # the key of the reasons that holds a line per frame that could not be scored
MAX_VALUE = 255  # of an 8-bit picture
MAX_WORKERS = 8
SHOWN_LINES = 5  # of them in the table, for a test set has hundreds

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

    A depth map that is missing, spoilt or without a valid value is None, and so is a missing depth mask; what is spoilt is logged.

    Args:
        apply_scale_adjustment: multiply depth by the annotated factor, which gives world units. The challenge's evaluation
            takes the PNG's values as they are, and ``depth_abs_fg`` is proportional to them.

    Raises:
        GroundTruthError: image or mask missing, broken, redacted or of another size than annotated, or of values that make no mask: what
            the audit (``data/audit.py``) does not score either.
    """
    if record.mask_path is None:
        raise GroundTruthError(f"{record.image_path}: the annotation names no mask")
    size = (record.height, record.width)
    try:
        photo = read_photo(record.image_path, exactly(size, "its annotation says") if all(size) else None)
        size = (photo.height, photo.width)
        mask = np.asarray(read_mask(record.mask_path, exactly(size, "its picture")))
    except (PictureError, FileNotFoundError) as error:
        raise GroundTruthError(str(error)) from error
    rgb = np.asarray(photo)
    if not rgb.any():
        raise GroundTruthError(f"{record.image_path}: black, as redacted targets are: nothing to score against")
    if fault := mask_fault(mask):
        raise GroundTruthError(f"{record.mask_path}: mask {fault[1]}")
    depth, depth_mask = _depth(record, size, record.depth_scale_adjustment if apply_scale_adjustment else 1.0)
    planes = (torch.from_numpy(plane.astype(np.float32) / MAX_VALUE) for plane in (rgb.transpose(2, 0, 1), mask[None]))
    return GroundTruth(*planes, depth, depth_mask)


def _depth(record: FrameRecord, size: tuple[int, int], scale: float) -> tuple[Tensor | None, Tensor | None]:
    if record.depth_path is None or not record.depth_path.is_file():
        return None, None
    has_mask = record.depth_mask_path is not None and record.depth_mask_path.is_file()
    try:
        return load_depth(record.depth_path, record.depth_mask_path if has_mask else None, size, scale=scale)
    except PictureError as error:
        logger.warning("frame %s has no depth: %s", record.name, error)
        return None, None


def score_view(view: RenderedView, truth: GroundTruth) -> FrameScores:
    """The challenge's metrics of one frame; ``depth_abs_fg`` is None without ground-truth depth."""
    return challenge_metrics(view.rgb, view.mask, view.depth, truth.rgb, truth.mask, truth.depth, truth.depth_mask)


def score_archive(
    path: Path | str,
    records: Mapping[Target, FrameRecord],
    *,
    allow_missing: bool = False,
    apply_scale_adjustment: bool = False,
    workers: int | None = None,
) -> dict[str, Any]:
    """Scores every frame of an archive that has ground truth; each picture is checked and decoded once, by the threads that score.

    A frame whose ground truth is missing, broken, of another size, or black (redacted) is left out with a warning.

    Args:
        records: ground truth per frame, from ``targets_with_records``.
        allow_missing: score what is there; a subset without any frame has null scores and no part in the mean.
        apply_scale_adjustment: see ``load_ground_truth``.
        workers: threads; None: one per core that this process may use, at most ``MAX_WORKERS``.

    Returns:
        ``{"mean": {metric: value}, "subsets": {"<category>/<subset>": {metric: value, "n_frames": n, "n_missing": n,
        "n_without_truth": n}}}``: frames scored, absent from the archive, and left out; a metric without value is None, and
        ``"reasons"`` beside it says why. ``reasons["without_truth"]`` lists the frames left out, each with its file.
        ``"depth_units"`` says what ``depth_abs_fg`` is in: "png", the depth map's own values as in the challenge, or "world".

    Raises:
        MissingTargets, ArchiveError: as ``read_archive``.
    """
    workers = workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    scores: dict[Target, FrameScores] = {}
    without_truth: dict[Target, str] = {}
    pending: deque[tuple[Target, Future[FrameScores]]] = deque()

    def collect(target: Target, future: Future[FrameScores]) -> None:
        try:
            scores[target] = future.result()
        except GroundTruthError as error:
            logger.warning("%s is not scored: %s", target.path("*"), error)
            without_truth[target] = str(error)

    with ThreadPoolExecutor(workers) as pool, closing(archive_pictures(path, records, allow_missing=allow_missing)) as pictures:
        for target, files in pictures:
            pending.append((target, pool.submit(_score_target, path, target, files, records[target], apply_scale_adjustment)))
            if len(pending) > 2 * workers:  # bounds the pictures in memory
                collect(*pending.popleft())
        for target, future in pending:
            collect(target, future)
    return {**aggregate(scores, list(records), without_truth), "depth_units": "world" if apply_scale_adjustment else "png"}


def aggregate(
    scores: Mapping[Target, FrameScores], targets: Sequence[Target], without_truth: Mapping[Target, str] | None = None
) -> dict[str, Any]:
    """Means over frames, then over subsets, as ``score_archive`` returns them (without ``depth_units``).

    Args:
        scores: of the frames that were scored.
        targets: all frames that should have been.
        without_truth: why, of the frames that are in the archive but could not be scored.
    """
    without_truth = without_truth or {}
    subsets: dict[str, dict[str, Any]] = {}
    unscored: dict[str, None] = {}  # why subsets have no scores, in order
    for folder in dict.fromkeys(target.folder for target in targets):
        members = [target for target in targets if target.folder == folder]
        frames = [scores[target] for target in members if target in scores]
        left_out = [without_truth[target] for target in members if target in without_truth]
        why_none = NO_TRUTH if left_out else NO_FRAME
        subset = _mean_of(frames, "frames", NO_DEPTH if frames else why_none)
        subset |= {"n_frames": len(frames), "n_missing": len(members) - len(frames) - len(left_out), "n_without_truth": len(left_out)}
        if left_out:
            subset["reasons"][WITHOUT_TRUTH] = left_out
        if not frames:
            unscored[why_none] = None
        subsets[folder] = subset
    scored = [subset for subset in subsets.values() if subset["n_frames"]]
    why_none = " or ".join(unscored)
    mean = _mean_of(scored, "subsets", NO_DEPTH if scored else why_none)
    if len(scored) < len(subsets):
        mean["reasons"]["missing"] = f"mean over {len(scored)} of {len(subsets)} subsets, the others have {why_none}"
    return {"mean": mean, "subsets": subsets}


def format_table(result: Mapping[str, Any]) -> str:
    """Plain text: a row per subset and one of the mean, ``-`` where there is no value, then the reasons."""
    rows = [["subset", "frames", *METRIC_NAMES]]
    notes = []
    for name, scores in [*result["subsets"].items(), ("MEAN", result["mean"])]:
        frames = ""
        if "n_frames" in scores:
            total = scores["n_frames"] + scores["n_missing"] + scores["n_without_truth"]
            frames = str(total) if scores["n_frames"] == total else f"{scores['n_frames']}/{total}"
        rows.append([name, frames, *("-" if scores[metric] is None else f"{scores[metric]:.4f}" for metric in METRIC_NAMES)])
        notes += [f"{name}: {metric}: {reason}" for metric, reason in scores["reasons"].items() if metric != WITHOUT_TRUTH]
        left_out = scores["reasons"].get(WITHOUT_TRUTH, [])
        notes += [f"{name}: not scored: {reason}" for reason in left_out[:SHOWN_LINES]]
        if len(left_out) > SHOWN_LINES:
            notes.append(f"{name}: not scored: and {len(left_out) - SHOWN_LINES} more")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *notes])


def _score_target(
    path: Path | str, target: Target, files: Mapping[str, bytes], record: FrameRecord, apply_scale_adjustment: bool
) -> FrameScores:
    view = decode_pictures(path, target, files)
    truth = load_ground_truth(record, apply_scale_adjustment=apply_scale_adjustment)
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
