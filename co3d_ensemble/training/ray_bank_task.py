"""Training a field on the rays of a bank: the recipe's task."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from co3d_ensemble.config import CameraJitterConfig, OccupancyConfig, TrainingConfig
from co3d_ensemble.data.ray_bank import RayBank, RayBatch
from co3d_ensemble.fields.vm_field import Mapped
from co3d_ensemble.plugin.model import ObjectModel
from co3d_ensemble.plugin.tensorf_model import TensoRFModel
from co3d_ensemble.training.grid_schedule import Shrink, Upsample, grid_changes
from co3d_ensemble.training.optimizer import Moments
from co3d_ensemble.training.validation import FrameValidation

EXACT_STEPS = 16  # on CUDA, steps that wait for their counts of samples before there are rooms: enough to know how counts vary
MOST_PARTS = 8  # refinements that look at every voxel once between them, at most


class RayBankTask:
    """A :class:`~co3d_ensemble.training.task.Task`: rays of all frames against an :class:`ObjectModel`.

    See :class:`GridTask` for a model whose grid changes.

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
        model.bounded = model.box.is_cuda
        self._bounded_from: int | None = None
        self.structure_time = 0.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.model.parameter_groups(self._training.lr, self._training.lr_network)

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

        On CUDA the rooms for samples also follow the counts, so that steps do not wait for the device.
        """
        if self._refines_at(step):
            with self._timed():
                self.model.occupancy.refine(self.model.density, part=self._refined_part(step))
        self._follow_counts(step)
        return False

    def structure_seconds(self) -> tuple[int, float]:
        """How often a run refines the grid (a share of ``max_steps``, whatever that is) and what one refinement takes."""
        grid, schedule = self.model.occupancy, self._occupancy
        if grid is None:
            return 0, 0.0
        interval, max_steps = self._refine_interval, self._training.max_steps
        first = max(1, math.ceil(schedule.refine_from * max_steps / interval))
        count = max(0, math.ceil(max_steps / interval) - first)  # due at first, first + 1, ... intervals, before the end
        if count == 0:
            return 0, 0.0
        start = time.perf_counter()
        part = self._refined_part(first * interval)
        grid.refine(self.model.density, part=part)  # ends by asking the device whether anything is left, so it is over by then
        return count, time.perf_counter() - start

    def _follow_counts(self, step: int, *, changed: bool = False) -> None:
        """Where the model is bounded: after its first step and after a change of its box some steps take what room they need."""
        if not self.model.bounded:
            return
        if changed or self._bounded_from is None:
            self.model.forget_counts()
            self._bounded_from = step + EXACT_STEPS
        if step >= self._bounded_from:
            self.model.follow_counts()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Adds what the block takes to ``structure_time``; waits for the device, so that nothing else is counted."""
        device = self.model.box.device
        for ends in (False, True):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if not ends:
                start = time.perf_counter()
                yield
        self.structure_time += time.perf_counter() - start

    @property
    def _refine_interval(self) -> int:
        """Steps between two refinements: longer in a short run, so that ``MOST_PARTS`` of them look at all voxels."""
        interval, share = max(1, round(self._occupancy.refine_every * self._training.max_steps)), self._occupancy.refine_share
        return interval if share is None else max(interval, math.ceil(self._n_voxels / (MOST_PARTS * share * self._samples_per_step)))

    @property
    def _n_voxels(self) -> int:
        return self.model.occupancy.hull.numel()

    @property
    def _samples_per_step(self) -> int:
        return self._training.n_rays * self.model.samples_per_ray

    def _refined_part(self, step: int) -> tuple[int, int]:
        """Which voxels the refinement at ``step`` looks at, for ``OccupancyGrid.refine``: steps and refinements of a scene with
        another hull cost more or less alike, so their ratio depends on the size of the whole grid, not on the hull's."""
        share, interval = self._occupancy.refine_share, self._refine_interval
        if share is None:
            return 0, 1
        n = math.ceil(self._n_voxels / (share * interval * self._samples_per_step))
        return step // interval % n, n

    def _refines_at(self, step: int) -> bool:
        schedule, max_steps = self._occupancy, self._training.max_steps
        if self.model.occupancy is None or step < schedule.refine_from * max_steps:
            return False
        return step > 0 and step % self._refine_interval == 0


class GridTask(RayBankTask):
    """The same for a :class:`TensoRFModel`: its grid grows and is cropped by the schedule.

    Args:
        resolution: cube root of the voxel count that the model starts with.
        grid: a ``GridScheduleConfig`` or a node of its shape.
    """

    model: TensoRFModel

    def __init__(self, *args: Any, resolution: int, grid: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resolution, self._grid = resolution, grid
        self._operations: list[Mapped] = []
        self._plans: Sequence[tuple[int, int]] = ()

    def planned(self, plans: Sequence[tuple[int, int]]) -> None:
        self._plans = plans

    def structure(self, step: int) -> bool:
        super().structure(step)
        max_steps = self._training.max_steps
        changes = grid_changes(step, max_steps, resolution=self._resolution, schedule=self._grid, plans=self._plans)
        if changes:
            with self._timed():
                self._operations = [self._apply(change) for change in changes]
            self._follow_counts(step, changed=True)
        return bool(changes)

    @property
    def penalty_names(self) -> tuple[str, ...]:
        return self.model.penalty_names

    def add_penalties(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        return self.model.add_penalties(weights)

    def remap_moments(self, ema: dict[str, Tensor], moments: Moments) -> tuple[dict[str, Tensor], Moments]:
        """EMA copies and Adam's moments through the same linear operations as the parameters of the last :meth:`structure`."""
        moved: Moments = {}
        for name, state in moments.items():
            if self._grid.moments == "reset" and _is_factor(name):
                continue
            moved[name] = {key: value if value.ndim == 0 else self._mapped(name, value) for key, value in state.items()}
        return {name: self._mapped(name, average) for name, average in ema.items()}, moved

    def settle(self) -> None:
        """Brings the grid to its final size, at which most steps of a run are made: for timing on a task that is thrown away."""
        if self._grid.upsample_at:
            self.model.upsample(self._grid.final_resolution**3)

    def _apply(self, change: Shrink | Upsample) -> Mapped:
        if isinstance(change, Shrink):
            return self.model.shrink(to_hull=change.number == 0)
        return self.model.upsample(change.n_voxels)

    @torch.no_grad()
    def _mapped(self, name: str, tensor: Tensor) -> Tensor:
        for operation in self._operations:
            tensor = operation(name, tensor)
        return tensor


def _is_factor(name: str) -> bool:
    return "_planes." in name or "_lines." in name
