"""PNG bytes of one submitted frame: image, mask and depth, as the CO3D challenge reads them.

Unlike the official writer, colours are rounded (truncation costs 0.2 dB at 40 dB) and clamped (a value above 1 would wrap).
Decoding trusts nothing: every chunk is verified and the header compared with the expected size before any pixel is unpacked,
and what came out is compared again.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from co3d_ensemble.base.png import encode_png, verify_png
from co3d_ensemble.functional.types import RenderedView
from co3d_ensemble.rendering import depth_bits

KINDS = ("image", "mask", "depth")
FOREGROUND = 0.5  # a mask of at least this is written as 1

# others (transparency, animation, a palette) could make the pixels others than the submitted ones
CHUNKS = (b"IHDR", b"IDAT", b"IEND", b"tEXt", b"zTXt", b"iTXt", b"tIME", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD")
OVERHEAD_BYTES = 1 << 16  # of chunks other than the pixels', and of what deflate adds to pixels that it cannot compress


class _Format(NamedTuple):
    bits: int
    color_type: int
    channels: tuple[int, ...]
    types: tuple[type, ...]  # that versions of PIL decode it to
    what: str


_FORMATS = {
    "image": _Format(8, 2, (3,), (np.uint8,), "8-bit RGB"),
    "mask": _Format(8, 0, (), (np.uint8,), "8-bit grey"),
    "depth": _Format(16, 0, (), (np.uint16, np.int32), "16-bit grey"),
}


def max_png_bytes(size: tuple[int, int]) -> int:
    """More than any sound PNG of a submitted plane of (height, width) pixels takes."""
    n_bytes = size[0] * (1 + 3 * size[1])
    return n_bytes + n_bytes // 1000 + OVERHEAD_BYTES


def encode_image(rgb: Tensor) -> bytes:
    """8-bit RGB PNG of a colour picture, clamped to [0, 1] and rounded to the nearest value.

    Args:
        rgb: on black, shape (3, H, W).

    Raises:
        ValueError: for another shape or non-finite values.
    """
    values = _checked("rgb", rgb, channels=3)
    pixels = np.empty((*values.shape[1:], 3), np.uint8)
    for i, channel in enumerate(values):  # the product in float64, or one value in 10,000 near a half rounds the other way
        pixels[..., i] = np.rint(np.multiply(channel.clip(0, 1), 255, dtype=np.float64))
    return encode_png(pixels)


def encode_mask(mask: Tensor) -> bytes:
    """8-bit PNG that is 255 where the opacity is at least 1/2, else 0.

    Args:
        mask: opacity in [0, 1], shape (1, H, W).
    """
    return encode_png((_checked("mask", mask, channels=1)[0] >= FOREGROUND).astype(np.uint8) * np.uint8(255))


def encode_depth(depth: Tensor) -> bytes:
    """16-bit PNG whose values are the bits of the depth as float16, clamped to the range of float16.

    Args:
        depth: z in camera space, shape (1, H, W).
    """
    return encode_png(depth_bits(_checked("depth", depth, channels=1)[0]))


def decode_image(data: bytes, name: str, size: tuple[int, int]) -> Tensor:
    """Colours in [0, 1], float32, shape (3, H, W).

    Args:
        data: content of the PNG.
        name: what messages call it.
        size: expected (height, width).

    Raises:
        ValueError: naming the file, when it is no PNG, truncated, of another format or of another size.
    """
    return torch.from_numpy(_pixels(data, name, size, "image").transpose(2, 0, 1).astype(np.float32) / 255)


def decode_mask(data: bytes, name: str, size: tuple[int, int]) -> Tensor:
    """Mask in {0, 1}, float32, shape (1, H, W); other values than 0 and 255 are an error. Else as ``decode_image``."""
    pixels = _pixels(data, name, size, "mask")
    other = pixels[(pixels != 0) & (pixels != 255)]
    if other.size:
        raise ValueError(f"{name}: a mask holds 0 and 255 only, {other.size} pixels differ, e.g. {other[0]}")
    return torch.from_numpy(pixels[None].astype(np.float32) / 255)


def decode_depth(data: bytes, name: str, size: tuple[int, int]) -> Tensor:
    """Depth, float32, shape (1, H, W); a non-finite value is an error. Else as ``decode_image``."""
    depth = _pixels(data, name, size, "depth").astype(np.uint16).view(np.float16).astype(np.float32)
    if not np.isfinite(depth).all():
        raise ValueError(f"{name}: {np.count_nonzero(~np.isfinite(depth))} non-finite depth values")
    return torch.from_numpy(depth[None])


def encode_view(view: RenderedView) -> dict[str, bytes]:
    """The three PNGs of a view by kind.

    Raises:
        ValueError: for non-finite values, or planes of different sizes.
    """
    sizes = {kind: tuple(plane.shape[-2:]) for kind, plane in (("image", view.rgb), ("mask", view.mask), ("depth", view.depth))}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"image, mask and depth differ in size: {sizes}")
    return {"image": encode_image(view.rgb), "mask": encode_mask(view.mask), "depth": encode_depth(view.depth)}


def decode_view(files: Mapping[str, bytes], names: Mapping[str, str], size: tuple[int, int]) -> RenderedView:
    """The view of three PNGs by kind.

    Args:
        files: content per kind.
        names: what messages call each file.
        size: expected (height, width).
    """
    return RenderedView(
        rgb=decode_image(files["image"], names["image"], size),
        depth=decode_depth(files["depth"], names["depth"], size),
        mask=decode_mask(files["mask"], names["mask"], size),
    )


def _checked(name: str, values: Tensor, *, channels: int) -> np.ndarray:
    if values.ndim != 3 or values.shape[0] != channels:
        raise ValueError(f"{name}: expected shape ({channels}, H, W), got {tuple(values.shape)}")
    array = values.detach().cpu().float().numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: {np.count_nonzero(~np.isfinite(array))} non-finite values")
    return array


def _pixels(data: bytes, name: str, size: tuple[int, int], kind: str) -> np.ndarray:
    expected = _FORMATS[kind]
    try:
        header = verify_png(data)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if (header.bits, header.color_type) != (expected.bits, expected.color_type):
        raise ValueError(f"{name}: expected {expected.what}, the PNG has {header.bits} bits of colour type {header.color_type}")
    if (header.height, header.width) != tuple(size):
        found = f"{header.height} x {header.width}"
        raise ValueError(f"{name}: expected {size[0]} x {size[1]} (height x width) pixels, the PNG has {found}")
    if header.n_bytes != len(data):
        raise ValueError(f"{name}: the PNG is followed by other data ({len(data) - header.n_bytes} bytes)")
    unknown = [chunk for chunk in header.chunks if chunk not in CHUNKS]
    if unknown:
        raise ValueError(f"{name}: the PNG has a chunk {unknown[0]!r}, which can change what is seen")
    try:
        pixels = _decoded(data)
    except (OSError, SyntaxError, ValueError, zlib.error, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: the PNG cannot be decoded: {error}") from error
    if pixels.shape != (*size, *expected.channels) or pixels.dtype not in expected.types:
        raise ValueError(f"{name}: the PNG was decoded to {pixels.shape} {pixels.dtype}, expected {size} {expected.what}")
    return pixels


def _decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        return np.array(picture)
