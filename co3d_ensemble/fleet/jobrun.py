"""A claimed job in a worker's hands: attempts, one after the other, until it is done or given up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from co3d_ensemble.base.signals import STOPPED_STATUS
from co3d_ensemble.files import remove_temporaries, write_json_atomic
from co3d_ensemble.fleet import attempts
from co3d_ensemble.fleet.child import Process
from co3d_ensemble.fleet.disk import JobFolder, last_error, read_json, stamp_of
from co3d_ensemble.fleet.jobs import Job
from co3d_ensemble.training.lock import FolderLock, RunDirectoryBusy

logger = logging.getLogger(__name__)

BUSY_PAUSE_SECONDS = 5.0  # before a folder that somebody else holds is tried again
RETRY_PAUSE_SECONDS = 1.0  # longer with every attempt, as what is wrong may pass


@dataclass(frozen=True)
class Terms:
    """How a worker runs jobs.

    Attributes:
        start: a job's child on its log.
        check: raises where failures are not the jobs' fault: the disk is full, a mount has vanished.
        worker: shown as who does it.
        gpu_share: of a GPU per job.
        retry_pause: seconds before the second attempt, twice that before the third.
    """

    output_dir: Path
    worker: str
    device: str
    start: Callable[[Job, Path], Process]
    max_attempts: int = 3
    gpu_share: float = 0.0
    check: Callable[[], None] = lambda: None
    retry_pause: float = RETRY_PAUSE_SECONDS
    busy_pause: float = BUSY_PAUSE_SECONDS


class JobRun:
    """Call :meth:`poll` until :attr:`ended`, or :meth:`stopped` after the child was stopped."""

    def __init__(self, job: Job, terms: Terms) -> None:
        self.job, self.terms = job, terms
        self.folder = JobFolder(terms.output_dir, job.name)
        self.child: Process | None = None
        self.ended = False
        self._lock: FolderLock | None = None
        self._not_before = 0.0
        self._log_start = 0

    def poll(self) -> None:
        """Takes the next step that can be taken without waiting.

        Raises:
            OSError: the job's files cannot be written, or ``terms.check`` says why nothing can go on; no attempt is counted.
        """
        if self.ended or time.monotonic() < self._not_before:
            return
        if self._lock is None and not self._take():
            return
        if self.child is None:
            self._begin()
        elif (status := self.child.poll()) is not None:
            self._end(status)

    def stopped(self) -> None:
        """After the child was told to stop (and did): the attempt does not count."""
        if self.child is not None:
            status = self.child.poll()
            self._record_end(attempts.DONE if status == 0 else attempts.STOPPED)
            if status == 0:
                self._done()
        self.release()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None

    def _take(self) -> bool:
        """Locks the job; False where somebody else is at it or at its run."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.folder.path)
        try:
            lock.__enter__()
        except RunDirectoryBusy as busy:
            return self._wait(busy)
        self._lock = lock
        try:
            remove_temporaries(self.folder.path)
            if self.folder.run.is_dir():  # a child that outlived its worker, or a training by hand
                with FolderLock(self.folder.run):
                    pass
        except RunDirectoryBusy as busy:
            self.release()
            return self._wait(busy)
        if self.folder.failed.exists() or self.folder.is_done(self.job.recipe):
            self._finish()  # by who held it
            return False
        record = self._record()
        if record["running"] is not None:
            self._record_end(attempts.LOST)
        return True

    def _wait(self, busy: RunDirectoryBusy) -> bool:
        logger.warning("%s: %s; waiting", self.job.name, busy)
        self._not_before = time.monotonic() + self.terms.busy_pause
        return False

    def _record(self) -> attempts.Record:
        return read_json(self.folder.attempts) or attempts.new_record()

    def _begin(self) -> None:
        self.terms.check()
        record = attempts.begin(
            self._record(),
            now=time.time(),
            worker=self.terms.worker,
            device=self.terms.device,
            gpu_share=self.terms.gpu_share,
            checkpoint=stamp_of(self.folder.checkpoint),
        )
        write_json_atomic(self.folder.attempts, record)
        self._log_start = self.folder.log_bytes()
        self.child = self.terms.start(self.job, self.folder.log)
        logger.info("%s: attempt %d", self.job.name, record["started"])

    def _end(self, status: int) -> None:
        self.child = None
        if status == 0:
            self._record_end(attempts.DONE)
            self._done()
            return
        if status in STOPPED_STATUS:  # told to stop by somebody else; it has its checkpoint
            self._record_end(attempts.STOPPED)
        else:
            error = last_error(status, self.folder.log_tail(self._log_start))
            self.terms.check()
            record = self._record_end(attempts.FAILED, error)
            logger.warning("%s: %s (%s)", self.job.name, error, self.folder.log)
            if attempts.is_exhausted(record, self.terms.max_attempts):
                self._give_up(record, error)
                return
            self._not_before = time.monotonic() + self.terms.retry_pause * record["fruitless"]

    def _record_end(self, how: str, error: str | None = None) -> attempts.Record:
        now = time.time()
        if how == attempts.LOST:  # nobody saw the end: the last sign of life
            now = max((path.stat().st_mtime for path in (self.folder.log, self.folder.checkpoint) if path.exists()), default=now)
        record = attempts.end(self._record(), how, now=now, checkpoint=stamp_of(self.folder.checkpoint), error=error)
        write_json_atomic(self.folder.attempts, record)
        return record

    def _done(self) -> None:
        self.folder.write_done(self.job.recipe, self._record()["seconds"])
        logger.info("%s: done", self.job.name)
        self._finish()

    def _give_up(self, record: attempts.Record, error: str) -> None:
        told: dict[str, Any] = {"error": error, "attempts": record["started"], "log": str(self.folder.log), "time": time.time()}
        write_json_atomic(self.folder.failed, {**told, "log_tail": self.folder.log_tail(self._log_start)})
        logger.error("%s failed for good after %d attempts: %s", self.job.name, record["started"], error)
        self._finish()

    def _finish(self) -> None:
        self.ended = True
        self.release()
