"""One pass per picture, and views that are where geometry says."""

from __future__ import annotations

import math

import pytest
import torch

from co3d_ensemble.mine.inference import (
    LARGEST_ZOOM,
    blended,
    enlarged,
    predict_stack,
    render_pose,
    surface_disparities,
    zoom_hiding_borders,
)
from co3d_ensemble.mine.trajectories import Pose, trajectory
from tests.mine.stacks import OPAQUE, camera, opaque_stack, random_stack, smooth_picture


def sideways(shift):
    """The camera moves by -shift, so that the scene moves to the right."""
    return Pose(torch.eye(3), torch.tensor([shift, 0.0, 0.0]))


class CountingNetwork:
    """Gives planes of the disparity's own grey; opaque at the second."""

    mode = "sigma"

    def __init__(self):
        self.encoded = 0

    def encode(self, image):
        self.encoded += 1
        return image

    def decode(self, features, disparity, *, plane_chunk=None, n_scales=None):
        shape = (*disparity.shape, 1, *features.shape[-2:])
        sigma = torch.zeros(shape)
        sigma[:, 1] = OPAQUE
        return [(disparity[:, :, None, None, None].expand(*disparity.shape, 3, *features.shape[-2:]), sigma)]


def test_a_picture_is_encoded_once_for_any_number_of_planes_and_views():
    network, image = CountingNetwork(), smooth_picture(24, 32)
    features = network.encode(image[None])
    for disparity in (torch.tensor([0.9, 0.5, 0.1]), torch.linspace(0.9, 0.1, 8)):
        stack = predict_stack(network, image, camera(24, 32), disparity, features=features)
        render_pose(stack, sideways(0.1))
        render_pose(stack, sideways(0.2))
        assert stack.rgb.shape == (len(disparity), 3, 24, 32)
    assert network.encoded == 1


def test_fine_planes_stand_where_the_coarse_ones_found_the_surface():
    """All weight is on the second plane, whose share of the range ends halfway to its neighbours."""
    image, coarse = smooth_picture(24, 32), torch.tensor([0.9, 0.5, 0.1])
    stack = predict_stack(CountingNetwork(), image, camera(24, 32), coarse, n_fine=2)
    torch.testing.assert_close(stack.disparity, torch.tensor([0.9, 0.6, 0.5, 0.4, 0.1]))
    assert stack.rgb.shape == (5, 3, 24, 32)


def test_visible_source_pixels_keep_the_photographs_colours_and_hidden_ones_the_networks():
    image, disparity = smooth_picture(24, 32), torch.tensor([0.9, 0.5, 0.1])
    stack = predict_stack(CountingNetwork(), image, camera(24, 32), disparity)
    assert torch.allclose(stack.view.rgb[0], image, atol=1e-6)
    assert torch.allclose(stack.rgb[2], torch.full_like(image, 0.1))  # behind the opaque plane
    plain = predict_stack(CountingNetwork(), image, camera(24, 32), disparity, blend=False)
    assert torch.allclose(plain.view.rgb[0], torch.full_like(image, 0.5))


def test_a_plane_moves_by_focal_length_times_shift_times_its_disparity():
    stack = opaque_stack()
    pixels = 3
    shift = pixels / (stack.K[0, 0].item() * 0.5)
    view = render_pose(stack, sideways(shift))
    assert torch.allclose(view.rgb[0, :, :, pixels:], stack.view.rgb[0, :, :, :-pixels], atol=1e-5)
    assert view.rgb[0, :, :, :pixels].abs().max() == 0 and not view.valid[0, 0, :, 0].any()
    assert torch.allclose(view.depth[0, 0, :, pixels:], torch.tensor(2.0), atol=1e-5)


