"""The view metrics: the functional losses of each pass, against targets given or sampled from the pictures."""

import pytest
import torch
from pytorch3d.implicitron.models.metrics import ViewMetricsBase
from pytorch3d.implicitron.models.renderer.base import ImplicitronRayBundle, RendererOutput
from torch.utils._python_dispatch import TorchDispatchMode

import co3d_ensemble.plugin  # noqa: F401 - registers the components
from co3d_ensemble.functional.losses import alpha_bce_loss, full_rgb_loss, roi_rgb_loss, sample_entropy_loss
from co3d_ensemble.functional.types import RayTargets
from co3d_ensemble.plugin.model import build_component


def metrics():
    return build_component(ViewMetricsBase, "RecipeViewMetrics", {})


def output(shape, seed, *, opacities=True, prev_stage=None) -> RendererOutput:
    generator = torch.Generator().manual_seed(seed)
    return RendererOutput(
        features=torch.rand(*shape, 3, generator=generator),
        depths=torch.rand(*shape, 1, generator=generator),
        masks=torch.rand(*shape, 1, generator=generator),
        prev_stage=prev_stage,
        aux={"opacities": torch.rand(*shape, 6, generator=generator)} if opacities else {},
    )


def bundle(xys, **packed) -> ImplicitronRayBundle:
    three = torch.zeros(*xys.shape[:-1], 3)
    return ImplicitronRayBundle(origins=three, directions=three, lengths=torch.zeros(*xys.shape[:-1], 6), xys=xys, **packed)


HEIGHT, WIDTH = 6, 9


def pictures(n=3):
    generator = torch.Generator().manual_seed(7)
    return torch.rand(n, 3, HEIGHT, WIDTH, generator=generator), torch.rand(n, 1, HEIGHT, WIDTH, generator=generator)


def ndc(column, row):
    """PyTorch3D's NDC of a pixel's centre in a wide picture: x to the left, y up, the shorter side spans [-1, 1]."""
    return torch.stack((WIDTH / HEIGHT - (2 * column + 1) / HEIGHT, 1 - (2 * row + 1) / HEIGHT), dim=-1)


def expected(result: RendererOutput, rgb, mask):
    return {
        "loss_roi_rgb": roi_rgb_loss(result.features.reshape(-1, 3), rgb, mask),
        "loss_rgb": full_rgb_loss(result.features.reshape(-1, 3), rgb, mask),
        "loss_alpha_bce": alpha_bce_loss(result.masks.flatten(), mask),
        "loss_sample_entropy": sample_entropy_loss(result.aux["opacities"]),
        "loss_prev_stage_roi_rgb": roi_rgb_loss(result.prev_stage.features.reshape(-1, 3), rgb, mask),
        "loss_prev_stage_rgb": full_rgb_loss(result.prev_stage.features.reshape(-1, 3), rgb, mask),
        "loss_prev_stage_alpha_bce": alpha_bce_loss(result.prev_stage.masks.flatten(), mask),
    }


