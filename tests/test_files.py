"""Files that appear whole or not at all."""

import errno
import json
import math
import os

import pytest

from co3d_ensemble import files
from co3d_ensemble.files import (
    remove_temporaries,
    without_non_finite,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
    written_atomically,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_content_arrives_in_new_folders_and_leaves_nothing_else(tmp_path):
    write_bytes_atomic(tmp_path / "a" / "b" / "file.bin", b"\0\1")
    write_text_atomic(tmp_path / "a" / "b" / "text", "grün\n")
    assert (tmp_path / "a" / "b" / "file.bin").read_bytes() == b"\0\1"
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "grün\n".encode()
    assert names(tmp_path / "a" / "b") == ["file.bin", "text"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file_and_no_temporary(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error):
        with written_atomically(path) as file:
            file.write(b"half of the n")
            file.flush()
            raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with written_atomically(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert len(names(tmp_path)) == 2
    assert path.read_bytes() == b"new"


def test_content_is_on_disk_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    path, order = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else f"{os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", recorded_fsync)
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_bytes_atomic(path, b"12345")
    assert order == ["5 bytes", "rename", "folder"]


def test_json_is_strict_with_null_for_what_json_lacks(tmp_path):
    path = tmp_path / "results.json"
    write_json_atomic(path, {"nan": math.nan, "inf": [math.inf, (-math.inf, 1.5)], "n": 3, "flag": True, "none": None, "text": "NaN"})

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == {"nan": None, "inf": [None, [None, 1.5]], "n": 3, "flag": True, "none": None, "text": "NaN"}
    assert path.read_text().endswith("}\n")


def test_values_that_are_finite_are_kept_as_they_are():
    value = {"a": [1, 2.5, {"b": "x"}], "c": False}
    assert without_non_finite(value) == value


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and names(tmp_path) == ["results.json"]


def test_what_killed_processes_left_is_removed_at_any_depth_and_nothing_else(tmp_path):
    pid = os.fork()
    if pid == 0:  # a process that dies in the middle of a write
        for path in (tmp_path / "last.pt", tmp_path / "deep" / "er" / "view.npz"):
            context = written_atomically(path)
            context.__enter__().write(b"half")
            _alive.append(context)
        os._exit(9)
    os.waitpid(pid, 0)
    (tmp_path / "deep" / "keep.json").write_text("{}")
    (tmp_path / "folder.tmp-1").mkdir()
    assert len(names(tmp_path)) == 3 and len(names(tmp_path / "deep" / "er")) == 1
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["deep", "folder.tmp-1"]
    assert names(tmp_path / "deep") == ["er", "keep.json"] and names(tmp_path / "deep" / "er") == []


_alive = []  # a collected context would clean up after itself, which a killed process does not


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json_atomic(path, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*results.json"):
        write_json_atomic(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
