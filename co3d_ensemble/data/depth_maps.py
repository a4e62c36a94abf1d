"""Ground-truth depth of a frame and where it is valid, or why there is none: against nothing every depth would be perfect."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from co3d_ensemble.base.pictures import PictureError, Size, exactly, read_depth, read_depth_mask


def load_depth(path: Path, mask_path: Path | None, size: Size, *, scale: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """The depth map and its validity.

    Args:
        mask_path: None: valid wherever the map is above 0.
        size: (height, width) of the photograph.
        scale: factor of the map's values.

    Returns:
        z, 0 = unknown, and 0/1 validity or None, float32, shape (1, H, W).

    Raises:
        FileNotFoundError, PictureError: naming the file that is missing or spoilt, or the map where no value is above 0 and valid.
    """
    depth = torch.from_numpy(read_depth(path, exactly(size, "its picture"), scale=scale))[None]
    mask = None
    if mask_path is not None:
        mask = torch.from_numpy(read_depth_mask(mask_path, exactly(size, "its picture")))[None].float()
    if not ((depth > 0) if mask is None else (depth > 0) & (mask > 0)).any():
        what = "has no value above 0" + ("" if mask is None else f" that {mask_path} calls valid")
        raise PictureError(f"{path}: {what}", what)
    return depth, mask
