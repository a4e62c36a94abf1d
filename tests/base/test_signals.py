from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from co3d_ensemble.base.signals import EXIT_STATUS, Stopped, StopSignals, Terminated, exit_status, signals_raise
from co3d_ensemble.scripts import reported

BOTH = pytest.mark.parametrize(("number", "kind", "status"), [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, Terminated, 143)])


@BOTH
def test_a_signal_raises_where_it_finds_the_program_and_the_handlers_come_back(number, kind, status):
    before = signal.getsignal(number)
    with pytest.raises(kind) as caught, signals_raise():
        signal.raise_signal(number)
    assert exit_status(caught.value) == status and signal.getsignal(number) is before


@BOTH
def test_a_script_ends_with_128_plus_the_signal_and_one_line(number, kind, status, capsys):
    assert reported(lambda: signal.raise_signal(number) or 0) == status
    message = capsys.readouterr().err
    assert "the same command goes on" in message and message.count("\n") == 1


def test_a_request_within_a_script_is_looked_at_and_nothing_raises():
    with signals_raise(), StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert EXIT_STATUS[signals.reason] == 143


@BOTH
def test_at_once_raises_within_its_block_and_on_entry_after_a_signal(number, kind, status):
    with StopSignals() as signals:
        with pytest.raises(Stopped), signals.at_once():
            signal.raise_signal(number)
        assert EXIT_STATUS[signals.reason] == status
        with pytest.raises(Stopped), signals.at_once():
            raise AssertionError("the block ran")
        with signals.at_once(False):
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_program_that_cleans_up_for_ever(number):
    code = "\n".join(
        [
            "import sys, time",
            "from co3d_ensemble.base.signals import signals_raise",
            "with signals_raise():",
            "    try:",
            "        print('ready', flush=True); time.sleep(60)",
            "    finally:",
            "        print('cleaning', flush=True); time.sleep(60)",
        ]
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ})
    for line in ("ready\n", "cleaning\n"):
        assert process.stdout.readline() == line
        process.send_signal(number)
    assert process.wait(30) == -number
    process.stdout.close()


def test_a_forked_worker_is_ended_by_sigterm_and_leaves_ctrl_c_to_its_parent():
    with signals_raise():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_outside_the_main_thread_handlers_are_left_alone():
    found = []

    def work():
        with signals_raise():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
