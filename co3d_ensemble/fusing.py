"""The members of one sequence at its cameras, and the fusion that is chosen for them on validation frames."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from co3d_ensemble.base.paths import plain_part
from co3d_ensemble.base.progress import tracked
from co3d_ensemble.config import FusionConfig
from co3d_ensemble.data.co3d import FrameRecord
from co3d_ensemble.files import written_atomically
from co3d_ensemble.functional.fusion import PIXEL_METHODS, FusionRule, fuse, n_zones, stacked, zones
from co3d_ensemble.functional.fusion_fit import Guard, error_products, paired_choice, simplex_weights
from co3d_ensemble.functional.metrics import FOREGROUND
from co3d_ensemble.functional.types import Frame, PinholeCamera, RenderedView
from co3d_ensemble.functional.uncertainty import color_disagreement, depth_disagreement
from co3d_ensemble.pipeline import Renders, checkpoint_stamp, keep_if_made_from, locked_for_rendering, run_directory, view_path
from co3d_ensemble.rendering import Pictures, write_view
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.run_directory import RunDirectory
from co3d_ensemble.training.validation import mean_scores, score_frame

FUSION_FILE = "fusion.json"
BASELINE = "mean"  # the published fusion: another one has to beat it
ONLY = "only_"  # candidates that are one member alone: only_<name>

Rules = tuple[FusionRule, FusionRule]  # of colour and depth, of the mask


@dataclass(frozen=True)
class Fusion:
    """Which members, and how their colour (with it depth) and their mask are averaged."""

    members: tuple[str, ...]
    color: FusionRule = FusionRule()
    mask: FusionRule = FusionRule()

    def __call__(self, views: Sequence[RenderedView]) -> RenderedView:
        return fuse(views, self.color, self.mask)

    def as_json(self) -> dict[str, Any]:
        return {"members": list(self.members), "color": self.color.as_json(), "mask": self.mask.as_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fusion:
        members = tuple(plain_part(name, "members") for name in value["members"])
        return cls(members, FusionRule.from_json(value["color"]), FusionRule.from_json(value["mask"]))


def recorded_fusion(folder: Path) -> Fusion | None:
    """The fusion that an ensemble's folder records, or None.

    Raises:
        ValueError: naming the file, when it is damaged.
    """
    path = folder / FUSION_FILE
    if not path.exists():
        return None
    try:
        return Fusion.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record of a fusion, or damaged: {error!r}; delete it to choose the fusion again") from error


def trained_runs(output_dir: Path | str, category: str, subset_name: str, members: Sequence[str]) -> dict[str, RunDirectory | None]:
    """The run of each member, None where it has no checkpoint to render."""
    runs = {name: RunDirectory(run_directory(output_dir, category, subset_name, name)) for name in members}
    return {name: run if Checkpoints(run.checkpoints).best.exists() else None for name, run in runs.items()}


class MemberRenders:
    """The members' views of a frame; opened by :meth:`locked`, which holds every member's run."""

    def __init__(self, runs: Mapping[str, RunDirectory], device: torch.device, chunk_rays: int | None = None) -> None:
        self.names = tuple(runs)
        self.stamp = {name: checkpoint_stamp(run) for name, run in runs.items()}
        self._renders = [Renders(run, device, chunk_rays) for run in runs.values()]

    @classmethod
    @contextmanager
    def locked(cls, runs: Mapping[str, RunDirectory], device: torch.device, chunk_rays: int | None = None) -> Iterator[MemberRenders]:
        """Raises RunDirectoryBusy where one of the runs is being trained or rendered."""
        with ExitStack() as held:
            for run in runs.values():
                held.enter_context(locked_for_rendering(run))
            yield cls(runs, device, chunk_rays)

    def views(self, record: FrameRecord, camera: PinholeCamera | None = None) -> list[RenderedView]:
        return [renders.view(record, camera) for renders in self._renders]


class FusedRenders:
    """Fused views, kept with the members' disagreement in ``views/`` of an ensemble's folder. For use under its lock.

    ``<sequence>_<frame>.npz`` holds the fused view and ``<sequence>_<frame>_uncertainty.npz`` the standard deviation over the
    members of colour (``rgb``) and, over those that have a surface, of z (``depth``, world units; ``surfaces`` counts them).
    """

    def __init__(self, folder: Path, fusion: Fusion, members: MemberRenders) -> None:
        self._folder, self._fusion = folder / "views", fusion
        pictures = Pictures(folder / "renders")
        self.show, self.show_original = pictures.show, pictures.show_original
        keep_if_made_from(self._folder, folder / "renders", {"fusion": fusion.as_json(), "members": members.stamp})

    def view(self, views: Sequence[RenderedView], record: FrameRecord, camera: PinholeCamera | None = None) -> RenderedView:
        """The fusion of the members' ``views``, written unless it was before."""
        path = view_path(self._folder, record, record.camera() if camera is None else camera)
        fused = self._fusion(views)
        if not path.exists():
            (deviation, surfaces), arrays = depth_disagreement(views), path.with_name(f"{path.stem}_uncertainty.npz")
            with written_atomically(arrays) as file:
                np.savez_compressed(
                    file, rgb=color_disagreement(views).half().numpy(), depth=deviation.numpy(), surfaces=surfaces.byte().numpy()
                )
            write_view(path, fused)
        return fused


