"""The vector-matrix factorization against loops over points, corners and components in float64."""

import math

import pytest
import torch

from co3d_ensemble.functional import vm

RESOLUTION = (5, 7, 4)


def factors(components=3, resolution=RESOLUTION, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, components, generator=generator, dtype=dtype).requires_grad_()

    planes = [random(resolution[u], resolution[v]) for u, v in vm.PLANE_AXES]
    return planes, [random(resolution[w]) for w in vm.LINE_AXES]


def positions(n=9, *, dtype=torch.float64):
    """Random ones, both corners, and a vertex of the grid."""
    inner = torch.rand(n, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)
    vertex = torch.tensor([[2 / 4, 3 / 6, 1 / 3]], dtype=dtype)
    return torch.cat((inner, torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype), vertex))


def interpolated(factor, coordinates):
    """One value per component: sum over all vertices of the product of hat functions."""
    result = torch.zeros(factor.shape[-1], dtype=factor.dtype)
    for vertex in torch.cartesian_prod(*[torch.arange(n) for n in factor.shape[:-1]]).reshape(-1, factor.dim() - 1).tolist():
        hats = [max(0.0, 1 - abs(x * (n - 1) - i)) for x, n, i in zip(coordinates, factor.shape, vertex)]
        result = result + math.prod(hats) * factor[tuple(vertex)]
    return result


def products(planes, lines, position):
    return [
        interpolated(planes[mode], [position[axis] for axis in vm.PLANE_AXES[mode]])
        * interpolated(lines[mode], [position[vm.LINE_AXES[mode]]])
        for mode in range(3)
    ]


def gradients(value, tensors):
    return torch.autograd.grad(value, tensors)


def as_functions_of_the_factors(fn):
    return lambda *tensors: fn(tensors[:3], tensors[3:6], *tensors[6:])


def test_the_sum_is_that_of_loops_over_modes_vertices_and_components():
    planes, lines = factors()
    expected = torch.stack([torch.stack(products(planes, lines, x)).sum() for x in positions().tolist()])
    torch.testing.assert_close(vm.vm_sum(planes, lines, positions()), expected, rtol=1e-12, atol=1e-12)


