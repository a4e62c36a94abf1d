"""Camera paths around the source camera, in units in which a photograph has a scale: how far the nearest surface moves.

A photograph has no unit of length, so a path's size is not given in one: ``amplitude`` is the share of the picture's width by
which a surface of disparity ``near`` moves when the camera moves sideways by the path's radius, ``radius = amplitude width / (f near)``.
The camera keeps looking at the point of disparity ``focus`` on the source's optical axis, so that what lies there stays in place,
what is nearer and what is farther moves in opposite directions, and as little as possible leaves the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SPIRAL_TURNS = 2


class Pose(NamedTuple):
    """``X_target = R X_source + t`` in OpenCV's camera frames: R (3, 3), t (3,)."""

    R: Tensor
    t: Tensor


def trajectory(
    kind: str, n_frames: int, *, focal: float, width: int, near: float, focus: float, amplitude: float, dtype: torch.dtype = torch.float32
) -> list[Pose]:
    """The poses of a path that ends where it begins, so that a video of it can be repeated without a jump.

    Args:
        kind: ``circle`` around the optical axis in the source's image plane; ``line`` from the source to the right, to the
            left and back; ``spiral``: a circle twice, while the camera moves forward and back.
        n_frames: poses, at least 1.
        focal: horizontal focal length in pixels of a picture of ``width`` pixels.
        near: disparity (1 / z) of the nearest surface, in the units of the multiplane image.
        focus: disparity of what the camera looks at; 0: it keeps its direction.
        amplitude: share of ``width`` by which the nearest surface would move in a camera that keeps its direction.

    Raises:
        ValueError: an unknown kind, or a number out of its range.
    """
    if kind not in TRAJECTORIES:
        raise ValueError(f"trajectory={kind!r}: expected one of {', '.join(TRAJECTORIES)}")
    if n_frames < 1:
        raise ValueError(f"frames={n_frames}: must be positive")
    if not (near > 0 and focus >= 0 and focal > 0 and width > 0 and amplitude >= 0):
        raise ValueError(
            f"near={near}, focus={focus}, focal={focal}, width={width}, amplitude={amplitude}: near, focal and width must be positive, "
            "focus and amplitude must not be negative"
        )
    radius = amplitude * width / (focal * near)
    offsets = [TRAJECTORIES[kind](2 * math.pi * frame / n_frames) for frame in range(n_frames)]
    return [_looking_at_focus(torch.tensor(offset, dtype=torch.float64) * radius, focus, dtype) for offset in offsets]


def _circle(angle: float) -> tuple[float, float, float]:
    return math.cos(angle), math.sin(angle), 0.0


def _line(angle: float) -> tuple[float, float, float]:
    return math.sin(angle), 0.0, 0.0


def _spiral(angle: float) -> tuple[float, float, float]:
    return math.cos(SPIRAL_TURNS * angle), math.sin(SPIRAL_TURNS * angle), math.sin(angle)


# camera position in radii, in the source's frame, at an angle of [0, 2 pi)
TRAJECTORIES: dict[str, Callable[[float], tuple[float, float, float]]] = {"circle": _circle, "line": _line, "spiral": _spiral}


def _looking_at_focus(center: Tensor, focus: float, dtype: torch.dtype) -> Pose:
    """The pose of a camera at ``center`` (3,) whose axis goes through (0, 0, 1/focus), its x axis level with the source's."""
    # times focus, so that 0 is no special case: the axis is then the source's own
    forward = torch.nn.functional.normalize(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) - focus * center, dim=0)
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), forward), dim=0)
    R = torch.stack((right, torch.linalg.cross(forward, right), forward))
    return Pose(R.to(dtype), (-R @ center).to(dtype))
