"""The table, and the summary, from files."""

from __future__ import annotations

import csv
import io
import json
import time

import pytest
from rich.console import Console

from co3d_ensemble.fleet import attempts
from co3d_ensemble.fleet.disk import JobFolder, fleet_folder
from co3d_ensemble.fleet.status import as_json, packed, read_status, render
from co3d_ensemble.fleet.summary import MEAN, Row, csv_text, markdown, with_means
from co3d_ensemble.functional.metrics import METRIC_NAMES
from co3d_ensemble.training.lock import FolderLock

NAMES = [f"apple/manyview_dev_{i}/nerf" for i in range(5)]
NOW = 1_000_000.0


@pytest.fixture
def output(tmp_path):
    """Five jobs: done, running, interrupted, failed, waiting (in this order); the second is to be locked by the test."""
    fleet_folder(tmp_path).mkdir()
    listed = [{"name": name, "recipe": "r", "expected_seconds": None} for name in NAMES]
    (fleet_folder(tmp_path) / "jobs.json").write_text(json.dumps({"jobs": listed, "slots": 2}))
    folders = [JobFolder(tmp_path, name) for name in NAMES]
    for folder in folders[:4]:
        folder.path.mkdir(parents=True)
        begun = attempts.begin(attempts.new_record(), now=NOW - 60, worker="3@node", device="cpu", gpu_share=0, checkpoint=None)
        if folder is folders[0]:
            begun = attempts.end(begun, attempts.DONE, now=NOW, checkpoint=[1, 1])
        folder.attempts.write_text(json.dumps(begun))
    done, running, _, failed, _ = folders
    done.best.parent.mkdir(parents=True)
    done.best.write_bytes(b"x")
    done.results.write_text(json.dumps({"metrics": {"psnr_masked": 21.5}, "steps": 100}))
    done.write_done("r", 60.0)
    failed.failed.write_text(json.dumps({"error": "exit 1: no frames", "attempts": 3}))
    running.run.mkdir(parents=True)
    (running.run / "config.yaml").write_text("training:\n  max_steps: 200\n")
    lines = [
        {"kind": "train", "step": 50, "seconds_per_step": 0.5, "rays_per_second": 2048.0},
        {"kind": "validation", "step": 50, "metrics": {"psnr_masked": 18.25}},
    ]
    (running.run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    return tmp_path


def test_every_state_is_told_from_the_files_and_the_locks(output):
    with FolderLock(JobFolder(output, NAMES[1]).path):
        jobs = read_status(output, now=NOW)["jobs"]
    assert [job.state for job in jobs] == ["done", "running", "interrupted", "failed", "waiting"]
    running = jobs[1]
    assert (running.worker, running.step, running.max_steps, running.psnr) == ("3@node", 50, 200, 18.25)
    assert (running.rays_per_second, running.seconds_left, running.seconds) == (2048.0, 75.0, 60.0)
    assert jobs[0].psnr == 21.5 and jobs[3].error == "exit 1: no frames"


def test_a_job_whose_worker_was_killed_is_not_shown_as_running(output):
    assert read_status(output, now=NOW)["counts"] == {"running": 0, "waiting": 1, "interrupted": 2, "done": 1, "failed": 1}


def test_the_time_left_for_all_packs_what_is_left_onto_the_slots(output):
    with FolderLock(JobFolder(output, NAMES[1]).path):
        status = read_status(output, now=NOW)
    assert status["seconds_left"] == packed([75.0, 60.0, 60.0], 2) == 120.0  # a job took 60 s so far


def test_table_and_json_show_all_of_it(output):
    status = read_status(output, now=NOW)
    console = Console(width=200, file=io.StringIO())
    console.print(render(status))
    shown = console.file.getvalue()
    assert all(name in shown for name in NAMES) and "exit 1: no frames" in shown and "5 jobs" in shown
    assert [job["name"] for job in json.loads(as_json(status))["jobs"]] == NAMES


def test_a_folder_without_a_fleet_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no fleet"):
        read_status(tmp_path)


def test_two_hundred_jobs_are_read_in_a_blink(tmp_path):
    fleet_folder(tmp_path).mkdir()
    listed = [{"name": f"thing{i}/manyview_dev_0/nerf", "recipe": "r", "expected_seconds": 1.0} for i in range(200)]
    (fleet_folder(tmp_path) / "jobs.json").write_text(json.dumps({"jobs": listed, "slots": 8}))
    began = time.monotonic()
    assert read_status(tmp_path)["counts"]["waiting"] == 200
    assert time.monotonic() - began < 2.0


def row(subset, model, psnr, depth, hours=1.0):
    scores = {name: None for name in METRIC_NAMES} | {"psnr_masked": psnr, "depth_abs_fg": depth}
    return Row(subset, model, scores, {"hours": hours, "gpu_hours": hours, "attempts": 1})


def test_means_are_over_the_subsets_that_have_a_value_and_costs_are_summed():
    rows = with_means([row("a/d", "nerf", 20.0, None), row("b/d", "nerf", 22.0, 0.5), row("a/d", "tensorf", 30.0, 0.1)])
    assert [(r.subset, r.model) for r in rows] == [("a/d", "nerf"), ("b/d", "nerf"), (MEAN, "nerf"), ("a/d", "tensorf"), (MEAN, "tensorf")]
    assert rows[2].scores["psnr_masked"] == 21.0 and rows[2].scores["depth_abs_fg"] == 0.5 and rows[2].cost["hours"] == 2.0


def test_the_page_and_the_csv_say_the_same():
    rows = with_means([row("a/d", "nerf", 20.0, None)])
    page = markdown(rows, exports={"dev": {"error": "no subset of it is complete"}}, failures={"a/d/tensorf": "exit 1"}, wall_hours=2.0)
    assert "| a/d" in page and "20.00" in page and "**MEAN**" in page and "- `a/d/tensorf`: exit 1" in page and "No archive" in page
    table = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [line["subset"] for line in table] == ["a/d", MEAN] and table[0]["psnr_masked"] == "20.00000" and table[0]["depth_abs_fg"] == ""
