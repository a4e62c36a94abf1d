"""What the launch scripts share: logging with a rank prefix, and errors as one line instead of a traceback."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

USER_ERRORS = (ValueError, OSError, RuntimeError, FloatingPointError)
INTERRUPTED = 130  # 128 + SIGINT, as the training loop has it


def configure_logging(level: int = logging.INFO) -> None:
    """Log lines to stderr; under torchrun with the rank in front."""
    rank = os.environ.get("RANK")
    prefix = "" if rank is None else f"[rank {rank}] "
    logging.basicConfig(level=level, format=f"{prefix}%(levelname).1s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("pytorch3d", "PIL", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def first_line(error: BaseException) -> str:
    """What a person needs of an exception: its message without Hydra's chain of causes."""
    message = str(error).strip()
    cause = error.__cause__
    if cause is not None and str(cause).strip() and str(cause).strip() not in message:
        message += f": {str(cause).strip()}"
    return " ".join(message.split())


def reported(action: Callable[[], int]) -> int:
    """Runs ``action`` and returns its exit code, or prints the error and returns 1; after Ctrl-C 130.

    CO3D_ENSEMBLE_TRACEBACK=1 shows the traceback; unexpected kinds of errors always do.
    """
    try:
        return action()
    except USER_ERRORS as error:
        if os.environ.get("CO3D_ENSEMBLE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while loading or scoring; training takes Ctrl-C itself
        if os.environ.get("CO3D_ENSEMBLE_TRACEBACK"):
            raise
        print("interrupted: the same command goes on", file=sys.stderr)
        return INTERRUPTED
