"""Training a field on the rays of a bank: the recipe's task."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from co3d_ensemble.config import CameraJitterConfig, OccupancyConfig, TrainingConfig
from co3d_ensemble.data.ray_bank import RayBank, RayBatch
from co3d_ensemble.functional.schedules import due
from co3d_ensemble.plugin.model import ObjectModel
from co3d_ensemble.training.validation import FrameValidation

CAPACITY_STEPS = 200  # on CUDA, steps between two fits of the room for occupied samples
FIRST_CAPACITY_STEP = 16  # enough batches to know how their counts vary


class RayBankTask:
    """A :class:`~co3d_ensemble.training.task.Task`: rays of all frames against an :class:`ObjectModel`.

    Attributes:
        model: on the bank's device.
        rays_per_step: for rays per second.
    """

    def __init__(
        self,
        model: ObjectModel,
        bank: RayBank,
        validation: FrameValidation,
        *,
        training: TrainingConfig,
        occupancy: OccupancyConfig,
        jitter: CameraJitterConfig,
        chunk_rays: int,
    ) -> None:
        self.model, self._bank, self._validation = model, bank, validation
        self._training, self._occupancy, self._chunk_rays = training, occupancy, chunk_rays
        self._jitter: dict[str, Any] = {}
        if jitter.mode == "extrinsics":
            self._jitter = {
                "angle_std": jitter.extrinsics_angle_std,
                "shift_std": jitter.extrinsics_shift_std,
                "pivot": model.box.mean(dim=0),
            }
        self.rays_per_step = training.n_rays

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "name": "field", "lr": self._training.lr}]

    def batch(self, step: int) -> RayBatch:
        return self._bank.sample(self._training.n_rays, **self._jitter)

    def losses(self, batch: RayBatch) -> dict[str, Tensor]:
        return self.model.losses(batch.origins, batch.directions, batch.targets)

    def validate(self) -> dict[str, float]:
        return self._validation.run(lambda camera: self.model.render_view(camera, self._chunk_rays))

    def pictures(self) -> Iterable[tuple[str, Tensor]]:
        return self._validation.pictures()

    def structure(self, step: int) -> bool:
        """Refines the occupancy grid from the density when it is due; replaces no parameter.

        On CUDA it also fits the room for occupied samples, so that the steps between do not wait for the device.
        """
        if self._refines_at(step):
            self.model.occupancy.refine(self.model.density)
        if self.model.box.is_cuda and step % CAPACITY_STEPS == FIRST_CAPACITY_STEP:
            self.model.adapt_capacity()
        return False

    def structure_seconds(self) -> tuple[int, float]:
        """How often a run refines the grid (a share of ``max_steps``, whatever that is) and what one refinement takes."""
        grid, schedule = self.model.occupancy, self._occupancy
        if grid is None:
            return 0, 0.0
        first = max(1, math.ceil(schedule.refine_from / schedule.refine_every))
        count = max(0, math.ceil(1 / schedule.refine_every) - first)  # due at first, first + 1, ... intervals, before the end
        if count == 0:
            return 0, 0.0
        start = time.perf_counter()
        grid.refine(self.model.density)  # ends by asking the device whether anything is left, so it is over by then
        return count, time.perf_counter() - start

    def _refines_at(self, step: int) -> bool:
        schedule, max_steps = self._occupancy, self._training.max_steps
        if self.model.occupancy is None or step < schedule.refine_from * max_steps:
            return False
        return due(step, schedule.refine_every, max_steps)


def evenly_spread(items: list[Any], at_most: int) -> list[Any]:
    """At most ``at_most`` of the items, evenly spread, in order."""
    if len(items) <= at_most:
        return items
    return [items[i] for i in torch.linspace(0, len(items) - 1, at_most).round().long().tolist()]
