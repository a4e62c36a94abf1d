"""The ray bank: PyTorch3D's own rays for the same pixels, that pixel's target, and a cost that does not know the frames."""

import math

import pytest
import torch
from pytorch3d.renderer import NDCMultinomialRaysampler, PerspectiveCameras
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from co3d_ensemble.data.ray_bank import RayBank
from co3d_ensemble.functional.cameras import angle_between, camera_center, pinhole_from_ndc, project, so3_exp
from co3d_ensemble.functional.types import Frame

SIZES = [(7, 11), (12, 5), (6, 6)]
FORMATS = ["ndc_isotropic", "ndc_norm_image_bounds"]


def extrinsics(index: int):
    R = so3_exp(torch.tensor([0.3, -1.1 + 0.9 * index, 0.4]))
    return R, torch.tensor([0.2, -0.3 * index, 4.0 + index])


INTRINSICS = torch.tensor([2.1, 1.7]), torch.tensor([0.21, -0.13])  # focal, principal point: unequal, off centre


def frame(index: int, size, intrinsics_format="ndc_isotropic") -> Frame:
    (height, width), (R, T), (focal, principal) = size, extrinsics(index), INTRINSICS
    generator = torch.Generator().manual_seed(index)
    return Frame(
        name=f"thing/{index}",
        sequence_name="thing",
        frame_number=index,
        rgb=torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8),
        mask=torch.randint(0, 256, (1, height, width), generator=generator, dtype=torch.uint8),
        camera=pinhole_from_ndc(R, T, focal, principal, height=height, width=width, intrinsics_format=intrinsics_format),
    )


def frames(intrinsics_format="ndc_isotropic"):
    return [frame(i, size, intrinsics_format) for i, size in enumerate(SIZES)]


def pytorch3d_rays(index: int, size, intrinsics_format):
    """Origins and unit directions of every pixel, row by row, by PyTorch3D's raysampler."""
    (height, width), (R, T), (focal, principal) = size, extrinsics(index), INTRINSICS
    if intrinsics_format == "ndc_norm_image_bounds":  # CO3Dv1, as Implicitron's dataset rescales it
        to_isotropic = torch.tensor([width, height]) / min(height, width)
        focal, principal = focal * to_isotropic, principal * to_isotropic
    cameras = PerspectiveCameras(R=R[None], T=T[None], focal_length=focal[None], principal_point=principal[None])
    sampler = NDCMultinomialRaysampler(
        image_width=width, image_height=height, n_pts_per_ray=1, min_depth=1.0, max_depth=1.0, unit_directions=True
    )
    bundle = sampler(cameras)
    return bundle.origins.reshape(-1, 3), bundle.directions.reshape(-1, 3)


@pytest.mark.parametrize("intrinsics_format", FORMATS)
def test_every_ray_is_the_one_of_pytorch3ds_raysampler(intrinsics_format):
    bank = RayBank(frames(intrinsics_format))
    batch = bank.rays(torch.arange(len(bank.pixels)))
    expected = [pytorch3d_rays(i, size, intrinsics_format) for i, size in enumerate(SIZES)]
    assert (batch.origins - torch.cat([o for o, _ in expected])).abs().max() <= 1e-5
    assert (batch.directions - torch.cat([d for _, d in expected])).abs().max() <= 1e-5


def test_targets_are_the_colour_and_mask_of_the_rays_own_pixel():
    all_frames = frames()
    batch = RayBank(all_frames).sample(300, torch.Generator().manual_seed(0))
    assert set(batch.frame.tolist()) == {0, 1, 2}
    for i in range(300):
        f = all_frames[int(batch.frame[i])]
        x, y = (int(v - 0.5) for v in batch.xy[i])
        torch.testing.assert_close(batch.targets.rgb[i], f.rgb[:, y, x].float() / 255)
        assert batch.targets.mask[i] == float(f.mask[0, y, x] > 127)


def test_rays_pass_through_the_pixel_that_they_name():
    all_frames = frames()
    batch = RayBank(all_frames).sample(100, torch.Generator().manual_seed(0))
    for i in range(100):
        pixel, z = project(batch.origins[i] + 5 * batch.directions[i], all_frames[int(batch.frame[i])].camera)
        torch.testing.assert_close(pixel, batch.xy[i], rtol=0, atol=1e-4)
        assert z > 0


def test_pixels_are_drawn_uniformly_from_all_frames():
    bank = RayBank(frames())
    batch = bank.sample(60_000, torch.Generator().manual_seed(0))
    width = torch.tensor([w for _, w in SIZES])[batch.frame]
    row = bank.first[batch.frame] + (batch.xy[:, 1] - 0.5).long() * width + (batch.xy[:, 0] - 0.5).long()
    count = row.bincount(minlength=len(bank.pixels)).double()
    expected = 60_000 / len(bank.pixels)
    assert len(count) == len(bank.pixels)
    assert ((count - expected).abs() < 5 * math.sqrt(expected)).all()


