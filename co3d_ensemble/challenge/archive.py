"""Submission archives of the CO3D challenge: writing, checking and reading one HDF5 file of PNGs.

Layout: dataset ``binary_data`` (variable-length uint8) holds the bytes of each PNG, ``filepaths`` (UTF-8) its path
``<category>/<subset>/<category>_<sequence>_<frame number>_{image,mask,depth}.png``, and an attribute of ``binary_data`` per
file name its index. An archive is read as hostile: nothing is extracted, and any entry that was not asked for is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import h5py
import numpy as np

from co3d_ensemble.challenge.frame_io import KINDS, decode_view, encode_view
from co3d_ensemble.challenge.targets import Target
from co3d_ensemble.files import replaced_atomically
from co3d_ensemble.functional.types import RenderedView

MAX_BYTES = 2_000_000_000  # the challenge's limit, 2.0 GB
DATA, PATHS = "binary_data", "filepaths"
MAX_PATH_BYTES = 4096
HDF5_ERRORS = (OSError, RuntimeError, KeyError)  # what h5py raises where the structure of a file is broken


class ArchiveError(ValueError):
    """The archive cannot be a submission; the message names the file and the entry."""


class MissingTargets(ArchiveError):
    """Frames that an archive lacks, in ``targets``; the message lists all of them."""

    def __init__(self, path: Path, targets: Sequence[Target]) -> None:
        self.targets = tuple(targets)
        names = "\n  ".join(target.path("*") for target in targets)
        super().__init__(f"{path}: {len(targets)} frames are missing:\n  {names}")


def write_archive(path: Path | str, frames: Iterable[tuple[Target, RenderedView]], *, max_bytes: int = MAX_BYTES) -> int:
    """Writes an archive frame by frame; ``path`` is replaced only when all went well.

    Args:
        path: e.g. ``<folder>/submission_manyview_dev.hdf5``.
        frames: consumed once, one view in memory at a time.
        max_bytes: largest size of the file.

    Returns:
        Size of the file in bytes.

    Raises:
        ValueError: no frame, a view of another size than its target, non-finite values, a file name that stands twice,
            a name that the official reader cannot take apart, or an archive larger than ``max_bytes``.
    """
    path = Path(path)
    with replaced_atomically(path) as temporary:
        # the bound "latest", as in the challenge's own writer, keeps thousands of attributes in a tree of their own
        with h5py.File(temporary, "w", libver="latest") as file:
            _write_frames(file, frames, max_bytes)
        size = temporary.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{path}: the archive has {size:,} bytes, more than the {max_bytes:,} allowed")
    return size


def read_archive(
    path: Path | str, targets: Iterable[Target], *, allow_missing: bool = False
) -> Iterator[tuple[Target, RenderedView]]:
    """Yields the decoded frames in the order of ``targets``; everything but the pixels is checked before the first.

    Args:
        targets: all frames that the archive may hold.
        allow_missing: skip frames of which the archive holds no file.

    Raises:
        MissingTargets: listing the frames.
        ArchiveError: no HDF5 file, datasets missing or of another type, an index that contradicts the paths, a path that is
            absolute, unknown, doubled or leaves its folder, a PNG that is broken, not finite or of another size.
    """
    path, targets = Path(path), list(dict.fromkeys(targets))
    with _opened(path) as file:
        with _reading(path, "its structure"):
            data, paths = _datasets(file, path, len(targets) * len(KINDS))
            position = _checked_positions(path, data, paths, targets)
        missing = set(_missing(path, position, targets))
        if missing and not allow_missing:
            raise MissingTargets(path, [target for target in targets if target in missing])
        for target in targets:
            if target not in missing:
                yield target, _read_view(path, data, position, target)


def check_archive(
    path: Path | str, targets: Iterable[Target], *, allow_missing: bool = False, max_bytes: int = MAX_BYTES
) -> list[Target]:
    """Decodes the whole archive once and returns the missing targets (none, unless they are allowed).

    Raises:
        ArchiveError: as ``read_archive``, or a file larger than ``max_bytes``.
    """
    path, targets = Path(path), list(dict.fromkeys(targets))
    if path.is_file() and path.stat().st_size > max_bytes:
        raise ArchiveError(f"{path}: the archive has {path.stat().st_size:,} bytes, more than the {max_bytes:,} allowed")
    present = {target for target, _ in read_archive(path, targets, allow_missing=allow_missing)}
    return [target for target in targets if target not in present]


def _write_frames(file: h5py.File, frames: Iterable[tuple[Target, RenderedView]], max_bytes: int) -> None:
    data = file.create_dataset(DATA, (0,), maxshape=(None,), dtype=h5py.vlen_dtype(np.uint8), compression="gzip")
    paths: list[str] = []
    position: dict[str, int] = {}
    written = 0
    for target, view in frames:
        if "_" in target.category:
            raise ValueError(f"category {target.category!r}: the official reader takes what precedes the first '_' as the category")
        if tuple(view.rgb.shape[-2:]) != target.size:
            raise ValueError(f"{target.path('image')}: expected {target.size} pixels (H, W), the view has {tuple(view.rgb.shape[-2:])}")
        try:
            files = encode_view(view)
        except ValueError as error:
            raise ValueError(f"{target.path('*')}: {error}") from error
        data.resize((len(paths) + len(KINDS),))
        for kind in KINDS:
            path = target.path(kind)
            name = PurePosixPath(path).name
            if name in position:
                raise ValueError(f"{path}: the archive already holds a file of this name, {paths[position[name]]}")
            data[len(paths)] = np.frombuffer(files[kind], np.uint8)
            position[name] = len(paths)
            paths.append(path)
            written += len(files[kind])
        if written > max_bytes:
            raise ValueError(f"the archive exceeds {max_bytes:,} bytes at frame {len(paths) // len(KINDS)}, {target.path('*')}")
    if not paths:
        raise ValueError("no frame to write")
    longest = max(len(path.encode()) for path in paths)
    file.create_dataset(PATHS, data=[path.encode() for path in paths], dtype=h5py.string_dtype("utf-8", longest), compression="gzip")
    data.attrs.update(position)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise ArchiveError(f"{path}: no such file")
    with _reading(path, "it is no whole HDF5 file and"):
        file = h5py.File(path, "r")
    with file:
        yield file


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turns what h5py raises for a broken file into an ``ArchiveError``."""
    try:
        yield
    except HDF5_ERRORS as error:
        raise ArchiveError(f"{path}: {what} cannot be read: {error}") from error


