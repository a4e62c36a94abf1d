"""An archive's HDF5 file, read as hostile: what its structure claims is bounded before the library acts on it.

Imports neither torch nor PIL, for :mod:`archive_process` runs it in a process of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from co3d_ensemble.base.messages import shown

DATA, PATHS = "binary_data", "filepaths"
MAX_PATH_BYTES = 4096
MAX_CHUNK_BYTES = 1 << 24  # 16 times the largest chunk that h5py chooses by itself
DEFLATE, SHUFFLE, FLETCHER32 = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32
FILTERS = ((), (DEFLATE,), (SHUFFLE, DEFLATE))  # in the order of writing, each with or without a checksum behind it
CHECKSUM_BYTES = 4
HDF5_ERRORS = (OSError, RuntimeError, KeyError)  # what h5py raises where the structure of a file is broken

# what a dataset holds of a variable-length value: its size, and where in the file its bytes are
_REFERENCE = np.dtype([("bytes", "<u4"), ("heap", "<u8"), ("number", "<u4")])
_SIZES = (8, 8)  # bytes of addresses and lengths in every HDF5 file that is not made otherwise on purpose


class ArchiveError(ValueError):
    """The archive cannot be a submission; the message names the file and the entry."""


class ArchiveFile:
    """The two datasets of an open archive, their structure checked.

    Attributes:
        entries: paths, in the order of ``filepaths``.
        index: what the attributes give by file name: a position, or a text that says what is there instead.
    """

    def __init__(self, file: h5py.File, path: Path, *, max_entries: int, max_entry_bytes: int) -> None:
        self._path = path
        with reading(path, "its structure"):
            sizes, user_block = file.id.get_create_plist().get_sizes(), file.userblock_size
            if sizes != _SIZES or user_block:
                found = f"addresses and lengths of {sizes} bytes and a user block of {user_block}"
                raise ArchiveError(f"{path}: has {found}, expected {_SIZES} and 0")
            self._data, paths = _datasets(file, path, max_entries)
            if h5py.check_string_dtype(paths.dtype).length is None:
                too_long = np.flatnonzero(_references(path, paths)["bytes"] > MAX_PATH_BYTES)
                if too_long.size:
                    raise ArchiveError(f"{path}: path {too_long[0]} has more than {MAX_PATH_BYTES} bytes")
            else:
                _stored(path, paths)
            self.entries = _entries(path, paths)
            self.index = {name: _position(self._data, name) for name in self._data.attrs}
            self._check_references(_references(path, self._data), max_entry_bytes)

    def stream(self, positions: Sequence[int]) -> Iterator[bytes]:
        """The entries' bytes, one in memory at a time."""
        for position in positions:
            with reading(self._path, self.entries[position]):
                content = self._data[position].tobytes()
            yield content

    def _check_references(self, references: np.ndarray, max_entry_bytes: int) -> None:
        owner: dict[tuple[int, int], str] = {}
        for entry, (n_bytes, *place) in zip(self.entries, references.tolist(), strict=True):
            if n_bytes > max_entry_bytes:
                told = f"has {n_bytes:,} bytes, more than a picture of its size needs ({max_entry_bytes:,})"
                raise ArchiveError(f"{self._path}: entry {shown(entry)} {told}")
            other = owner.setdefault(tuple(place), entry) if n_bytes else entry
            if other is not entry:
                raise ArchiveError(f"{self._path}: entry {shown(entry)} refers to the bytes of {shown(other)}")