def test_a_view_can_have_another_camera_and_another_size():
    stack = opaque_stack()
    K = torch.tensor([2.0, 2.0, 1.0])[:, None] * stack.K
    view = render_pose(stack, Pose(torch.eye(3), torch.zeros(3)), K=K, size=(48, 64), plane_chunk=1)
    assert view.rgb.shape == (1, 3, 48, 64)
    pairs = torch.nn.functional.avg_pool2d(view.rgb, 2)
    assert (pairs - stack.view.rgb)[..., 1:-1, 1:-1].abs().max() < 0.03  # interpolation between the same pixels


def test_an_enlarged_stack_shows_the_large_photograph_from_the_source_and_moves_by_twice_the_pixels():
    stack, large = opaque_stack(), smooth_picture(48, 64, seed=3)
    twice = enlarged(stack, large)
    assert torch.allclose(twice.view.rgb[0], large, atol=1e-5) and twice.size == (48, 64)
    assert torch.allclose(twice.K, torch.tensor([2.0, 2.0, 1.0])[:, None] * stack.K)
    view = render_pose(twice, sideways(3 / (stack.K[0, 0].item() * 0.5)))
    assert torch.allclose(view.rgb[0, :, :, 6:], large[:, :, :-6], atol=1e-5)


def test_disparities_of_surfaces_are_quantiles_of_what_is_seen():
    height, width = 10, 10
    sigma = torch.zeros(3, 1, height, width)
    sigma[0, :, :, :2], sigma[1, :, :, 2:8], sigma[2, :, :, 8:] = OPAQUE, OPAQUE, OPAQUE
    stack = blended(torch.zeros(3, 3, height, width), sigma, torch.tensor([1.0, 0.5, 0.1]), camera(height, width), mode="sigma", image=None)
    assert surface_disparities(stack, (1.0, 0.95, 0.5, 0.05)) == pytest.approx([1.0, 1.0, 0.5, 0.1], rel=1e-4)


def test_where_nothing_is_opaque_the_disparities_are_still_finite():
    stack = random_stack(3, mode="alpha", density=0.0)
    assert all(math.isfinite(value) for value in surface_disparities(stack, (0.0, 0.5, 1.0)))


# Zoom


def test_without_movement_nothing_has_to_be_hidden():
    assert zoom_hiding_borders([Pose(torch.eye(3), torch.zeros(3))], camera(24, 32), (24, 32), (1.0, 0.1)) == 1.0


def test_a_shift_to_both_sides_needs_the_zoom_that_hides_it():
    K, nearest, pixels = camera(24, 32), 0.8, 4
    shift = pixels / (K[0, 0].item() * nearest)
    zoom = zoom_hiding_borders([sideways(shift), sideways(-shift)], K, (24, 32), (nearest, 0.1))
    assert zoom == pytest.approx(16 / (16 - pixels), rel=1e-3)


@pytest.mark.parametrize("kind", ["circle", "spiral"])
def test_a_zoomed_path_shows_the_source_picture_only_and_hardly_less_zoom_does_not(kind):
    near, middle, far = disparity = (0.8, 0.4, 0.2)
    stacks = [opaque_stack(48, 64, disparity=disparity, surface=surface) for surface in (0, 2)]
    K, size = stacks[0].K, stacks[0].size
    poses = trajectory(kind, 12, focal=K[0, 0].item(), width=size[1], near=near, focus=middle, amplitude=0.1)
    zoom = zoom_hiding_borders(poses, K, size, (near, far))
    assert 1.1 < zoom < LARGEST_ZOOM

    def all_seen(factor):
        zoomed = torch.tensor([[factor * K[0, 0], 0, K[0, 2]], [0, factor * K[1, 1], K[1, 2]], [0, 0, 1]])
        return all((render_pose(stack, pose, K=zoomed).alpha > 0.99).all() for stack in stacks for pose in poses)

    assert all_seen(zoom)
    assert not all_seen(1 + 0.6 * (zoom - 1))  # the corner pixels' centres are half a pixel inside of the corners


def test_a_movement_that_no_zoom_hides_gets_the_largest():
    assert zoom_hiding_borders([sideways(10.0)], camera(24, 32), (24, 32), (1.0,)) == LARGEST_ZOOM
