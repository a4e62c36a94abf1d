"""Whose a fleet is: the lock on its output folder, the session of its torchrun, and its workers' bond to their agent."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from co3d_ensemble.fleet.bound import die_with_parent
from co3d_ensemble.fleet.disk import FleetState, fleet_folder
from co3d_ensemble.fleet.settings import FleetConfig
from co3d_ensemble.training.lock import FolderLock, RunDirectoryBusy

LOCK_SLACK_SECONDS = 10.0  # over the grace, for the leader of the round before to be gone


def bound_to_agent() -> bool:
    """Asks for SIGTERM when torchrun's agent dies: one that is killed leaves its workers behind, and they would go on beside
    those of the next. False where it is dead already: the agent is a Python process, and who inherits orphans is not."""
    parent = os.getppid()
    die_with_parent(parent, signal.SIGTERM)
    try:
        return Path(os.readlink(f"/proc/{parent}/exe")).name.startswith("python")
    except PermissionError:  # another user's: no agent of ours, but the init that inherits orphans
        return False
    except OSError:  # no /proc, or gone this moment
        return os.getppid() == parent


def take_fleet_lock(settings: FleetConfig, held: ExitStack, stopping: Callable[[], bool]) -> None:
    """Locks the output folder until ``held`` is closed. A leader of the same session that is being stopped is waited for.

    Raises:
        RunDirectoryBusy: another fleet has it, with its owner and start.
    """
    deadline = time.monotonic() + settings.grace_seconds + LOCK_SLACK_SECONDS
    while True:
        try:
            held.enter_context(FolderLock(fleet_folder(settings.output_dir)))
            return
        except RunDirectoryBusy:
            holder = FleetState(settings.output_dir).read() or {}
            if holder.get("session") != session() or time.monotonic() > deadline or stopping():
                raise


def session() -> str:
    """The same for all rounds of one torchrun, and for no other one."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment:
        return f"{socket.gethostname()}:{os.getpid()}"
    name = environment["TORCHELASTIC_RUN_ID"]
    return f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}" if name == "none" else name  # none: torchrun's default id


def whose() -> dict[str, Any]:
    return {"session": session(), "host": socket.gethostname(), "pid": os.getpid(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
