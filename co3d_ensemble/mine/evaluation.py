"""Scores of a trained network: views (PSNR, SSIM, LPIPS) and depth, per number of planes, from one encoder pass per picture.

A view's scores are over all pixels of the picture that is left after the protocol's crop, also those that no plane covers
(black), as the reference's are; ``psnr_valid`` is over the pixels that at least two planes cover. SSIM is the published one
(11 x 11 Gaussian) on colours in [0, 1], LPIPS takes them in [-1, 1] (the reference feeds [0, 1], which its tables contain).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from co3d_ensemble.challenge.lpips import Network as LPIPSNetwork
from co3d_ensemble.fields.mpi_network import MPINetwork
from co3d_ensemble.functional.depth_metrics import DEPTH_METRIC_NAMES, depth_metrics
from co3d_ensemble.functional.metrics import SSIM_WINDOW, psnr_fg, psnr_full_image, ssim
from co3d_ensemble.functional.mpi_losses import disparity_scale
from co3d_ensemble.functional.mpi_sampling import fixed_disparities, stratified_disparities
from co3d_ensemble.mine.inference import PlaneStack, predict_stack, render_pose
from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.protocols import ScoreRules, SourceTask, inner_box, seeded
from co3d_ensemble.mine.trajectories import Pose

VIEW_METRICS = ("psnr", "ssim", "lpips", "psnr_valid", "valid_share")
DEPTH_METRICS = tuple(DEPTH_METRIC_NAMES)
SCALES = ("auto", "points", "none")
NO_VALID, NO_POINTS, NO_TRUTH = "no pixel that two planes cover", "no sparse points", "no pixel with known depth counts"
NOT_FINITE = "not finite"

Record = dict[str, Any]


@dataclass(frozen=True)
class PlaneSampling:
    """Where the planes of an evaluation stand.

    Attributes:
        counts: numbers of planes, each gives a row.
        near, far: disparities of the range.
        kind: ``fixed`` (centres of the intervals) or ``stratified`` (drawn, as the reference does, from ``seed`` and the picture).
        chunk: planes decoded and warped at once; None: all, and the renderer's own choice.
        blend: visible source pixels keep the photograph's colours.
        fine: planes added to each of ``counts`` where a first pass finds surfaces (coarse to fine).
    """

    counts: tuple[int, ...]
    near: float
    far: float
    kind: str = "fixed"
    seed: int = 0
    chunk: int | None = None
    blend: bool = True
    fine: int = 0

    def disparities(self, count: int, index: int, device: torch.device | str) -> Tensor:
        """1 / z of the planes of picture ``index``, without fine ones, descending, shape (count,)."""
        if self.kind == "fixed":
            return fixed_disparities(count, self.near, self.far, batch=1, device=device)[0]
        with seeded(self.seed, index):
            return stratified_disparities(count, self.near, self.far, batch=1)[0].to(device)


@dataclass(frozen=True)
class Scoring:
    """What is scored and how.

    Attributes:
        scale: whether translations are divided by the scale of the source's sparse points: ``points`` (without points that
            is an error), ``auto`` (where there are points), ``none``.
        lpips: network of ``challenge.lpips``, or None.
        no_lpips: why there is none.
    """

    rules: ScoreRules
    scale: str = "auto"
    lpips: LPIPSNetwork | None = None
    no_lpips: str | None = None


@torch.no_grad()
def score_source(network: MPINetwork, task: SourceTask, index: int, *, planes: PlaneSampling, scoring: Scoring) -> Iterator[Record]:
    """All scores of one source picture: a record per number of planes and view, and one per number of planes for its depth.

    A record has ``name``, ``row`` (``depth`` for depth), ``planes``, the metrics of its kind, None where there is no value, and
    ``reasons`` for those; a view's also ``scale``.

    Raises:
        ValueError: ``scale=points`` and a source without points, naming it.
    """
    device = next(network.parameters()).device
    image, K = task.image.to(device), task.K.to(device)
    features = network.encode(image[None])
    for count in planes.counts:
        disparity = planes.disparities(count, index, device)
        how = {"plane_chunk": planes.chunk, "blend": planes.blend, "n_fine": planes.fine}
        stack = predict_stack(network, image, K, disparity, features=features, **how)
        scale, why_none = _scale(stack, task, scoring.scale) if task.pairs else (1.0, None)
        for row, pair in task.pairs:
            record = score_view(stack, pair, scoring=scoring, scale=scale, plane_chunk=planes.chunk)
            if why_none:
                record["reasons"]["scale"] = why_none
            yield {"name": pair.name, "row": row, "planes": count, **record}
        if task.depth is not None:
            yield {"name": task.name, "row": "depth", "planes": count, **score_depth(stack, task, scoring.rules)}


def _scale(stack: PlaneStack, task: SourceTask, wanted: str) -> tuple[float, str | None]:
    """The scale of the source's points, and why it is 1 where points should have given it."""
    if wanted == "none":
        return 1.0, None
    there = task.points is not None and bool((task.points[:, 2] > 0).any())
    if not there:
        if wanted == "points":
            raise ValueError(f"{task.name} has no sparse points: scale=points cannot be had (scale=none takes translations as they are)")
        return 1.0, NO_POINTS
    return disparity_scale(stack.view.disparity, task.points.to(stack.rgb)[None]).item(), None


