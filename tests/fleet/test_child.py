"""Children: bound to their worker's life, stopped softly, then not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from co3d_ensemble.fleet import session
from co3d_ensemble.fleet.child import child_environment, start, stop
from tests.children import environment_of_child

SLEEP = ("/bin/sh", "-c", "exec sleep 60")


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_output_and_command_are_in_the_log_and_the_code_is_the_childs(tmp_path):
    child = start(("/bin/sh", "-c", "echo out; echo err >&2; exit 7"), tmp_path / "a" / "log.txt", os.environ)
    assert child.wait() == 7
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "exit 7" in log.splitlines()[0] and log.endswith("out\nerr\n")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(PR_SET_PDEATHSIG) is Linux's")
def test_a_child_dies_with_its_worker_even_if_that_is_killed(tmp_path):
    code = (
        "import os, sys, time, pathlib\n"
        "from co3d_ensemble.fleet.child import start\n"
        f"child = start({SLEEP!r}, pathlib.Path({str(tmp_path)!r}) / 'log', os.environ)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = environment_of_child(threads=None)
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(worker.stdout.readline())
    wait_until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep"))  # the death signal is set by then
    worker.kill()
    worker.wait()
    worker.stdout.close()
    wait_until(lambda: not is_alive(pid))


def test_stopping_is_sigterm_first_and_sigkill_after_the_grace(tmp_path):
    forever = "while :; do sleep 0.01; done"
    soft = start(("/bin/sh", "-c", f"trap 'sleep 0.2; exit 9' TERM; touch {tmp_path}/a; {forever}"), tmp_path / "1", os.environ)
    hard = start(("/bin/sh", "-c", f"trap '' TERM; touch {tmp_path}/b; {forever}"), tmp_path / "2", os.environ)
    wait_until(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
    began = time.monotonic()
    stop([soft, hard], grace_seconds=1.5)
    assert soft.wait() == 9 and hard.wait() == -signal.SIGKILL
    assert 1.4 < time.monotonic() - began < 10


def test_children_do_not_take_themselves_for_workers_of_torchrun():
    environment = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "3", "PATH": "/bin"}
    assert child_environment(environment, 2) == {"PATH": "/bin", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}


@pytest.mark.parametrize(
    ("found", "alive"),
    [("/usr/bin/python3.11", True), ("/usr/lib/systemd/systemd", False), (PermissionError(), False)],
    ids=["agent", "init", "init of another user"],
)
def test_a_worker_knows_whether_its_agent_is_alive(monkeypatch, found, alive):
    def readlink(path):
        assert path == f"/proc/{os.getppid()}/exe"
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(session, "die_with_parent", lambda parent, number: True)
    monkeypatch.setattr(os, "readlink", readlink)
    assert session.bound_to_agent() is alive
