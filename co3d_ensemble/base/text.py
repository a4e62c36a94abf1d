"""Text files that people and other programs write."""

from __future__ import annotations

import codecs
from pathlib import Path

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def read_text(path: Path, *, strict: bool = True) -> str:
    """Content of a text file in UTF-8, or in what its byte order mark says (editors on Windows write it, and PowerShell UTF-16).

    Args:
        strict: False: bytes that are no text become U+FFFD.

    Raises:
        ValueError: naming the file, where it is no text.
        OSError: as reading it raises.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding, "strict" if strict else "replace")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from error
