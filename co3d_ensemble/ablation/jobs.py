"""Commands as independent child processes, a few at once: one that fails is noted, a signal stops all of them softly."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from co3d_ensemble.base.quoting import for_device
from co3d_ensemble.base.signals import EXIT_STATUS, StopSignals

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
LOG_TAIL_BYTES = 8192


@dataclass(frozen=True)
class Job:
    """A command whose output goes to a log. Its argument ``device={device}`` gets the device of the slot that it runs in."""

    name: str
    command: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class Outcome:
    """How a call of :func:`run_jobs` ended.

    Attributes:
        failures: reason by name of the jobs that ended with an error, in order.
        status: 0, or the exit status of the signal that stopped it.
    """

    failures: dict[str, str]
    status: int


def run_jobs(
    pending: Callable[[Mapping[str, str]], Iterable[Job]],
    *,
    devices: Sequence[str],
    threads: int,
    environment: Mapping[str, str] | None = None,
    ended: Callable[[Job], None] = lambda job: None,
) -> Outcome:
    """Runs what is pending, one job per entry of ``devices`` at a time, until nothing is left.

    Each job is started once. It has a session of its own, so Ctrl-C reaches it through this process alone: SIGINT and
    SIGTERM are passed on as one SIGTERM, which a training answers with a checkpoint; what then is not finished goes on
    when it is started again.

    Args:
        pending: the jobs to do, most urgent first, given the failures so far; asked again whenever one has ended, as that may
            make others possible.
        threads: of each job, for OpenMP and what else computes on CPUs.
        environment: of the jobs, in place of this process's.
        ended: called after each job that ended with 0.

    Raises:
        KeyboardInterrupt: second Ctrl-C; the jobs are killed.
    """
    variables = {**(os.environ if environment is None else environment), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    free, running = list(devices), {}
    started: set[str] = set()
    failures: dict[str, str] = {}
    with StopSignals() as signals:
        try:
            queue = list(pending(failures))
            while True:
                while free and not signals.reason and (job := next((job for job in queue if job.name not in started), None)):
                    started.add(job.name)
                    device = free.pop(0)
                    running[_start(job, device, variables)] = (job, device)
                if not running:
                    return Outcome(failures, EXIT_STATUS.get(signals.reason, 0))
                done = _wait(running, signals)
                for process in done:
                    job, device = running.pop(process)
                    free.append(device)
                    if process.returncode == 0:
                        ended(job)
                    elif not signals.reason:
                        failures[job.name] = _reason(process.returncode, job.log)
                        logger.error("%s failed: %s (%s)", job.name, failures[job.name], job.log)
                queue = list(pending(failures))
        finally:
            for process in running:
                process.kill()
                process.wait()


def _start(job: Job, device: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    command = for_device(job.command, device)
    with open(job.log, "ab") as log:
        log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {shlex.join(command)}\n".encode())
        log.flush()
        logger.info("starting %s", job.name)
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _wait(running: Iterable[subprocess.Popen[bytes]], signals: StopSignals) -> list[subprocess.Popen[bytes]]:
    """The processes that have ended, at least one; passes a signal on, once."""
    while True:
        if signals.reason:
            logger.info("stopping %d jobs", len(list(running)))
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                process.wait()
        done = [process for process in running if process.poll() is not None]
        if done:
            return done
        time.sleep(POLL_SECONDS)


def _reason(returncode: int, log: Path) -> str:
    """The child's error message, or how it ended."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    if returncode < 0:
        return f"killed by signal {-returncode}"
    told = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return f"exit {returncode}: {told.removeprefix('error: ')}"
