"""Floor 3: a trained model's views on disk: exact arrays, ready for fusion and export, and pictures for people."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from co3d_ensemble.base.pictures import read_header
from co3d_ensemble.base.png import encode_png
from co3d_ensemble.data.co3d import FrameRecord
from co3d_ensemble.files import write_bytes_atomic, written_atomically
from co3d_ensemble.functional.types import RenderedView

FLOAT16_MAX = 65504.0

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


def depth_bits(depth: np.ndarray) -> np.ndarray:
    """Depth as uint16: the bits of its float16, as in CO3D's depth maps; clamped to the range of float16."""
    return depth.clip(-FLOAT16_MAX, FLOAT16_MAX).astype(np.float16).view(np.uint16)


def write_pictures(folder: Path, name: str, view: RenderedView) -> None:
    """``<name>_rgb.png`` and ``<name>_mask.png`` with 8 bits (black background; opacity), ``<name>_depth.png`` with 16: z in world
    units, as the bits of its float16, like CO3D's depth maps; 0 is no surface. Values that are not finite become 0. Atomic.
    """
    rgb, mask, depth = (np.nan_to_num(plane.float().numpy(), posinf=0.0, neginf=0.0) for plane in (view.rgb, view.mask, view.depth))
    colour, opacity = (np.rint(plane.clip(0, 1) * 255).astype(np.uint8) for plane in (rgb, mask))
    planes = {"rgb": colour.transpose(1, 2, 0), "mask": opacity[0], "depth": depth_bits(depth[0])}
    for kind, pixels in planes.items():
        write_bytes_atomic(folder / f"{name}_{kind}.png", encode_png(pixels))


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


class Pictures:
    """A folder of PNGs of target frames, ``<sequence>_<frame>_{rgb,mask,depth}.png``, see :func:`write_pictures`.

    They have the size that the targets are scored at. Where exports rendered the original size and it is another one, those
    pictures lie in ``original_size/`` below.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def show(self, view: RenderedView, record: FrameRecord) -> None:
        """Of the view that is scored."""
        self._write(self._folder, view, record)

    def show_original(self, view: RenderedView, record: FrameRecord) -> None:
        """Of the view at the frame's own size."""
        if _size_of(self._folder / f"{view_name(record)}_rgb.png") != (record.width, record.height):
            self._write(self._folder / "original_size", view, record)

    def _write(self, folder: Path, view: RenderedView, record: FrameRecord) -> None:
        if not (folder / f"{view_name(record)}_depth.png").exists():  # the last one of the three
            write_pictures(folder, view_name(record), view)


def _size_of(picture: Path) -> tuple[int, int] | None:
    if not picture.exists():
        return None
    header = read_header(picture)
    return header.width, header.height


def view_name(record: FrameRecord) -> str:
    """What the files of a frame's views are called, without their endings."""
    return f"{record.sequence_name}_{record.frame_number}"
