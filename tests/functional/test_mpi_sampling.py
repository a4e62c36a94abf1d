"""Where planes stand: intervals, order, reproducibility, and the density of coarse-to-fine sampling."""

import pytest
import torch

from co3d_ensemble.functional.mpi_sampling import explicit_disparities, fine_disparities, fixed_disparities, stratified_disparities

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n_planes", [1, 2, 32, 256])
def test_every_interval_holds_one_plane_and_planes_descend(n_planes):
    disparity = stratified_disparities(n_planes, 1.0, 0.001, batch=3, generator=generator(), dtype=F64)
    assert disparity.shape == (3, n_planes)
    edges = torch.linspace(1.0, 0.001, n_planes + 1, dtype=F64)
    assert ((disparity <= edges[:-1]) & (disparity >= edges[1:])).all()
    assert (disparity.diff(dim=1) < 0).all()


def test_planes_are_uniform_in_their_interval_and_differ_between_entries():
    disparity = stratified_disparities(4, 0.9, 0.1, batch=20000, generator=generator(), dtype=F64)
    share = (disparity - torch.tensor([0.9, 0.7, 0.5, 0.3], dtype=F64)) / -0.2
    torch.testing.assert_close(share.mean(dim=0), torch.full((4,), 0.5, dtype=F64), rtol=0, atol=0.01)
    torch.testing.assert_close(share.var(dim=0), torch.full((4,), 1 / 12, dtype=F64), rtol=0, atol=0.003)
    assert disparity[:, 0].unique().numel() == 20000


def test_a_generator_or_the_default_one_decides_the_draw():
    first = stratified_disparities(8, 1, 0.1, batch=2, generator=generator(3))
    assert torch.equal(first, stratified_disparities(8, 1, 0.1, batch=2, generator=generator(3)))
    assert not torch.equal(first, stratified_disparities(8, 1, 0.1, batch=2, generator=generator(4)))
    torch.manual_seed(3)
    assert torch.equal(first, stratified_disparities(8, 1, 0.1, batch=2))


def test_fixed_planes_are_the_centres_of_the_intervals():
    assert fixed_disparities(4, 0.9, 0.1, batch=2, dtype=F64).tolist() == [pytest.approx([0.8, 0.6, 0.4, 0.2])] * 2


def test_a_list_is_taken_as_it_is_for_every_entry():
    assert explicit_disparities([2.0, 1.0, 0.5], batch=2).tolist() == [[2.0, 1.0, 0.5]] * 2


@pytest.mark.parametrize(
    ("values", "message"), [([], "empty"), ([1.0, 1.0], "1.0 before 1.0"), ([0.2, 0.3], "0.2 before 0.3"), ([0.2, 0], "got 0")]
)
def test_a_list_that_does_not_descend_to_above_zero_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        explicit_disparities(values, batch=1)


@pytest.mark.parametrize(("n_planes", "near", "far"), [(0, 1, 0.1), (4, 0.1, 1), (4, 1, 1), (4, 1, 0), (4, float("nan"), 0.1)])
def test_impossible_ranges_are_refused(n_planes, near, far):
    with pytest.raises(ValueError, match="n_planes=0|near="):
        stratified_disparities(n_planes, near, far, batch=1)
    with pytest.raises(ValueError, match="n_planes=0|near="):
        fixed_disparities(n_planes, near, far, batch=1)


def test_fine_planes_go_where_the_weight_is_in_proportion():
    coarse = torch.tensor([[1.0, 0.8, 0.4, 0.2]], dtype=F64)
    weights = torch.tensor([[0.0, 3.0, 1.0, 0.0]], dtype=F64)
    merged = fine_disparities(coarse, weights, 4000, generator=generator())
    assert merged.shape == (1, 4004)
    assert (merged.diff(dim=1) <= 0).all()
    # plane 1 owns (0.6, 0.9), plane 2 (0.3, 0.6): midpoints between neighbours
    fine = merged[0]
    inside = ((fine < 0.9) & (fine > 0.6)).sum().item() - 1, ((fine < 0.6) & (fine > 0.3)).sum().item() - 1
    assert inside == (3000, 1000)
    upper = fine[(fine < 0.9) & (fine > 0.6)]
    assert upper.mean().item() == pytest.approx(0.75, abs=1e-3)


def test_quantiles_without_perturbation_by_hand():
    coarse, weights = torch.tensor([[1.0, 0.5]], dtype=F64), torch.tensor([[1.0, 1.0]], dtype=F64)
    # intervals (1, 0.75) and (0.75, 0.5) with half of the mass each; quantiles at 1/4 and 3/4
    assert fine_disparities(coarse, weights, 2, perturb=False)[0].tolist() == pytest.approx([1.0, 0.875, 0.625, 0.5])


def test_an_entry_without_weight_is_sampled_as_if_all_were_equal_and_entries_are_independent():
    coarse = torch.tensor([[1.0, 0.5], [0.8, 0.4]], dtype=F64)
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=F64, requires_grad=True)
    merged = fine_disparities(coarse, weights, 2, perturb=False)
    assert merged[0].tolist() == pytest.approx([1.0, 0.875, 0.625, 0.5])
    assert merged[1].tolist() == pytest.approx([0.8, 0.75, 0.65, 0.4])
    assert not merged.requires_grad


def test_shapes_that_cannot_be_merged_are_refused():
    for disparity, weights in ((torch.rand(2, 3), torch.rand(2, 4)), (torch.rand(2, 1), torch.rand(2, 1))):
        with pytest.raises(ValueError, match="N >= 2"):
            fine_disparities(disparity, weights, 2)