def score_view(stack: PlaneStack, pair: Pair, *, scoring: Scoring, scale: float = 1.0, plane_chunk: int | None = None) -> Record:
    """Scores of one view of a stack; all of its colours' are NaN where one of them is not finite.

    Args:
        scale: by how much larger the stack's disparities are than the pair's unit has them; divides the translation.
    """
    height, width = pair.target.shape[-2:]
    view = render_pose(stack, Pose(pair.R, pair.t / scale), K=pair.K_target.to(stack.K), size=(height, width), plane_chunk=plane_chunk)
    rows, columns = inner_box(height, width, scoring.rules.border)
    predicted, truth = view.rgb[0, :, rows, columns].clamp(0, 1), pair.target.to(stack.rgb)[:, rows, columns]
    valid = view.valid[0, :, rows, columns].float()
    record: Record = {name: None for name in VIEW_METRICS}
    reasons: dict[str, str] = {}
    record["valid_share"] = valid.mean().item()
    if not torch.isfinite(predicted).all():  # what the metrics refuse to score
        return {**record, **dict.fromkeys(("psnr", "ssim", "lpips", "psnr_valid"), math.nan), "scale": scale, "reasons": reasons}
    record["psnr"] = psnr_full_image(predicted, truth).item()
    if valid.any():
        record["psnr_valid"] = psnr_fg(predicted, truth, valid).item()
    else:
        reasons["psnr_valid"] = NO_VALID
    if min(predicted.shape[-2:]) >= SSIM_WINDOW:
        record["ssim"] = ssim(predicted, truth).item()
    else:
        reasons["ssim"] = (
            f"{predicted.shape[-1]} x {predicted.shape[-2]} pixels are smaller than its window of {SSIM_WINDOW} x {SSIM_WINDOW}"
        )
    if scoring.lpips is not None:
        record["lpips"] = scoring.lpips(2 * predicted[None] - 1, 2 * truth[None] - 1).item()
    else:
        reasons["lpips"] = scoring.no_lpips or "switched off"
    return {**record, "scale": scale, "reasons": reasons}


