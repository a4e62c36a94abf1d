"""What the files say after everything was killed."""

from __future__ import annotations

import json
import os

import pytest

from co3d_ensemble.fleet.disk import FleetState, JobFolder, last_error, read_json, unfinished
from co3d_ensemble.fleet.jobs import Job
from co3d_ensemble.training.lock import FolderLock

NAME = "apple/manyview_dev_0/nerf"


@pytest.fixture
def folder(tmp_path):
    """A job with a finished run."""
    made = JobFolder(tmp_path, NAME)
    made.best.parent.mkdir(parents=True)
    made.best.write_bytes(b"weights")
    made.results.write_text(json.dumps({"metrics": {}}))
    made.path.mkdir(parents=True)
    return made


def test_a_job_is_done_by_its_recipe_and_while_its_results_are_there(folder):
    assert not folder.is_done("recipe")
    folder.write_done("recipe", 1.0)
    assert folder.is_done("recipe") and not folder.is_done("another")
    folder.results.unlink()
    assert not folder.is_done("recipe")


@pytest.mark.parametrize("damage", ["gone", "cut", "rewritten"])
def test_a_job_whose_best_checkpoint_changed_is_not_done(folder, damage):
    folder.write_done("recipe", 1.0)
    if damage == "gone":
        folder.best.unlink()
    elif damage == "cut":
        folder.best.write_bytes(b"wei")
    else:
        stat = folder.best.stat()
        os.utime(folder.best, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not folder.is_done("recipe")


def test_damaged_results_are_not_done(folder):
    folder.write_done("recipe", 1.0)
    folder.results.write_text("{")
    assert not folder.is_done("recipe")


def test_what_is_done_or_given_up_is_not_listed_again(tmp_path, folder):
    jobs = [Job(name, ("true",), "recipe") for name in (NAME, "apple/manyview_dev_0/tensorf", "cape/manyview_dev_0/nerf")]
    folder.write_done("recipe", 1.0)
    failed = JobFolder(tmp_path, jobs[1].name)
    failed.path.mkdir(parents=True)
    failed.failed.write_text("{}")
    assert unfinished(tmp_path, jobs) == [jobs[2]]


def test_whether_somebody_is_at_a_job_can_be_asked_without_being_in_the_way(folder):
    assert not folder.is_locked()
    with FolderLock(folder.path):
        assert folder.is_locked()
    assert not folder.is_locked()


def test_a_failure_is_told_by_the_childs_own_words_or_by_its_signal():
    assert last_error(1, "I x: loading\nerror: no such frame\nlater\n") == "exit 1: no such frame"
    assert last_error(-9, "error: of an attempt before") == "killed by signal 9"
    assert last_error(1, "Traceback\nValueError: what\n") == "exit 1: ValueError: what"


def test_the_tail_of_a_log_leaves_earlier_attempts_out(folder):
    folder.log.write_text("error: first\n")
    since = folder.log_bytes()
    with open(folder.log, "a") as file:
        file.write("error: second\n")
    assert folder.log_tail(since) == "error: second\n"


def test_damaged_records_are_named(tmp_path):
    (tmp_path / "fleet_state.json").write_text("{")
    with pytest.raises(ValueError, match="fleet_state.json is damaged"):
        FleetState(tmp_path).read()
    assert read_json(tmp_path / "nowhere.json") is None
