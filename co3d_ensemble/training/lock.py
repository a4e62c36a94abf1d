"""An exclusive lock on a folder that the operating system releases when its process dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

LOCK_NAME = ".lock"
GRACE_SECONDS = 2.0  # a holder killed this moment, or its forked worker, may take a while to be gone

_held: set[int] = set()


def _close_in_forked_child() -> None:
    """A forked data worker shares the lock; without this it would keep it after its parent was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_forked_child)


class RunDirectoryBusy(RuntimeError):
    """Another process is working in the run directory."""


class FolderLock:
    """``with FolderLock(folder):`` — one holder per folder, across processes and within one.

    Raises:
        RunDirectoryBusy: on entry, naming the holder's host, process and start.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / LOCK_NAME
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not _locked_within(descriptor, GRACE_SECONDS):
            holder = _describe(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise RunDirectoryBusy(f"{self.path.parent} is in use by {holder}")
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        self._descriptor = descriptor
        _held.add(descriptor)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor in _held:  # not in a forked child, where it is closed
            _held.remove(self._descriptor)
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)  # the file stays: removing it would let two processes lock two files of one name
        self._descriptor = None


def _locked_within(descriptor: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)


def _describe(content: bytes) -> str:
    try:
        owner = json.loads(content)
    except ValueError:  # locked a moment ago, not yet signed
        return "another process"
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
