"""Which samples to evaluate, as an index of fixed size, so that a CUDA step never waits for the device."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

HEADROOM = 1.25  # capacity over the largest count seen: counts vary by a few percent from batch to batch
GRANULARITY = 4096  # capacities are multiples, so that few different shapes occur


class Compaction:
    """Positions of the occupied samples of a batch.

    How many samples are occupied is known to the device only; asking for it makes the host wait. With a ``capacity`` the
    index has that many entries: unused ones point one past the last sample, and samples beyond it are left out, which
    counts as opacity 0 for this step. :meth:`adapt` sets the capacity from the counts seen since its last call, and is the
    only call that waits. Where torch has no kernel for an index of fixed size on the device (CUDA before about torch 2.7),
    the capacity stays None: every step waits, with the same result.

    Attributes:
        capacity: entries of the index; None: as many as there are (the host waits; on the CPU there is nothing to wait for).
    """

    def __init__(self) -> None:
        self.capacity: int | None = None
        self._peak: Tensor | None = None

    def __call__(self, occupied: Tensor) -> Tensor:
        """Index into the flattened ``occupied``, ascending; padded with ``occupied.numel()``. Shape (n,) int64."""
        flat = occupied.reshape(-1)
        count = flat.sum()
        self._peak = count if self._peak is None else torch.maximum(self._peak, count)
        if self.capacity is None:
            return flat.nonzero()[:, 0]
        return torch.nonzero_static(flat, size=self.capacity, fill_value=flat.numel())[:, 0]

    def adapt(self) -> None:
        """Fits the capacity to what was seen; says so when samples had to be left out."""
        if self._peak is None or not _has_static_nonzero(self._peak.device.type):
            return
        peak, self._peak = int(self._peak), None
        if self.capacity is not None and peak > self.capacity:
            logger.warning("a step had %d occupied samples and room for %d: the rest was left out of it", peak, self.capacity)
        self.capacity = max(1, -(-int(HEADROOM * peak) // GRANULARITY)) * GRANULARITY


@functools.cache
def _has_static_nonzero(device_type: str) -> bool:
    """Tried once per kind of device, so that the passes of a model say it once."""
    try:
        torch.nonzero_static(torch.ones(1, dtype=torch.bool, device=device_type), size=1)
    except NotImplementedError:
        logger.info("torch %s has no nonzero_static on %s: every step waits for its count of samples", torch.__version__, device_type)
        return False
    return True