@contextmanager
def opened_archive(path: Path, *, max_entries: int, max_entry_bytes: int) -> Iterator[ArchiveFile]:
    """The archive, read in this process: for archives that one can trust to be whole, and for tests.

    Args:
        max_entries: more are refused.
        max_entry_bytes: the size that no entry may exceed.

    Raises:
        ArchiveError: no whole HDF5 file, datasets missing, stored elsewhere or of another type, chunks that are larger than what
            they hold or that unpack to more, paths that are not UTF-8, entries that are too large or share their bytes.
    """
    with reading(path, "it is no whole HDF5 file and"):
        file = h5py.File(path, "r")
    with file:
        yield ArchiveFile(file, path, max_entries=max_entries, max_entry_bytes=max_entry_bytes)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turns what h5py raises for a broken file into an ``ArchiveError``."""
    try:
        yield
    except HDF5_ERRORS as error:
        raise ArchiveError(f"{path}: {what} cannot be read: {error}") from error
    except MemoryError as error:
        raise ArchiveError(f"{path}: {what} cannot be read: it takes more memory than an archive needs") from error


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


def _entries(path: Path, paths: h5py.Dataset) -> list[str]:
    entries = []
    for i, raw in enumerate(paths[:]):
        try:
            entries.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ArchiveError(f"{path}: path {i} is not UTF-8: {shown(raw)}") from error
    return entries


def _position(data: h5py.Dataset, name: str) -> int | str:
    """The value of an attribute that is one whole number; others are not read, for they may have any size."""
    attribute = data.attrs.get_id(name)
    if attribute.shape != () or attribute.dtype.kind not in "iu":
        return f"a value of type {attribute.dtype} and shape {attribute.shape}"
    return int(data.attrs[name])


def _item_bytes(dataset: h5py.Dataset) -> int:
    """Of an element in the file; HDF5 itself tells the size that a variable-length one has in memory."""
    string = h5py.check_string_dtype(dataset.dtype)
    return _REFERENCE.itemsize if string is None or string.length is None else string.length


def _references(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    return np.frombuffer(_stored(path, dataset), _REFERENCE)


def _stored(path: Path, dataset: h5py.Dataset) -> bytes:
    """What the file holds of every element, unpacked within the size that it must have: HDF5 would unpack a chunk to any size."""
    name, plist, item = dataset.name.strip("/"), dataset.id.get_create_plist(), _item_bytes(dataset)
    layout, n_bytes = plist.get_layout(), len(dataset) * item
    if not n_bytes:
        return b""
    if layout == h5py.h5d.CONTIGUOUS:
        offset = dataset.id.get_offset()
        if offset is None or dataset.id.get_storage_size() != n_bytes:
            raise ArchiveError(f"{path}: {name!r} holds other than its {n_bytes:,} bytes")
        return _read_at(path, name, offset, n_bytes)
    if layout != h5py.h5d.CHUNKED:
        raise ArchiveError(f"{path}: {name!r} is not stored in chunks")
    filters = tuple(plist.get_filter(i)[0] for i in range(plist.get_nfilters()))
    if (filters[:-1] if filters[-1:] == (FLETCHER32,) else filters) not in FILTERS:
        raise ArchiveError(f"{path}: {name!r} is stored with the filters {filters}, expected gzip at most")
    (length,) = dataset.chunks
    if length * item > MAX_CHUNK_BYTES:
        raise ArchiveError(f"{path}: {name!r} has chunks of {length * item:,} bytes, expected at most {MAX_CHUNK_BYTES:,}")
    chunks = [_stored_chunk(path, dataset, first, filters, item) for first in range(0, len(dataset), length)]
    return b"".join(chunks)[:n_bytes]


def _stored_chunk(path: Path, dataset: h5py.Dataset, first: int, filters: tuple[int, ...], item: int) -> bytes:
    """The elements of the chunk that begins at ``first``, whose size in the file is checked before it is read."""
    where = f"{path}: the chunk of {dataset.name.strip('/')!r} at entry {first}"
    n_bytes = dataset.chunks[0] * item
    info = dataset.id.get_chunk_info_by_coord((first,))
    if info.byte_offset is None or info.size > n_bytes + n_bytes // 100 + 1024:  # deflate adds no more to what it cannot compress
        raise ArchiveError(f"{where} takes {info.size or 0:,} bytes in the file, its content has {n_bytes:,}")
    mask, stored = dataset.id.read_direct_chunk((first,))
    for place, kind in reversed(tuple(enumerate(filters))):
        if mask >> place & 1:  # this chunk is stored without this filter
            continue
        if kind == FLETCHER32:
            stored = stored[:-CHECKSUM_BYTES]
        elif kind == DEFLATE:
            try:
                stored = zlib.decompressobj().decompress(stored, n_bytes + 1)
            except zlib.error as error:
                raise ArchiveError(f"{where} cannot be unpacked: {error}") from error
        else:
            stored = np.frombuffer(stored[: len(stored) // item * item], np.uint8).reshape(item, -1).T.tobytes()
    if len(stored) != n_bytes:
        raise ArchiveError(f"{where} unpacks to {'more' if len(stored) > n_bytes else 'less'} than its {n_bytes:,} bytes")
    return stored


def _read_at(path: Path, name: str, offset: int, n_bytes: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(n_bytes)
    if len(content) != n_bytes:
        raise ArchiveError(f"{path}: the file ends within {name!r}")
    return content
