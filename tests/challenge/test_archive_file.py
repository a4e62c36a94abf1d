"""What an archive's structure may claim: refused before the HDF5 library believes it."""

import tracemalloc
import zlib

import h5py
import numpy as np
import pytest

from co3d_ensemble.challenge.archive_file import DATA, PATHS, ArchiveError, opened_archive

NAMES = ["a/b/1.png", "a/b/2.png", "a/b/3.png"]
CONTENTS = [b"first", b"second", b"third"]
BOMB_BYTES = 1 << 25
CHECKED = {"dtype": "S9", "chunks": (2,), "compression": "gzip", "shuffle": True, "fletcher32": True}


def written(path, *, chunk=4, compression="gzip", shuffle=False, paths=None, **data_options):
    with h5py.File(path, "w", libver="latest") as file:
        data_options |= {"chunks": (chunk,), "maxshape": (None,), "compression": compression, "shuffle": shuffle}
        data = file.create_dataset(DATA, (len(NAMES),), dtype=h5py.vlen_dtype(np.uint8), **data_options)
        values = np.empty(len(NAMES), object)
        values[:] = [np.frombuffer(content, np.uint8) for content in CONTENTS]
        data[:] = values
        paths = {"dtype": "S9", "compression": "gzip"} if paths is None else paths
        file.create_dataset(PATHS, data=[name.encode() for name in NAMES], **paths)
        data.attrs.update({name[4:]: i for i, name in enumerate(NAMES)})
    return path


def read(path, max_entry_bytes=100):
    with opened_archive(path, max_entries=3, max_entry_bytes=max_entry_bytes) as archive:
        return archive.entries, archive.index, list(archive.stream([2, 0, 1]))


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"shuffle": True}, {"compression": None}])
@pytest.mark.parametrize("paths", [None, {"dtype": h5py.string_dtype("utf-8")}, CHECKED])
def test_sound_layouts_are_read(tmp_path, options, paths):
    entries, index, contents = read(written(tmp_path / "a.hdf5", paths=paths, **options))
    assert entries == NAMES and index == {"1.png": 0, "2.png": 1, "3.png": 2} and contents == [b"third", b"first", b"second"]


def test_chunks_declared_larger_than_any_archive_needs_are_refused_by_their_size(tmp_path):
    path = written(
        tmp_path / "a.hdf5", paths={"dtype": "S4096", "chunks": (BOMB_BYTES // 4096,), "maxshape": (None,), "compression": "gzip"}
    )
    with pytest.raises(ArchiveError, match=r"a\.hdf5: 'filepaths' has chunks of 33,554,432 bytes, expected at most 16,777,216"):
        read(path)


@pytest.mark.parametrize("name", [DATA, PATHS])
@pytest.mark.parametrize("n_bytes", [BOMB_BYTES, 1 << 20])
def test_a_chunk_that_unpacks_to_more_than_it_holds_is_refused_and_takes_no_memory(tmp_path, name, n_bytes):
    path = written(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        file[name].id.write_direct_chunk((0,), zlib.compress(bytes(n_bytes), 9))
    tracemalloc.start()
    with pytest.raises(ArchiveError, match=f"a.hdf5: the chunk of '{name}' at entry 0 (takes|unpacks to more)"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_chunk_of_too_few_bytes_is_refused(tmp_path):
    path = written(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        file[DATA].id.write_direct_chunk((0,), zlib.compress(bytes(16)))
    with pytest.raises(ArchiveError, match="unpacks to less"):
        read(path)


def test_two_entries_on_the_same_bytes_are_refused_by_name(tmp_path):
    path = written(tmp_path / "a.hdf5", compression=None)
    with h5py.File(path, "a") as file:
        _, raw = file[DATA].id.read_direct_chunk((0,))
        file[DATA].id.write_direct_chunk((0,), raw[:16] + raw[:16] + raw[32:])
    with pytest.raises(ArchiveError, match="entry 'a/b/2.png' refers to the bytes of 'a/b/1.png'"):
        read(path)


def test_an_entry_larger_than_its_picture_can_be_is_refused_before_it_is_read(tmp_path):
    with pytest.raises(ArchiveError, match="entry 'a/b/2.png' has 6 bytes, more than a picture of its size needs .5."):
        read(written(tmp_path / "a.hdf5"), max_entry_bytes=5)


@pytest.mark.parametrize("value", [np.zeros(1 << 16), 0.0, "0", True, h5py.Empty("i8")])
def test_an_attribute_that_is_no_whole_number_is_told_and_not_read(tmp_path, value):
    path = written(tmp_path / "a.hdf5")
    with h5py.File(path, "a", libver="latest") as file:
        file[DATA].attrs["2.png"] = value
    assert read(path)[1]["2.png"].startswith("a value of type")


def test_a_path_of_variable_length_is_limited(tmp_path):
    path = written(tmp_path / "a.hdf5", paths={"dtype": h5py.string_dtype("utf-8")})
    with h5py.File(path, "a") as file:
        file[PATHS][1] = "x" * 5000
    with pytest.raises(ArchiveError, match="path 1 has more than 4096 bytes"):
        read(path)
