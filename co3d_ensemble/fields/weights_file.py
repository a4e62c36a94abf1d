"""Files of weights that others saved: whatever is wrong with one is told in a line with its name."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import torch

# what torch.load raises on damaged bytes of its ZIP format, of its older one (hubs still have it), and on files of another kind
DAMAGED = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, struct.error, LookupError, ValueError, TypeError, AssertionError)


def read_weights(path: Path | str, told: str) -> Any:
    """What ``torch.save`` wrote, on the CPU; nothing in the file is executed.

    Args:
        told: what a message calls the file, such as ``weights=FILE``.

    Raises:
        ValueError: ``told``, and why it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise ValueError(f"{told}: cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none: torch explains at length."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
