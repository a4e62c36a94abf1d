"""Mistakes made on purpose, by formulas of their own, and undone."""

from dataclasses import replace

import pytest
import torch

from co3d_ensemble.functional.cameras import camera_center, ndc_from_pinhole, opencv_from_pinhole, pinhole_from_ndc, project, so3_exp
from co3d_ensemble.functional.conventions import camera_mistakes
from co3d_ensemble.functional.types import PinholeCamera

CAMERA = PinholeCamera(
    so3_exp(torch.tensor([0.4, -1.1, 0.7])), torch.tensor([0.3, -0.2, 4.0]), torch.tensor([70.0, 70.0]), torch.tensor([35.0, 22.0]), 48, 64
)
TO_OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0]))  # of OpenCV's axes


def opencv_columns(camera):
    """COLMAP's R and t as they are."""
    _, R, t = opencv_from_pinhole(camera)
    return replace(camera, R=R, T=t)


def opencv_rows(camera):
    _, R, t = opencv_from_pinhole(camera)
    return replace(camera, R=R.T, T=t)


def transform_matrix(camera):
    """Rotation and last column of NeRF's ``transforms.json``: camera to world, OpenGL's axes, column vectors."""
    _, R, t = opencv_from_pinhole(camera)
    return replace(camera, R=R.T @ TO_OPENGL, T=-R.T @ t)


def opengl_rows(camera):
    _, R, t = opencv_from_pinhole(camera)
    return replace(camera, R=(TO_OPENGL @ R).T, T=TO_OPENGL @ t)


def inverse_pose(camera):
    """Camera to world, row vectors."""
    return replace(camera, R=camera.R.T, T=camera_center(camera.R, camera.T))


def other_ndc(told, written):
    def made(camera):
        focal, principal = ndc_from_pinhole(camera)  # as ndc_isotropic
        if told == "ndc_norm_image_bounds":
            side = torch.tensor([camera.width, camera.height]) / min(camera.width, camera.height)
            focal, principal = focal / side, principal / side
        return pinhole_from_ndc(camera.R, camera.T, focal, principal, height=camera.height, width=camera.width, intrinsics_format=written)

    return made


MADE = {
    "OpenCV's axes": opencv_rows,
    "OpenGL's or Blender's axes": opengl_rows,
    "R is meant for column vectors": lambda camera: replace(camera, R=camera.R.T),
    "T is the camera's position": lambda camera: replace(camera, T=camera_center(camera.R, camera.T)),
    "transpose it, then the cameras have OpenCV's axes": opencv_columns,
    "transpose it, then T is the camera's position (camera-to-world): T must be minus that position times R": inverse_pose,
    "times R, then the cameras have OpenGL's or Blender's axes": transform_matrix,
    "set intrinsics_format to ndc_norm_image_bounds": other_ndc("ndc_norm_image_bounds", "ndc_isotropic"),
    "set intrinsics_format to ndc_isotropic": other_ndc("ndc_isotropic", "ndc_norm_image_bounds"),
    "principal point has the wrong sign": lambda camera: replace(camera, principal=torch.tensor([64.0, 48.0]) - camera.principal),
}


@pytest.mark.parametrize("told", MADE)
def test_a_mistake_is_undone_by_the_one_that_names_it(told):
    wrong = MADE[told](CAMERA)
    mended = next(mistake for mistake in camera_mistakes(wrong) if told in mistake.told).undone(wrong)
    for name in ("R", "T", "focal", "principal"):
        torch.testing.assert_close(getattr(mended, name), getattr(CAMERA, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("told", "axis"), [("mirrored left to right", 0), ("upside down", 1)])
def test_the_camera_of_a_mirrored_picture_sees_every_point_at_its_mirrored_place(told, axis):
    mended = next(mistake for mistake in camera_mistakes(CAMERA) if told in mistake.told).undone(CAMERA)
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    expected, z = project(points, CAMERA)
    expected[:, axis] = (64, 48)[axis] - expected[:, axis]
    found, same = project(points, mended)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(same, z)


def test_simple_mistakes_come_first_and_a_square_picture_has_one_ndc_format():
    told = [mistake.told for mistake in camera_mistakes(CAMERA)]
    combined = [", then " in text for text in told[:15]]
    assert combined == sorted(combined) and len(set(told)) == len(told)
    square = [mistake.told for mistake in camera_mistakes(CAMERA.resized(64, 64))]
    assert [text for text in told if text not in square] == [text for text in told if "intrinsics_format" in text]
