"""Reads an archive in a child process, which the HDF5 library may hang, crash or fill: that ends in an ``ArchiveError``.

The child gets a request on its standard input and answers in messages, each a kind, a length and as many bytes: the structure,
or an error; then, for the positions that it is asked for, the entries in their order. It limits itself, so that it also ends
where this process is gone.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from co3d_ensemble.challenge.archive_file import ArchiveError, opened_archive

_MESSAGE = struct.Struct("<cQ")
STRUCTURE, ENTRY, ERROR = b"S", b"D", b"E"
MAX_MESSAGE_BYTES = 1 << 30
# BLAS libraries start threads, each with its own share of the memory that is limited
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}


@dataclass(frozen=True)
class Limits:
    """What the child may use.

    Attributes:
        cpu_seconds: for the structure, and for each entry. Sound ones take milliseconds.
        seconds: the same by the clock, for disks that are slow.
        memory_bytes: address space, of which Python and the libraries take 0.12 GB.
    """

    cpu_seconds: float = 20.0
    seconds: float = 300.0
    memory_bytes: int = 1 << 30


class IsolatedArchive:
    """An open archive in the child; as :class:`~co3d_ensemble.challenge.archive_file.ArchiveFile`."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path, limits: Limits) -> None:
        self._process, self._path, self._limits = process, path, limits
        found = json.loads(self._answer(STRUCTURE, "its structure"))
        self.entries: list[str] = found["entries"]
        self.index: dict[str, int | str] = found["index"]

    def stream(self, positions: Sequence[int]) -> Iterator[bytes]:
        """The entries' bytes; to be called once."""
        _send_line(self._process.stdin, list(positions))
        for position in positions:
            yield self._answer(ENTRY, self.entries[position])

    def _answer(self, expected: bytes, what: str) -> bytes:
        header = self._process.stdout.read(_MESSAGE.size)
        kind, length = _MESSAGE.unpack(header) if len(header) == _MESSAGE.size else (b"", 0)
        if length > MAX_MESSAGE_BYTES:  # a child that a hostile file took over
            raise ArchiveError(f"{self._path}: {what} cannot be read: {length:,} bytes are announced")
        content = self._process.stdout.read(length)
        if len(header) < _MESSAGE.size or len(content) < length:
            raise ArchiveError(f"{self._path}: {what} cannot be read: {self._how_it_ended()}")
        if kind == ERROR:
            raise ArchiveError(content.decode())
        if kind != expected:
            raise ArchiveError(f"{self._path}: {what} cannot be read: the process that reads it answered {kind!r}")
        return content

    def _how_it_ended(self) -> str:
        told, code = self._process.stderr.read().decode(errors="replace").strip().splitlines(), self._process.wait()
        if -code in (signal.SIGPROF, signal.SIGALRM):
            limits = self._limits
            return f"the HDF5 library did not end within {limits.cpu_seconds:g} s of computing or {limits.seconds:g} s, the file is damaged"
        if code < 0:
            return f"the HDF5 library crashed ({signal.Signals(-code).name}), the file is damaged"
        return f"the process that reads it ended with {told[-1] if told else f'exit code {code}'}"


@contextmanager
def isolated_archive(path: Path, *, max_entries: int, max_entry_bytes: int, limits: Limits | None = None) -> Iterator[IsolatedArchive]:
    """The archive, open in a child process that ends with the block; Ctrl-C ends both.

    Args, Raises: as :func:`~co3d_ensemble.challenge.archive_file.opened_archive`; also an ``ArchiveError`` where the library hangs,
        crashes or needs more than the ``limits``.
    """
    limits = limits or Limits()
    package = str(Path(__file__).resolve().parents[2])
    found = os.environ.get("PYTHONPATH")
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": package if not found else os.pathsep.join((package, found))}
    request = {"path": os.fspath(path), "max_entries": max_entries, "max_entry_bytes": max_entry_bytes, "limits": asdict(limits)}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen([sys.executable, "-m", __name__], env=environment, **pipes) as process:
        try:
            _send_line(process.stdin, request)
            yield IsolatedArchive(process, path, limits)
        finally:
            process.kill()
            with suppress(BrokenPipeError):  # of what it did not read
                process.stdin.close()


def _send_line(pipe: BinaryIO, value: object) -> None:
    with suppress(BrokenPipeError):  # the answer that is waited for next tells why the child has ended
        pipe.write(json.dumps(value).encode() + b"\n")
        pipe.flush()


def _send(kind: bytes, content: bytes) -> None:
    out = sys.stdout.buffer
    out.write(_MESSAGE.pack(kind, len(content)) + content)
    out.flush()


@contextmanager
def _time_limit(limits: Limits) -> Iterator[None]:
    """Ends this process by the default action of the timers' signals, which needs no turn of the Python interpreter."""
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, limits.seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _serve() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    limits = Limits(**request.pop("limits"))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path = Path(request.pop("path"))
    with ExitStack() as held:
        with _time_limit(limits):
            archive = held.enter_context(opened_archive(path, **request))
        _send(STRUCTURE, json.dumps({"entries": archive.entries, "index": archive.index}).encode())
        contents = archive.stream(json.loads(sys.stdin.buffer.readline() or b"[]"))
        while True:
            with _time_limit(limits):
                content = next(contents, None)
            if content is None:
                break
            _send(ENTRY, content)
        os._exit(0)  # without closing the file: the library could hang there as well


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent, which takes Ctrl-C
    try:
        _serve()
    except ArchiveError as error:
        _send(ERROR, str(error).encode())
    except BrokenPipeError:
        os._exit(1)  # nobody reads any more


if __name__ == "__main__":
    _main()
