import math

import pytest
import torch

from co3d_ensemble.functional.cameras import (
    camera_center,
    distance_to_depth,
    intersect_box,
    inverse_intrinsics,
    ndc_from_pinhole,
    nearest_point_to_rays,
    opencv_from_pinhole,
    pinhole_from_ndc,
    pinhole_from_opencv,
    pixel_centers,
    pixel_rays,
    project,
    relative_pose,
    resized_intrinsics,
    so3_exp,
)


def make_camera(intrinsics_format="ndc_isotropic", height=40, width=60):
    R = so3_exp(torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64))
    T = torch.tensor([0.1, -0.2, 5.0], dtype=torch.float64)
    focal, principal = torch.tensor([2.0, 2.2], dtype=torch.float64), torch.tensor([0.1, -0.05], dtype=torch.float64)
    return pinhole_from_ndc(R, T, focal, principal, height=height, width=width, intrinsics_format=intrinsics_format)


@pytest.mark.parametrize("intrinsics_format", ["ndc_isotropic", "ndc_norm_image_bounds"])
def test_points_on_a_pixels_ray_project_back_to_that_pixel(intrinsics_format):
    camera = make_camera(intrinsics_format)
    xy = pixel_centers(camera.height, camera.width).double()
    origins, directions = pixel_rays(camera, xy)
    distance = torch.linspace(1, 9, len(xy), dtype=torch.float64)
    pixels, z = project(origins + distance[:, None] * directions, camera)
    assert torch.allclose(pixels, xy, atol=1e-9)
    assert torch.allclose(z, distance_to_depth(distance, directions, camera.R), atol=1e-12)


def test_ndc_round_trip():
    camera = make_camera()
    focal, principal = ndc_from_pinhole(camera)
    assert torch.allclose(focal, torch.tensor([2.0, 2.2], dtype=torch.float64))
    assert torch.allclose(principal, torch.tensor([0.1, -0.05], dtype=torch.float64))


def test_resizing_keeps_the_ray_of_a_picture_position():
    camera = make_camera()
    small = camera.resized(10, 30)
    _, full = pixel_rays(camera, torch.tensor([[20.0, 12.0]], dtype=torch.float64))
    _, half = pixel_rays(small, torch.tensor([[10.0, 3.0]], dtype=torch.float64))
    assert torch.allclose(full, half)


def test_unknown_format_is_refused_by_name():
    with pytest.raises(ValueError, match="pixels_please"):
        make_camera("pixels_please")


def test_so3_exp_equals_the_matrix_exponential_and_has_a_finite_gradient_at_zero():
    v = torch.tensor([[0.4, -1.1, 2.0], [1e-6, 0, 0], [0, 0, 0]], dtype=torch.float64, requires_grad=True)
    x, y, z = v.detach().unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).reshape(-1, 3, 3)
    assert torch.allclose(so3_exp(v), torch.linalg.matrix_exp(skew), atol=1e-12)
    so3_exp(v).sum().backward()
    assert torch.isfinite(v.grad).all()


def test_box_intersection_by_hand():
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    origins = torch.tensor([[-3.0, 0, 0], [0, 0, 0], [-3, 5, 0], [3, 0, 0], [-3, 0.5, 0.5]])
    directions = torch.tensor([[1.0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    near, far = intersect_box(origins, directions, box)
    assert near.tolist() == pytest.approx([2, 0, 0, 0, 2])
    assert far.tolist() == pytest.approx([4, 1, 0, 0, 4])


def test_nearest_point_to_rays_recovers_a_common_point():
    target = torch.tensor([0.3, -2.0, 1.5], dtype=torch.float64)
    origins = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(target - origins, dim=-1)
    assert torch.allclose(nearest_point_to_rays(origins, directions), target, atol=1e-9)


def test_camera_center_maps_to_the_view_origin():
    camera = make_camera()
    assert torch.allclose(camera_center(camera.R, camera.T) @ camera.R + camera.T, torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert math.isclose(float(torch.det(camera.R)), 1.0, abs_tol=1e-12)


def test_intrinsics_are_inverted_in_closed_form_with_skew_and_in_batches():
    K = torch.tensor([[[9.0, 0.4, 5.3], [0, 8.0, 3.1], [0, 0, 1]], [[7.0, 0, 2.0], [0, 6.5, 4.0], [0, 0, 1]]], dtype=torch.float64)
    assert torch.allclose(inverse_intrinsics(K), torch.linalg.inv(K), atol=1e-14)
    assert (inverse_intrinsics(K)[:, 2] == torch.tensor([0.0, 0, 1])).all()
    assert torch.allclose(inverse_intrinsics(K[1]), torch.linalg.inv(K[1]), atol=1e-14)


def test_a_cameras_opencv_form_projects_points_to_the_same_pixels_and_depths():
    camera = make_camera()
    K, R, t = opencv_from_pinhole(camera)
    points = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = points @ R.T + t
    pixels, z = project(points, camera)
    assert torch.allclose(seen[:, 2], z)
    assert torch.allclose((seen @ K.T)[:, :2] / seen[:, 2:], pixels)
    assert math.isclose(float(torch.det(R)), 1.0, abs_tol=1e-12)


def test_the_opencv_form_leads_back_to_the_camera_and_skew_is_refused():
    camera = make_camera()
    K, R, t = opencv_from_pinhole(camera)
    back = pinhole_from_opencv(K, R, t, height=camera.height, width=camera.width)
    for name in ("R", "T", "focal", "principal"):
        assert torch.allclose(getattr(back, name), getattr(camera, name), atol=1e-15), name
    assert (back.height, back.width) == (camera.height, camera.width)
    K[0, 1] = 0.5
    with pytest.raises(ValueError, match="skew 0.5"):
        pinhole_from_opencv(K, R, t, height=4, width=6)


def test_the_relative_pose_leads_from_camera_to_camera():
    generator = torch.Generator().manual_seed(0)
    rotations = so3_exp(torch.randn(2, 5, 3, dtype=torch.float64, generator=generator))
    translations = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    point = torch.randn(3, dtype=torch.float64, generator=generator)
    source, target = (R @ point + t for R, t in zip(rotations, translations))
    R, t = relative_pose(rotations[0], translations[0], rotations[1], translations[1])
    assert torch.allclose((R @ source[..., None])[..., 0] + t, target, atol=1e-12)


def test_intrinsics_of_a_resized_picture_are_those_of_the_resized_camera():
    camera = make_camera()
    K = opencv_from_pinhole(camera)[0]
    assert torch.allclose(resized_intrinsics(K, (40, 60), (10, 30)), opencv_from_pinhole(camera.resized(10, 30))[0])
