"""A job's child process: its output in a log, its life bound to its worker's."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from co3d_ensemble.fleet import bound

# of torchrun's worker; a child is none
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL_")
POLL_SECONDS = 0.02


class Process(Protocol):
    """What a worker needs of a child; benchmarks have children that only sleep."""

    def poll(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...

    def wait(self) -> int: ...


def child_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """The worker's environment without what torchrun put there, and with the child's threads."""
    kept = {key: value for key, value in environment.items() if not key.startswith(_TORCHRUN)}
    return {**kept, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a command in a session of its own, so that signals reach it through its worker alone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {shlex.join(command)}\n".encode())
        file.flush()
        whole = [sys.executable, "-I", "-S", bound.__file__, str(os.getpid()), *command]
        return subprocess.Popen(
            whole, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )


def stop(children: Iterable[Process], grace_seconds: float) -> None:
    """SIGTERM to all, then SIGKILL to those that are still there after the grace; returns when none is."""
    children = [child for child in children if child.poll() is None]
    for child in children:
        child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(POLL_SECONDS)
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()
