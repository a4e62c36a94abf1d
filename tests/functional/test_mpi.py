"""Multiplane images against rays cast through textured planes in Python floats, one pixel at a time."""

import math

import pytest
import torch

from co3d_ensemble.functional import mpi
from co3d_ensemble.functional.cameras import so3_exp
from co3d_ensemble.functional.mpi import (
    blend_source,
    composite,
    mean_plane_weights,
    plane_distances,
    render_source_view,
    render_target_view,
    weighted_sum,
)
from tests.functional import mpi_reference as reference

F64 = torch.float64
SOURCE, TARGET = (7, 10), (8, 6)  # neither square nor of one size


def draw(*shape, seed=0):
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def intrinsics(fx, fy, cx, cy, skew=0.0):
    return torch.tensor([[fx, skew, cx], [0, fy, cy], [0, 0, 1]], dtype=F64)


def scene(batch=2, planes=4, *, seed=0, translation=0.3, angle=0.15, target=TARGET):
    """Planes, two unequal cameras per entry and a pose per entry."""
    height, width = SOURCE
    rgb, sigma = draw(batch, planes, 3, height, width, seed=seed), 2 * draw(batch, planes, 1, height, width, seed=seed + 1)
    depth = 1 / torch.linspace(0.9, 0.2, planes + 1, dtype=F64)[:-1].expand(batch, -1) * (1 + 0.1 * draw(batch, 1, seed=seed + 2))
    K_source = torch.stack([intrinsics(9.0 + b, 8.0, 5.3, 3.1 - 0.2 * b, 0.4) for b in range(batch)])
    K_target = torch.stack([intrinsics(7.0, 8.5 + b, 2.9, 4.2) for b in range(batch)])
    R = so3_exp(angle * (2 * draw(batch, 3, seed=seed + 3) - 1))
    t = translation * (2 * draw(batch, 3, seed=seed + 4) - 1)
    return {
        "rgb": rgb,
        "sigma": sigma,
        "depth": depth.contiguous(),
        "K_source": K_source,
        "K_target": K_target,
        "R": R,
        "t": t,
        "height": target[0],
        "width": target[1],
    }


def render(arguments, **changes):
    arguments = {**arguments, **changes}
    rgb, sigma, depth = (arguments.pop(name) for name in ("rgb", "sigma", "depth"))
    return render_target_view(rgb, sigma, depth, **arguments)


def cast(arguments, *, lookup=None, mode="sigma"):
    """The reference's pictures of every entry, stacked: rgb, Z, alpha, count."""
    results = []
    for b in range(len(arguments["rgb"])):
        results.append(
            reference.ray_cast(
                lookup or reference.from_pictures(arguments["rgb"][b], arguments["sigma"][b]),
                arguments["depth"][b],
                **{name: arguments[name][b] for name in ("K_source", "K_target", "R", "t")},
                source_size=SOURCE,
                target_size=(arguments["height"], arguments["width"]),
                mode=mode,
            )
        )
    return [torch.stack(values) for values in zip(*results)]


