"""Damaged submission archives: bytes of the file, structures of HDF5, the PNGs inside, and what the layout allows to claim."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from benchmarks.fuzzing import ALWAYS_FAULTS, Outcome, Target, outcome_of_error
from co3d_ensemble.base.png import SIGNATURE, png_chunk
from co3d_ensemble.challenge import archive as archives
from co3d_ensemble.challenge.archive_process import Limits, isolated_archive
from co3d_ensemble.challenge.targets import Target as Frame
from co3d_ensemble.functional.types import RenderedView

NAME = "submission_manyview_dev.hdf5"
CPU_SECONDS = 2.0  # of the reader, in which sound archives of this size take milliseconds: hangs are common here
BOMB_BYTES = 1 << 28  # of zeros, which deflate packs into 0.3 MB
FRAMES = [Frame("cape", "manyview_dev_0", "110_13051_23361", number, 24, 32) for number in (7, 12, 15)]


def _view(frame: Frame) -> RenderedView:
    generator = torch.Generator().manual_seed(frame.frame_number)
    drawn = [
        torch.randint(0, high, (channels, *frame.size), generator=generator).float() for high, channels in ((256, 3), (999, 1), (2, 1))
    ]
    return RenderedView(rgb=drawn[0] / 255, depth=drawn[1] / 64, mask=drawn[2])


class Archives(Target):
    """An archive of three frames of one size. It must not be scored otherwise: what is decoded is compared bit by bit."""

    name = "archives"
    faults = ALWAYS_FAULTS | {Outcome.OTHER}
    seconds = 60.0

    def prepare(self, folder: Path) -> None:
        archives.write_archive(folder / NAME, ((frame, _view(frame)) for frame in FRAMES))

    def mutate(self, generator: random.Random, folder: Path) -> str:
        path = folder / NAME
        kind = generator.choice([*_OF_BYTES, *_OF_BYTES, *_OF_CONTENT])
        if kind in _OF_BYTES:
            data = bytearray(path.read_bytes())
            place = _OF_BYTES[kind](generator, data)
            path.write_bytes(data)
        else:
            place = _OF_CONTENT[kind](generator, path)
        return f"{kind}: {place}"

    def judge(self, folder: Path) -> tuple[Outcome, str]:
        path = folder / NAME
        limits = Limits(cpu_seconds=CPU_SECONDS)
        archives.open_archive = lambda *args, **sizes: isolated_archive(*args, **sizes, limits=limits)
        try:
            read = dict(archives.read_archive(path, FRAMES))
        except ValueError as error:
            return outcome_of_error(error, [str(path)]), str(error)
        same = all(
            torch.equal(getattr(read[frame], part), getattr(_view(frame), part)) for frame in FRAMES for part in ("rgb", "depth", "mask")
        )
        return (Outcome.SAME if same else Outcome.OTHER), "read"


def _place(generator: random.Random, data: bytearray) -> int:
    return generator.randrange(len(data))


def _flip(generator: random.Random, data: bytearray) -> str:
    at = _place(generator, data)
    data[at] ^= 1 << generator.randrange(8)
    return f"bit at {at}"


def _bytes(generator: random.Random, data: bytearray) -> str:
    places = [_place(generator, data) for _ in range(generator.choice((1, 4, 64)))]
    for at in places:
        data[at] = generator.randrange(256)
    return f"at {places[:4]}"


def _run(generator: random.Random, data: bytearray) -> str:
    at, length = _place(generator, data), generator.choice((2, 8, 40, 500))
    value = generator.choice((b"\0", b"\xff", b"\x7f"))
    data[at : at + length] = (value * length)[: len(data) - at]
    return f"{length} x {value!r} at {at}"


def _truncate(generator: random.Random, data: bytearray) -> str:
    at = _place(generator, data)
    del data[at:]
    return f"at {at}"


def _copy(generator: random.Random, data: bytearray) -> str:
    length = generator.choice((8, 64, 512))
    first, second = _place(generator, data), _place(generator, data)
    part = data[first : first + length]
    data[second : second + len(part)] = part[: len(data) - second]
    return f"{length} bytes of {first} at {second}"


def _heap(generator: random.Random, data: bytearray) -> str:
    """A header in a global heap, where the PNGs lie: its collection's size, or an object's number, count or size."""
    start = generator.choice([found.start() for found in re.finditer(b"GCOL", bytes(data))])
    at, headers = start + 16, []
    while at + 16 <= len(data) and len(headers) < 16:
        headers.append(at)
        at += 16 + (int.from_bytes(data[at + 8 : at + 16], "little") + 7) // 8 * 8
    header, (offset, length) = generator.choice(
        [(start, (8, 8)), *((found, part) for found in headers for part in ((0, 2), (2, 2), (8, 8)))]
    )
    value = generator.choice((0, 1, 2, 3, 7, 16, 4096, len(data), (1 << 31) - 1, (1 << 63) - 1, (1 << 64) - 1)) & ((1 << 8 * length) - 1)
    data[header + offset : header + offset + length] = value.to_bytes(length, "little")
    return f"{value} at {header + offset}"


def _address(generator: random.Random, data: bytearray) -> str:
    """A number that could be an address or a length becomes another one."""
    at = generator.choice([at for at in range(0, len(data) - 8) if 64 < int.from_bytes(data[at : at + 8], "little") <= len(data)])
    value = generator.choice((0, 8, 48, _place(generator, data), len(data), 1 << 40, (1 << 64) - 1))
    data[at : at + 8] = value.to_bytes(8, "little")
    return f"{value} at {at}"


_OF_BYTES: dict[str, Callable[[random.Random, bytearray], str]] = {
    "flip": _flip,
    "bytes": _bytes,
    "run": _run,
    "truncate": _truncate,
    "copy": _copy,
    "heap": _heap,
    "address": _address,
}


def _content(path: Path) -> tuple[list[bytes], list[bytes]]:
    with h5py.File(path, "r") as file:
        return [entry.tobytes() for entry in file[archives.DATA][:]], list(file[archives.PATHS][:])


def _write(path: Path, contents: list[bytes], paths: list[bytes], *, chunk: int = 16) -> h5py.File:
    """An archive of the same layout, left open."""
    file = h5py.File(path, "w", libver="latest")
    growing = {"chunks": (chunk,), "maxshape": (None,), "compression": "gzip"}
    data = file.create_dataset(archives.DATA, (len(contents),), dtype=h5py.vlen_dtype(np.uint8), **growing)
    values = np.empty(len(contents), object)
    values[:] = [np.frombuffer(content, np.uint8) for content in contents]
    data[:] = values
    file.create_dataset(archives.PATHS, data=paths, dtype=h5py.string_dtype("utf-8", max(map(len, paths))), compression="gzip")
    data.attrs.update({Path(name.decode()).name: i for i, name in enumerate(paths)})
    return file


def _png(generator: random.Random, path: Path) -> str:
    """A PNG whose chunks are sound one by one."""
    contents, paths = _content(path)
    i = generator.randrange(len(contents))
    kind, damaged = generator.choice(_PNGS)(generator, contents[i])
    contents[i] = damaged
    _write(path, contents, paths).close()
    return f"{kind} in {paths[i].decode()}"


def _png_bit(generator: random.Random, path: Path) -> str:
    contents, paths = _content(path)
    i = generator.randrange(len(contents))
    damaged = bytearray(contents[i])
    place = _flip(generator, damaged)
    contents[i] = bytes(damaged)
    _write(path, contents, paths).close()
    return f"{place} of {paths[i].decode()}"


def _header(
    png: bytes, *, width: int = 32, height: int = 24, bits: int | None = None, color: int | None = None, more: bytes = b"\0\0\0"
) -> bytes:
    found = png[24], png[25]
    content = (
        width.to_bytes(4, "big")
        + height.to_bytes(4, "big")
        + bytes((found[0] if bits is None else bits, found[1] if color is None else color))
    )
    return png_chunk(b"IHDR", content + more)


_BODY = len(SIGNATURE) + 25  # where the chunks after the header begin


def _second_header(generator: random.Random, png: bytes) -> tuple[str, bytes]:
    at = generator.choice((_BODY, len(png) - 12))
    second = _header(
        png, width=generator.choice((1, 31, 33, 1 << 20)), bits=generator.choice((None, 8, 16)), color=generator.choice((None, 0, 2, 3, 6))
    )
    return "second header", png[:at] + second + png[at:]


def _other_header(generator: random.Random, png: bytes) -> tuple[str, bytes]:
    changed = generator.choice(
        ({"width": 31}, {"height": 25}, {"bits": 1}, {"bits": 16}, {"color": 3}, {"color": 4}, {"more": b"\0\0\1"}, {"more": b"\1\0\0"})
    )
    return f"header {changed}", SIGNATURE + _header(png, **changed) + png[_BODY:]


def _extra_chunk(generator: random.Random, png: bytes) -> tuple[str, bytes]:
    name, content = generator.choice(
        (
            (b"tRNS", b"\0\0\0\0\0\0"),
            (b"PLTE", bytes(768)),
            (b"acTL", b"\0\0\0\2\0\0\0\0"),
            (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26), 9)),
            (b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 26), 9)),
            (b"tEXt", b"a\0b"),
            (b"abcd", b""),
            (b"ABCD", b""),
            (b"IDAT", b""),
        )
    )
    return f"chunk {name!r}", png[:_BODY] + png_chunk(name, content) + png[_BODY:]


def _other_pixels(generator: random.Random, png: bytes) -> tuple[str, bytes]:
    """Compressed pixels that are too few, too many, of an unknown filter, or none."""
    raw = zlib.decompress(png[_BODY + 8 : -16])
    kind, packed = generator.choice(
        (
            ("few", zlib.compress(raw[:-40])),
            ("none", zlib.compress(b"")),
            ("many", zlib.compress(raw + bytes(1 << 26), 9)),
            ("filter 9", zlib.compress(b"\x09" + raw[1:])),
            ("no end", zlib.compress(raw)[:-6]),
            ("noise", bytes(generator.randrange(256) for _ in range(80))),
            ("checksum", zlib.compress(raw)[:-1] + b"\0"),
        )
    )
    return f"pixels {kind}", png[:_BODY] + png_chunk(b"IDAT", packed) + png[-12:]


_PNGS = (_second_header, _other_header, _extra_chunk, _other_pixels)


def _bomb(generator: random.Random, path: Path) -> str:
    """Chunks that unpack to a gigabyte: because they are declared so large, or although they are not."""
    contents, paths = _content(path)
    kind, name = generator.choice(("declared", "undeclared")), generator.choice((archives.DATA, archives.PATHS))
    if kind == "declared" and name == archives.DATA:
        _write(path, contents, paths, chunk=BOMB_BYTES // 16).close()
        return f"{kind} {name}"
    with _write(path, contents, paths) as file:
        if kind == "declared":
            del file[name]
            file.create_dataset(
                name, data=paths, dtype=h5py.string_dtype("utf-8", 4096), chunks=(BOMB_BYTES // 4096,), maxshape=(None,), compression="gzip"
            )
        else:
            packer = zlib.compressobj(1)
            packed = b"".join(packer.compress(bytes(1 << 24)) for _ in range(BOMB_BYTES >> 24)) + packer.flush()
            file[name].id.write_direct_chunk((0,), packed)
    return f"{kind} {name}"


def _attribute(generator: random.Random, path: Path) -> str:
    with h5py.File(path, "a", libver="latest") as file:
        data = file[archives.DATA]
        name = generator.choice(list(data.attrs))
        value = generator.choice((1, -1, 1 << 40, 0.0, True, "0", [0, 1], np.zeros(1 << 20), np.void(b"0"), h5py.Empty("i8")))
        data.attrs[name] = value
    return f"{type(value).__name__} {np.shape(value) if not isinstance(value, h5py.Empty) else ''} in {name}"


def _layout(generator: random.Random, path: Path) -> str:
    """Another type, shape or filter of a dataset."""
    contents, paths = _content(path)
    kind = generator.choice(
        ("scalar", "matrix", "fewer", "more", "int16", "scaleoffset", "group", "soft link", "external link", "double gzip")
    )
    with _write(path, contents, paths) as file:
        name = generator.choice((archives.DATA, archives.PATHS))
        attributes = dict(file[archives.DATA].attrs)
        if kind == "fewer":
            file[archives.DATA].attrs.clear()
        del file[name]
        if kind == "soft link":
            file[name] = h5py.SoftLink("/elsewhere")
        elif kind == "external link":
            file[name] = h5py.ExternalLink("/etc/passwd", "x")
        elif kind == "group":
            file.create_group(name)
        elif kind == "double gzip":
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_chunk((16,))
            plist.set_deflate(1)
            plist.set_filter(h5py.h5z.FILTER_DEFLATE, h5py.h5z.FLAG_OPTIONAL, (1,))
            kinds = h5py.h5t.py_create(h5py.vlen_dtype(np.uint8) if name == archives.DATA else np.dtype("S80"), logical=True)
            h5py.h5d.create(file.id, name.encode(), kinds, h5py.h5s.create_simple((9,), (h5py.h5s.UNLIMITED,)), plist)
        else:
            shape = {"scalar": (), "matrix": (3, 3), "fewer": (0,), "more": (1 << 40,)}.get(kind, (9,))
            file.create_dataset(
                name,
                shape,
                dtype=np.int16 if kind in ("int16", "scaleoffset") else h5py.vlen_dtype(np.uint8),
                chunks=shape and (1,) * len(shape),
                maxshape=shape and (None,) * len(shape),
            )
        if name == archives.DATA and not kind.endswith("link"):
            file[name].attrs.update(attributes)
    return f"{kind} {name}"


_OF_CONTENT: dict[str, Callable[[random.Random, Path], str]] = {
    "png": _png,
    "png bit": _png_bit,
    "bomb": _bomb,
    "attribute": _attribute,
    "layout": _layout,
}
