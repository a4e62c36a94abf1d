"""Values from files, as error messages show them."""

from __future__ import annotations

import reprlib
from typing import Any

_BOUNDED = reprlib.Repr()
_BOUNDED.maxlevel, _BOUNDED.maxlist, _BOUNDED.maxtuple, _BOUNDED.maxdict = 3, 6, 6, 6
_BOUNDED.maxstring = _BOUNDED.maxother = 160
_BOUNDED.maxlong = 40


def shown(value: Any) -> str:
    """``repr(value)``, bounded in length and depth, whatever a file holds; of long texts the middle is left out."""
    return _BOUNDED.repr(value)
