"""The check of everything that needs a GPU: it runs on the CPU at toy size, and what fails in it fails alone."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Part, run_part, time_presets


@pytest.fixture
def one(tmp_path):
    def run(code, *, seconds=60.0):
        part = Part("part", (sys.executable, "-c", code), seconds)
        return run_part(part, folder=tmp_path, environment=os.environ)

    return run


def test_a_part_that_ends_well_has_its_output_and_no_reason(one):
    result = one("print('first'); print(); print('last')")
    assert (result["status"], result["reason"], result["lines"]) == ("ok", None, ["first", "last"])


def test_a_part_that_fails_has_its_error_as_the_reason(one):
    result = one("print('at work'); raise ValueError('no such grid')")
    assert result["status"] == "failed" and result["reason"] == "exit 1: ValueError: no such grid"


def test_a_part_that_hangs_is_ended_with_its_children_at_its_limit(one, tmp_path):
    child = "import os, subprocess, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); time.sleep(600)"
    result = one(child, seconds=1.0)
    assert (result["status"], result["reason"]) == ("timed out", "after 1 s") and result["seconds"] < 30
    until = time.monotonic() + 20  # the kernel ends it after the signal, on a busy machine not at once
    while (state := process_state(result["lines"][0])) and not state.startswith("Z") and time.monotonic() < until:
        time.sleep(0.05)
    assert state == "" or state.startswith("Z")


def process_state(number):
    """As ps has it, empty where there is no such process."""
    return subprocess.run(["ps", "-o", "stat=", "-p", number], capture_output=True, text=True).stdout.strip()


def test_a_preset_that_ends_its_process_is_named_and_those_behind_it_are_timed():
    asked = []

    def run(presets):
        asked.append(list(presets))
        answers = [json.dumps({"step_ms": 1.0}) for _ in presets[: presets.index("bad") if "bad" in presets else None]]
        bad = {"status": "failed", "reason": "exit 1: out of memory"} if "bad" in presets else {"status": "ok", "reason": None}
        return {**bad, "seconds": 2.0, "lines": ["loading", *answers]}

    found = time_presets(["a", "bad", "b", "c"], run)
    assert asked == [["a", "bad", "b", "c"], ["b", "c"]]
    assert list(found) == ["a", "bad", "b", "c"] and [part["status"] for part in found.values()] == ["ok", "failed", "ok", "ok"]
    assert found["bad"]["reason"] == "exit 1: out of memory" and found["c"]["step_ms"] == 1.0


def test_the_counts_and_failures_of_the_tests_are_read():
    lines = ["...", "FAILED tests/a.py::test_b - boom", "1 failed, 7 passed, 2 skipped, 900 deselected in 3.00s"]
    result = gpu_check.with_counts({"status": "failed", "reason": "exit 1", "seconds": 3.0, "lines": lines})
    assert result["counts"] == {"failed": 1, "passed": 7, "skipped": 2} and result["failures"] == [lines[1]]


def test_steps_are_timed_on_the_cpu_in_one_table_and_one_file(root, tmp_path, capsys):
    path = tmp_path / "check.json"
    place = ["--dataset-root", str(root), "--category", "mug", "--device", "cpu", "--json", str(path)]
    status = gpu_check.main(["--quick", "--parts", "steps", "--presets", "tensorf" + gpu_check.FINAL, *place])
    result, shown = json.loads(path.read_text()), capsys.readouterr()
    assert status == 0 and result["card"]["name"] is None and result["torch"] and "at most" in shown.err
    ((name, part),) = result["parts"].items()
    assert name == "steps_tensorf_final_grid" and name in shown.out
    assert part["status"] == "ok" and part["step_ms"] > 0 and part["operators"] > 100 and part["launches"] is None


def test_a_training_part_is_the_launch_script_with_the_seconds_as_its_budget(tmp_path):
    arguments = gpu_check.parse_arguments(["--device", "cpu"])
    part = gpu_check.training_part("nerf", arguments, tmp_path, "mug", tmp_path / "out", seconds=45.0)
    assert "training.budget_minutes=0.7500" in part.command and "experiment='nerf'" in part.command and part.seconds > 45
