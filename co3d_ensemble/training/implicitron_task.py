"""Training one of Implicitron's own models on photographs, through the loop that trains ours.

A step is Implicitron's: a few whole frames, masked by the model, of which the model samples its rays. Frames stay on
the device as bytes and become floats when they are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from co3d_ensemble.config import TrainingConfig
from co3d_ensemble.functional.metrics import challenge_metrics
from co3d_ensemble.functional.types import Frame, RenderedView
from co3d_ensemble.plugin.frames import pytorch3d_cameras
from co3d_ensemble.plugin.implicitron_model import ImplicitronModel

MAX_PICTURES = 4  # validation frames shown in TensorBoard


class ImplicitronTask:
    """A :class:`~co3d_ensemble.training.task.Task` over frames resident in memory.

    Attributes:
        model: the adapter, on ``device``.
        loss_weights: the model's own; the loop takes these in place of ``training.loss_weights``.
        rays_per_step: for rays per second.
    """

    def __init__(
        self,
        model: ImplicitronModel,
        *,
        train_frames: Sequence[Frame],
        val_frames: Sequence[Frame],
        training: TrainingConfig,
        frames_per_step: int = 1,
        chunk_rays: int = 16_384,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Raises:
            ValueError: fewer training frames than ``frames_per_step``, no validation frame, or frames of different
                sizes that would have to share a batch.
        """
        if not 1 <= frames_per_step <= len(train_frames):
            raise ValueError(f"frames_per_step={frames_per_step}: must be between 1 and the {len(train_frames)} training frames")
        if not val_frames:
            raise ValueError("val_frames is empty: there is nothing to validate on")
        if frames_per_step > 1:
            _check_equal_sizes(train_frames)
        self.model = model.to(device)
        self.loss_weights = dict(model.loss_weights)
        self.rays_per_step = model.rays_per_step(frames_per_step)
        self._train = [_resident(frame, device) for frame in train_frames]
        self._val = list(val_frames)
        self._lr = training.lr
        self._frames_per_step = frames_per_step
        self._chunk_rays = chunk_rays
        self._device = device
        self._pictures: list[tuple[str, Tensor]] = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "name": "implicitron", "lr": self._lr}]

    def batch(self, step: int) -> dict[str, Any]:
        """Keyword arguments of Implicitron's forward for frames drawn without repetition by torch's generator."""
        drawn = [self._train[i] for i in torch.randperm(len(self._train))[: self._frames_per_step].tolist()]
        mask = torch.stack([frame.mask for frame in drawn]).float() / 255
        return {
            "image_rgb": torch.stack([frame.rgb for frame in drawn]).float() / 255,
            "fg_probability": mask,
            "mask_crop": torch.ones_like(mask),  # frames are not cropped, so every pixel may be sampled
            "camera": pytorch3d_cameras([frame.camera for frame in drawn]),
            "sequence_name": [frame.sequence_name for frame in drawn],
        }

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.model.losses(batch)

    def validate(self) -> dict[str, float]:
        """Mean challenge metrics over the validation frames; a metric is missing where no frame has its ground truth."""
        self._pictures = []
        per_frame = []
        for frame in self._val:
            view = self.model.render_view(frame.camera.to(self._device), self._chunk_rays).cpu()
            per_frame.append(_score(view, frame))
            if len(self._pictures) < MAX_PICTURES:
                self._pictures.append((f"val/{frame.name}", _picture(view, frame)))
        return _mean(per_frame)

    def pictures(self) -> Iterable[tuple[str, Tensor]]:
        """Target | render | depth | mask of the first validation frames."""
        return list(self._pictures)

    def structure(self, step: int) -> bool:
        return False


def _check_equal_sizes(frames: Sequence[Frame]) -> None:
    first = frames[0]
    for frame in frames:
        if frame.rgb.shape != first.rgb.shape:
            raise ValueError(
                f"frames_per_step > 1 needs frames of one size: {first.name} has {tuple(first.rgb.shape[1:])}, "
                f"{frame.name} {tuple(frame.rgb.shape[1:])} (height, width); use frames_per_step=1"
            )


def _resident(frame: Frame, device: torch.device | str) -> Frame:
    """What training needs of a frame, on the device."""
    return Frame(
        name=frame.name,
        sequence_name=frame.sequence_name,
        frame_number=frame.frame_number,
        rgb=frame.rgb.to(device),
        mask=frame.mask.to(device),
        camera=frame.camera.to(device),
    )


def _score(view: RenderedView, frame: Frame) -> dict[str, float | None]:
    return challenge_metrics(
        view.rgb, view.mask, view.depth, frame.rgb.float() / 255, frame.mask.float() / 255, frame.depth, frame.depth_mask
    )


def _mean(per_frame: Sequence[dict[str, float | None]]) -> dict[str, float]:
    """Mean of each metric over the frames that have it."""
    values: dict[str, list[float]] = {}
    for metrics in per_frame:
        for name, value in metrics.items():
            if value is not None:
                values.setdefault(name, []).append(float(value))
    return {name: sum(found) / len(found) for name, found in values.items()}


def _picture(view: RenderedView, frame: Frame) -> Tensor:
    mask = view.mask.expand(3, -1, -1)
    depth = view.depth
    surface = depth[depth > 0]
    if len(surface):  # near is bright; a pixel without a surface stays black
        low, high = surface.min(), surface.max()
        depth = torch.where(depth > 0, 1 - 0.8 * (depth - low) / (high - low).clamp_min(torch.finfo(depth.dtype).tiny), 0)
    panels = [frame.rgb.float() / 255, view.rgb, depth.expand(3, -1, -1), mask]
    return (torch.cat(panels, dim=-1).clamp(0, 1) * 255).round().to(torch.uint8)
