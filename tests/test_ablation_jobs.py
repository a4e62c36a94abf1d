"""The job runner with commands of a moment: order, slots, failures, signals."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from co3d_ensemble.ablation.jobs import Job, run_jobs
from co3d_ensemble.base.quoting import DEVICE


def job(tmp_path, name, code):
    return Job(name, (sys.executable, "-S", "-c", code), tmp_path / "logs" / f"{name}.log")


def shell(tmp_path, name, script):
    return Job(name, ("/bin/sh", "-c", script, DEVICE), tmp_path / "logs" / f"{name}.log")


def test_jobs_start_in_order_and_no_more_at_once_than_there_are_devices(tmp_path):
    script = "echo start ${0#device=} %(i)d >> %(all)s; sleep 0.2; echo end ${0#device=} %(i)d >> %(all)s"
    ended = []
    jobs = [shell(tmp_path, f"job{i}", script % {"all": tmp_path / "all", "i": i}) for i in range(5)]
    outcome = run_jobs(lambda failures: jobs, devices=["a", "b"], threads=1, ended=lambda job: ended.append(job.name))
    assert outcome.status == 0 and outcome.failures == {}
    assert sorted(ended) == [job.name for job in jobs]
    events = [line.split() for line in (tmp_path / "all").read_text().splitlines()]
    busy: set[str] = set()
    for what, device, _ in events:
        if what == "start":
            assert device not in busy
            busy.add(device)
        else:
            busy.remove(device)
    assert {device for _, device, _ in events} == {"a", "b"}
    starts = [int(number) for what, _, number in events if what == "start"]
    assert all(abs(position - number) <= 1 for position, number in enumerate(starts))  # two at once may swap their first lines
    assert "/bin/sh -c" in (tmp_path / "logs" / "job3.log").read_text()  # the command, to run it by hand


def test_a_failing_job_is_reported_with_its_error_and_the_rest_goes_on(tmp_path):
    jobs = [
        shell(tmp_path, "bad", "echo 'error: no such frame' >&2; echo later; exit 3"),
        shell(tmp_path, "worse", "kill -KILL $$"),
        shell(tmp_path, "silent", "exit 1"),
        shell(tmp_path, "good", f"touch {tmp_path}/done"),
    ]
    outcome = run_jobs(lambda failures: jobs, devices=["cpu"], threads=1)
    assert outcome.failures["bad"] == "exit 3: no such frame"
    assert outcome.failures["worse"] == "killed by signal 9"
    assert outcome.failures["silent"].startswith("exit 1: ")
    assert set(outcome.failures) == {"bad", "worse", "silent"} and outcome.status == 0
    assert (tmp_path / "done").exists()


def test_what_becomes_possible_when_a_job_ends_is_run_and_failures_are_told(tmp_path):
    first, second = shell(tmp_path, "first", f"touch {tmp_path}/made"), shell(tmp_path, "second", f"test -e {tmp_path}/made")
    bad, told = shell(tmp_path, "bad", "exit 1"), []

    def pending(failures):
        told.append(dict(failures))
        return [first, bad] if not (tmp_path / "made").exists() else [second, bad]

    outcome = run_jobs(pending, devices=["cpu"], threads=1)
    assert list(outcome.failures) == ["bad"]
    assert "bad" in told[-1] and (tmp_path / "logs" / "second.log").exists()


def test_jobs_get_their_threads_and_the_environment(tmp_path):
    script = f"echo $OMP_NUM_THREADS $FRUIT > {tmp_path}/seen"
    run_jobs(lambda failures: [shell(tmp_path, "job", script)], devices=["cpu"], threads=3, environment={**os.environ, "FRUIT": "fig"})
    assert (tmp_path / "seen").read_text() == "3 fig\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_each_job_once_as_sigterm_starts_no_more_and_is_no_failure(tmp_path, number, status):
    code = (
        "import pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def stop(number, frame):\n"
        "    with open(folder / 'stopped', 'a') as file: file.write(str(number) + '\\n')\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "(folder / 'ready').touch()\n"
        "while not (folder / 'stopped').exists(): time.sleep(0.01)\n"
        "time.sleep(0.3)\n"  # as a checkpoint takes a while
        "sys.exit(143)"
    )
    jobs = [job(tmp_path, "long", code), shell(tmp_path, "next", f"touch {tmp_path}/next")]

    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    outcome = run_jobs(lambda failures: jobs, devices=["cpu"], threads=1)
    sender.join()
    assert outcome.status == status and outcome.failures == {}
    assert (tmp_path / "stopped").read_text() == f"{int(signal.SIGTERM)}\n"
    assert not (tmp_path / "next").exists()


def test_a_second_ctrl_c_kills_the_jobs(tmp_path):
    script = f"trap '' TERM; echo $$ > {tmp_path}/pid; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    stubborn = shell(tmp_path, "stubborn", script)

    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(lambda failures: [stubborn], devices=["cpu"], threads=1)
    sender.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
