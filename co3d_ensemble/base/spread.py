"""A few items out of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def evenly_spread(items: Sequence[T], at_most: int) -> list[T]:
    """At most ``at_most`` of the items, evenly spread from the first to the last, in order."""
    if len(items) <= at_most:
        return list(items)
    last = len(items) - 1
    return [items[round(i * last / max(1, at_most - 1))] for i in range(at_most)]
