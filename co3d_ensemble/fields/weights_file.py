"""Files of weights, of ours and of others: whatever is wrong with one is told in a line with its name."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# what torch.load raises on damaged bytes of its ZIP format, of its older one (hubs still have it), and on files of another kind
DAMAGED = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, struct.error, LookupError, ValueError, TypeError, AssertionError)

# what taking a network or an optimizer back from a whole file of another content raises; LookupError has KeyError and IndexError
NOT_FITTING = (LookupError, TypeError, AttributeError, ValueError, RuntimeError, AssertionError, pickle.UnpicklingError)
_SHOWN_CHARACTERS = 300  # torch lists every entry that does not fit


class NotACheckpoint(ValueError):
    """A whole file with another content than the one that it is needed for; the message names the file."""


@contextmanager
def restoring(path: Path | str, what: str = "checkpoint of this run") -> Iterator[None]:
    """Turns whatever the content of a file makes the block raise into one line: ``PATH is no checkpoint of this run: why``.

    Raises:
        NotACheckpoint: one of ``NOT_FITTING``. A device without memory stays what it is.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except NOT_FITTING as error:
        text = " ".join(str(error).split())
        why = f"it has no {text}" if isinstance(error, KeyError) else text or type(error).__name__
        raise NotACheckpoint(f"{path} is no {what}: {why[:_SHOWN_CHARACTERS]}") from error


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
