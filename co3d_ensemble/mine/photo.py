"""Any photograph as the network takes it: colours in [0, 1], a size the network was trained near, and a pinhole camera.

The principal point is the photograph's centre (nothing else is known), pixels are square, lens distortion is not undone.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from co3d_ensemble.base.pictures import read_header, read_photo

logger = logging.getLogger(__name__)

FITS = ("whole", "crop", "stretch")
DEFAULT_FOV = 60.0  # degrees, where neither the user nor the file tells: phones' main cameras have 60 to 75
FULL_FRAME_DIAGONAL = math.hypot(36.0, 24.0)  # millimetres, what EXIF's equivalent focal length refers to
SIDE_MULTIPLE = 8  # of the network's sides where they follow the photograph: its smallest output is 1/8
SMALLEST_SIDE = 16


@dataclass(frozen=True)
class Photo:
    """A photograph at the network's size.

    Attributes:
        image: colours in [0, 1], shape (3, H, W).
        K: intrinsics in pixels of ``image``, shape (3, 3).
        fov: horizontal field of view in degrees of the photograph as it was (upright, before a crop).
        fov_source: where ``fov`` is from: ``given``, ``EXIF`` or ``default``.
        original_size: (height, width) of the upright photograph.
    """

    image: Tensor
    K: Tensor
    fov: float
    fov_source: str
    original_size: tuple[int, int]


def load_photo(
    path: Path | str, *, height: int, width: int, fov: float | None = None, fit: str = "whole", background: float = 1.0
) -> Photo:
    """Reads a photograph and fits it to the network.

    EXIF's orientation is applied; transparent pixels are laid over a background; pictures of other modes become RGB. Resampling is
    Lanczos', which averages when it reduces.

    Args:
        height, width: the network's size in pixels.
        fov: horizontal field of view in degrees of the upright photograph; None takes EXIF's 35 mm equivalent focal length,
            or ``DEFAULT_FOV`` where there is none.
        fit: ``whole`` keeps all of the photograph and its aspect at about the network's number of pixels (the network takes
            any size); ``crop`` cuts the centre of the network's aspect out; ``stretch`` resizes all of it to the network's size
            (as the reference does), with unequal focal lengths so that the geometry stays right.
        background: grey value in [0, 1] behind transparent pixels.

    Raises:
        FileNotFoundError: naming the file.
        ValueError: not a picture, or a number out of its range.
    """
    if fit not in FITS:
        raise ValueError(f"fit={fit!r}: expected one of {', '.join(FITS)}")
    if fov is not None and not 0 < fov < 180:
        raise ValueError(f"fov={fov}: must lie between 0 and 180 degrees")
    focal_35mm = read_header(Path(path)).focal_35mm
    picture = read_photo(Path(path), upright=True, background=background)
    if min(picture.size) < SMALLEST_SIDE:
        raise ValueError(f"{path}: {picture.width} x {picture.height} pixels; at least {SMALLEST_SIDE} on each side are needed")
    fov, fov_source = _field_of_view(fov, focal_35mm, picture.size)
    left, top, right, bottom = _crop_box(picture.size, height / width) if fit == "crop" else (0.0, 0.0, *map(float, picture.size))
    size = _size_keeping_aspect(picture.size, height * width) if fit == "whole" else (width, height)
    image = picture.resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    scale_x, scale_y = size[0] / (right - left), size[1] / (bottom - top)
    focal = picture.width / 2 / math.tan(math.radians(fov) / 2)
    K = torch.tensor(
        [
            [focal * scale_x, 0, (picture.width / 2 - left) * scale_x],
            [0, focal * scale_y, (picture.height / 2 - top) * scale_y],
            [0, 0, 1],
        ]
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return Photo(pixels.contiguous(), K, fov, fov_source, (picture.height, picture.width))


def _field_of_view(given: float | None, focal_35mm: float | None, size: tuple[int, int]) -> tuple[float, str]:
    if given is not None:
        return float(given), "given"
    if focal_35mm is not None and focal_35mm > 0:
        focal = focal_35mm / FULL_FRAME_DIAGONAL * math.hypot(*size)  # the standard compares diagonals
        return math.degrees(2 * math.atan(size[0] / 2 / focal)), "EXIF"
    logger.warning("the photograph does not tell its field of view: %g degrees are assumed (fov=... sets it)", DEFAULT_FOV)
    return DEFAULT_FOV, "default"


def _crop_box(size: tuple[int, int], aspect: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred box with height / width = ``aspect``."""
    width, height = size
    cut_width, cut_height = min(width, height / aspect), min(height, width * aspect)
    left, top = (width - cut_width) / 2, (height - cut_height) / 2
    return left, top, left + cut_width, top + cut_height


def _size_keeping_aspect(size: tuple[int, int], n_pixels: int) -> tuple[int, int]:
    """(width, height) near ``n_pixels`` pixels, multiples of ``SIDE_MULTIPLE``, so the aspect is kept to that rounding."""
    scale = math.sqrt(n_pixels / (size[0] * size[1]))
    width, height = (max(SMALLEST_SIDE, SIDE_MULTIPLE * round(side * scale / SIDE_MULTIPLE)) for side in size)
    return width, height
