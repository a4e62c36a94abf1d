"""The occupancy-aware renderer with fields written down by hand: passes, importance sampling, skipping."""

import pytest
import torch
from pytorch3d.implicitron.models.renderer.base import BaseRenderer, EvaluationMode, ImplicitronRayBundle

import co3d_ensemble.plugin  # noqa: F401 - registers the components
from co3d_ensemble.fields.occupancy import OccupancyGrid
from co3d_ensemble.plugin.compat import pytorch3d_version
from co3d_ensemble.plugin.model import build_component

N_FINE = 24


def renderer(**settings):
    return build_component(BaseRenderer, "OccupancyAwareRenderer", {"n_pts_per_ray_fine": N_FINE, **settings})


def rays(n=3, n_samples=21) -> ImplicitronRayBundle:
    """Along +z from z = 0 to 10, beside each other in x."""
    origins = torch.stack((0.1 * torch.arange(n), torch.zeros(n), torch.zeros(n)), dim=-1).float()
    directions = torch.tensor([0.0, 0.0, 1.0]).expand(n, 3)
    return ImplicitronRayBundle(
        origins=origins, directions=directions, lengths=torch.linspace(0, 10, n_samples).repeat(n, 1), xys=torch.zeros(n, 2)
    )


class Field:
    """Density and colour as functions of z; remembers what it was asked."""

    def __init__(self, density, color=0.5):
        self.density, self.color, self.lengths, self.occupied = density, color, [], []

    def __call__(self, *, ray_bundle, occupied=None, **kwargs):
        z = ray_bundle.lengths
        self.lengths.append(z)
        self.occupied.append(occupied)
        density = self.density(z)
        if occupied is not None:
            density = density * occupied
        return density[..., None], torch.full((*z.shape, 3), self.color), {}


def slab(low, high, value=50.0):
    return lambda z: value * ((z >= low) & (z < high)).float()


def occupancy(low, high, *, wide=True) -> OccupancyGrid:
    """Voxels of side 1 over z in 0..10, occupied from ``low`` to ``high``."""
    hull = torch.zeros(1, 1, 10, dtype=torch.bool)
    hull[0, 0, low:high] = True
    return OccupancyGrid(torch.tensor([[-1.0, -1, 0], [1, 1, 10]] if wide else [[-0.05, -1, 0], [0.05, 1, 10]]), hull)


def test_functions_pass_in_order_and_outputs_chain():
    first, second, third = Field(slab(4, 6), 0.2), Field(slab(4, 6), 0.4), Field(slab(4, 6), 0.6)
    output = renderer()(ray_bundle=rays(), implicit_functions=[first, second, third])
    assert [len(f.lengths) for f in (first, second, third)] == [1, 1, 1]
    assert [f.lengths[0].shape[-1] for f in (first, second, third)] == [21, 21 + N_FINE, 21 + 2 * N_FINE]
    for stage, color in ((output, 0.6), (output.prev_stage, 0.4), (output.prev_stage.prev_stage, 0.2)):
        torch.testing.assert_close(stage.features, color * stage.masks.expand(3, 3))
    assert output.prev_stage.prev_stage.prev_stage is None
    assert output.weights is None and output.prev_stage.weights is None  # nobody needs them any more


def test_the_fine_pass_has_the_coarse_samples_and_finds_the_surface():
    coarse, fine = Field(slab(4, 6)), Field(slab(4, 6))
    renderer(occupied_floor=0.0)(ray_bundle=rays(), implicit_functions=[coarse, fine])
    t = fine.lengths[0]
    assert (t.diff(dim=-1) >= 0).all()
    added = torch.stack([row[~torch.isin(row, c)] for row, c in zip(t, coarse.lengths[0])])
    assert added.shape == (3, N_FINE)
    assert ((added >= 3.5) & (added <= 4.5)).float().mean() > 0.95  # the slab is opaque: all weight at its front