def _datasets(file: h5py.File, path: Path, max_entries: int) -> tuple[h5py.Dataset, h5py.Dataset]:
    """The two datasets, stored in this very file and of the right types; links and external storage could name any file."""
    found = []
    for name in (DATA, PATHS):
        link = file.get(name, getlink=True)
        node = file[name] if isinstance(link, h5py.HardLink) else None
        if not isinstance(node, h5py.Dataset) or node.external or node.is_virtual:
            raise ArchiveError(f"{path}: the dataset {name!r} is missing or not stored in this file")
        if node.ndim != 1 or len(node) > max_entries:
            raise ArchiveError(f"{path}: {name!r} has shape {node.shape}, expected at most {max_entries} entries")
        found.append(node)
    data, paths = found
    if h5py.check_vlen_dtype(data.dtype) != np.uint8:
        raise ArchiveError(f"{path}: {DATA!r} has type {data.dtype}, expected variable-length uint8")
    string = h5py.check_string_dtype(paths.dtype)
    if string is None or (string.length or 0) > MAX_PATH_BYTES:
        raise ArchiveError(f"{path}: {PATHS!r} has type {paths.dtype}, expected strings of at most {MAX_PATH_BYTES} bytes")
    if not len(data) == len(paths) == len(data.attrs):
        raise ArchiveError(f"{path}: {len(data)} entries, {len(paths)} paths and {len(data.attrs)} indexed names, expected as many of each")
    return data, paths


def _checked_positions(path: Path, data: h5py.Dataset, paths: h5py.Dataset, targets: Sequence[Target]) -> dict[str, int]:
    """Position per path, after every path was found among the targets' and agrees with the index of file names."""
    allowed = {target.path(kind) for target in targets for kind in KINDS}
    indexed = dict(data.attrs.items())
    position: dict[str, int] = {}
    for i, raw in enumerate(paths[:]):
        try:
            entry = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArchiveError(f"{path}: path {i} is not UTF-8: {raw!r}") from error
        problem = _path_problem(entry, allowed, position)
        if problem:
            raise ArchiveError(f"{path}: entry {entry!r} {problem}")
        name = PurePosixPath(entry).name
        if np.ndim(indexed.get(name)) != 0 or not isinstance(indexed.get(name), (int, np.integer)) or indexed[name] != i:
            raise ArchiveError(f"{path}: entry {entry!r} is number {i}, but the attribute {name!r} says {indexed.get(name)!r}")
        position[entry] = i
    return position


def _path_problem(entry: str, allowed: set[str], seen: dict[str, int]) -> str | None:
    parts = entry.replace("\\", "/").split("/")
    if entry.startswith(("/", "\\")) or ":" in parts[0]:
        return "is an absolute path"
    if ".." in parts:
        return "leaves its folder with '..'"
    if entry in seen:
        return "stands twice"
    if entry in allowed:
        return None
    if len(parts) != 3 or "" in parts or "." in parts:
        return "is not of the form <category>/<subset>/<file>"
    return "is not among the files of the targets"


def _read_view(path: Path, data: h5py.Dataset, position: dict[str, int], target: Target) -> RenderedView:
    names = {kind: target.path(kind) for kind in KINDS}
    with _reading(path, target.path("*")):
        files = {kind: data[position[name]].tobytes() for kind, name in names.items()}
    try:
        return decode_view(files, {kind: f"{path}: {name}" for kind, name in names.items()}, target.size)
    except ValueError as error:
        raise ArchiveError(str(error)) from error


def _missing(path: Path, position: dict[str, int], targets: Sequence[Target]) -> list[Target]:
    missing = []
    for target in targets:
        absent = [kind for kind in KINDS if target.path(kind) not in position]
        if 0 < len(absent) < len(KINDS):
            raise ArchiveError(f"{path}: {target.path('*')} lacks its {', '.join(absent)}")
        if absent:
            missing.append(target)
    return missing
