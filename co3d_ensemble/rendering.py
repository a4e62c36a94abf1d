"""Floor 3: a trained model at target cameras, and its renders on disk (one file per frame, ready for fusion and export)."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from co3d_ensemble.files import written_atomically
from co3d_ensemble.functional.types import PinholeCamera, RenderedView

# what zipfile, zlib and NumPy raise on damaged archives, by where the damage is
_DAMAGE = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError, RuntimeError)


class Renderable(Protocol):
    def render_view(self, camera: PinholeCamera, chunk_rays: int) -> RenderedView: ...


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: this torch ({torch.__version__}) sees no CUDA device; use device=cpu or auto")
    return device


def render_views(model: Renderable, cameras: Sequence[PinholeCamera], *, chunk_rays: int) -> Iterator[RenderedView]:
    """Views on the CPU, one at a time; memory is bounded by ``chunk_rays`` and one picture."""
    for camera in cameras:
        yield model.render_view(camera, chunk_rays).cpu()


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
