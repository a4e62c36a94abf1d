"""What every schema of settings is made of: fields with a line of help, the listing of them, and checks that name the key."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any


def setting(default: Any, help: str, *, literal: bool = False) -> Any:
    """A dataclass field with a line of help; mutable defaults are copied per instance.

    Args:
        literal: a path or a name, whose text on a command line is taken as it stands, whatever characters it has.
    """
    metadata = {"help": help, "literal": literal}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_with_help(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields (dotted key, default, help) of every leaf setting of a dataclass, in declaration order."""
    for entry in fields(config_class):
        value = entry.default if entry.default_factory is MISSING else entry.default_factory()
        key = prefix + entry.name
        if is_dataclass(value):
            yield from settings_with_help(type(value), key + ".")
        else:
            yield key, value, entry.metadata["help"]


def literal_settings(config_class: type, prefix: str = "") -> frozenset[str]:
    """Dotted keys of the settings that are paths or names, see :func:`setting`."""
    found: set[str] = set()
    for entry in fields(config_class):
        nested = entry.default_factory
        if isinstance(nested, type) and is_dataclass(nested):
            found |= literal_settings(nested, f"{prefix}{entry.name}.")
        elif entry.metadata.get("literal"):
            found.add(prefix + entry.name)
    return frozenset(found)


def check_choices(config: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError for a dotted key whose value is none of those that it may have."""
    for key, allowed in choices.items():
        if _value(config, key) not in allowed:
            raise ValueError(f"{key}={_value(config, key)!r}: expected one of {', '.join(allowed)}")


def check_positive(config: Any, keys: Sequence[str]) -> None:
    """Raises ValueError for a dotted key whose value is not positive and finite."""
    for key in keys:
        if not 0 < _value(config, key) < math.inf:
            raise ValueError(f"{key}={_value(config, key)!r}: must be positive and finite")


def check_ranges(config: Any, ranges: Mapping[str, str]) -> None:
    """Raises ValueError for a dotted key whose value lies outside of an interval written like ``(0, 1]``; null is inside."""
    for key, interval in ranges.items():
        value = _value(config, key)
        if value is not None and not _lies_in(value, interval):
            raise ValueError(f"{key}={value}: must lie in {interval}")


def check_shares(config: Any, keys: Sequence[str]) -> None:
    """Raises ValueError for a dotted key whose values are not shares of ``max_steps`` in ascending order."""
    for key in keys:
        shares = list(_value(config, key))
        if any(not 0 < share < 1 for share in shares) or shares != sorted(shares):
            raise ValueError(f"{key}={shares}: expected ascending shares of max_steps in (0, 1)")


def check_betas(config: Any, key: str) -> None:
    """Raises ValueError for a dotted key whose value is not Adam's two decay rates."""
    betas = list(_value(config, key))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{key}={betas}: expected two numbers in [0, 1)")


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _lies_in(value: float, interval: str) -> bool:
    """Whether ``value`` lies in an interval written like ``(0, 1]``; nan lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
