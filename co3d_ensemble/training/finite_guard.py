"""Keeps non-finite updates out of the weights without waiting for the device, and says later which step and term it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NEVER = torch.iinfo(torch.int64).max


class NonFiniteLoss(FloatingPointError):
    """A loss, their sum or the gradient became NaN or infinite; the weights hold no update from it or after it.

    Attributes:
        step: 0-based step of the first occurrence.
        term: name of the loss, ``total`` or ``gradient_norm``.
    """

    def __init__(self, step: int, term: str) -> None:
        self.step, self.term = step, term
        super().__init__(f"step {step}: {term} is not finite; training stopped before the update")


class FiniteGuard:
    """Remembers, per term and on the device, the first step at which it was not finite."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._first_bad: Tensor | None = None

    @torch.no_grad()
    def observe(self, step: int, names: Sequence[str], values: Tensor) -> Tensor:
        """Takes one step's terms.

        Args:
            values: shape (len(names),).

        Returns:
            float32 scalar on the device: 1 from the first non-finite value on, else 0. It is Adam's ``found_inf``.
        """
        if tuple(names) != self._names:
            self.check()
            self._names = tuple(names)
            self._first_bad = torch.full_like(values, _NEVER, dtype=torch.int64)
        assert self._first_bad is not None
        self._first_bad = torch.where(values.isfinite(), self._first_bad, self._first_bad.clamp_max(step))
        return (self._first_bad != _NEVER).any().float()

    def check(self) -> None:
        """Waits for the device.

        Raises:
            NonFiniteLoss: for the earliest step and, within it, the first term, that was not finite.
        """
        if self._first_bad is None:
            return
        first_bad = self._first_bad.tolist()
        step = min(first_bad)
        if step != _NEVER:
            raise NonFiniteLoss(step, self._names[first_bad.index(step)])
