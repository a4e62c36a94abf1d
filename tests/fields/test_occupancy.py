"""The occupancy grid: lookups against a loop over voxels, and what refinement may and may not do."""

import copy
import math

import pytest
import torch

from co3d_ensemble.fields.occupancy import OccupancyGrid
from co3d_ensemble.functional.visual_hull import voxel_centers

BOX = torch.tensor([[-1.0, 2.0, 10.0], [3.0, 4.0, 13.0]])
SHAPE = (8, 4, 6)  # voxels of 0.5


def grid(hull=None, **settings) -> OccupancyGrid:
    return OccupancyGrid(BOX, torch.ones(SHAPE, dtype=torch.bool) if hull is None else hull, **settings)


def random_hull(share=0.5):
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < share


def centers():
    return voxel_centers(BOX, SHAPE)


def dense_at(*cells, value=100.0):
    """A density that is ``value`` in the given voxels and 0 elsewhere."""

    def density(points):
        index = ((points - BOX[0]) / 0.5).floor().long()
        hit = torch.zeros(len(points), dtype=torch.bool)
        for cell in cells:
            hit |= (index == torch.tensor(cell)).all(dim=-1)
        return value * hit.float()

    return density


def test_lookup_matches_a_loop_over_points_in_and_around_the_box():
    hull = random_hull()
    occupancy = grid(hull)
    points = BOX[0] - 1 + torch.rand(6, 100, 3, generator=torch.Generator().manual_seed(1)) * (BOX[1] - BOX[0] + 2)
    result = occupancy(points)
    assert result.shape == (6, 100) and result.dtype == torch.bool
    n_inside = 0
    for point, found in zip(points.reshape(-1, 3).tolist(), result.flatten().tolist()):
        cell = [math.floor((x - low) / 0.5) for x, low in zip(point, BOX[0].tolist())]
        inside = all(0 <= i < n for i, n in zip(cell, SHAPE))
        n_inside += inside
        assert found == (inside and bool(hull[tuple(cell)]))
    assert 100 < n_inside < 500


def test_every_voxel_answers_for_its_own_centre():
    hull = random_hull()
    assert torch.equal(grid(hull)(centers()), hull)


def test_lookup_along_rays_is_the_lookup_of_their_points():
    occupancy = grid(random_hull())
    generator = torch.Generator().manual_seed(1)
    origins = BOX.mean(dim=0) + torch.randn(4, 9, 3, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(4, 9, 3, generator=generator), dim=-1)
    lengths = 6 * torch.rand(4, 9, 20, generator=generator)
    points = origins[..., None, :] + lengths[..., None] * directions[..., None, :]
    along, expected = occupancy.along_rays(origins, directions, lengths), occupancy(points)
    assert along.shape == (4, 9, 20) and 0 < expected.float().mean() < 1
    assert (along != expected).sum() <= 1  # one may lie on a face, where rounding decides


@pytest.mark.parametrize("far", [1e6, -1e6, 1e30])
def test_points_far_outside_are_not_occupied(far):
    assert not grid()(torch.full((1, 3), far)).any()


def test_refinement_keeps_what_is_dense_and_its_neighbours_and_empties_the_rest():
    occupancy = grid()
    torch.manual_seed(0)
    occupancy.refine(dense_at((2, 1, 3), (7, 3, 5)))
    expected = torch.zeros(SHAPE, dtype=torch.bool)
    expected[1:4, 0:3, 2:5] = True
    expected[6:, 2:, 4:] = True
    assert torch.equal(occupancy.occupied, expected)


def test_refinement_never_leaves_the_hull():
    hull = random_hull(0.3)
    occupancy = grid(hull)
    for _ in range(3):
        occupancy.refine(lambda points: torch.full((len(points),), 1e3))
        assert torch.equal(occupancy.occupied, hull)


def test_refinement_asks_only_about_points_of_hull_voxels_one_in_each():
    hull = random_hull(0.3)
    asked = []

    def density(points):
        asked.append(points)
        return torch.ones(len(points))

    grid(hull).refine(density, chunk=7)
    assert max(len(part) for part in asked) <= 7
    cells = ((torch.cat(asked) - BOX[0]) / 0.5).floor().long()
    assert torch.equal(cells, hull.nonzero())
    offset = torch.cat(asked) - centers()[hull]
    assert offset.abs().max() <= 0.25 and offset.abs().mean() == pytest.approx(0.125, abs=0.02)


def test_repeated_refinement_never_drops_what_has_density():
    generator = torch.Generator().manual_seed(3)
    field = torch.where(torch.rand(SHAPE, generator=generator) < 0.1, 5.0, 0.0)
    cells = [tuple(c) for c in field.nonzero().tolist()]
    occupancy = grid()
    for _ in range(30):
        occupancy.refine(dense_at(*cells, value=5.0))
        assert occupancy.occupied[field > 0].all()
    assert not occupancy.occupied.all()


