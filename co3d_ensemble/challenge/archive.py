"""Submission archives of the CO3D challenge: writing, checking and reading one HDF5 file of PNGs.

Layout: dataset ``binary_data`` (variable-length uint8) holds the bytes of each PNG, ``filepaths`` (UTF-8) its path
``<category>/<subset>/<category>_<sequence>_<frame number>_{image,mask,depth}.png``, and an attribute of ``binary_data`` per
file name its index. An archive is read as hostile: in a process of its own, nothing is extracted, and any entry that was not
asked for is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath

import h5py
import numpy as np

from co3d_ensemble.base.messages import shown
from co3d_ensemble.base.progress import tracked
from co3d_ensemble.challenge.archive_file import DATA, PATHS, ArchiveError, ArchiveFile
from co3d_ensemble.challenge.archive_process import IsolatedArchive, isolated_archive
from co3d_ensemble.challenge.frame_io import KINDS, decode_view, encode_view, max_png_bytes
from co3d_ensemble.challenge.targets import Target
from co3d_ensemble.files import replaced_atomically
from co3d_ensemble.functional.types import RenderedView

MAX_BYTES = 2_000_000_000  # the challenge's limit, 2.0 GB

open_archive = isolated_archive  # tests put opened_archive here, which needs no process of its own


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


def archive_pictures(
    path: Path | str, targets: Iterable[Target], *, allow_missing: bool = False
) -> Iterator[tuple[Target, dict[str, bytes]]]:
    """Yields the PNGs of each frame by kind, in the order of ``targets``; all but their content is checked before the first.

    Args:
        targets: all frames that the archive may hold.
        allow_missing: skip frames of which the archive holds no file.

    Raises:
        MissingTargets: listing the frames.
        ArchiveError: no HDF5 file, datasets missing or of another type, an index that contradicts the paths, a path that is
            absolute, unknown, doubled or leaves its folder; anything that the HDF5 library fails, hangs or grows at.
    """
    path, targets = Path(path), list(dict.fromkeys(targets))
    with _opened(path, targets, allow_missing=allow_missing) as (archive, position, missing):
        absent = set(missing)
        present = [target for target in targets if target not in absent]
        contents = archive.stream([position[target.path(kind)] for target in present for kind in KINDS])
        for target in tracked(present, f"reading {path.name}", "frames"):
            yield target, {kind: next(contents) for kind in KINDS}


def decode_pictures(path: Path | str, target: Target, files: Mapping[str, bytes]) -> RenderedView:
    """The view of one frame's PNGs.

    Raises:
        ArchiveError: one that is broken, not finite or of another size, by name.
    """
    try:
        return decode_view(files, {kind: f"{path}: {target.path(kind)}" for kind in KINDS}, target.size)
    except ValueError as error:
        raise ArchiveError(str(error)) from error


def read_archive(path: Path | str, targets: Iterable[Target], *, allow_missing: bool = False) -> Iterator[tuple[Target, RenderedView]]:
    """Yields the decoded frames in the order of ``targets``.

    Args, Raises: as :func:`archive_pictures` and :func:`decode_pictures`.
    """
    with closing(archive_pictures(path, targets, allow_missing=allow_missing)) as pictures:
        for target, files in pictures:
            yield target, decode_pictures(path, target, files)


def check_archive(path: Path | str, targets: Iterable[Target], *, allow_missing: bool = False, max_bytes: int = MAX_BYTES) -> list[Target]:
    """Decodes the whole archive once and returns the missing targets (none, unless they are allowed).

    Raises:
        ArchiveError: as ``read_archive``, or a file larger than ``max_bytes``.
    """
    path, targets = Path(path), list(dict.fromkeys(targets))
    _check_size(path, max_bytes)
    present = {target for target, _ in read_archive(path, targets, allow_missing=allow_missing)}
    return [target for target in targets if target not in present]


def check_structure(
    path: Path | str, targets: Iterable[Target], *, allow_missing: bool = False, max_bytes: int = MAX_BYTES
) -> list[Target]:
    """As :func:`check_archive` without a look at the pictures, for an archive that is scored next, which decodes them."""
    path, targets = Path(path), list(dict.fromkeys(targets))
    _check_size(path, max_bytes)
    with _opened(path, targets, allow_missing=allow_missing) as (_, _, missing):
        return missing


def _check_size(path: Path, max_bytes: int) -> None:
    if path.is_file() and path.stat().st_size > max_bytes:
        raise ArchiveError(f"{path}: the archive has {path.stat().st_size:,} bytes, more than the {max_bytes:,} allowed")


@contextmanager
def _opened(
    path: Path, targets: Sequence[Target], *, allow_missing: bool
) -> Iterator[tuple[IsolatedArchive | ArchiveFile, dict[str, int], list[Target]]]:
    """The archive, the position of every path in it, and the targets that it lacks."""
    if not path.is_file():
        raise ArchiveError(f"{path}: no such file")
    largest = max((max_png_bytes(target.size) for target in targets), default=0)
    with open_archive(path, max_entries=len(targets) * len(KINDS), max_entry_bytes=largest) as archive:
        position = _checked_positions(path, archive.entries, archive.index, targets)
        missing = _missing(path, position, targets)
        if missing and not allow_missing:
            raise MissingTargets(path, missing)
        yield archive, position, missing


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


def _checked_positions(path: Path, entries: Sequence[str], index: Mapping[str, int | str], targets: Sequence[Target]) -> dict[str, int]:
    """Position per path, after every path was found among the targets' and agrees with the index of file names."""
    allowed = {target.path(kind) for target in targets for kind in KINDS}
    position: dict[str, int] = {}
    for i, entry in enumerate(entries):
        problem = _path_problem(entry, allowed, position)
        if problem:
            raise ArchiveError(f"{path}: entry {shown(entry)} {problem}")
        name = PurePosixPath(entry).name
        if index.get(name) != i:
            raise ArchiveError(f"{path}: entry {entry!r} is number {i}, but the attribute {name!r} says {index.get(name, 'nothing')}")
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


def _missing(path: Path, position: dict[str, int], targets: Sequence[Target]) -> list[Target]:
    missing = []
    for target in targets:
        absent = [kind for kind in KINDS if target.path(kind) not in position]
        if 0 < len(absent) < len(KINDS):
            raise ArchiveError(f"{path}: {target.path('*')} lacks its {', '.join(absent)}")
        if absent:
            missing.append(target)
    return missing
