"""Training one of Implicitron's own models on photographs, through the loop that trains ours.

A step is Implicitron's: a few whole frames, masked by the model, of which the model samples its rays; for a model that
pools features, followed by a random number of other frames to pool from. Frames stay on the device as bytes and become
floats when they are drawn.
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
from co3d_ensemble.plugin.source_views import check_equal_sizes
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
            ValueError: fewer training frames than a step takes (``frames_per_step`` and the fewest source views), no validation
                frame, frames of different sizes that would have to share a batch, or targets that the model would not render.
        """
        if not 1 <= frames_per_step <= len(train_frames):
            raise ValueError(f"frames_per_step={frames_per_step}: must be between 1 and the {len(train_frames)} training frames")
        if frames_per_step > 1:
            check_equal_sizes(train_frames, f"frames_per_step={frames_per_step}")
        self._source_counts = _source_counts(model, len(train_frames), frames_per_step)
        self.model = model.to(device)
        self.loss_weights = dict(model.loss_weights)
        self.rays_per_step = model.rays_per_step(frames_per_step)
        self._train = [_resident(frame, device) for frame in train_frames]
        self._validation = FrameValidation.of_run(val_frames, training, self.rays_per_step)
        self._lr = training.lr
        self._frames_per_step = frames_per_step
        self._chunk_rays = chunk_rays
        self._device = device

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "name": "implicitron", "lr": self._lr}]

    def batch(self, step: int) -> dict[str, Any]:
        """Keyword arguments of Implicitron's forward for frames drawn without repetition by torch's generator: targets, then sources."""
        count = self._frames_per_step
        if self._source_counts is not None:
            count += int(torch.randint(self._source_counts[0], self._source_counts[1] + 1, ()))
        drawn = [self._train[i] for i in torch.randperm(len(self._train))[:count].tolist()]
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


def _source_counts(model: ImplicitronModel, n_frames: int, frames_per_step: int) -> tuple[int, int] | None:
    """Fewest and most source views of a step, or None where the model pools no features."""
    settings = model.source_settings
    if settings is None:
        return None
    if model.n_targets != frames_per_step:
        raise ValueError(
            f"frames_per_step={frames_per_step}: this model pools features and renders n_train_target_views={model.n_targets or 0} "
            "frames of a batch; the two must be equal"
        )
    if frames_per_step + settings.min_views > n_frames:
        raise ValueError(
            f"frames_per_step={frames_per_step} and min_source_views={settings.min_views} need "
            f"{frames_per_step + settings.min_views} training frames, there are {n_frames}"
        )
    return settings.min_views, min(settings.views, n_frames - frames_per_step)


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
