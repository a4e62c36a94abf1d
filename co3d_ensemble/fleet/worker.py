"""A worker: claims jobs and runs them on its device until none is left or it is told to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

from co3d_ensemble.fleet import child
from co3d_ensemble.fleet.claims import STORE_ERRORS, Round, RoundError
from co3d_ensemble.fleet.jobrun import JobRun, Terms
from co3d_ensemble.fleet.jobs import Job

logger = logging.getLogger(__name__)


def work(round: Round, terms: Terms, *, slots: int, grace_seconds: float, stopping: Callable[[], bool]) -> None:
    """Until no job is left to claim and the claimed ones have ended; when told to stop, until their checkpoints are written.

    Args:
        slots: jobs at once.
        stopping: whether to stop.

    Raises:
        OSError: the disk is full, a mount has vanished; children were stopped first.
        RoundError: the store is lost; jobs at hand were brought to their end first.
    """
    runs: list[JobRun] = []
    lost: Exception | None = None
    left = True  # jobs to claim
    try:
        while not stopping():
            while left and lost is None and len(runs) < slots:
                try:
                    job = round.claim()
                except STORE_ERRORS as error:
                    lost = error
                    break
                left = job is not None
                if job is not None:
                    runs.append(JobRun(job, terms))
            for run in runs:
                run.poll()
            for run in [run for run in runs if run.ended]:
                runs.remove(run)
                try:
                    round.tell_ended()
                except STORE_ERRORS as error:
                    lost = lost or error
            if not runs and (not left or lost is not None):
                break
            time.sleep(child.POLL_SECONDS)
    finally:
        stop_runs(runs, grace_seconds)
    if lost is not None and not stopping():
        raise RoundError(f"lost the store: {lost}") from lost


def run_alone(job: Job, terms: Terms, *, grace_seconds: float, stopping: Callable[[], bool]) -> None:
    """Runs one job that is not claimed from a round, as :func:`work` does."""
    run = JobRun(job, terms)
    try:
        while not run.ended and not stopping():
            run.poll()
            time.sleep(child.POLL_SECONDS)
    finally:
        stop_runs([run], grace_seconds)


def stop_runs(runs: list[JobRun], grace_seconds: float) -> None:
    """Stops what runs, with its checkpoint, and notes that these attempts do not count."""
    children = [run.child for run in runs if run.child is not None]
    if children:
        logger.info("stopping %d jobs", len(children))
    child.stop(children, grace_seconds)
    for run in runs:
        if not run.ended:
            with suppress(OSError):  # a full disk: the next worker finds the attempt under way and takes it for lost
                run.stopped()
        run.release()
