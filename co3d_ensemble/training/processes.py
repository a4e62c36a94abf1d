"""The processes that train one model together, and what they agree on.

Gradients are averaged by the step itself and the model is not wrapped: ``DistributedDataParallel`` averages what its own
``forward`` led to, but a task may call any part of its model, differentiate penalties itself and change its structure, and
every name in EMA, moments and checkpoints would get a prefix. What that costs is DDP's overlap of communication with the
backward pass: one all-reduce of all gradients per step instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from co3d_ensemble.rendering import resolve_device

logger = logging.getLogger(__name__)

PATIENCE = timedelta(hours=2)  # a process may wait so long for another that loads, scores or writes; a dead one is noticed at once

T = TypeVar("T")


class FirstProcessFailed(RuntimeError):
    """What the first process was asked for ended in an error there; every other process raises this."""


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or does not answer any more: there is nobody left to go on with."""


class Processes:
    """This process alone: nothing to agree on. :func:`joined` gives one of several.

    Attributes:
        rank, size: this process's number and how many there are.
    """

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which alone owns the run directory."""
        return self.rank == 0

    def largest(self, *values: int) -> list[int]:
        """Of every value the largest that a process has."""
        return list(values)

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process; it is not called in the others.

        Raises:
            FirstProcessFailed: in the others, when it raised in the first.
        """
        return make()

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        return [value]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces every tensor by its mean over the processes, in place; nothing waits for the device."""

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Replaces every tensor by the first process's, in place."""


ALONE = Processes()


class Joined(Processes):
    """One of several processes of torch.distributed's default group.

    Args:
        control: a group over the CPU, for what the processes agree on without waiting for their devices.
    """

    def __init__(self, control: Any) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._control = control

    def largest(self, *values: int) -> list[int]:
        agreed = torch.tensor(values, dtype=torch.int64)
        with _together():
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._control)
        return agreed.tolist()

    def from_first(self, make: Callable[[], T]) -> T:
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = make()
            except Exception as error:
                dist.broadcast_object_list([None, f"{type(error).__name__}: {error}"], src=0, group=self._control)
                raise
        with _together():
            dist.broadcast_object_list(outcome, src=0, group=self._control)
        if outcome[1] is not None:
            raise FirstProcessFailed(f"the first process stopped: {outcome[1]}")
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with _together():
            dist.all_gather_object(values, value, group=self._control)
        return values

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for group in by_kind.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with _together():
                dist.all_reduce(flat)
            flat /= self.size
            parts = flat.split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [part.view(tensor.shape) for part, tensor in zip(parts, group, strict=True)])

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            with _together():
                dist.broadcast(sent, src=0)
            tensor.copy_(sent)


@contextmanager
def _together() -> Iterator[None]:
    """What a backend says when another process is gone names sockets; people need to know where to look."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost("another process of this run has ended; what it said itself, or torchrun's report, tells why") from error


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """``with joined(config.device) as (processes, device):`` — all of them under torchrun, else this process alone.

    On CUDA every process takes the GPU of its local rank and gradients go through NCCL, on the CPU through Gloo.

    Args:
        device: auto | cpu | cuda | cuda:N; the last only for one process.

    Every method of the processes may raise :class:`ProcessLost`.

    Raises:
        ValueError: a device that is not there, or one for several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, resolve_device(device)
        return
    place = _own_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", timeout=PATIENCE, device_id=place)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
        control = dist.group.WORLD
    processes = Joined(control)
    logger.info("process %d of %d on %s", processes.rank, processes.size, place)
    yield processes, place
    dist.destroy_process_group()  # after an error the others may not answer any more: then the end of the process has to do


def _own_device(device: str) -> torch.device:
    place = resolve_device(device)
    if place.type == "cpu":
        return place
    if place.index is not None:
        raise ValueError(f"device={device}: several processes cannot share one GPU; device=cuda gives each the GPU of its local rank")
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if own >= torch.cuda.device_count():
        raise ValueError(f"device={device}: local rank {own} has no GPU, there are {torch.cuda.device_count()} (torchrun --nproc_per_node)")
    return torch.device("cuda", own)