def test_the_same_generator_state_draws_the_same_rays_and_another_other_ones():
    bank = RayBank(frames())
    first, again, other = (bank.sample(50, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.origins, again.origins) and torch.equal(first.directions, again.directions)
    assert torch.equal(first.targets.rgb, again.targets.rgb)
    assert not torch.equal(first.directions, other.directions)


class Recorder(TorchDispatchMode):
    """Operations that run, and the number of elements of every tensor that one of them makes."""

    def __init__(self):
        super().__init__()
        self.operations, self.elements, self.fetched = [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append(str(function))
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in inputs:  # a view is not made
                self.elements.append(x.numel())
        return result


def recorded(n_frames, size, n_rays, **jitter) -> Recorder:
    bank = RayBank([frame(i, size) for i in range(n_frames)])
    with Recorder() as recorder:
        bank.sample(n_rays, torch.Generator().manual_seed(0), **jitter)
    return recorder


def test_sampling_makes_nothing_larger_than_a_few_numbers_per_ray():
    recorder = recorded(6, (120, 90), 16)
    assert len(recorder.elements) > 10
    assert max(recorder.elements) <= 9 * 16  # one 3 x 3 rotation per ray


def test_the_cost_of_sampling_depends_neither_on_the_number_nor_on_the_size_of_frames():
    small, many, large = recorded(1, (4, 4), 16), recorded(40, (4, 4), 16), recorded(1, (300, 200), 16)
    assert small.operations == many.operations == large.operations
    assert small.elements == many.elements == large.elements


def test_jitter_adds_one_small_motion_per_camera_and_nothing_per_pixel():
    jitter = {"angle_std": 0.1, "shift_std": 0.1, "pivot": torch.zeros(3)}
    assert recorded(5, (4, 4), 64, **jitter).elements == recorded(5, (90, 70), 64, **jitter).elements
    assert max(recorded(5, (90, 70), 64, **jitter).elements) <= 9 * 64


def test_sampling_never_waits_for_the_device():
    operations = recorded(3, (5, 7), 16, angle_std=0.1, shift_std=0.1, pivot=torch.zeros(3)).operations
    assert not [name for name in operations if "_local_scalar_dense" in name or "nonzero" in name]


PIVOT = torch.tensor([0.5, -0.2, 0.3])


def test_jitter_rotates_each_camera_rigidly_about_the_pivot_and_keeps_the_targets():
    bank = RayBank(frames())
    index = torch.arange(len(bank.pixels))
    still = bank.rays(index)
    torch.manual_seed(0)
    moved = bank.rays(index, angle_std=0.2, pivot=PIVOT)
    assert torch.equal(still.targets.rgb, moved.targets.rgb) and torch.equal(still.targets.mask, moved.targets.mask)
    torch.testing.assert_close((moved.origins - PIVOT).norm(dim=-1), (still.origins - PIVOT).norm(dim=-1))
    angles = []
    for k in range(len(SIZES)):
        own = still.frame == k
        # one rotation explains the camera's position and all its directions
        before = torch.cat((still.directions[own], (still.origins[own] - PIVOT)[:1]))
        after = torch.cat((moved.directions[own], (moved.origins[own] - PIVOT)[:1]))
        u, _, vh = torch.linalg.svd(before.double().T @ after.double())
        rotation = (vh.T @ u.T).float()
        torch.testing.assert_close(before @ rotation.T, after, rtol=1e-4, atol=1e-4)
        angles.append(rotation)
    assert not torch.allclose(angles[0], angles[1], atol=1e-3)


def test_jitter_angles_and_shifts_have_the_std_that_is_asked_for():
    bank = RayBank([frame(0, (3, 3)) for _ in range(2000)])
    index = bank.first + 4
    still = bank.rays(index)
    torch.manual_seed(0)
    shifted = bank.rays(index, shift_std=0.01, pivot=PIVOT)
    distance = (camera_center(*extrinsics(0)) - PIVOT).norm()
    assert (shifted.origins - still.origins).std(dim=0).tolist() == pytest.approx([0.01 * distance.item()] * 3, rel=0.1)
    torch.testing.assert_close(shifted.directions, still.directions)
    turned = bank.rays(index, angle_std=0.02, pivot=PIVOT)
    # the angle of a vector under a rotation by N(0, s) about a uniform axis: sin^2 between axis and vector averages 2/3
    angle = angle_between(turned.directions, still.directions)
    assert angle.square().mean().sqrt().item() == pytest.approx(0.02 * math.sqrt(2 / 3), rel=0.1)


def test_jitter_draws_anew_at_every_call_and_without_it_nothing_moves():
    bank = RayBank(frames())
    index = torch.arange(20)
    assert torch.equal(bank.rays(index).origins, bank.rays(index).origins)
    first, second = (bank.rays(index, angle_std=0.1, pivot=PIVOT).directions for _ in range(2))
    assert not torch.equal(first, second)


def test_jitter_without_a_pivot_is_refused():
    with pytest.raises(ValueError, match="pivot"):
        RayBank(frames()).sample(4, angle_std=0.1)


def test_a_bank_without_frames_is_refused():
    with pytest.raises(ValueError, match="at least one frame"):
        RayBank([])


def test_pictures_stay_uint8_in_the_bank():
    bank = RayBank(frames())
    assert bank.pixels.dtype == torch.uint8 and bank.pixels.numel() == 4 * sum(h * w for h, w in SIZES)
    assert len(bank) == 3 and bank.names == ["thing/0", "thing/1", "thing/2"]
