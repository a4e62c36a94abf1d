"""Which samples to evaluate, as an index of fixed size, so that a CUDA step never waits for the device."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

HEADROOM = 1.25  # capacity over the largest count seen: counts vary by a few percent from batch to batch
GROWTH = 1.5  # the same for a room that became too small: counts that grow are not done growing
GRANULARITY = 4096  # capacities are multiples, so that few different shapes occur
FULL = 0.85  # share of the capacity from which on the room grows: a count may rise by 17 % between two reads
REFIT_READS = 100  # counts read between two looks at whether less room would do
WORTH_SHRINKING = 0.9  # of the capacity: a smaller room than that is worth another shape


class Selection(NamedTuple):
    """The chosen samples of a batch of rays.

    Attributes:
        index: into the flattened samples, int64, shape (n,); entries without a sample point one past the last one.
        whole: rays whose chosen samples are all in the index, bool, shape (n_rays,); None: every ray is.
    """

    index: Tensor
    whole: Tensor | None


class Compaction:
    """Positions of the chosen samples of a batch.

    How many samples are chosen is known to the device only; asking for it makes the host wait. With a ``capacity`` the index has
    that many entries. Where more samples are chosen, the batch becomes smaller for this step: the index holds the samples of
    neighbouring rays from a random one on, in a circle, and ``Selection.whole`` says which rays those are. Means of losses
    over them are unbiased, whichever rays come last; a ray without all of its samples must not be counted.

    :meth:`follow` lets the capacity follow the counts without waiting.

    Attributes:
        capacity: entries of the index; None: as many as there are (the host waits; on the CPU there is nothing to wait for).
        left_out: chosen samples of the last batch that had no room, int64 scalar on the device; None before the first batch.
    """

    def __init__(self) -> None:
        self.capacity: int | None = None
        self.left_out: Tensor | None = None
        self._places: Tensor | None = None
        self.restart()

    def __call__(self, chosen: Tensor) -> Selection:
        """The samples of ``chosen``, bool (n_rays, n_samples); draws from torch's default generator where there is a capacity."""
        flat = chosen.reshape(-1)
        if self.capacity is None:
            self._see(flat.sum())
            self.left_out = flat.new_zeros((), dtype=torch.int64)
            return Selection(flat.nonzero()[:, 0], None)
        ranks = flat.cumsum(0, dtype=torch.int32)  # chosen samples up to each one, itself included
        ends, total = ranks.view(chosen.shape)[:, -1], ranks[-1]
        self._see(total)
        self.left_out = (total - self.capacity).clamp_min(0).long()
        circle = total.clamp_min(self.capacity)
        first = ends.index_select(0, random_ray(len(ends), ends.device))[0] * (total > self.capacity)
        wanted = (self._numbers(flat.device) + first) % circle
        whole = (ends - first - 1) % circle < self.capacity
        return Selection(torch.searchsorted(ranks, wanted, right=True), whole)

    def follow(self) -> bool:
        """Fits the capacity to the counts since the last call, to be called between steps.

        On CUDA the largest count is copied to the host behind the steps that are still running and is read by a later call,
        once it has arrived; on the CPU it is read at once. A room that became too small grows at once, and a step that did
        not fit is reported.

        Returns:
            Whether the capacity changed, and with it the shapes of the next step.
        """
        if self._peak is not None and not self._reader.busy:
            self._reader.start(self._peak)
            self._peak = None
        peak, before = self._reader.take(), self.capacity
        if peak is not None:
            self._fit(peak)
        return self.capacity != before

    def restart(self) -> None:
        """Forgets the counts and the capacity: for a change after which a batch may have quite another count."""
        self.capacity = None
        self._peak: Tensor | None = None
        self._reader = _LateReader()
        self._largest, self._reads = 0, 0

    def _see(self, count: Tensor) -> None:
        self._peak = count if self._peak is None else torch.maximum(self._peak, count.to(self._peak.dtype))

    def _fit(self, peak: int) -> None:
        self._largest, self._reads = max(self._largest, peak), self._reads + 1
        if self.capacity is None:
            self.capacity = _room_for(HEADROOM * peak)
        elif peak > FULL * self.capacity:
            grown = _room_for(GROWTH * peak)
            if peak > self.capacity:
                message = "a step had %d samples to evaluate and room for %d: it was made with fewer rays. There is room for %d now"
                logger.warning(message, peak, self.capacity, grown)
            self.capacity = grown
        if self._reads == REFIT_READS:
            fitted = _room_for(HEADROOM * self._largest)
            if fitted <= WORTH_SHRINKING * self.capacity:
                self.capacity = fitted
            self._largest, self._reads = 0, 0

    def _numbers(self, device: torch.device) -> Tensor:
        """0, 1, ... up to the capacity."""
        if self._places is None or len(self._places) != self.capacity or self._places.device != device:
            self._places = torch.arange(self.capacity, dtype=torch.int32, device=device)
        return self._places


def random_ray(n_rays: int, device: torch.device) -> Tensor:
    """Index of a random one of ``n_rays`` rays, shape (1,), from torch's default generator."""
    return torch.randint(n_rays, (1,), device=device)


class _LateReader:
    """Brings a number from the device to the host without waiting for it."""

    def __init__(self) -> None:
        self.busy = False
        self._number: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def start(self, number: Tensor) -> None:
        self.busy = True
        if not number.is_cuda:
            self._number = number
            return
        if self._arrived is None:
            self._number, self._arrived = torch.empty((), dtype=torch.int64, pin_memory=True), torch.cuda.Event()
        self._number.copy_(number.long(), non_blocking=True)
        self._arrived.record()

    def take(self) -> int | None:
        """The number, once; None while it is under way, or where none was asked for."""
        if not self.busy or (self._arrived is not None and not self._arrived.query()):
            return None
        self.busy = False
        return int(self._number)


def _room_for(count: float) -> int:
    return max(1, -(-int(count) // GRANULARITY)) * GRANULARITY
