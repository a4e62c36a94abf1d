"""What is done, failed and under way, on disk: all that a fleet knows after everything was killed.

``<output_dir>/fleet/jobs/<job>/`` holds ``attempts.json``, ``log.txt`` and, in the end, ``done.json`` or ``failed.json``, and is
locked by the worker that runs the job. ``<output_dir>/fleet_state.json`` says how the fleet as a whole stands.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.fleet.jobs import Job
from co3d_ensemble.training.lock import LOCK_NAME

LOG_TAIL_BYTES = 4096
FINISH = "submission"  # name of the last step, as a job
FAILURES_FILE = "failures.json"  # below fleet/: what the last step could not do, and why
Stamp = list[int]  # bytes and modification time in ns: tells one version of a file from another


def fleet_folder(output_dir: Path | str) -> Path:
    return Path(output_dir) / "fleet"


def read_json(path: Path) -> Any:
    """Content of a JSON file that is replaced atomically; None where there is none.

    Raises:
        ValueError: naming the file, when it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error


def stamp_of(path: Path) -> Stamp | None:
    """None where there is no such file."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


class JobFolder:
    """A job's files."""

    def __init__(self, output_dir: Path | str, name: str) -> None:
        self.path = fleet_folder(output_dir) / "jobs" / name
        self.run = Path(output_dir) / name
        self.attempts = self.path / "attempts.json"
        self.done = self.path / "done.json"
        self.failed = self.path / "failed.json"
        self.log = self.path / "log.txt"
        self.checkpoint = self.run / "checkpoints" / "last.pt"
        self.best = self.run / "checkpoints" / "best.pt"
        self.results = self.run / "results.json"

    def is_done(self, recipe: str) -> bool:
        """Whether the job was done by this recipe, and its results are as they were then.

        The best checkpoint is known by size and time; every byte of it is verified when it is rendered from.
        """
        record = read_json(self.done)
        if record is None or record["recipe"] != recipe:
            return False
        if record["best"] is None:  # a job without a run
            return True
        try:
            return read_json(self.results) is not None and stamp_of(self.best) == record["best"]
        except ValueError:
            return False

    def write_done(self, recipe: str, seconds: float) -> None:
        self.failed.unlink(missing_ok=True)
        write_json_atomic(self.done, {"recipe": recipe, "best": stamp_of(self.best), "seconds": seconds})

    def log_bytes(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def log_tail(self, since: int = 0) -> str:
        """The end of the log, of what came after its first ``since`` bytes."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(since, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def is_locked(self) -> bool:
        """Whether a worker is at the job now."""
        return self.folder_is_locked(self.path)

    @staticmethod
    def folder_is_locked(folder: Path) -> bool:
        """Asks without taking the lock from anybody who wants it."""
        try:
            descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)


def last_error(returncode: int, log_tail: str) -> str:
    """The child's own message, or how it ended."""
    if returncode < 0:
        return f"killed by signal {-returncode}"
    lines = [line.strip() for line in log_tail.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return f"exit {returncode}: {told.removeprefix('error: ')}"


def unfinished(output_dir: Path | str, jobs: list[Job]) -> list[Job]:
    """The jobs that are neither done nor given up, in their order."""
    folders = {job.name: JobFolder(output_dir, job.name) for job in jobs}
    return [job for job in jobs if not folders[job.name].failed.exists() and not folders[job.name].is_done(job.recipe)]


class FleetState:
    """``fleet_state.json``: ``state`` is ``requeue`` from the start until it is ``done`` or ``failed``.

    So whatever ends the fleet early, kill -9 included, leaves the right word for who reads it.
    """

    def __init__(self, output_dir: Path | str) -> None:
        self.path = Path(output_dir) / "fleet_state.json"

    def write(self, state: str, reason: str, **more: Any) -> None:
        write_json_atomic(self.path, {"state": state, "reason": reason, **more})

    def read(self) -> Mapping[str, Any] | None:
        return read_json(self.path)