def test_samples_in_empty_voxels_are_marked_and_only_they():
    field = Field(slab(0, 10))
    marcher = renderer()
    marcher.set_occupancy(occupancy(3, 5))
    marcher(ray_bundle=rays(), implicit_functions=[field, field])
    for z, occupied in zip(field.lengths, field.occupied):
        assert torch.equal(occupied, (z >= 3) & (z < 5))
    marcher.set_occupancy(None)
    marcher(ray_bundle=rays(), implicit_functions=[field])
    assert field.occupied[-1] is None


def test_fine_samples_land_in_occupied_space_although_the_coarse_pass_sees_nothing():
    blind, fine = Field(slab(0, 0)), Field(slab(0, 10))
    marcher = renderer()
    marcher.set_occupancy(occupancy(6, 8))
    marcher(ray_bundle=rays(), implicit_functions=[blind, fine])
    assert (fine.lengths[0] >= 5.75).logical_and(fine.lengths[0] <= 8.25).sum(dim=-1).min() >= N_FINE
    inside = fine.occupied[0].sum(dim=-1) - 4  # four coarse samples lie there
    assert (inside >= 0.8 * N_FINE).all()


def test_a_little_of_the_importance_stays_on_occupied_space_behind_a_surface():
    coarse, fine = Field(slab(2, 3)), Field(slab(2, 3))
    marcher = renderer(n_pts_per_ray_fine=100, occupied_floor=0.05)
    marcher.set_occupancy(occupancy(2, 9))
    marcher(ray_bundle=rays(), implicit_functions=[coarse, fine])
    behind = ((fine.lengths[0] > 3.3) & (fine.lengths[0] < 8.7)).sum(dim=-1) - 10  # ten coarse ones
    assert (behind > 10).all() and (behind < 60).all()


@pytest.mark.parametrize("n_samples", [3, 21])
def test_a_ray_without_an_occupied_sample_is_black_and_transparent_and_finite(n_samples):
    field = Field(slab(0, 10))
    marcher = renderer()
    marcher.set_occupancy(occupancy(4, 6, wide=False))  # holds the first ray only
    output = marcher(ray_bundle=rays(n_samples=n_samples), implicit_functions=[field, field])
    for stage in (output, output.prev_stage):
        assert not stage.masks[1:].any() and not stage.features[1:].any() and not stage.depths[1:].any()
    assert output.masks[0] > 0.9
    assert all(torch.isfinite(t).all() for t in field.lengths)


def test_importance_samples_are_random_in_training_and_the_same_in_evaluation():
    field = Field(slab(4, 6))
    marcher = renderer()
    for mode in (EvaluationMode.EVALUATION, EvaluationMode.EVALUATION, EvaluationMode.TRAINING, EvaluationMode.TRAINING):
        marcher(ray_bundle=rays(), implicit_functions=[field, field], evaluation_mode=mode)
    fine = field.lengths[1::2]
    assert torch.equal(fine[0], fine[1])
    assert not torch.equal(fine[2], fine[0]) and not torch.equal(fine[2], fine[3])


def test_the_bundle_of_the_caller_is_left_alone():
    bundle, field = rays(), Field(slab(4, 6))
    before = bundle.lengths.clone()
    renderer()(ray_bundle=bundle, implicit_functions=[field, field])
    assert torch.equal(bundle.lengths, before)


def test_no_implicit_function_is_refused():
    with pytest.raises(ValueError, match="at least one implicit function"):
        renderer()(ray_bundle=rays(), implicit_functions=[])


@pytest.mark.skipif(pytorch3d_version() < (0, 7, 5), reason="bundles of intervals came with PyTorch3D 0.7.5")
def test_bundles_of_intervals_are_refused():
    bundle = rays()
    bundle.bins = torch.linspace(0, 10, 22).repeat(3, 1)
    with pytest.raises(ValueError, match="cast_ray_bundle_as_cone"):
        renderer()(ray_bundle=bundle, implicit_functions=[Field(slab(4, 6))])


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="OccupancyAwareRenderer has no setting n_fine; it has: .*n_pts_per_ray_fine.*occupied_floor"):
        renderer(n_fine=3)