def assert_losses(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_both_passes_are_scored_against_given_targets_and_the_entropy_is_of_the_last_pass_only():
    result = output((20,), 1, prev_stage=output((20,), 2))
    rgb, mask = torch.rand(20, 3), (torch.rand(20) > 0.5).float()
    found = metrics()(raymarched=result, ray_bundle=bundle(torch.zeros(20, 2)), targets=RayTargets(rgb=rgb, mask=mask))
    assert_losses(found, expected(result, rgb, mask))


def test_losses_are_unweighted_whatever_the_number_of_rays():
    result = output((20,), 1)
    targets = RayTargets(rgb=torch.rand(20, 3), mask=torch.ones(20))
    doubled = (x.repeat(2, 1) for x in (result.features, result.depths, result.masks))
    twice = RendererOutput(*doubled, aux={"opacities": result.aux["opacities"].repeat(2, 1)})
    both = RayTargets(rgb=targets.rgb.repeat(2, 1), mask=targets.mask.repeat(2))
    assert_losses(
        metrics()(raymarched=twice, ray_bundle=bundle(torch.zeros(40, 2)), targets=both),
        metrics()(raymarched=result, ray_bundle=bundle(torch.zeros(20, 2)), targets=targets),
    )


def drawn_pixels(n_cameras, n_rays):
    generator = torch.Generator().manual_seed(3)
    column = torch.randint(WIDTH, (n_cameras, n_rays), generator=generator)
    row = torch.randint(HEIGHT, (n_cameras, n_rays), generator=generator)
    return column, row


def test_targets_sampled_from_the_pictures_are_those_of_the_rays_pixels():
    images, masks = pictures(3)
    column, row = drawn_pixels(3, 8)
    result = output((3, 8, 1), 1, prev_stage=output((3, 8, 1), 2))
    rays = bundle(ndc(column, row)[:, :, None])
    found = metrics()(raymarched=result, ray_bundle=rays, image_rgb=images, fg_probability=masks, results={}, mask_crop=None)
    camera = torch.arange(3)[:, None]
    rgb = images[camera, :, row, column].reshape(-1, 3)
    assert_losses(found, expected(result, rgb, (masks[camera, 0, row, column] > 0.5).float().flatten()))


def packed_case(counts=(3, 1, 2), ids=(0, 2, 4)):
    images, masks = pictures(5)
    camera = torch.tensor(ids).repeat_interleave(torch.tensor(counts))
    column, row = (x[0] for x in drawn_pixels(1, len(camera)))
    shape = (len(camera), 1, 1)
    result = output(shape, 1, prev_stage=output(shape, 2))
    rays = bundle(ndc(column, row)[:, None, None], camera_ids=torch.tensor(ids), camera_counts=torch.tensor(counts))
    return images, masks, result, rays, images[camera, :, row, column], (masks[camera, 0, row, column] > 0.5).float()


def test_packed_rays_get_the_pixel_of_their_own_camera():
    images, masks, result, rays, rgb, mask = packed_case()
    found = metrics()(raymarched=result, ray_bundle=rays, image_rgb=images, fg_probability=masks)
    assert_losses(found, expected(result, rgb, mask))


def test_packed_rays_copy_one_picture_per_camera_and_not_one_per_ray():
    images, masks, result, rays, *_ = packed_case(counts=(7, 9, 6))
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (made if isinstance(made, (tuple, list)) else (made,)) if isinstance(x, torch.Tensor))
            return made

    with Sizes():
        metrics()(raymarched=result, ray_bundle=rays, image_rgb=images, fg_probability=masks)
    assert max(sizes) <= 5 * images[0].numel()


def test_without_ground_truth_or_opacities_nothing_is_made_up():
    result = output((3, 8, 1), 1, opacities=False)
    rays = bundle(torch.zeros(3, 8, 1, 2))
    images, masks = pictures(3)
    assert metrics()(raymarched=result, ray_bundle=rays) == {}
    assert metrics()(raymarched=result, ray_bundle=rays, image_rgb=images) == {}
    found = metrics()(raymarched=result, ray_bundle=rays, image_rgb=images, fg_probability=masks)
    assert set(found) == {"loss_roi_rgb", "loss_rgb", "loss_alpha_bce"}


@pytest.mark.parametrize("prefix", ["loss_", "val_"])
def test_names_start_with_the_prefix_that_is_asked_for(prefix):
    result = output((4,), 1, prev_stage=output((4,), 2))
    targets = RayTargets(rgb=torch.rand(4, 3), mask=torch.ones(4))
    found = metrics()(raymarched=result, ray_bundle=bundle(torch.zeros(4, 2)), targets=targets, keys_prefix=prefix)
    assert set(found) == {name.replace("loss_", prefix, 1) for name in expected(result, targets.rgb, targets.mask)}
