"""Training batches as a function of (seed, step), whatever reads them: a resumed run, or one of other processes, sees the same pairs."""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from co3d_ensemble.mine.mirror import mirrored
from co3d_ensemble.mine.pairs import Pair, collate
from co3d_ensemble.training.stepper import derived_seed

_ORDER, _ITEM = 0, 1  # what a seed is derived for


class PairLoader:
    """A process's share of every step's batch.

    The batches walk through the data set in an order that is drawn anew for each pass, from the seed; a pair that a data set draws
    anything for (its target, its points) gets a seed of its own. Pair k of a batch belongs to process ``k % size``.

    Args:
        dataset: of :class:`Pair`, drawing from torch's default generator only.
        batch_size: pairs per step of all processes together.
        workers: reading processes; 0: this one.
        mirror: show every other pair, by a draw of its own, in a mirror.
        pin_memory: for copies to a GPU that wait for nothing.

    Raises:
        ValueError: a batch that the processes cannot share evenly.
    """

    def __init__(
        self,
        dataset: Dataset[Pair],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
        workers: int = 0,
        mirror: bool = False,
        pin_memory: bool = False,
    ) -> None:
        if batch_size % size:
            raise ValueError(f"training.batch_size={batch_size}: must be a multiple of the number of processes, {size}")
        self._items = _SeededItems(dataset, mirror=mirror)
        self._share = {"n_pairs": len(dataset), "batch_size": batch_size, "seed": seed, "rank": rank, "size": size}  # type: ignore[arg-type]
        self._workers, self._pin_memory = workers, pin_memory
        self._next = -1  # the step whose batch the iterator gives next
        self._batches: Iterator[Pair] = iter(())
        if workers:
            atexit.register(_close, weakref.ref(self))

    def batch(self, step: int) -> Pair:
        """On the CPU. Steps in succession come from workers that read ahead; any other step starts them anew.

        Raises:
            ValueError, OSError: what the data set raises, without a worker's traceback in the message (it is the cause's).
        """
        if step != self._next:
            loader: DataLoader[Any] = DataLoader(
                self._items,
                batch_sampler=Steps(step, **self._share),  # type: ignore[arg-type]
                collate_fn=collate,
                num_workers=self._workers,
                worker_init_fn=_ignore_signals if self._workers else None,
                pin_memory=self._pin_memory,
                generator=torch.Generator(),  # else it draws from the default one, on which the step's own draws would depend
            )
            self._batches = iter(loader)
        self._next = step + 1
        try:
            return next(self._batches)
        except (ValueError, OSError) as error:
            _, ours, told = str(error).rpartition(f"\n{type(error).__name__}: ")
            if not (self._workers and ours):
                raise
            raise type(error)(told.rstrip()) from error

    def close(self) -> None:
        """Ends the workers. At the end of the process this must come before multiprocessing's own cleaning up, which terminates them
        by the signal that they ignore and waits for them: an error whose traceback holds the loader would hang for ever."""
        batches, self._batches, self._next = self._batches, iter(()), -1
        shut_down = getattr(batches, "_shutdown_workers", None)  # what the iterator's own destructor calls
        if shut_down is not None:
            shut_down()


class Steps:
    """Endless: for every step from ``first`` on, the (seed, index) of the items of one process."""

    def __init__(self, first: int, *, n_pairs: int, batch_size: int, seed: int, rank: int, size: int) -> None:
        self._first, self._n_pairs, self._batch_size = first, n_pairs, batch_size
        self._seed, self._rank, self._size = seed, rank, size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, epoch = torch.empty(0), -1
        step = self._first
        while True:
            items = []
            for k in range(self._rank, self._batch_size, self._size):
                position = step * self._batch_size + k
                if position // self._n_pairs != epoch:
                    epoch = position // self._n_pairs
                    generator = torch.Generator().manual_seed(derived_seed(self._seed, _ORDER, epoch))
                    order = torch.randperm(self._n_pairs, generator=generator)
                items.append((derived_seed(self._seed, _ITEM, position), int(order[position % self._n_pairs])))
            yield items
            step += 1


class _SeededItems(Dataset[Pair]):
    """Items by (seed, index); torch's default generator is put back as it was."""

    def __init__(self, dataset: Dataset[Pair], *, mirror: bool) -> None:
        self._dataset, self._mirror = dataset, mirror

    def __getitem__(self, key: tuple[int, int]) -> Pair:
        seed, index = key
        before = torch.random.get_rng_state()
        torch.random.default_generator.manual_seed(seed)  # of the CPU alone: a worker has no business on a GPU
        try:
            pair = self._dataset[index]
            return mirrored(pair) if self._mirror and bool(torch.rand(()) < 0.5) else pair
        finally:
            torch.random.set_rng_state(before)


def _close(loader: weakref.ref[PairLoader]) -> None:
    there = loader()
    if there is not None:
        there.close()


def _ignore_signals(_: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM go to the whole group; the training process decides what they mean, and needs its workers
    to finish the step. They end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
