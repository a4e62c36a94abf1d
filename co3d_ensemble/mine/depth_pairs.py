"""What the depth tables' data sets share: a picture that is its own target, and ground truth at its own size."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.pictures import fit_size

# what scipy's reader raises on damaged bytes, beside its own MatReadError; NotImplementedError: MATLAB v7.3
_MATLAB_ERRORS = (OSError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, NotImplementedError, zlib.error)
MATLAB_PIXEL = -0.5  # MATLAB counts pixel centres from 1, the house from 0.5


def depth_pair(name: str, rgb: np.ndarray, depth: np.ndarray, K: torch.Tensor, *, height: int, width: int) -> Pair:
    """A pair of one picture with itself.

    Args:
        rgb: uint8, shape (H0, W0, 3).
        depth: z in metres, 0 where unknown or not to be scored, shape (H0, W0). It stays at this size: predictions are resized
            to it, as the published tables are made.
        K: intrinsics in house pixels of ``rgb``, float64, shape (3, 3).
        height, width: size of the pair's pictures; all of ``rgb`` is stretched to it, so that both show the same.
    """
    fit = fit_size(rgb.shape[:2], height=height, width=width)
    picture, K = fit.picture(Image.fromarray(rgb)), fit.intrinsics(K).float()
    z = torch.from_numpy(depth.astype(np.float32))[None]
    return Pair(name, picture, picture, K, K, torch.eye(3), torch.zeros(3), source_depth=z, target_depth=z)


def read_matlab5(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB v5 file.

    Raises:
        FileNotFoundError, ValueError: naming the file.
        RuntimeError: scipy is not installed; the message says how to get it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{path} needs scipy to be read: pip install 'co3d_ensemble[mine]'") from error
    try:
        return loadmat(path)
    except (MatReadError, *_MATLAB_ERRORS) as error:
        raise ValueError(f"{path}: damaged or no MATLAB v5 file: {error!r}") from error
