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
from co3d_ensemble.functional.types import Frame
from co3d_ensemble.plugin.frames import pytorch3d_cameras
from co3d_ensemble.plugin.implicitron_model import ImplicitronModel
from co3d_ensemble.training.validation import FrameValidation


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
        if frames_per_step > 1:
            _check_equal_sizes(train_frames)
        self.model = model.to(device)
        self.loss_weights = dict(model.loss_weights)
        self.rays_per_step = model.rays_per_step(frames_per_step)
        self._train = [_resident(frame, device) for frame in train_frames]
        self._validation = FrameValidation(val_frames)
        self._lr = training.lr
        self._frames_per_step = frames_per_step
        self._chunk_rays = chunk_rays
        self._device = device

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
        return self._validation.run(lambda camera: self.model.render_view(camera.to(self._device), self._chunk_rays))

    def pictures(self) -> Iterable[tuple[str, Tensor]]:
        return self._validation.pictures()

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
