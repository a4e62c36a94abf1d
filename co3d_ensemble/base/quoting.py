"""Values on command lines, whatever characters they have: the one place that quotes and reads quotes.

Three readers meet a value. The shell is its user's affair. Hydra's grammar takes most special characters for syntax, unless the
value stands in quotes, in which a backslash counts only before a quote. OmegaConf then takes ``${`` for an interpolation, unless a
backslash stands before it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

DEVICE = "device={device}"  # argument of a child's command that says where it runs

_QUOTED = re.compile(r"(['\"])((?:\\.|(?!\1)[^\\])*)\1", re.DOTALL)
_PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)\Z)[a-z_/][a-z0-9_/.-]*", re.IGNORECASE)  # Hydra reads it as it stands
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_BEFORE_QUOTE = re.compile(r"(\\*)('|\Z)")
_KEY = re.compile(r"\+{0,2}(?:members\.[^.=]+\.overrides\.)?(?P<key>[^=]*)")


def escaped(text: str) -> str:
    """``text`` as OmegaConf's nodes hold it, so that reading the node gives ``text``."""
    return _INTERPOLATION.sub(lambda found: found[1] * 2 + "\\${", text)


def with_escapes(value: Any) -> Any:
    """``value`` with every string in dicts and lists :func:`escaped`: plain values that become a configuration."""
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, dict):
        return {key: with_escapes(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_escapes(entry) for entry in value]
    return value


def quoted(value: Any) -> str:
    """A value as the right side of an override: text in quotes, numbers, truth values and None (``null``) as they are."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return str(value).lower()
    return "'" + _BEFORE_QUOTE.sub(lambda found: found[1] * 2 + ("\\'" if found[2] else ""), escaped(str(value))) + "'"


def override(key: str, value: Any) -> str:
    """``key=value`` with the value :func:`quoted`, as every launch script and child process reads it."""
    return f"{key}={quoted(value)}"


def is_quoted(text: str) -> bool:
    """Whether all of ``text`` is one value in quotes."""
    return _QUOTED.fullmatch(text) is not None


def unquoted(text: str) -> str:
    """The inverse of :func:`quoted` for text, as Hydra's parser has it: what is left for OmegaConf to read.

    Raises:
        ValueError: ``text`` is not in quotes.
    """
    found = _QUOTED.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r}: expected a value in quotes")
    quote, body = found.groups()

    def halved(match: re.Match[str]) -> str:
        return "\\" * (len(match[1]) // 2) + match[2]

    return re.sub(rf"(\\+)({quote}|\Z)", halved, body)


def literal(arguments: Iterable[str], keys: Collection[str]) -> list[str]:
    """Arguments in which the values of ``keys`` (paths, names) are taken literally: quoted where they are not yet.

    ``null``, nothing, and what the user put in quotes stay as they are. ``+`` and ``++`` before a key, and the part
    ``members.NAME.overrides.`` of an ensemble's, do not make it another one.

    Raises:
        ValueError: a value that is no text in UTF-8, which no configuration file can hold.
    """
    found = []
    for argument in arguments:
        left, sign, value = argument.partition("=")
        if sign and _KEY.fullmatch(left)["key"] in keys:  # type: ignore[index]
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{argument!r}: the name is not UTF-8; rename it, or make a symbolic link to it") from error
            if value not in ("", "null") and not is_quoted(value) and not _PLAIN.fullmatch(value):
                argument = override(left, value)
        found.append(argument)
    return found


def for_device(command: Sequence[str], device: str) -> list[str]:
    """A child's command in which the argument :data:`DEVICE` names the device; braces elsewhere are part of a path."""
    return [f"device={device}" if argument == DEVICE else argument for argument in command]
