"""Files that appear whole or not at all: temporary file in the same folder, fsync, rename, fsync of the folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_PATTERN = "*.tmp*"


@contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends without an exception; otherwise ``path`` is untouched.

    Raises:
        OSError: naming ``path`` where the system's own error names no file, as a full disk's does.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path``, see :func:`replaced_atomically`."""
    with replaced_atomically(path) as temporary, open(temporary, "wb") as file:
        yield file
        file.flush()


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomic(path: Path, content: bytes) -> None:
    with written_atomically(path) as file:
        file.write(content)


def write_text_atomic(path: Path, text: str) -> None:
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: Path, value: Any) -> None:
    """Writes strict JSON; NaN and infinities, which JSON lacks, become null."""
    write_text_atomic(path, json.dumps(without_non_finite(value), indent=2, allow_nan=False) + "\n")


def without_non_finite(value: Any) -> Any:
    """``value`` with every NaN and infinity inside dicts, lists and tuples replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_non_finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_non_finite(entry) for entry in value]
    return value


def remove_temporaries(folder: Path) -> None:
    """Removes what killed processes left; only for a folder that no other process is writing to."""
    for path in Path(folder).rglob(TEMPORARY_PATTERN):
        if path.is_file():
            path.unlink()