def assert_equal_to_rays(view, rays, n_planes):
    rgb, z, alpha, count = rays
    torch.testing.assert_close(view.rgb, rgb, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(view.alpha, alpha, rtol=1e-9, atol=1e-11)
    surface = alpha > mpi.SURFACE_ALPHA
    torch.testing.assert_close(view.depth, torch.where(surface, z / alpha, 0.0), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(view.disparity[surface], (alpha / z)[surface], rtol=1e-9, atol=1e-11)
    assert (view.disparity[~surface] == 0).all()
    assert torch.equal(view.valid, count >= min(2, n_planes))


@pytest.mark.parametrize("mode", ["sigma", "alpha"])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_target_view_is_what_rays_cast_through_the_planes_see(mode, checkpoint):
    arguments = scene()
    if mode == "alpha":
        arguments["sigma"] = arguments["sigma"] / 2
    rays = cast(arguments, mode=mode)
    count = rays[3]
    assert (count == 0).any() and (count == 4).any() and ((count > 0) & (count < 4)).any()
    assert_equal_to_rays(render(arguments, mode=mode, checkpoint=checkpoint), rays, 4)


def test_an_analytic_stack_of_planes_with_linear_textures_is_rendered_exactly():
    arguments = scene(batch=1, planes=3, translation=0.05, angle=0.02, target=(5, 7))
    arguments["K_target"] = intrinsics(14.0, 13.0, 3.5, 2.6)[None]  # looks at the middle of the source picture only
    slopes = 0.02 * (draw(3, 4, 2, seed=9) - 0.5)

    def lookup(plane, x, y):
        values = [0.5 + a * x + b * y for a, b in slopes[plane].tolist()]
        return values[:3], values[3]

    for plane in range(3):
        for row in range(SOURCE[0]):
            for column in range(SOURCE[1]):
                colour, value = lookup(plane, column + 0.5, row + 0.5)
                arguments["rgb"][0, plane, :, row, column] = torch.tensor(colour, dtype=F64)
                arguments["sigma"][0, plane, 0, row, column] = value
    rays = cast(arguments, lookup=lookup)
    assert (rays[3] == 3).all()
    assert_equal_to_rays(render(arguments), rays, 3)


@pytest.mark.parametrize("mode", ["sigma", "alpha"])
def test_the_source_view_is_what_rays_from_the_source_camera_see(mode):
    arguments = scene(target=SOURCE)
    if mode == "alpha":
        arguments["sigma"] = arguments["sigma"] / 2
    identity = {"R": torch.eye(3, dtype=F64).expand(2, 3, 3), "t": torch.zeros(2, 3, dtype=F64), "K_target": arguments["K_source"]}
    rgb, z, alpha, _ = cast({**arguments, **identity}, mode=mode)
    view = render_source_view(arguments["rgb"], arguments["sigma"], arguments["depth"], arguments["K_source"], mode=mode)
    torch.testing.assert_close(view.rgb, rgb, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(view.depth, z / alpha, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(view.alpha, alpha, rtol=1e-9, atol=1e-11)
    moved = render(arguments, **identity, mode=mode)
    torch.testing.assert_close(moved.rgb, view.rgb)
    torch.testing.assert_close(moved.disparity, view.disparity)
    assert moved.valid.all()


def test_distances_are_those_between_back_projected_points():
    K, depth = intrinsics(9.0, 8.0, 5.3, 3.1, 0.4)[None], torch.tensor([[1.0, 1.5, 4.0]], dtype=F64)
    result = plane_distances(depth, K, *SOURCE)
    assert result.shape == (1, 3, 1, *SOURCE)
    for row, column in ((0, 0), (6, 9), (3, 5)):
        points = [reference.unproject(K[0].tolist(), column + 0.5, row + 0.5, z) for z in depth[0].tolist()]
        for i in range(2):
            assert result[0, i, 0, row, column].item() == pytest.approx(math.dist(points[i], points[i + 1]), rel=1e-12)
    assert (result[:, 2] == 1e3).all()


def test_compositing_is_the_formula_written_as_a_loop():
    rgb, sigma, delta, depth = draw(1, 5, 3, 1, 2), 3 * draw(1, 5, 1, 1, 2, seed=1), draw(1, 5, 1, 1, 2, seed=2), 1 + draw(1, 5, seed=3)
    image, z, weights, transmittance = composite(rgb, sigma, delta, depth)
    for column in range(2):
        s, d = sigma[0, :, 0, 0, column].tolist(), delta[0, :, 0, 0, column].tolist()
        T = [math.exp(-sum(s[j] * d[j] for j in range(i))) for i in range(5)]
        w = [T[i] * (1 - math.exp(-s[i] * d[i])) for i in range(5)]
        assert transmittance[0, :, 0, 0, column].tolist() == pytest.approx(T, rel=1e-12)
        assert weights[0, :, 0, 0, column].tolist() == pytest.approx(w, rel=1e-12)
        for channel in range(3):
            expected = sum(w[i] * rgb[0, i, channel, 0, column].item() for i in range(5))
            assert image[0, channel, 0, column].item() == pytest.approx(expected, rel=1e-12)
        assert z[0, 0, 0, column].item() == pytest.approx(sum(w[i] * depth[0, i].item() for i in range(5)), rel=1e-12)


def test_opacities_composite_as_products_of_what_passes_written_as_a_loop():
    """C = sum T_i alpha_i c_i with T_i = prod_{j<i} (1 - alpha_j), the slides' volume rendering; densities have 1 - exp(-sigma delta)."""
    rgb, sigma, delta, depth = draw(1, 5, 3, 1, 2), 3 * draw(1, 5, 1, 1, 2, seed=1), draw(1, 5, 1, 1, 2, seed=2), 1 + draw(1, 5, seed=3)
    alpha = 1 - torch.exp(-sigma * delta)
    image, z, weights, transmittance = of_opacities = composite(rgb, alpha, None, depth, mode="alpha")
    for column in range(2):
        a = alpha[0, :, 0, 0, column].tolist()
        T = [math.prod(1 - a[j] for j in range(i)) for i in range(5)]
        assert transmittance[0, :, 0, 0, column].tolist() == pytest.approx(T, rel=1e-12)
        assert weights[0, :, 0, 0, column].tolist() == pytest.approx([T[i] * a[i] for i in range(5)], rel=1e-12)
        for channel in range(3):
            expected = sum(T[i] * a[i] * rgb[0, i, channel, 0, column].item() for i in range(5))
            assert image[0, channel, 0, column].item() == pytest.approx(expected, rel=1e-12)
        assert z[0, 0, 0, column].item() == pytest.approx(sum(T[i] * a[i] * depth[0, i].item() for i in range(5)), rel=1e-12)
    torch.testing.assert_close(of_opacities, composite(rgb, sigma, delta, depth))


@pytest.mark.parametrize("mode", ["sigma", "alpha"])
def test_gradients_of_the_source_view_are_those_of_finite_differences(mode):
    arguments = scene(batch=1, planes=3)
    cut = (slice(None), slice(None), slice(None), slice(0, 2), slice(0, 3))
    planes = [arguments["rgb"][cut], arguments["sigma"][cut] / 2, arguments["depth"], arguments["K_source"]]
    leaves = [value.clone().requires_grad_() for value in planes]

    def rendered(rgb, sigma, depth, K):
        view = render_source_view(rgb, sigma, depth, K, mode=mode)
        return view.rgb, view.depth, view.disparity, view.alpha, view.transmittance

    assert torch.autograd.gradcheck(rendered, leaves)


def test_blending_gives_visible_pixels_the_photographs_colour():
    rgb, image = draw(2, 3, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
    T = draw(2, 3, 1, 4, 5, seed=2)
    T[:, 0] = 1
    blended = blend_source(rgb, T, image)
    torch.testing.assert_close(blended[:, 0], image)
    b, i, c, y, x = 1, 2, 0, 3, 4
    expected = T[b, i, 0, y, x] * image[b, c, y, x] + (1 - T[b, i, 0, y, x]) * rgb[b, i, c, y, x]
    torch.testing.assert_close(blended[b, i, c, y, x], expected)


def test_gradients_of_blended_colours_reach_the_densities_that_let_the_light_through():
    rgb, image, T = draw(1, 2, 3, 2, 2), draw(1, 3, 2, 2, seed=1), draw(1, 2, 1, 2, 2, seed=2)
    leaves = [value.requires_grad_() for value in (rgb, T, image)]
    assert torch.autograd.gradcheck(blend_source, leaves)
    blend_source(*leaves).sum().backward()
    assert T.grad.abs().min() > 0


def test_weighted_sums_are_those_of_the_products():
    weights, values = draw(2, 4, 1, 3, 5), draw(2, 4, 3, 3, 5, seed=1)
    torch.testing.assert_close(weighted_sum(weights, values), (weights * values).sum(dim=1))


@pytest.mark.parametrize("mode", ["sigma", "alpha"])
def test_mean_plane_weights_are_the_averages_of_the_weights(mode):
    arguments = scene(target=SOURCE)
    rgb, sigma, depth, K = arguments["rgb"], arguments["sigma"] / 2, arguments["depth"], arguments["K_source"]
    view = render_source_view(rgb, sigma, depth, K, mode=mode)
    weights = composite(rgb, sigma, plane_distances(depth, K, *SOURCE), depth, mode=mode)[2]
    torch.testing.assert_close(mean_plane_weights(view), weights.mean(dim=(2, 3, 4)))
    with pytest.raises(ValueError, match="transmittance"):
        mean_plane_weights(render(arguments))
