"""Pictures to tensors of the data set's size: a fit that takes the intrinsics along, and what the readers of data sets share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from co3d_ensemble.base.paths import listed
from co3d_ensemble.base.pictures import Expected, Size, photo_size
from co3d_ensemble.base.text import read_text
from co3d_ensemble.data.audit import MAX_ROTATION_ERROR

FITS = ("stretch", "crop")
CHECKS = ("headers", "decode", "none")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
MIN_SIDE = 8  # pixels
SIZE_TOLERANCE = 1.01  # pixels by which a reduced picture's side may differ from its camera's, as programs round


@dataclass(frozen=True)
class Fit:
    """How a picture of one size becomes one of another: the part ``box`` of it, resampled to ``height x width``.

    Attributes:
        box: left, top, right, bottom in pixels of the original, not necessarily whole.
    """

    box: tuple[float, float, float, float]
    height: int
    width: int

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the result per pixel of the original, across and down."""
        left, top, right, bottom = self.box
        return self.width / (right - left), self.height / (bottom - top)

    def intrinsics(self, K: Tensor) -> Tensor:
        """K (3, 3) of the original to K of the result: the origin moves to the box's corner, then pixels scale."""
        left, top, _, _ = self.box
        across, down = self.scale
        change = K.new_tensor([[across, 0, -left * across], [0, down, -top * down], [0, 0, 1]])
        return change @ K

    def picture(self, image: Image.Image) -> Tensor:
        """Colour in [0, 1], float32, (3, H, W) (one channel for modes L and F), low-passed where it shrinks."""
        resized = image.resize((self.width, self.height), Image.Resampling.BICUBIC, box=self.box)
        return to_tensor(resized)

    def nearest(self, values: Tensor) -> Tensor:
        """``values`` (..., H0, W0) at the pixels that hold the result's pixel centres: for depth, which has no mean."""
        left, top, _, _ = self.box
        across, down = self.scale
        columns = (left + (torch.arange(self.width) + 0.5) / across).long().clamp(0, values.shape[-1] - 1)
        rows = (top + (torch.arange(self.height) + 0.5) / down).long().clamp(0, values.shape[-2] - 1)
        return values[..., rows[:, None], columns]


def fit_size(size: tuple[int, int], *, height: int, width: int, mode: str = "stretch") -> Fit:
    """The fit of a picture of ``size`` (height, width): all of it stretched, or the largest centred part of the new shape."""
    old_height, old_width = size
    if mode == "stretch":
        return Fit((0.0, 0.0, float(old_width), float(old_height)), height, width)
    taken = min(old_width / width, old_height / height)
    x, y = (old_width - taken * width) / 2, (old_height - taken * height) / 2
    return Fit((x, y, x + taken * width, y + taken * height), height, width)


def check_settings(*, height: int, width: int, fit: str, check: str = "headers", n_points: int = 0, checks: Sequence[str] = CHECKS) -> None:
    """ValueError with the setting's name for what all data sets of photographs share; ``checks``: what ``check`` may be."""
    for name, value, low in (("height", height, MIN_SIDE), ("width", width, MIN_SIDE), ("n_points", n_points, 0)):
        if value < low:
            raise ValueError(f"{name}={value}: must be at least {low}")
    for name, value, allowed in (("fit", fit, FITS), ("check", check, checks)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")


def to_tensor(image: Image.Image) -> Tensor:
    values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    scaled = torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)
    return (scaled if image.mode == "F" else scaled / 255).contiguous()


def picture_size(path: Path, check: str = "headers", expected: Expected | None = None) -> Size:
    """(height, width) of a photograph from the header, or with ``check="decode"`` after reading all of it; errors as ``read_photo``."""
    return photo_size(path, expected, decode=check == "decode")


def existing_folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing: expected the folder of {what}")
    return path


def pictures_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """Picture files of a folder, with ``deep`` of those below as well, sorted."""
    return [path for path in listed(folder, deep=deep) if path.suffix.lower() in PICTURE_SUFFIXES]


def pictures_by_stem(folder: Path) -> dict[str, Path]:
    """Picture files of a folder by their names without suffix.

    Raises:
        ValueError: naming two of them that have one: nothing tells which is the photograph.
    """
    found: dict[str, Path] = {}
    for path in pictures_in(folder):
        if path.stem in found:
            raise ValueError(f"{found[path.stem]} and {path} are both the picture {path.stem}: move one of them (a mask?) elsewhere")
        found[path.stem] = path
    return found


def text_lines(path: Path) -> list[str]:
    """Lines of a text file that are not empty, without the space around them; ValueError with the path where it is no text."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def numbers(words: Sequence[str], where: str) -> list[float]:
    """Finite floats, or ValueError with ``where`` (file and line) and the word that is none."""
    values = []
    for word in words:
        try:
            value = float(word)
        except ValueError:
            value = float("nan")
        if not np.isfinite(value):
            raise ValueError(f"{where}: {word!r} is not a finite number")
        values.append(value)
    return values


def check_rotation(R: Any, where: str) -> None:
    """ValueError with ``where`` unless R (3, 3) is a rotation within ``MAX_ROTATION_ERROR``."""
    R = np.asarray(R, dtype=np.float64)
    if not np.isfinite(R).all():
        raise ValueError(f"{where}: no rotation: {R.tolist()}")
    error, determinant = np.abs(R @ R.T - np.eye(3)).max(), np.linalg.det(R)
    if error > MAX_ROTATION_ERROR or determinant < 0:
        raise ValueError(f"{where}: no rotation: |R R^T - I| {error:.2g}, det {determinant:.2g}")
