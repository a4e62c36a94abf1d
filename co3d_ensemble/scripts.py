"""What the launch scripts share: arguments, logging with a rank prefix, errors as one line instead of a traceback, exit codes."""

from __future__ import annotations

import io
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, NoReturn

import yaml
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.base.quoting import is_quoted, literal, unquoted
from co3d_ensemble.base.signals import EXIT_INTERRUPTED, exit_status, signals_raise
from co3d_ensemble.settings import literal_settings

USER_ERRORS = (ValueError, OSError, RuntimeError, FloatingPointError)
_OMEGACONF_NOISE = ("full_key:", "reference_type=", "object_type=")
WRONG_ARGUMENTS = 2
READER_GONE = 141  # 128 + SIGPIPE, what the shell's own tools end with behind ``| head``
_HOW_TO_QUOTE = "text with other characters than letters, digits and /-+._ needs quotes that the shell leaves: \"KEY='a (b)'\""


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
    told = ": ".join(text.removesuffix(".") for text in texts)
    return f"{told} ({_HOW_TO_QUOTE})" if any(isinstance(link, OverrideParseException) for link in chain) else told


def run_script(main: Callable[[list[str]], int]) -> NoReturn:
    """Ends the process as ``main`` says, given the command line's arguments; quietly where nobody reads the output any more."""
    try:
        status = main(sys.argv[1:])
    except SystemExit as end:  # argparse's
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
            end.code = 1
        status = end.code or 0
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        status = READER_GONE
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            status = status or READER_GONE
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python complains of what it cannot flush at its end
    sys.exit(status)


def _reader_is_gone() -> bool:
    """Whether what this process shows goes to a pipe whose other end is closed; other pipes may be broken, too."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(io.UnsupportedOperation):  # a stream without a file, in a test
            poll.register(stream.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def reported(action: Callable[[], int]) -> int:
    """Runs ``action`` and returns its exit code, or prints the error and returns 1; after Ctrl-C 130, after SIGTERM 143.

    Signals end it wherever it is; a training takes them itself, to save first. CO3D_ENSEMBLE_TRACEBACK=1 shows the traceback;
    unexpected kinds of errors always do.
    """
    try:
        with signals_raise():
            return action()
    except USER_ERRORS as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return READER_GONE
        if os.environ.get("CO3D_ENSEMBLE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        if os.environ.get("CO3D_ENSEMBLE_TRACEBACK"):
            raise
        status = exit_status(stop)
        print(f"{'interrupted' if status == EXIT_INTERRUPTED else 'told to stop'}: the same command goes on", file=sys.stderr)
        return status


def parsed(arguments: Sequence[str], schema: type) -> DictConfig:
    """``key=value`` arguments of a dataclass as plain values. Paths and names are taken literally, a value that stands in quotes is
    text as Hydra has it, everything else is YAML.

    Raises:
        ValueError: an argument without ``=``, or one that is no YAML.
    """
    bare = [argument for argument in arguments if argument.partition("=")[0] in ("", argument)]
    if bare:
        raise ValueError(f"{bare[0]!r}: expected key=value")
    given = OmegaConf.create()
    for argument in literal(arguments, literal_settings(schema)):
        key, _, value = argument.partition("=")
        if is_quoted(value):
            OmegaConf.update(given, key, unquoted(value))
        else:
            try:
                given = OmegaConf.merge(given, OmegaConf.from_dotlist([argument]))
            except yaml.YAMLError as error:
                raise ValueError(f"{argument}: {' '.join(str(error).split())} ({_HOW_TO_QUOTE})") from error
    return given  # type: ignore[return-value]


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
        structured = OmegaConf.structured(schema)
        given = parsed(arguments, OmegaConf.get_type(structured))
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
