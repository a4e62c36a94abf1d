"""The usual mistakes with cameras and masks, as transformations that undo them.

Right is PyTorch3D's convention, see :class:`PinholeCamera`: row vectors, ``X_view = X_world @ R + T``, x left, y up, z forward.
COLMAP and OpenCV have x right, y down and column vectors; OpenGL, Blender and NeRF's ``transforms.json`` x right, y up, z backwards
and camera-to-world matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from co3d_ensemble.functional.types import PinholeCamera

_FLIPS = {
    "OpenCV's axes (x right, y down): negate columns 1 and 2 of R and entries 1 and 2 of T": (-1.0, -1.0, 1.0),
    "OpenGL's or Blender's axes (x right, z backwards): negate columns 1 and 3 of R and entries 1 and 3 of T": (-1.0, 1.0, -1.0),
    "the axes x left, y down, z backwards: negate columns 2 and 3 of R and entries 2 and 3 of T": (1.0, -1.0, -1.0),
}
_TRANSPOSED = "R is meant for column vectors: transpose it"
_CENTRE = "T is the camera's position (camera-to-world): T must be minus that position times R"
_OTHER_NDC = "focal length and principal point are in the other NDC format: set intrinsics_format to {}"
_MIRRORED = "the pictures and masks are mirrored left to right"
_UPSIDE_DOWN = "the pictures and masks are upside down"
_OTHER_SIGN = "the principal point has the wrong sign: NDC has x to the left and y up"


@dataclass(frozen=True)
class Mistake:
    """What is wrong with all cameras, in words that say what to do, and the camera as it should be."""

    told: str
    undone: Callable[[PinholeCamera], PinholeCamera]


def camera_mistakes(camera: PinholeCamera) -> list[Mistake]:
    """Mistakes that can be told apart for cameras like ``camera``, those of one kind before combinations."""
    found: list[tuple[int, Mistake]] = []
    for centre, transposed, (axes, flip) in product((False, True), (False, True), ((None, None), *_FLIPS.items())):
        told = [_TRANSPOSED] * transposed + [_CENTRE] * centre + [f"the cameras have {axes}"] * (axes is not None)
        if told:
            found.append((len(told), Mistake(", then ".join(told), _pose_undone(transposed, centre, flip))))
    mistakes = [mistake for _, mistake in sorted(found, key=lambda entry: entry[0])]
    if camera.height != camera.width:
        for power, name in ((1.0, "ndc_norm_image_bounds"), (-1.0, "ndc_isotropic")):
            mistakes.append(Mistake(_OTHER_NDC.format(name), lambda c, power=power: _scaled(c, power)))
    mistakes.append(Mistake(_OTHER_SIGN, lambda c: replace(c, principal=_size(c) - c.principal)))
    return [*mistakes, Mistake(_MIRRORED, lambda c: _mirrored(c, 0)), Mistake(_UPSIDE_DOWN, lambda c: _mirrored(c, 1))]


def _pose_undone(transposed: bool, centre: bool, flip: tuple[float, float, float] | None) -> Callable[[PinholeCamera], PinholeCamera]:
    def undone(camera: PinholeCamera) -> PinholeCamera:
        R, T = camera.R.T if transposed else camera.R, camera.T
        if centre:
            T = -T @ R
        axes = R.new_tensor(flip or (1.0, 1.0, 1.0))
        return replace(camera, R=R * axes, T=T * axes)

    return undone


def _size(camera: PinholeCamera) -> Tensor:
    return camera.focal.new_tensor([camera.width, camera.height])


def _mirrored(camera: PinholeCamera, axis: int) -> PinholeCamera:
    """The camera that sees a mirrored picture: of negative focal length, which projections and rays take as it is."""
    focal, principal = camera.focal.clone(), camera.principal.clone()
    focal[axis], principal[axis] = -focal[axis], _size(camera)[axis] - principal[axis]
    return replace(camera, focal=focal, principal=principal)


def _scaled(camera: PinholeCamera, power: float) -> PinholeCamera:
    """Intrinsics that were scaled by half the shorter side instead of each by half its own side (power 1), or the reverse (-1)."""
    size = _size(camera)
    scale = (size / size.min()) ** power
    return replace(camera, focal=camera.focal * scale, principal=size / 2 + (camera.principal - size / 2) * scale)
