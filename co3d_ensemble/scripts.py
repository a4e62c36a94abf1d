"""What the launch scripts share: logging with a rank prefix, and errors as one line instead of a traceback."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

USER_ERRORS = (ValueError, OSError, RuntimeError, FloatingPointError)
_OMEGACONF_NOISE = ("full_key:", "reference_type=", "object_type=")
WRONG_ARGUMENTS = 2
INTERRUPTED = 130  # 128 + SIGINT, as the training loop has it


def configure_logging(level: int = logging.INFO) -> None:
    """Log lines to stderr; under torchrun with the rank in front."""
    rank = os.environ.get("RANK")
    prefix = "" if rank is None else f"[rank {rank}] "
    logging.basicConfig(level=level, format=f"{prefix}%(levelname).1s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("pytorch3d", "PIL", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def first_line(error: BaseException) -> str:
    """What a person needs of a configuration error and its cause: the key and what is wrong, in one line."""
    chain = [link for link in (error, error.__cause__) if link is not None]
    noise = _OMEGACONF_NOISE
    if any("' not in '" in str(link) for link in chain):
        noise += ("To append to your config",)  # Hydra's advice; a key that the schema lacks cannot be appended
    texts: list[str] = []
    for link in chain:
        told = str(link).partition("Config search path:")[0]  # Hydra's folders, of no use to who mistyped a name
        text = " ".join(line.strip() for line in told.splitlines() if not line.strip().startswith(noise))
        text = " ".join(text.split())
        key = getattr(link, "full_key", None)
        if key and not any(key in known for known in (text, *texts)):
            text = f"{key}: {text}"
        if text and not any(text in known for known in texts):
            texts.append(text)
    return ": ".join(text.removesuffix(".") for text in texts)


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


def quoted(arguments: Sequence[str], keys: Collection[str]) -> list[str]:
    """``key=value`` arguments with the values of ``keys`` quoted: the parser would read a file named 1e3 or [a] as a value."""
    parts = [argument.partition("=") for argument in arguments]
    return [f"{key}={json.dumps(value)}" if sign and key in keys and value != "null" else key + sign + value for key, sign, value in parts]


def run_with_settings(arguments: list[str], schema: type, document: str, action: Callable[[Any], int]) -> int:
    """A script whose arguments are ``key=value`` pairs of a dataclass; returns its exit code.

    A list of one may be given as its element (``planes=16``). ``-h`` prints ``document``. An unknown key, a missing or a bad value
    (also one that the dataclass's ``__post_init__`` refuses with a ``ValueError``) is one line and exit 2; the rest is as in
    :func:`reported`.
    """
    if {"-h", "--help"} & set(arguments):
        print(document)
        return 0
    configure_logging()
    try:
        bare = [argument for argument in arguments if argument.partition("=")[0] in ("", argument)]
        if bare:
            raise ValueError(f"{bare[0]!r}: expected key=value")
        structured, given = OmegaConf.structured(schema), OmegaConf.from_cli(arguments)
        for entry in fields(OmegaConf.get_type(structured)):
            if str(entry.type).startswith("list[") and isinstance(given.get(entry.name), (int, float, str)):
                given[entry.name] = [given[entry.name]]
        merged = OmegaConf.merge(structured, given)
        OmegaConf.to_container(merged, throw_on_missing=True)
        settings = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        print(f"error: {first_line(error)} (--help lists the settings)", file=sys.stderr)
        return WRONG_ARGUMENTS
    return reported(lambda: action(settings))
