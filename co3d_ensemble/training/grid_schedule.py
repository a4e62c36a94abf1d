"""When the grid of a VM field grows and is cropped: a function of ``step`` and ``max_steps``, so that resuming needs one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from co3d_ensemble.functional.schedules import first_step_of
from co3d_ensemble.functional.vm import voxel_counts


@dataclass(frozen=True)
class Shrink:
    """Crop the box. ``number`` counts from 0: the first crop follows the hull, later ones what the density left occupied."""

    number: int


@dataclass(frozen=True)
class Upsample:
    """Grow the grid to ``n_voxels``."""

    n_voxels: int


def grid_changes(
    step: int, max_steps: int, *, resolution: int, schedule: Any, plans: Sequence[tuple[int, int]] = ()
) -> list[Shrink | Upsample]:
    """The changes that precede ``step``, in order: crops first, so that voxels are not spent on what is cropped away.

    A share of ``max_steps`` is rounded to a whole step, at least 1: nothing changes before the first update. Of several
    upsamplings that fall on one step in a short run, the last one counts.

    Args:
        resolution: cube root of the voxel count at the start.
        schedule: a ``GridScheduleConfig`` or a node of its shape.
        plans: of a run whose ``max_steps`` was changed on its way, all of them, see ``first_step_of``.
    """
    plans = plans or ((0, max_steps),)
    changes: list[Shrink | Upsample] = [
        Shrink(number) for number, share in enumerate(schedule.shrink_at) if first_step_of(share, plans) == step
    ]
    shares = schedule.upsample_at
    counts = voxel_counts(resolution**3, schedule.final_resolution**3, len(shares)) if shares else []
    grown = [count for share, count in zip(shares, counts, strict=True) if first_step_of(share, plans) == step]
    return [*changes, *(Upsample(count) for count in grown[-1:])]
