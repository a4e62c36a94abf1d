"""JSON files that people and other programs write, gzipped or not: read whole, or refused by name."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

MEBIBYTE = 2**20
# CO3D's annotations shrink to a quarter or a fifth, indented ones to a fifteenth; what shrinks more than this is no annotation
MAX_UNPACKED = 30
ALWAYS_UNPACKED = 32 * MEBIBYTE  # of small files, whatever they shrank by


def read_json(path: Path) -> Any:
    """Content of a ``.json`` file or a gzipped ``.jgz`` one, in UTF-8 or UTF-16, with or without a byte order mark.

    Raises:
        ValueError: naming the file, when it is missing, corrupt, nested too deeply, or unpacks to far more than it should.
    """
    try:
        data = path.read_bytes()
        return json.loads(_unpacked(data) if path.suffix == ".jgz" else data)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: nested too deeply") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {_in_a_line(error)}") from error


def _unpacked(data: bytes) -> bytes:
    """At most so much is ever in memory: a gzip bomb of a megabyte unpacks to a gigabyte."""
    limit = max(MAX_UNPACKED * len(data), ALWAYS_UNPACKED)
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{len(data):,} bytes unpack to more than {limit:,}, which no list of annotations does")
    return content


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())
