"""Floor 3: a trained model at target cameras, and its renders on disk (one file per frame, ready for fusion and export)."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from co3d_ensemble.files import written_atomically
from co3d_ensemble.functional.types import RenderedView

# what zipfile, zlib and NumPy raise on damaged archives, by where the damage is
_DAMAGE = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError, RuntimeError)


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        ValueError: another kind of device, or a CUDA device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not re.fullmatch(r"cuda(:[0-9]+)?", name):
        raise ValueError(f"device={name}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: this torch ({torch.__version__}) sees no CUDA device; use device=cpu or auto")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device={name}: the last CUDA device here is cuda:{torch.cuda.device_count() - 1}")
    return device


def write_view(path: Path, view: RenderedView) -> None:
    """One view as compressed NumPy arrays: float16 colour and mask (steps of 1/2048 at 1), float32 depth. Atomic."""
    with written_atomically(path) as file:
        np.savez_compressed(file, rgb=view.rgb.half().numpy(), depth=view.depth.float().numpy(), mask=view.mask.half().numpy())


def read_view(path: Path) -> RenderedView:
    """The view that :func:`write_view` wrote.

    Raises:
        ValueError: naming the file, when it is damaged.
    """
    with open(path, "rb") as file:
        try:
            with np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
                return RenderedView(*(torch.from_numpy(arrays[key].astype(np.float32)) for key in ("rgb", "depth", "mask")))
        except _DAMAGE as error:
            raise ValueError(f"{path}: not a render, or damaged: {error}") from error