def test_the_projection_is_the_basis_times_the_products_of_the_modes_side_by_side():
    planes, lines = factors()
    basis = torch.randn(4, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    side_by_side = torch.stack([torch.cat(products(planes, lines, x)) for x in positions().tolist()])
    torch.testing.assert_close(vm.vm_project(planes, lines, positions(), torch.eye(9).double()), side_by_side, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vm.vm_project(planes, lines, positions(), basis), side_by_side @ basis.T, rtol=1e-12, atol=1e-12)


def test_every_mode_spans_the_three_axes_once():
    assert all({*vm.PLANE_AXES[mode], vm.LINE_AXES[mode]} == {0, 1, 2} for mode in range(3))


@pytest.mark.parametrize("cache_bytes", [1 << 20, 100])  # one chunk of points, and several
def test_the_gradients_of_factors_and_basis_are_those_of_finite_differences(monkeypatch, cache_bytes):
    monkeypatch.setattr(vm, "CACHE_BYTES", cache_bytes)
    planes, lines = factors(2, (3, 2, 4))
    basis = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    x = positions(5)
    assert torch.autograd.gradcheck(as_functions_of_the_factors(lambda p, l: vm.vm_sum(p, l, x)), (*planes, *lines))
    project = as_functions_of_the_factors(lambda p, l, b: vm.vm_project(p, l, x, b))
    assert torch.autograd.gradcheck(project, (*planes, *lines, basis))


@pytest.mark.parametrize("resolution", [(5, 7, 4), (200, 190, 3)])  # keys of 16 and of 32 bits
def test_the_sums_over_sorted_bags_and_by_atomic_additions_agree(resolution):
    x = torch.rand(500, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    index, weight = vm._all_bags(x, resolution)[0]
    values = torch.randn(500, 3, dtype=torch.float64)
    n_vertices = resolution[0] * resolution[1]
    expected = vm._scatter_atomic(values, index, weight, n_vertices)
    torch.testing.assert_close(vm._scatter_sorted(values, index, weight, n_vertices), expected, rtol=1e-12, atol=1e-12)
    assert (n_vertices > vm.INT16_VALUES) == (resolution[0] == 200)


def test_float32_is_float64_to_rounding_in_values_and_gradients():
    planes, lines = factors(16, (20, 30, 25))
    x = torch.rand(3000, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = vm.vm_sum(planes, lines, x)
    rough_factors = [[f.detach().float().requires_grad_() for f in group] for group in (planes, lines)]
    rough = vm.vm_sum(*rough_factors, x.float())
    torch.testing.assert_close(rough.double(), exact, rtol=1e-4, atol=1e-4)
    expected = gradients(exact.square().sum(), [*planes, *lines])
    for a, b in zip(gradients(rough.square().sum(), [*rough_factors[0], *rough_factors[1]]), expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_positions_outside_the_box_are_those_of_its_nearest_face():
    planes, lines = factors()
    outside = torch.tensor([[-0.5, 0.3, 2.0], [1e30, 0.0, -1e30]], dtype=torch.float64)
    assert torch.equal(vm.vm_sum(planes, lines, outside), vm.vm_sum(planes, lines, outside.clamp(0, 1)))


def test_a_position_that_is_no_number_gives_no_number_and_harms_no_other():
    planes, lines = factors()
    x = positions()
    broken = torch.cat((torch.full((1, 3), torch.nan, dtype=x.dtype), x))
    value = vm.vm_sum(planes, lines, broken)
    assert value[0].isnan()
    torch.testing.assert_close(value[1:], vm.vm_sum(planes, lines, x))


def test_no_point_at_all_gives_zero_gradients():
    planes, lines = factors()
    basis = torch.ones(2, 9, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(0, 3, dtype=torch.float64)
    value, projected = vm.vm_sum(planes, lines, none), vm.vm_project(planes, lines, none, basis)
    assert value.shape == (0,) and projected.shape == (0, 2)
    assert all((g == 0).all() for g in gradients(value.sum() + projected.sum(), [*planes, *lines, basis]))


def linear_plane(n_u, n_v):
    u, v = torch.linspace(0, 1, n_u, dtype=torch.float64), torch.linspace(0, 1, n_v, dtype=torch.float64)
    return torch.stack((2 + 3 * u[:, None] - v, u[:, None] + 4 * v), dim=-1)


@pytest.mark.parametrize("shape", [(5, 9), (16, 3), (2, 2), (41, 40)])
def test_resizing_preserves_linear_functions_at_any_resolution(shape):
    torch.testing.assert_close(vm.resize(linear_plane(5, 4), shape), linear_plane(*shape), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vm.resize(linear_plane(5, 4)[:, 0], shape[:1]), linear_plane(*shape)[:, 0], rtol=1e-12, atol=1e-12)


def test_upsampling_to_a_multiple_keeps_the_function_and_its_old_vertices_exactly():
    planes, lines = factors(dtype=torch.float32)
    finer = tuple(3 * (n - 1) + 1 for n in RESOLUTION)
    fine_planes = [vm.resize(p.detach(), [finer[a] for a in axes]) for p, axes in zip(planes, vm.PLANE_AXES)]
    fine_lines = [vm.resize(l.detach(), [finer[a]]) for l, a in zip(lines, vm.LINE_AXES)]
    x = positions(50, dtype=torch.float32)
    torch.testing.assert_close(vm.vm_sum(fine_planes, fine_lines, x), vm.vm_sum(planes, lines, x).detach(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(fine[::3, ::3], coarse) for fine, coarse in zip(fine_planes, planes))


def test_resizing_and_cropping_are_linear_and_keep_second_moments_non_negative():
    a, b = (torch.randn(6, 5, 2, dtype=torch.float64) for _ in range(2))
    for change in (lambda x: vm.resize(x, (11, 7)), lambda x: vm.crop(x, [(1, 4), (0, 3)])):
        torch.testing.assert_close(change(2 * a - 3 * b), 2 * change(a) - 3 * change(b), rtol=1e-12, atol=1e-12)
        assert (change(a.square()) >= 0).all()


def test_cropping_copies_the_vertices_of_the_range():
    plane = linear_plane(6, 5)
    cropped = vm.crop(plane, [(1, 4), (2, 4)])
    assert torch.equal(cropped, plane[1:5, 2:5]) and cropped.is_contiguous()
    cropped.zero_()
    assert torch.equal(plane, linear_plane(6, 5))


@pytest.mark.parametrize("ranges", [[(0, 6), (0, 1)], [(-1, 2), (0, 1)], [(2, 2), (0, 1)], [(0, 1)]])
def test_ranges_outside_a_plane_or_of_one_vertex_are_refused(ranges):
    with pytest.raises(ValueError, match="expected"):
        vm.crop(linear_plane(6, 5), ranges)


@pytest.mark.parametrize("shape", [(1, 5), (5,), (2, 2, 2)])
def test_shapes_that_a_plane_cannot_take_are_refused_by_value(shape):
    with pytest.raises(ValueError, match=rf"shape=\({shape[0]},"):
        vm.resize(linear_plane(4, 4), shape)


def test_resolutions_follow_the_box_and_are_rounded_not_truncated():
    assert vm.grid_resolution(128**3, (1, 1, 1)) == (128, 128, 128)
    assert vm.grid_resolution(300**3, (0.7, 0.7, 0.7)) == (300, 300, 300)
    assert vm.grid_resolution(1000, (10.0, 10.0, 0.01))[2] == 2
    x, y, z = vm.grid_resolution(1_000_000, (1.0, 2.0, 4.0))
    assert (x, y, z) == (50, 100, 200)
    assert vm.grid_resolution(1_000_000, (0.1, 0.2, 0.4)) == (x, y, z)


@pytest.mark.parametrize(("voxels", "sides"), [(0, (1, 1, 1)), (8, (1, 0, 1)), (8, (1, math.inf, 1)), (8, (1, 1))])
def test_boxes_without_a_resolution_are_refused(voxels, sides):
    with pytest.raises(ValueError, match="n_voxels=0" if voxels == 0 else "sides="):
        vm.grid_resolution(voxels, sides)


def test_voxel_counts_grow_by_equal_factors_to_the_last():
    counts = vm.voxel_counts(128**3, 1024**3, 5)
    assert len(counts) == 5 and counts[-1] == 1024**3
    ratios = [b / a for a, b in zip([128**3, *counts], counts)]
    assert ratios == pytest.approx([512**0.2] * 5, rel=1e-5)
    with pytest.raises(ValueError, match="n_changes=0"):
        vm.voxel_counts(8, 64, 0)
