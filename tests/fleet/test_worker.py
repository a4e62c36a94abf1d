"""A worker with children of a moment: attempts, locks, slots, stopping, and what is nobody's fault."""

from __future__ import annotations

import json
import os
import time

import pytest
from torch.distributed import HashStore

from co3d_ensemble.fleet import attempts, child
from co3d_ensemble.fleet.claims import Round
from co3d_ensemble.fleet.disk import JobFolder, read_json
from co3d_ensemble.fleet.jobrun import JobRun, Terms
from co3d_ensemble.fleet.jobs import Job
from co3d_ensemble.fleet.worker import work
from co3d_ensemble.training.lock import FolderLock

FINISHES = "mkdir -p {run}/checkpoints; echo x > {run}/checkpoints/best.pt; echo '{{\"metrics\": {{}}, \"steps\": 1}}' > {run}/results.json"


def terms(output, **more):
    def start(job, log):
        return child.start(job.command, log, os.environ)

    usual = {"output_dir": output, "worker": "0@here", "device": "cpu", "start": start, "retry_pause": 0.0, "busy_pause": 0.1}
    return Terms(**{**usual, **more})


def shell(output, name, script):
    run = output / "apple" / "manyview_dev_0" / name
    return Job(f"apple/manyview_dev_0/{name}", ("/bin/sh", "-c", script.format(run=run, output=output)), "recipe")


def do(jobs, terms, *, slots=1, stopping=lambda: False):
    round = Round.new(HashStore(), jobs)
    work(round, terms, slots=slots, grace_seconds=5.0, stopping=stopping)
    return round


def test_every_job_is_done_and_told_and_a_bad_one_is_given_up_with_its_last_words(tmp_path):
    bad = shell(tmp_path, "bad", "echo 'error: no frames' >&2; exit 1")
    jobs = [shell(tmp_path, "good", FINISHES), bad, shell(tmp_path, "next", FINISHES)]
    round = do(jobs, terms(tmp_path))
    assert round.all_ended()
    assert all(JobFolder(tmp_path, jobs[i].name).is_done("recipe") for i in (0, 2))
    failed = read_json(JobFolder(tmp_path, jobs[1].name).failed)
    assert failed["error"] == "exit 1: no frames" and failed["attempts"] == 3 and "error: no frames" in failed["log_tail"]


def test_a_crash_costs_one_attempt_and_the_next_one_goes_on(tmp_path):
    job = shell(tmp_path, "flaky", "if [ -e {output}/once ]; then " + FINISHES + "; else touch {output}/once; kill -SEGV $$; fi")
    do([job], terms(tmp_path))
    record = read_json(JobFolder(tmp_path, job.name).attempts)
    assert [entry["how"] for entry in record["history"]] == ["failed", "done"]
    assert record["history"][0]["error"] == "killed by signal 11"


def test_an_attempt_that_a_dead_worker_left_under_way_does_not_count(tmp_path):
    job, folder = shell(tmp_path, "bad", "exit 1"), JobFolder(tmp_path, "apple/manyview_dev_0/bad")
    folder.path.mkdir(parents=True)
    left = attempts.begin(attempts.new_record(), now=time.time(), worker="9@gone", device="cpu", gpu_share=0, checkpoint=None)
    folder.attempts.write_text(json.dumps(left))
    do([job], terms(tmp_path))
    assert [entry["how"] for entry in read_json(folder.attempts)["history"]] == ["lost", "failed", "failed", "failed"]


def test_slots_run_side_by_side(tmp_path):
    meet = "touch {output}/%s; while [ ! -e {output}/%s ]; do sleep 0.01; done; " + FINISHES
    do([shell(tmp_path, "a", meet % ("a", "b")), shell(tmp_path, "b", meet % ("b", "a"))], terms(tmp_path), slots=2)


def test_when_told_to_stop_children_write_their_checkpoints_and_nothing_counts(tmp_path):
    script = "trap 'touch {output}/checkpoint; exit 143' TERM; touch {output}/ready; while :; do sleep 0.01; done"
    job = shell(tmp_path, "long", script)
    round = do([job], terms(tmp_path), stopping=(tmp_path / "ready").exists)
    record = read_json(JobFolder(tmp_path, job.name).attempts)
    assert (tmp_path / "checkpoint").exists() and not round.all_ended()
    assert record["running"] is None and record["fruitless"] == 0 and record["history"][-1]["how"] == "stopped"


def test_a_full_disk_or_a_vanished_mount_fails_no_job(tmp_path):
    job, calls = shell(tmp_path, "bad", "exit 1"), iter(range(1))

    def check():
        if next(calls, None) is None:  # it was there when the attempt began
            raise OSError(28, "the disk is almost full")

    with pytest.raises(OSError, match="almost full"):
        do([job], terms(tmp_path, check=check))
    folder = JobFolder(tmp_path, job.name)
    assert not folder.failed.exists() and not folder.is_locked()
    do([shell(tmp_path, "bad", FINISHES)], terms(tmp_path))
    assert folder.is_done("recipe") and read_json(folder.attempts)["fruitless"] == 0


@pytest.mark.parametrize("place", ["path", "run"])
def test_a_job_that_somebody_else_is_at_is_waited_for_and_not_done_twice(tmp_path, place):
    job = shell(tmp_path, "held", FINISHES)
    folder = JobFolder(tmp_path, job.name)
    held = getattr(folder, place)
    held.mkdir(parents=True)
    run = JobRun(job, terms(tmp_path))
    with FolderLock(held):
        run.poll()
        assert run.child is None and not run.ended
        if place == "path":
            folder.best.parent.mkdir(parents=True)
            folder.best.write_bytes(b"x")
            folder.results.write_text("{}")
            folder.write_done("recipe", 1.0)
    while not run.ended:
        run.poll()
        time.sleep(0.01)
    assert folder.attempts.exists() == (place == "run")  # else the other one did it
