"""Rendering and scoring frames with ground truth: what every task validates with, and what ``results.json`` holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from co3d_ensemble.functional.metrics import SSIM_WINDOW, challenge_metrics, ssim
from co3d_ensemble.functional.types import Frame, PinholeCamera, RenderedView

MAX_PICTURES = 4  # validation frames shown in TensorBoard

Render = Callable[[PinholeCamera], RenderedView]


def score_frame(view: RenderedView, frame: Frame, *, with_ssim: bool = True) -> dict[str, float | None]:
    """The challenge's metrics and SSIM (on black) of one frame; None where the ground truth is missing, and for the
    SSIM of a picture smaller than its window. SSIM takes longer than all the others: ``with_ssim=False`` leaves it out."""
    rgb, mask = frame.rgb.float() / 255, frame.mask.float() / 255
    scores = challenge_metrics(view.rgb, view.mask, view.depth, rgb, mask, frame.depth, frame.depth_mask)
    if not with_ssim:
        return scores
    fits = min(rgb.shape[-2:]) >= SSIM_WINDOW
    return {**scores, "ssim": float(ssim(view.rgb, rgb * (mask > 0.5))) if fits else None}


def mean_scores(per_frame: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """Mean of every metric over the frames that have it."""
    found: dict[str, list[float]] = {}
    for scores in per_frame:
        for name, value in scores.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


class FrameValidation:
    """Scores renderings of fixed frames and keeps the first pictures.

    Args:
        frames: with ground truth, on the CPU, at the run's resolution.

    Raises:
        ValueError: no frames.
    """

    def __init__(self, frames: Sequence[Frame]) -> None:
        if not frames:
            raise ValueError("there is no validation frame: nothing to validate on")
        self.frames = list(frames)
        self._pictures: list[tuple[str, Tensor]] = []

    def run(self, render: Render) -> dict[str, float]:
        """Mean metrics over the frames; a metric is missing where no frame has its ground truth."""
        self._pictures = []
        per_frame = []
        for frame in self.frames:
            view = render(frame.camera).cpu()
            per_frame.append(score_frame(view, frame))
            if len(self._pictures) < MAX_PICTURES:
                self._pictures.append((f"val/{frame.name}", view_strip(view, frame)))
        return mean_scores(per_frame)

    def pictures(self) -> list[tuple[str, Tensor]]:
        """(tag, target | render | depth | mask) of the first frames of the last run, uint8 (3, H, 4 W)."""
        return list(self._pictures)


def view_strip(view: RenderedView, frame: Frame) -> Tensor:
    """target | render | depth (near is bright) | mask, uint8 (3, H, 4 W)."""
    depth = view.depth
    surface = depth[depth > 0]
    if len(surface):
        low, high = surface.min(), surface.max()
        depth = torch.where(depth > 0, 1 - 0.8 * (depth - low) / (high - low).clamp_min(torch.finfo(depth.dtype).tiny), 0)
    panels = [frame.rgb.float() / 255, view.rgb, depth.expand(3, -1, -1), view.mask.expand(3, -1, -1)]
    return (torch.cat(panels, dim=-1).clamp(0, 1) * 255).round().to(torch.uint8)
