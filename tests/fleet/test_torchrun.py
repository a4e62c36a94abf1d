"""The fleet under torchrun, with pretended trainings: kills, two nodes, two fleets. The long version is benchmarks/fleet_chaos.py."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.fleet_chaos import Agents, outcome, pretended, split_at_dashes, torment
from tests.children import environment_of_child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="agents' processes are found in /proc")

N_JOBS = 8


@pytest.fixture
def script(tmp_path):
    return pretended(tmp_path / "root", N_JOBS, seed=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same jobs done by one plain worker."""
    folder = tmp_path_factory.mktemp("undisturbed")
    script = pretended(folder / "root", N_JOBS, seed=1)
    done = alone([*script, f"jobs_per_device={N_JOBS}"], folder / "out")
    assert done.returncode == 3, done.stderr  # two of the jobs are sick
    return folder / "out"


def alone(script, output):
    environment = environment_of_child()
    command = [sys.executable, *script, f"output_dir={output}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def state(output):
    return json.loads((output / "fleet_state.json").read_text())["state"]


def test_kills_of_children_workers_agents_and_everything_change_no_result(script, undisturbed, tmp_path):
    agents = Agents([*script, f"output_dir={tmp_path / 'out'}"], nodes=1, workers=2, log=tmp_path / "log")
    killed = torment(agents, kills=4, pause=3.0, generator=random.Random(time.time_ns()), seconds=200)
    assert outcome(tmp_path / "out", undisturbed) == [], (killed, (tmp_path / "log").read_text()[-4000:])
    assert state(tmp_path / "out") == "failed"  # as the undisturbed: of the sick ones


def test_two_nodes_share_the_jobs_and_one_does_the_last_step(script, undisturbed, tmp_path):
    agents = Agents([*script, f"output_dir={tmp_path / 'out'}"], nodes=2, workers=1, log=tmp_path / "log")
    torment(agents, kills=0, pause=1.0, generator=random.Random(0), seconds=120)
    assert outcome(tmp_path / "out", undisturbed) == []
    assert (tmp_path / "out" / "finish.log").read_text() == "0\n"
    jobs = (tmp_path / "out" / "fleet" / "jobs").rglob("attempts.json")
    workers = {entry["worker"].partition("@")[0] for path in jobs for entry in json.loads(path.read_text())["history"]}
    assert workers == {"0", "1"}


def test_a_second_fleet_on_the_same_folder_names_the_first_and_leaves_it_alone(script, tmp_path):
    output, log = tmp_path / "out", open(tmp_path / "log", "wb")
    environment = environment_of_child()
    with log, subprocess.Popen([sys.executable, *script, f"output_dir={output}"], stdout=log, stderr=log, env=environment) as first:
        while not list(output.rglob("attempts.json")):
            time.sleep(0.05)
        second = alone(script, output)
        assert second.returncode == 4
        assert f"in use by process {first.pid} on " in second.stderr and ", started " in second.stderr
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 143
    assert state(output) == "requeue"
    records = [json.loads(path.read_text()) for path in output.rglob("attempts.json")]
    assert all(record["running"] is None and record["fruitless"] == 0 or record["history"] for record in records)


@pytest.mark.parametrize(
    ("change", "told"),
    [("dataset_root={}/nowhere", "vanished mount"), ("min_free_gb=1e9", "almost full")],
)
def test_what_no_job_can_help_is_one_clear_line_and_fails_no_job(script, tmp_path, change, told):
    done = alone([*script, change.format(tmp_path)], tmp_path / "out")
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr
    assert state(tmp_path / "out") == "failed" and not list(tmp_path.rglob("failed.json"))


def test_chaos_takes_the_settings_of_real_trainings_after_dashes():
    assert split_at_dashes(["OUT", "--real", "ROOT", "--", "experiment=ensemble"]) == (["OUT", "--real", "ROOT"], ["experiment=ensemble"])
    assert split_at_dashes(["OUT", "--kills", "3"]) == (["OUT", "--kills", "3"], [])
