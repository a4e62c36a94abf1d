"""Checkpoints that are whole or absent, and that show any damage before a byte of them is believed.

A checkpoint is a file of ``torch.save`` (so ``torch.load`` opens it) whose ZIP comment holds the SHA-256 of all that
comes before it. torch itself does not verify the CRCs of what it reads.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from co3d_ensemble.fields.weights_file import NotACheckpoint, restoring
from co3d_ensemble.files import remove_temporaries, sync_folder, written_atomically

logger = logging.getLogger(__name__)

_LENGTH_BYTES = 2  # a ZIP ends with the length of its comment, then the comment
_DIGEST_BYTES = 64
_TRAILER_BYTES = _LENGTH_BYTES + _DIGEST_BYTES
_CHUNK_BYTES = 1 << 20
BEST_PARTS: dict[str, type | tuple[type, ...]] = {"model": Mapping, "step": int, "metric": float}
LAST_PARTS: dict[str, type | tuple[type, ...]] = {"model": Mapping, "optimizer": Mapping, "clock": dict, "config_digest": str}


class CheckpointDamaged(ValueError):
    """A checkpoint whose bytes are not the ones that were written."""


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written; the one before it is untouched."""


class _HashingWriter(io.RawIOBase):
    """Passes bytes on and hashes them. Keeps an ``OSError`` for later: raised inside torch's C++ writer it would be lost."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        if self.error is None:
            try:
                self._file.write(view)
            except OSError as error:
                self.error = error
        return len(view)


def _write_checked(file: BinaryIO, state: dict[str, Any]) -> None:
    writer = _HashingWriter(file)
    torch.save(state, writer)
    if writer.error is not None:
        raise writer.error
    comment = writer.digest.hexdigest().encode()
    file.seek(-_LENGTH_BYTES, os.SEEK_END)
    file.write(len(comment).to_bytes(_LENGTH_BYTES, "little") + comment)


def write_checkpoint(path: Path, state: dict[str, Any], *, keep_as: Path | None = None) -> None:
    """Replaces ``path`` by ``state`` (tensors, numbers, strings, lists, dicts).

    Args:
        keep_as: where the present ``path``, if any, goes.

    Raises:
        CheckpointWriteError: the file system refused, for example because it is full; ``path`` is as it was.
    """
    try:
        with written_atomically(path) as file:
            _write_checked(file, state)
            file.flush()
            os.fsync(file.fileno())  # the new file is safe before the old one moves
            if keep_as is not None and path.exists():
                os.replace(path, keep_as)
                sync_folder(path.parent)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise CheckpointWriteError(error.errno, f"could not write checkpoint ({reason}); the previous one is kept", str(path)) from error


def read_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint after verifying every byte of it.

    Raises:
        CheckpointDamaged: truncated or altered; the message names the file.
        NotACheckpoint: whole, but it holds something else than tensors and plain values by name.
        FileNotFoundError: there is none.
    """
    with open(path, "rb") as file:
        _verify(file, path)
        file.seek(0)
        with restoring(path):
            found = torch.load(file, map_location=map_location, weights_only=True)
    if not isinstance(found, dict):
        raise NotACheckpoint(f"{path} is no checkpoint of this run: it holds a {type(found).__name__}")
    return found


def check_parts(path: Path, saved: Mapping[str, Any], parts: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raises ``NotACheckpoint`` where a part of a checkpoint is missing or of another type."""
    for name, kinds in parts.items():
        if not isinstance(saved.get(name), kinds):
            found = f"{name!r} is a {type(saved[name]).__name__}" if name in saved else f"it has no {name!r}"
            raise NotACheckpoint(f"{path} is no checkpoint of this run: {found}")


def _verify(file: BinaryIO, path: Path) -> None:
    n_bytes = file.seek(0, os.SEEK_END)
    remaining = n_bytes - _TRAILER_BYTES
    if remaining <= 0:
        raise CheckpointDamaged(f"{path} is damaged: {n_bytes} bytes")
    file.seek(0)
    digest = hashlib.sha256()
    while remaining > 0:
        chunk = file.read(min(_CHUNK_BYTES, remaining))
        if not chunk:
            raise CheckpointDamaged(f"{path} shrank while it was read")
        digest.update(chunk)
        remaining -= len(chunk)
    digest.update(bytes(_LENGTH_BYTES))  # torch wrote a comment length of 0
    expected = _DIGEST_BYTES.to_bytes(_LENGTH_BYTES, "little") + digest.hexdigest().encode()
    if file.read() != expected:
        raise CheckpointDamaged(f"{path} is damaged: its checksum does not match its {n_bytes} bytes")


class Checkpoints:
    """The folder ``checkpoints``: ``last.pt`` to go on from, ``last.previous.pt`` behind it, ``best.pt`` to render with."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.last = self.folder / "last.pt"
        self.previous = self.folder / "last.previous.pt"
        self.best = self.folder / "best.pt"

    def prepare(self) -> None:
        """Makes the folder and removes what killed processes left in it; for the run's owner only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.folder)

    def save_last(self, state: dict[str, Any]) -> None:
        write_checkpoint(self.last, state, keep_as=self.previous)

    def save_best(self, state: dict[str, Any]) -> None:
        write_checkpoint(self.best, state)

    def load_last(self, map_location: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest good state, or None. Damaged files are named in a warning and removed."""
        path = self.newest_good()
        return None if path is None else read_checkpoint(path, map_location)

    def newest_good(self) -> Path | None:
        """The file that :meth:`load_last` reads."""
        return next((path for path in (self.last, self.previous) if self._is_good(path)), None)

    def has_good_best(self) -> bool:
        """Whether ``best.pt`` is there and whole; a damaged one is named in a warning and removed."""
        return self._is_good(self.best)

    def load_best(self, map_location: torch.device | str = "cpu") -> dict[str, Any]:
        """``{"model": state_dict with averaged weights, "step", "metric"}`` for rendering.

        Raises:
            FileNotFoundError: nothing was validated yet.
            CheckpointDamaged: the file is damaged.
            NotACheckpoint: it lacks one of these.
        """
        saved = read_checkpoint(self.best, map_location)
        check_parts(self.best, saved, BEST_PARTS)
        return saved

    def _is_good(self, path: Path) -> bool:
        if not path.exists():
            return False
        try:
            with open(path, "rb") as file:
                _verify(file, path)
        except CheckpointDamaged as damage:
            logger.warning("%s; removing it and going on without it", damage)
            path.unlink()  # it must not become last.previous.pt with the next save
            return False
        return True
