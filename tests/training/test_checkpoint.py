import errno
import logging
import os
import random

import pytest
import torch

from co3d_ensemble import files
from co3d_ensemble.training.checkpoint import (
    CheckpointDamaged,
    Checkpoints,
    CheckpointWriteError,
    _HashingWriter,
    read_checkpoint,
    write_checkpoint,
)


def state(step=1):
    return {"model": {"weight": torch.full((3, 4), float(step)), "bias": torch.arange(5)}, "step": step, "names": ["a"], "none": None}


@pytest.fixture
def checkpoints(tmp_path):
    folder = Checkpoints(tmp_path / "checkpoints")
    folder.prepare()
    return folder


def test_reads_back_what_was_written_also_through_torch(tmp_path):
    path = tmp_path / "a.pt"
    write_checkpoint(path, state(7))
    for read in (read_checkpoint(path), torch.load(path, weights_only=True)):
        assert read["step"] == 7 and read["names"] == ["a"] and read["none"] is None
        assert torch.equal(read["model"]["weight"], torch.full((3, 4), 7.0))


def test_every_truncation_is_detected(tmp_path):
    path = tmp_path / "a.pt"
    write_checkpoint(path, state())
    whole = path.read_bytes()
    for n_bytes in {0, 1, 65, 66, len(whole) // 2, *range(len(whole) - 100, len(whole))}:
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(CheckpointDamaged, match="a.pt"):
            read_checkpoint(path)


def test_every_flipped_bit_and_every_appended_byte_is_detected(tmp_path):
    path = tmp_path / "a.pt"
    write_checkpoint(path, state())
    whole = path.read_bytes()
    positions = random.Random(0).sample(range(len(whole)), 300) + list(range(len(whole) - 90, len(whole)))
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointDamaged):
            read_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointDamaged):
        read_checkpoint(path)


def test_only_tensors_and_plain_values_are_loaded(tmp_path):
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"code": os.system})
    with pytest.raises(Exception, match="[Ww]eights.only"):
        read_checkpoint(path)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:900] + b"?" + data[901:], lambda data: b""])
def test_a_damaged_last_is_named_removed_and_replaced_by_the_previous(checkpoints, caplog, damage):
    checkpoints.save_last(state(1))
    checkpoints.save_last(state(2))
    checkpoints.last.write_bytes(damage(checkpoints.last.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load_last()["step"] == 1
    assert str(checkpoints.last) in caplog.text
    assert not checkpoints.last.exists()
    checkpoints.save_last(state(3))
    assert checkpoints.load_last()["step"] == 3
    checkpoints.last.unlink()
    assert checkpoints.load_last()["step"] == 1


def test_a_kill_between_the_two_renames_leaves_the_previous(checkpoints):
    checkpoints.save_last(state(1))
    os.replace(checkpoints.last, checkpoints.previous)
    assert checkpoints.load_last()["step"] == 1


def test_without_a_checkpoint_there_is_none(checkpoints):
    assert checkpoints.load_last() is None and not checkpoints.has_good_best()
    with pytest.raises(FileNotFoundError):
        checkpoints.load_best()


def test_temporaries_of_killed_processes_are_removed_at_the_start(checkpoints):
    checkpoints.save_best(state(1))
    stale = checkpoints.folder / "last.pt.tmp-123"
    stale.write_bytes(b"half")
    checkpoints.prepare()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["best.pt"]


def test_a_full_disk_names_the_file_and_leaves_the_old_checkpoint(checkpoints, monkeypatch):
    checkpoints.save_last(state(1))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(CheckpointWriteError, match="disk is full.*last.pt") as raised:
            checkpoints.save_last(state(2))
    assert raised.value.errno == errno.ENOSPC
    assert [path.name for path in checkpoints.folder.iterdir()] == ["last.pt"]
    assert checkpoints.load_last()["step"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_an_error_inside_torchs_writer_is_kept():
    with open("/dev/full", "wb", buffering=0) as file:
        writer = _HashingWriter(file)
        torch.save(state(), writer)
    assert writer.error.errno == errno.ENOSPC
