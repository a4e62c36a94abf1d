"""Rendering and scoring frames with ground truth: what every task validates with, and what ``results.json`` holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from co3d_ensemble.base.spread import evenly_spread
from co3d_ensemble.functional.metrics import SSIM_WINDOW, challenge_metrics, ssim
from co3d_ensemble.functional.types import Frame, PinholeCamera, RenderedView

MIN_STRIDED_SIDE = 24  # pixels: a frame is not made smaller than that
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
        max_pixels: most pixels of one validation; None: all. Where the frames have more, every n-th row and column of them is scored
            (the scores are estimates of those of all pixels; there is no SSIM then), and where that is not enough, fewer frames.

    Raises:
        ValueError: no frames.
    """

    def __init__(self, frames: Sequence[Frame], *, max_pixels: float | None = None) -> None:
        if not frames:
            raise ValueError("there is no validation frame: nothing to validate on")
        self.frames, self.stride = list(frames), 1
        if max_pixels is not None:
            self._fit(max_pixels)
        self._pictures: list[tuple[str, Tensor]] = []

    @classmethod
    def of_run(cls, frames: Sequence[Frame], training: Any, rays_per_step: int) -> FrameValidation:
        """Of a size that suits a run: the pixels of a validation are limited to ``training.validation_share`` of the rays trained on
        between two, as the settings have ``max_steps`` now."""
        interval = max(1, round(training.validate_every * training.max_steps))
        share = training.validation_share
        return cls(frames, max_pixels=None if share is None else share * interval * rays_per_step)

    def _fit(self, max_pixels: float) -> None:
        """Strides the frames, then drops some, evenly, until at most so many pixels are left, or a single small frame."""
        shortest = min(min(frame.camera.height, frame.camera.width) for frame in self.frames)
        largest = max(1, shortest // MIN_STRIDED_SIDE)
        while self._pixels() > max_pixels and self.stride < largest:
            self.stride += 1
        kept = self.frames
        while self._pixels(kept) > max_pixels and len(kept) > 1:
            kept = evenly_spread(self.frames, len(kept) - 1)
        self.frames = [frame if self.stride == 1 else frame.strided(self.stride) for frame in kept]

    def _pixels(self, frames: Sequence[Frame] | None = None) -> int:
        cameras = [frame.camera for frame in (self.frames if frames is None else frames)]
        return sum(-(-camera.height // self.stride) * -(-camera.width // self.stride) for camera in cameras)

    def run(self, render: Render) -> dict[str, float]:
        """Mean metrics over the frames; a metric is missing where no frame has its ground truth."""
        self._pictures = []
        per_frame = []
        for frame in self.frames:
            view = render(frame.camera).cpu()
            per_frame.append(score_frame(view, frame, with_ssim=self.stride == 1))
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
