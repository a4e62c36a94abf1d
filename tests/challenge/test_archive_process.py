"""The child that reads archives. Each test starts one, which takes a third of a second: what needs none is in test_archive_file."""

import dataclasses
import os

import pytest
import torch

from co3d_ensemble.challenge import archive as archive_module
from co3d_ensemble.challenge.archive import ArchiveError, check_archive, read_archive, write_archive
from co3d_ensemble.challenge.archive_process import Limits, isolated_archive
from co3d_ensemble.challenge.targets import Target
from co3d_ensemble.functional.types import RenderedView

TARGETS = [Target("cape", "manyview_dev_0", "1_2_3", number, 6, 9) for number in (7, 12)]


def view_of(target):
    return RenderedView(torch.full((3, *target.size), target.frame_number / 255), torch.ones(1, *target.size), torch.ones(1, *target.size))


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "it's [odd] – é.hdf5"
    write_archive(path, ((target, view_of(target)) for target in TARGETS))
    return path


def in_a_child(monkeypatch, **limits):
    monkeypatch.setattr(
        archive_module, "open_archive", lambda path, **sizes: isolated_archive(path, **sizes, limits=Limits(**limits) if limits else None)
    )


def children():
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None


def test_the_child_reads_what_was_written_and_is_gone_when_nobody_reads_on(archive, monkeypatch):
    in_a_child(monkeypatch)
    reading = read_archive(archive, TARGETS)
    for target, view in (next(reading), next(reading)):
        assert torch.equal(view.rgb, view_of(target).rgb)
    reading.close()
    assert children() is None
    with pytest.raises(ArchiveError, match="expected 7 x 9") as caught:
        check_archive(archive, [dataclasses.replace(target, height=7) for target in TARGETS])
    assert children() is None and caught.value  # although the error is still held
    interrupted = read_archive(archive, TARGETS)
    next(interrupted)
    with pytest.raises(KeyboardInterrupt):
        interrupted.throw(KeyboardInterrupt)
    assert children() is None


def test_an_error_of_the_child_is_told_as_it_is(archive, monkeypatch):
    in_a_child(monkeypatch)
    archive.write_bytes(archive.read_bytes()[:500])
    with pytest.raises(ArchiveError, match=r"odd\] – é\.hdf5: it is no whole HDF5 file and cannot be read"):
        check_archive(archive, TARGETS)


def test_a_library_that_does_not_end_is_an_error_that_names_the_entry_and_the_limit(archive, monkeypatch):
    """HDF5 2.0 goes around for ever where an object of its heap is said to have as many bytes as its own header, below zero."""
    in_a_child(monkeypatch, cpu_seconds=0.5)
    data = bytearray(archive.read_bytes())
    size = data.index(b"GCOL") + 16 + 8
    data[size : size + 8] = ((1 << 64) - 16).to_bytes(8, "little")
    archive.write_bytes(data)
    with pytest.raises(
        ArchiveError, match=r"\.hdf5: cape/manyview_dev_0/cape_1_2_3_7_image\.png cannot be read: .*(within 0.5 s|end of input)"
    ):
        check_archive(archive, TARGETS)


def test_time_by_the_clock_is_limited_as_well(archive, monkeypatch):
    in_a_child(monkeypatch, seconds=1e-6)
    with pytest.raises(
        ArchiveError, match="its structure cannot be read: the HDF5 library did not end within 20 s of computing or 1e-06 s"
    ):
        check_archive(archive, TARGETS)


def test_memory_is_limited(archive, monkeypatch):
    in_a_child(monkeypatch, memory_bytes=1 << 20)
    with pytest.raises(ArchiveError, match="cannot be read"):
        check_archive(archive, TARGETS)