def choose_fusion(
    frames: Sequence[tuple[FrameRecord, Frame]],
    views_of: Callable[[FrameRecord, PinholeCamera], Sequence[RenderedView]],
    members: Sequence[str],
    settings: FusionConfig,
) -> tuple[Fusion, dict[str, Any]]:
    """The fusion of the members for one sequence, by its scores on validation frames.

    Fitted weights are scored on each frame as fitted on the others, so that no candidate has seen what it is scored on. With
    ``auto``, colour (and depth) is fused by the candidate with the best psnr_masked and the mask by the one with the best IoU,
    each only if it beats the plain average by the margins of ``settings``; depth has no vote, as it has none in training.

    Returns:
        The fusion, and all that the choice rests on: every candidate's scores, gains over the plain average and weights.
    """
    shown = tracked(frames, "rendering members", "validation frames")
    products = [_products(views_of(record, frame.camera), frame) for record, frame in shown]
    scores: dict[str, list[dict[str, float | None]]] = {}
    for left_out, (record, frame) in enumerate(tracked(frames, "comparing fusions", "validation frames")):
        views = views_of(record, frame.camera)
        for name, rules in candidates(members, products[:left_out] + products[left_out + 1 :]).items():
            scores.setdefault(name, []).append(score_frame(fuse(views, *rules), frame, with_ssim=False))  # which has no vote
    final = candidates(members, products)
    told: dict[str, dict[str, Any]] = {name: {"metrics": mean_scores(values)} for name, values in scores.items()}
    chosen = {}
    for part, metric, gain in (("color", "psnr_masked", settings.min_gain_psnr), ("mask", "iou", settings.min_gain_iou)):
        values = {name: [frame[metric] for frame in per_frame] for name, per_frame in scores.items()}
        chosen[part], compared = paired_choice(values, BASELINE, Guard(gain, settings.min_standard_errors))
        for name, entry in compared.items():
            told[name][metric] = entry
    if settings.method == "weights":
        total = sum(settings.weights.values())
        final["weights"] = (FusionRule("weights", (tuple(settings.weights[name] / total for name in members),)),) * 2
    if settings.method != "auto":
        chosen = dict.fromkeys(chosen, _asked_for(settings.method, scores))
    for name, entry in told.items():
        entry["color"], entry["mask"] = (rule.as_json() for rule in final[name])
    fusion = Fusion(tuple(members), final[chosen["color"]][0], final[chosen["mask"]][1])
    report = {"method": settings.method, "chosen": chosen, "candidates": told, "validation_frames": [frame.name for _, frame in frames]}
    return fusion, report


def _asked_for(method: str, scores: Mapping[str, Sequence[Mapping[str, float | None]]]) -> str:
    if method != "best_member":
        return method
    alone = [name for name in scores if name.startswith(ONLY)]
    return max(alone, key=lambda name: mean_scores(scores[name])["psnr_masked"])


def candidates(members: Sequence[str], products: Sequence[Mapping[str, Tensor]]) -> dict[str, Rules]:
    """Every fusion to choose from, fitted ones by the frames' products of errors; without any frame they are plain averages."""
    found: dict[str, Rules] = {BASELINE: (FusionRule(), FusionRule())}
    found |= {method: (FusionRule(method),) * 2 for method in PIXEL_METHODS}
    for method, count in (("fitted", 1), ("fitted_zones", n_zones())):
        nothing = torch.zeros(n_zones(), len(members), len(members), dtype=torch.float64)
        sums = [sum((frame[part] for frame in products), nothing) for part in ("color", "mask")]
        # a zone that the frames do not show is weighed as the whole picture is
        by_zone = [[E if count > 1 and E.any() else total.sum(dim=0) for E in total[:count]] for total in sums]
        found[method] = tuple(FusionRule(method, tuple(tuple(simplex_weights(E).tolist()) for E in zone)) for zone in by_zone)
    for i, name in enumerate(members):
        alone = FusionRule("member", (tuple(float(i == j) for j in range(len(members))),))
        found[ONLY + name] = (alone, alone)
    return found


def _products(views: Sequence[RenderedView], frame: Frame) -> dict[str, Tensor]:
    """What fits need to know of a frame, relative to the members' own errors: PSNR is a mean of logarithms over frames, so a
    frame that is hard for all must not outweigh the others."""
    rgb, _, mask = stacked(views)
    foreground = (frame.mask > 255 * FOREGROUND).float()
    zone = zones(mask)
    found = {
        "color": error_products(rgb, frame.rgb.float() / 255 * foreground, zone, n_zones()),
        "mask": error_products(mask, foreground, zone, n_zones()),
    }
    levels = {part: products.diagonal(dim1=1, dim2=2).sum() for part, products in found.items()}
    return {part: products / levels[part] if levels[part] > 0 else products for part, products in found.items()}
