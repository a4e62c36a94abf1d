"""When the VM grid changes: the published steps, scaled to any length of run, and what the changes do to a training."""

import pytest

from co3d_ensemble.config import GridScheduleConfig
from co3d_ensemble.training.grid_schedule import Shrink, Upsample, grid_changes

PUBLISHED = GridScheduleConfig()


def all_changes(max_steps, schedule=PUBLISHED, resolution=128):
    steps = range(max_steps) if max_steps < 10_000 else sorted({round(s * max_steps) for s in (*schedule.upsample_at, *schedule.shrink_at)})
    return {step: found for step in steps if (found := grid_changes(step, max_steps, resolution=resolution, schedule=schedule))}


def test_the_published_steps_are_those_of_the_slides():
    changes = all_changes(350_000)
    assert [step for step, found in changes.items() if isinstance(found[0], Upsample)] == [30000, 50000, 65000, 91300, 116200]
    assert {step: found for step, found in changes.items() if isinstance(found[0], Shrink)} == {20000: [Shrink(0)], 40000: [Shrink(1)]}


def test_voxel_counts_grow_by_equal_factors_to_the_final_one():
    counts = [found[0].n_voxels for found in all_changes(350_000).values() if isinstance(found[0], Upsample)]
    assert counts[-1] == 1024**3
    for before, after in zip([128**3, *counts], counts):
        assert after / before == pytest.approx(8 ** (3 / 5), rel=1e-6)


@pytest.mark.parametrize("max_steps", [2000, 200, 20])
def test_a_shorter_run_makes_the_same_changes_in_the_same_order(max_steps):
    changes = all_changes(max_steps)
    assert min(changes) >= 1 and max(changes) <= 0.4 * max_steps
    made = [change for found in changes.values() for change in found]
    assert [c for c in made if isinstance(c, Shrink)] == [Shrink(0), Shrink(1)]
    grown = [c.n_voxels for c in made if isinstance(c, Upsample)]
    assert grown == sorted(grown) and grown[-1] == 1024**3


def test_changes_that_fall_on_one_step_crop_first_and_grow_once():
    schedule = GridScheduleConfig(final_resolution=16, upsample_at=(0.5, 0.5), shrink_at=(0.5,))
    assert grid_changes(2, 4, resolution=8, schedule=schedule) == [Shrink(0), Upsample(16**3)]


def test_nothing_changes_before_the_first_update_or_without_a_schedule():
    assert grid_changes(0, 2, resolution=8, schedule=PUBLISHED) == []
    nothing = GridScheduleConfig(upsample_at=(), shrink_at=())
    assert all(grid_changes(step, 10, resolution=8, schedule=nothing) == [] for step in range(10))


@pytest.mark.parametrize(
    "plans", [[(0, 100)], [(0, 100), (10, 300)], [(0, 300), (30, 80)], [(0, 50), (20, 400), (90, 100)], [(0, 60), (60, 200)]]
)
def test_a_run_whose_length_changes_makes_every_change_once_and_in_order(plans):
    made = []
    for step in range(plans[-1][1]):
        known = [plan for plan in plans if plan[0] <= step]  # later ones are not known yet
        made += grid_changes(step, known[-1][1], resolution=128, schedule=PUBLISHED, plans=known)
    assert [change for change in made if isinstance(change, Shrink)] == [Shrink(0), Shrink(1)]
    grown = [change.n_voxels for change in made if isinstance(change, Upsample)]
    assert grown == sorted(set(grown)) and grown[-1] == 1024**3
