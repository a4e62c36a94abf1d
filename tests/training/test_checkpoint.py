import errno
import logging
import os
import random

import pytest
import torch

from co3d_ensemble import files
from co3d_ensemble.fields.weights_file import NotACheckpoint, restoring
from co3d_ensemble.training.checkpoint import (
    CheckpointDamaged,
    Checkpoints,
    CheckpointWriteError,
    _HashingWriter,
    read_checkpoint,
    write_checkpoint,
)
from tests.training.toy_task import ToyTask, run_toy


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
    with pytest.raises(NotACheckpoint, match="a.pt is no checkpoint of this run: [Ww]eights.only"):
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


def nested(value, keys, replacement):
    """``value`` with the entry at ``keys`` replaced, or taken away where the replacement is ``...``."""
    if not keys:
        return replacement
    changed = {**value, keys[0]: nested(value.get(keys[0]), keys[1:], replacement)} if isinstance(value, dict) else list(value)
    if isinstance(changed, list):
        changed[keys[0]] = nested(value[keys[0]], keys[1:], replacement)
    elif changed[keys[0]] is ...:
        del changed[keys[0]]
    return changed


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A toy run that was killed at its fifth step, and the content of its ``last.pt``."""
    folder = tmp_path_factory.mktemp("stopped")

    class Dying(ToyTask):
        def batch(self, step):
            if step == 5:
                raise InterruptedError
            return super().batch(step)

    with pytest.raises(InterruptedError):
        run_toy(folder, make_task=Dying, max_steps=8, checkpoint_every_seconds=0.0)
    return folder, Checkpoints(folder / "checkpoints").load_last()


@pytest.mark.parametrize(
    ("keys", "replacement"),
    [
        ((), {}),
        ((), [1, 2]),
        ((), torch.zeros(3)),
        ((), {"epoch": 3, "state_dict": {}}),
        (("config_digest",), ...),
        (("config_digest",), 7),
        (("clock",), ...),
        (("clock", "step"), ...),
        (("clock", "step"), "5"),
        (("clock", "seconds"), None),
        (("model",), []),
        (("model", "0.weight"), ...),
        (("model", "0.weight"), 3.0),
        (("model", "0.weight"), torch.zeros(5)),
        (("optimizer",), None),
        (("optimizer", "state"), ...),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(9)),
        (("optimizer", "state", 0), {}),
        (("optimizer", "state", 0), 3),
        (("optimizer", "state"), {9: {"step": torch.zeros(())}}),
        (("optimizer", "param_groups"), []),
        (("optimizer", "param_groups", 0, "parameter_names"), ["other"]),
        (("ema",), ...),
        (("ema",), {"weights": {}}),
        (("ema", "weights", "0.weight"), torch.zeros(1)),
        (("ema", "decay"), "fast"),
        (("ema", "decay"), 1.5),
        (("ema", "n_updates"), -1),
        (("clock", "another"), 1),
    ],
)
def test_a_whole_checkpoint_of_another_content_is_named_in_one_line(stopped, keys, replacement):
    folder, content = stopped
    last = folder / "checkpoints" / "last.pt"
    write_checkpoint(last, nested(content, keys, replacement))
    (folder / "checkpoints" / "last.previous.pt").unlink(missing_ok=True)
    with pytest.raises(NotACheckpoint, match=r"^\S+/last\.pt is no checkpoint of this run: .+") as raised:
        run_toy(folder, max_steps=8)
    assert "\n" not in str(raised.value)


def test_settings_of_the_optimizer_are_the_configurations_not_the_checkpoints(stopped):
    folder, content = stopped
    write_checkpoint(folder / "checkpoints" / "last.pt", nested(content, ("optimizer", "param_groups", 0, "eps"), "small"))
    result, _ = run_toy(folder, max_steps=8)
    assert result.steps == 8


@pytest.mark.parametrize(
    "content", [{"step": 1, "metric": 2.0}, {"model": {}, "metric": 2.0}, {"model": {}, "step": 1, "metric": "best"}, {"model": 3}]
)
def test_a_best_checkpoint_without_its_parts_is_named(checkpoints, content):
    write_checkpoint(checkpoints.best, content)
    with pytest.raises(NotACheckpoint, match=r"best\.pt is no checkpoint of this run: "):
        checkpoints.load_best()


def test_restoring_leaves_other_errors_alone(tmp_path):
    with pytest.raises(NotACheckpoint, match=r"^a\.pt is no checkpoint of this run: it has no 'model'\Z"), restoring("a.pt"):
        {}["model"]
    for error in (OSError("disk"), KeyboardInterrupt(), torch.cuda.OutOfMemoryError("full")):
        with pytest.raises(type(error)), restoring("a.pt"):
            raise error
