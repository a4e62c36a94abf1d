"""The photographs that a view-pooling model (NeRF-WCE, SRN-WCE, NeRFormer) looks at when it renders.

Such a model is not complete without pictures of its scene. They are a part of its weights: some of the training
photographs, chosen once, lie in the state dict as bytes with their cameras, so that a checkpoint renders the same views
wherever it is loaded, with or without the data set. Validation and target frames are never among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from co3d_ensemble.functional.cameras import angle_between, camera_center
from co3d_ensemble.functional.types import Frame, PinholeCamera

_TABLES = ("rgb", "mask", "R", "T", "focal", "principal")


@dataclass(frozen=True)
class SourceSettings:
    """
    Attributes:
        views: photographs that features are pooled from: at most in training, and at rendering.
        min_views: the fewest in training.
        kept: training photographs of which rendering chooses.
    """

    views: int = 9
    min_views: int = 1
    kept: int = 64


class SourceViews(nn.Module):
    """Photographs and cameras in buffers: ``rgb`` (n, 3, H, W) and ``mask`` (n, 1, H, W) uint8, cameras with intrinsics in pixels.

    Loading a state dict takes over the number and the size of its photographs.
    """

    rgb: Tensor
    mask: Tensor
    R: Tensor
    T: Tensor
    focal: Tensor
    principal: Tensor

    def __init__(self, frames: Sequence[Frame], *, kept: int) -> None:
        """
        Args:
            frames: the training frames; may be empty where a state dict will be loaded.
            kept: keep at most so many, as far from each other as possible.

        Raises:
            ValueError: frames of different sizes, naming them.
        """
        super().__init__()
        check_equal_sizes(frames, "pooling features from several photographs")
        if frames:
            centers = torch.stack([camera_center(frame.camera.R, frame.camera.T) for frame in frames])
            frames = [frames[i] for i in spread_out(centers, kept)]
        shapes = {"rgb": (3, 0, 0), "mask": (1, 0, 0), "R": (3, 3), "T": (3,), "focal": (2,), "principal": (2,)}
        for name in _TABLES:
            values = [getattr(frame if name in ("rgb", "mask") else frame.camera, name) for frame in frames]
            empty = torch.empty(0, *shapes[name], dtype=torch.uint8 if name in ("rgb", "mask") else torch.float32)
            self.register_buffer(name, torch.stack(values) if values else empty)

    def __len__(self) -> int:
        return self.rgb.shape[0]

    def nearest(self, camera: PinholeCamera, count: int, *, around: Tensor) -> Tensor:
        """Indices of the photographs taken from the directions closest to the camera's, as seen from ``around`` (3,).

        At most ``count``, nearest first; equal angles in the order of the photographs.
        """
        own = torch.nn.functional.normalize(camera_center(self.R, self.T) - around, dim=-1)
        wanted = torch.nn.functional.normalize(camera_center(camera.R, camera.T) - around, dim=-1)
        return angle_between(own, wanted).argsort(stable=True)[:count]

    def camera(self, index: int) -> PinholeCamera:
        height, width = self.rgb.shape[-2:]
        return PinholeCamera(self.R[index], self.T[index], self.focal[index], self.principal[index], height=height, width=width)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in _TABLES:
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape != own.shape:
                setattr(self, name, own.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def spread_out(points: Tensor, count: int) -> list[int]:
    """Indices of ``count`` points (n, 3), or of all: from the first one on, always the farthest from those chosen; ascending."""
    chosen = [0]
    distance = (points - points[0]).norm(dim=1)
    while len(chosen) < min(count, len(points)):
        distance[chosen[-1]] = -1.0  # of several points at one place each is chosen once
        chosen.append(int(distance.argmax()))
        distance = torch.where(distance < 0, distance, torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=1)))
    return sorted(chosen)


def check_equal_sizes(frames: Sequence[Frame], why: str) -> None:
    """
    Raises:
        ValueError: frames of different sizes; ``why`` says what needs them equal.
    """
    for frame in frames:
        if frame.rgb.shape != frames[0].rgb.shape:
            raise ValueError(
                f"{why} needs frames of one size: {frames[0].name} has {tuple(frames[0].rgb.shape[1:])}, "
                f"{frame.name} {tuple(frame.rgb.shape[1:])} (height, width)"
            )