def test_density_that_appears_later_is_taken_back():
    occupancy = grid()
    occupancy.refine(dense_at((0, 0, 0)))
    assert not occupancy.occupied[7, 3, 5]
    occupancy.refine(dense_at((0, 0, 0), (7, 3, 5)))
    assert occupancy.occupied[7, 3, 5]


def test_density_that_vanishes_is_forgotten_by_the_decay():
    occupancy = grid(decay=0.5, opacity_threshold=0.1)
    occupancy.refine(dense_at((0, 0, 0), (7, 3, 5), value=1.0))
    kept = []
    for _ in range(4):
        occupancy.refine(dense_at((0, 0, 0), value=1.0))
        kept.append(bool(occupancy.occupied[7, 3, 5]))
    # opacity over 0.5 world units of 2^-n reaches 0.1 up to n = 2: 0.118, then 0.061
    assert kept == [True, True, False, False]
    assert occupancy.occupied[0, 0, 0]


@pytest.mark.parametrize(("share", "kept"), [(1.01, True), (0.99, False)])
def test_the_threshold_is_the_opacity_over_one_voxel_length(share, kept):
    at_threshold = -math.log1p(-0.005) / 0.5
    occupancy = grid()
    occupancy.refine(dense_at((4, 2, 2), value=share * at_threshold))
    assert bool(occupancy.occupied[4, 2, 2]) is (kept or occupancy.occupied.all().item())
    assert bool(occupancy.occupied.all()) is not kept  # nothing dense: the grid is left as it was


def test_a_refinement_that_would_leave_nothing_leaves_the_grid():
    hull = random_hull()
    occupancy = grid(hull)
    occupancy.refine(dense_at((0, 0, 0)) if hull[0, 0, 0] else dense_at(tuple(hull.nonzero()[0].tolist())))
    before = occupancy.occupied.clone()
    assert not torch.equal(before, hull)
    for _ in range(200):
        occupancy.refine(lambda points: torch.zeros(len(points)))
    assert torch.equal(occupancy.occupied, before)
    empty = grid(torch.zeros(SHAPE, dtype=torch.bool))
    empty.refine(lambda points: torch.ones(len(points)))
    assert not empty.occupied.any()


def test_a_state_dict_round_trip_keeps_lookups_and_further_refinement():
    occupancy = grid(random_hull())
    occupancy.refine(dense_at((2, 1, 3), (3, 1, 3), (5, 2, 2)))
    other = OccupancyGrid(torch.zeros(2, 3), torch.ones(SHAPE, dtype=torch.bool))
    other.load_state_dict(copy.deepcopy(occupancy.state_dict()))
    for _ in range(2):
        assert torch.equal(other(centers()), occupancy(centers()))
        for one in (occupancy, other):
            torch.manual_seed(4)
            one.refine(dense_at((5, 2, 2), value=3.0))


def test_results_do_not_depend_on_the_scale_of_the_scene():
    refined = []
    for scale in (0.1, 1.0, 10.0):
        occupancy = OccupancyGrid(BOX * scale, torch.ones(SHAPE, dtype=torch.bool))
        torch.manual_seed(0)
        occupancy.refine(lambda points, scale=scale: 0.02 / scale * (points / scale - 3).sin().sum(-1).clamp_min(0))
        refined.append(occupancy.occupied)
    assert 0 < refined[0].sum() < refined[0].numel()
    assert torch.equal(refined[0], refined[1]) and torch.equal(refined[2], refined[1])


@pytest.mark.parametrize("n", [2, 3, 7])
def test_refinements_of_parts_look_at_every_hull_voxel_once_in_their_turn(n):
    hull = random_hull()
    occupancy, seen = grid(hull), torch.zeros(SHAPE, dtype=torch.int32)

    def density(points):
        index = ((points - BOX[0]) / 0.5).floor().long()
        seen[tuple(index.unbind(-1))] += 1
        return torch.zeros(len(points))

    for i in range(n - 1):
        occupancy.refine(density, part=(i, n))
    assert occupancy.occupied.any()  # beside what was not looked at yet nothing is declared empty
    occupancy.refine(density, part=(n - 1, n))
    assert torch.equal(seen, hull.int())


def test_a_part_forgets_as_fast_as_refinements_of_all():
    whole, parts = grid(decay=0.8), grid(decay=0.8)
    for occupancy in (whole, parts):
        occupancy.density.fill_(5.0)
    empty = lambda points: torch.zeros(len(points))
    for i in range(6):
        whole.refine(empty)
        parts.refine(empty, part=(i, 3))
    torch.testing.assert_close(parts.density, whole.density)
