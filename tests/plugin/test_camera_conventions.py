"""Our OpenCV form of a camera against PyTorch3D's own conversion."""

import pytest
import torch

import co3d_ensemble.plugin  # noqa: F401 - makes pytorch3d importable
from co3d_ensemble.functional.cameras import opencv_from_pinhole, pinhole_from_opencv, relative_pose, so3_exp
from co3d_ensemble.functional.types import PinholeCamera
from co3d_ensemble.plugin.frames import pytorch3d_cameras


def cameras(height, width):
    rotations = so3_exp(torch.tensor([[0.3, -1.1, 0.4], [-0.2, 0.1, 2.0]]))
    translations = torch.tensor([[0.2, -0.3, 4.0], [1.0, 0.5, 3.0]])
    return [
        PinholeCamera(R, T, torch.tensor([31.0, 29.0]), torch.tensor([0.4 * width, 0.55 * height]), height, width)
        for R, T in zip(rotations, translations)
    ]


@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12), (16, 16)])
def test_pytorch3d_converts_to_the_same_matrices(height, width):
    from pytorch3d.utils import opencv_from_cameras_projection

    for camera in cameras(height, width):
        R, t, K = opencv_from_cameras_projection(pytorch3d_cameras([camera]), torch.tensor([[height, width]]))
        ours = opencv_from_pinhole(camera)
        for name, theirs, value in zip(("K", "R", "t"), (K, R, t), ours):
            torch.testing.assert_close(value, theirs[0], msg=lambda m, name=name: f"{name}: {m}")


def test_pytorch3d_sees_a_point_of_the_source_at_the_pixel_that_the_relative_pose_says():
    source, target = cameras(12, 20)
    K_source, *source_pose = opencv_from_pinhole(source)
    K_target, *target_pose = opencv_from_pinhole(target)
    R, t = relative_pose(*source_pose, *target_pose)
    in_source = torch.linalg.inv(K_source) @ torch.tensor([7.5, 3.5, 1.0]) * 4.2
    in_target = K_target @ (R @ in_source + t)
    world = (
        pytorch3d_cameras([source]).get_world_to_view_transform().inverse().transform_points(in_source[None] * torch.tensor([-1.0, -1, 1]))
    )
    screen = pytorch3d_cameras([target]).transform_points_screen(world, image_size=((12, 20),))[0, :2]
    torch.testing.assert_close(in_target[:2] / in_target[2], screen, rtol=1e-4, atol=1e-4)


def test_cameras_from_opencv_are_pytorch3ds():
    from pytorch3d.utils import cameras_from_opencv_projection

    camera = cameras(12, 20)[0]
    K, R, t = opencv_from_pinhole(camera)
    theirs = cameras_from_opencv_projection(R[None], t[None], K[None], torch.tensor([[12, 20]]))
    ours = pytorch3d_cameras([pinhole_from_opencv(K, R, t, height=12, width=20)])
    for name in ("R", "T", "focal_length", "principal_point"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), msg=lambda m, name=name: f"{name}: {m}")