def score_depth(stack: PlaneStack, task: SourceTask, rules: ScoreRules) -> Record:
    """Depth metrics of the source view; predicted disparity is resized bilinearly to the truth's size.

    Pixels that no plane covers (in mode alpha) count as being on the farthest plane; where a density is not finite all metrics are NaN.
    """
    truth = task.depth.to(stack.rgb)
    mask = None if task.depth_mask is None else task.depth_mask.to(stack.rgb.device)
    disparity = torch.where(stack.view.disparity > 0, stack.view.disparity, stack.disparity[-1])
    if disparity.shape[-2:] != truth.shape[-2:]:
        disparity = F.interpolate(disparity, truth.shape[-2:], mode="bilinear", align_corners=False)
    counts = truth > 0 if mask is None else (truth > 0) & (mask > 0)
    if not (counts & torch.isfinite(truth) & (truth > rules.min_depth) & (truth < rules.max_depth)).any():
        return {**dict.fromkeys(DEPTH_METRICS), "scale": None, "reasons": dict.fromkeys(DEPTH_METRICS, NO_TRUTH)}
    if not torch.isfinite(stack.sigma).all():
        return {**dict.fromkeys(DEPTH_METRICS, math.nan), "scale": None, "reasons": {}}
    limits = {"min_depth": rules.min_depth, "max_depth": rules.max_depth}
    values = depth_metrics(disparity[0].reciprocal(), truth, mask, align=rules.depth_alignment, **limits)
    return {**values, "reasons": {}}


def summarise(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """``{row: {planes: means}}`` in the order of the records; each with ``n``, the number of pictures, and ``reasons``.

    A metric's mean is over the pictures that have it; where none has it it is None and its reason is that of the first. It is None,
    too, where a picture's is not finite: the mean of the others would not be the network's.
    """
    groups: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        groups.setdefault(record["row"], {}).setdefault(str(record["planes"]), []).append(record)
    return {row: {planes: _means(members, row) for planes, members in by.items()} for row, by in groups.items()}


def _means(members: Sequence[Record], row: str) -> Record:
    means: Record = {}
    reasons: dict[str, str] = {}
    for metric in DEPTH_METRICS if row == "depth" else VIEW_METRICS:
        values = [record[metric] for record in members if record[metric] is not None]
        means[metric] = math.fsum(values) / len(values) if values else None
        lacking = [record["reasons"].get(metric, "no value") for record in members if record[metric] is None]
        broken = [record["name"] for record in members if record["reasons"].get(metric) == NOT_FINITE]
        if broken:
            means[metric], reasons[metric] = None, f"{len(broken)} of {len(members)} {NOT_FINITE}, such as {broken[0]}"
        elif lacking and values:
            reasons[metric] = f"mean over {len(values)} of {len(members)}, the others have {lacking[0]}"
        elif lacking:
            reasons[metric] = lacking[0]
    unscaled = [record["reasons"]["scale"] for record in members if "scale" in record["reasons"]]
    if unscaled:
        reasons["scale"] = f"translations of {len(unscaled)} of {len(members)} are not scaled: {unscaled[0]}"
    return {**means, "n": len(members), "reasons": reasons}


def _without_non_finite(record: Record) -> Record:
    """A record that JSON can hold: metrics that are not finite are None and say so."""
    broken = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value) and name != "scale"]
    return {**record, **dict.fromkeys(broken), "reasons": {**record["reasons"], **dict.fromkeys(broken, NOT_FINITE)}}


def evaluate(
    network: MPINetwork,
    tasks: Sequence[SourceTask] | Any,
    indices: Sequence[int],
    *,
    planes: PlaneSampling,
    scoring: Scoring,
    known: Mapping[int, list[Record]] | None = None,
    keep: Callable[[int, list[Record]], None] = lambda index, records: None,
) -> list[Record]:
    """All records, in the order of ``indices``.

    Args:
        tasks: of :class:`SourceTask`.
        known: records of sources that have been scored before.
        keep: called with each source's index and records when they are there.
    """
    known = dict(known or {})
    for index in indices:
        if index not in known:
            scored = score_source(network, tasks[index], index, planes=planes, scoring=scoring)
            known[index] = [_without_non_finite(record) for record in scored]
            keep(index, known[index])
    return [record for index in indices for record in known[index]]
