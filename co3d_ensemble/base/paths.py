"""Paths and names that come from files and settings: none of them may lead out of the folder that it belongs to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from co3d_ensemble.base.messages import shown

CLUTTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir")  # of Windows, macOS and network disks, lower case
_CONTROL = {chr(code) for code in (*range(32), *range(127, 160))}
MAX_PART_BYTES = 255  # of one part of a path, on every file system in use


def inside(root: Path | str, relative: Any) -> Path:
    """The file below ``root`` that a list names; normalised, so that nothing in it leads back up.

    Only the text counts: symbolic links below ``root`` may point anywhere, as data sets are often put together of them.

    Args:
        relative: as the list has it; of any type, for lists are written by hand.

    Raises:
        ValueError: no text, empty, absolute, leads out of ``root``, or cannot be a path (a NUL, half of a surrogate pair, an endless
            part). The message names the path; callers put the list and the key in front of it.
    """
    if not isinstance(relative, str):
        raise ValueError(f"{shown(relative)} is no path: expected text")
    if not relative or os.path.isabs(relative):
        raise ValueError(f"{shown(relative)} is no path relative to {root}")
    parts = os.path.normpath(relative).split("/")
    if parts[0] == "..":
        raise ValueError(f"{shown(relative)} leads out of {root}")
    if parts == ["."] or not all(map(_is_possible, parts)):
        raise ValueError(f"{shown(relative)} cannot be a file in {root}")
    return Path(root, *parts)


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name is what systems leave behind: ``.DS_Store``, ``._0001.jpg``, ``Thumbs.db``, ``__MACOSX``."""
    return name.startswith(".") or name.lower() in CLUTTER


def listed(folder: Path, pattern: str = "*", *, deep: bool = False) -> list[Path]:
    """What a folder holds that people put there, sorted; clutter, and with ``deep`` what lies in cluttered folders, is left out.

    Args:
        pattern: as ``Path.glob`` takes it.
        deep: of all folders below as well.
    """
    found = folder.rglob(pattern) if deep else folder.glob(pattern)
    return sorted(path for path in found if not any(map(is_clutter, path.relative_to(folder).parts)))


def plain_part(name: Any, what: str) -> str:
    """``name``, which a folder or file is to be called after, if it is one plain part of a path.

    Args:
        what: the setting, or the file and key, that gives the name, for the message.

    Raises:
        ValueError: no text, empty, ``.`` or ``..``, with a separator or a control character, or longer than a part may be.
    """
    if not isinstance(name, str):
        raise ValueError(f"{what}={shown(name)}: expected a name, got {type(name).__name__}")
    if name in ("", ".", "..") or {"/", "\\"} & set(name) or _CONTROL & set(name) or not _is_possible(name):
        raise ValueError(f"{what}={shown(name)}: must be one plain part of a path, that is not empty, '.' or '..' and without '/' or '\\'")
    return name


def _is_possible(part: str) -> bool:
    try:
        return "\0" not in part and len(part.encode("utf-8")) <= MAX_PART_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
