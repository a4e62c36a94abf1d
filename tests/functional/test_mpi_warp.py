"""Homographies and the factored hits against 3D points moved between the cameras one at a time."""

import pytest
import torch

from co3d_ensemble.functional.cameras import so3_exp
from co3d_ensemble.functional.mpi_warp import inverse_plane_homographies, pixel_directions, plane_hits, plane_homographies
from tests.functional import mpi_reference as reference
from tests.functional.test_mpi import F64, SOURCE, TARGET, draw, intrinsics, scene

PIXELS = [(0.5, 0.5), (9.5, 6.5), (3.2, 5.9), (-4.0, 11.0)]


def cameras(batch=2):
    arguments = scene(batch=batch, angle=0.4)
    return {name: arguments[name] for name in ("K_source", "K_target", "R", "t", "depth")}


def move(H, x, y):
    moved = H @ torch.tensor([x, y, 1.0], dtype=F64)
    return (moved[:2] / moved[2]).tolist(), moved[2].item()


def entries(given):
    for b in range(len(given["R"])):
        K_source, K_target, R, t = (given[name][b].tolist() for name in ("K_source", "K_target", "R", "t"))
        for i, z in enumerate(given["depth"][b].tolist()):
            yield b, i, z, K_source, K_target, R, t


def test_the_homography_moves_pixels_as_reprojected_points_of_the_plane():
    given = cameras()
    H = plane_homographies(**given)
    assert H.shape == (2, 4, 3, 3)
    for b, i, z, K_source, K_target, R, t in entries(given):
        for x, y in PIXELS:
            point = reference.apply(R, t, reference.unproject(K_source, x, y, z))
            position, third = move(H[b, i], x, y)
            assert position == pytest.approx(reference.project(K_target, point), rel=1e-9)
            assert third == pytest.approx(point[2] / z, rel=1e-9)


def test_the_closed_form_is_the_inverse_and_its_third_component_is_the_rays_rise():
    given = cameras()
    H, inverse = plane_homographies(**given), inverse_plane_homographies(**given)
    expected = torch.linalg.inv(H)
    scale = (1 + (given["R"][:, :, 2] * given["t"]).sum(dim=1)[:, None] / given["depth"])[..., None, None]
    torch.testing.assert_close(inverse, expected * scale, rtol=1e-9, atol=1e-9)
    ray = reference.back(given["R"][1].tolist(), [0.0] * 3, reference.unproject(given["K_target"][1].tolist(), 3.2, 5.9, 1.0))
    assert move(inverse[1, 2], 3.2, 5.9)[1] == pytest.approx(ray[2], rel=1e-9)


def test_the_slides_equation_5_is_the_same_map_with_its_own_signs():
    """K (R' - t' n'^T / z) K^-1 from target to source, with the pose from target to source and the plane n'^T X = -z."""
    given = cameras(batch=1)
    R, t, K = given["R"][0], given["t"][0], given["K_source"][0]
    z = given["depth"][0, 1]
    back, shift = R.T, -R.T @ t
    # the source's plane (0, 0, 1) X_s = z in the target's frame: n' = R e_z, n' X_t = z + n' t =: offset
    n = R[:, 2]
    offset = z + n @ t
    slide = K @ (back - shift[:, None] * n[None, :] / -offset) @ torch.linalg.inv(K)
    ours = inverse_plane_homographies(K[None], K[None], R[None], t[None], z[None, None])[0, 0]
    torch.testing.assert_close(slide / slide.norm(), ours / ours.norm())


def test_a_plane_through_the_target_camera_has_a_finite_map_to_the_epipole():
    t, R = torch.tensor([[0.2, 0.1, -2.0]], dtype=F64), torch.eye(3, dtype=F64)[None]
    K = intrinsics(9.0, 8.0, 5.3, 3.1)[None]
    H = inverse_plane_homographies(K, K, R, t, torch.tensor([[2.0]], dtype=F64))[0, 0]
    for x, y in PIXELS:
        assert move(H, x, y)[0] == pytest.approx(reference.project(K[0].tolist(), [-0.2, -0.1, 2.0]))


def test_back_projection_is_equation_3():
    K = intrinsics(9.0, 8.0, 5.3, 3.1, 0.4)
    directions = pixel_directions(K[None], *SOURCE)[0]
    assert directions[:, 4, 7].tolist() == pytest.approx(reference.unproject(K.tolist(), 7.5, 4.5, 1.0))
    torch.testing.assert_close((torch.linalg.inv(K) @ torch.tensor([7.5, 4.5, 1.0], dtype=F64)) * 3, directions[:, 4, 7] * 3)


def test_hits_are_those_of_the_homography_and_of_points_on_the_ray():
    given = cameras()
    hits = plane_hits(**given, source_size=SOURCE, target_size=TARGET, dtype=F64)
    inverse = inverse_plane_homographies(**given)
    for b, i, z, K_source, K_target, R, t in entries(given):
        for row, column in ((0, 0), (7, 5), (3, 2)):
            grid = hits.positions[b, :, row, column] * hits.scale[b, i] + hits.shift[b, i]
            x, y = (grid[0].item() + 1) / 2 * SOURCE[1], (grid[1].item() + 1) / 2 * SOURCE[0]
            assert move(inverse[b, i], column + 0.5, row + 0.5)[0] == pytest.approx([x, y], rel=1e-9)
            point = reference.apply(R, t, reference.unproject(K_source, x, y, z))
            assert reference.project(K_target, point) == pytest.approx([column + 0.5, row + 0.5], rel=1e-9)
            assert (hits.ahead[b, i] * hits.advance[b, 0, row, column]).item() == pytest.approx(point[2], rel=1e-9)


def test_equation_6_is_the_distance_between_warped_points():
    given = cameras()
    hits = plane_hits(**given, source_size=SOURCE, target_size=TARGET, dtype=F64)
    reach = hits.spacing[:, :, None, None, None] * hits.length[:, None] + hits.rest[:, :, None, None, None]
    inverse = inverse_plane_homographies(**given)
    for b in range(2):
        K, z = given["K_source"][b].tolist(), given["depth"][b].tolist()
        points = [torch.tensor(reference.unproject(K, *move(inverse[b, i], 2.5, 6.5)[0], z[i]), dtype=F64) for i in range(len(z))]
        for i in range(len(z) - 1):
            assert reach[b, i, 0, 6, 2].item() == pytest.approx((points[i + 1] - points[i]).norm().item(), rel=1e-9)
        assert (reach[b, -1] == 1e3).all()


def test_autocast_does_not_round_the_homographies():
    given = {name: value.float() for name, value in cameras().items()}
    plain = plane_homographies(**given), inverse_plane_homographies(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plane_homographies(**given), plain[0]) and torch.equal(inverse_plane_homographies(**given), plain[1])


def test_homographies_are_differentiable_in_the_pose():
    given = cameras(batch=1)
    vector, t = 0.1 * draw(1, 3), given["t"]

    def warped(vector, t):
        return plane_homographies(given["K_source"], given["K_target"], so3_exp(vector), t, given["depth"])

    assert torch.autograd.gradcheck(warped, (vector.requires_grad_(), t.clone().requires_grad_()))
