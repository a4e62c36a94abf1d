"""Implicitron's own models behind the adapter: what they render against a naive composite, and their settings."""

import copy
import math
from pathlib import Path

import pytest
import torch

import co3d_ensemble.plugin  # noqa: F401 - makes pytorch3d importable
from co3d_ensemble.config import ExperimentConfig
from co3d_ensemble.functional.cameras import pixel_centers, pixel_rays, so3_exp
from co3d_ensemble.functional.types import SURFACE_ALPHA, PinholeCamera
from co3d_ensemble.plugin.frames import pytorch3d_cameras
from co3d_ensemble.plugin.implicitron_model import ImplicitronModel

MLP = {"n_layers_xyz": 2, "n_hidden_neurons_xyz": 16, "n_hidden_neurons_dir": 8, "append_xyz": [1]}
NERF = "implicit_function_NeuralRadianceFieldImplicitFunction_args"
SAMPLER = "raysampler_AdaptiveRaySampler_args"
RENDERER = "renderer_MultiPassEmissionAbsorptionRenderer_args"
POINTS = 6
SMALL = {
    "loss_weights": {"loss_mask_bce": 1.0, "loss_prev_stage_mask_bce": 1.0},
    NERF: MLP,
    SAMPLER: {"n_rays_per_image_sampled_from_mask": 32, "n_pts_per_ray_training": 6, "n_pts_per_ray_evaluation": POINTS},
    RENDERER: {"n_pts_per_ray_fine_training": 6, "n_pts_per_ray_fine_evaluation": 6},
}
TWO_PASSES = {
    "GenericModel": {"num_passes": 2},
    "OverfitModel": {
        "coarse_implicit_function_class_type": "NeuralRadianceFieldImplicitFunction",
        f"coarse_{NERF}": {**MLP, "n_hidden_neurons_xyz": 12},
    },
}
SPHERE = ((0.1, -0.2, 0.3), 1.5)
CONFIGS = Path(__file__).parents[2] / "configs"


def build(model_class_type="GenericModel", *, passes=2, size=(5, 8), scene_sphere=SPHERE, **changes) -> ImplicitronModel:
    torch.manual_seed(0)
    args = {**SMALL, **(TWO_PASSES[model_class_type] if passes == 2 else {}), **changes}
    if passes == 1:
        args["loss_weights"] = {"loss_mask_bce": 1.0, "loss_prev_stage_rgb_mse": 0.0}
    return ImplicitronModel(model_class_type, args, render_size=size, scene_sphere=scene_sphere)


def camera(height=5, width=8) -> PinholeCamera:
    return PinholeCamera(
        R=so3_exp(torch.tensor([0.3, -0.9, 0.2])),
        T=torch.tensor([0.1, 0.2, 4.0]),
        focal=torch.tensor([9.0, 8.0]),
        principal=torch.tensor([3.1, 2.9]),
        height=height,
        width=width,
    )


def frames_batch(*cameras: PinholeCamera) -> dict:
    count, (height, width) = len(cameras), (cameras[0].height, cameras[0].width)
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(count, 1, height, width, generator=generator) > 0.5).float()
    return {
        "image_rgb": torch.rand(count, 3, height, width, generator=generator),
        "fg_probability": mask,
        "mask_crop": torch.ones_like(mask),
        "camera": pytorch3d_cameras(cameras),
        "sequence_name": ["thing"] * count,
    }


def naive_render(model: ImplicitronModel, cam: PinholeCamera):
    """Colour, mask and z depth of a one-pass model, sample by sample: Implicitron's function, our rays and maths."""
    from pytorch3d.implicitron.models.renderer.base import ImplicitronRayBundle

    origins, directions = pixel_rays(cam, pixel_centers(cam.height, cam.width))
    distance = (origins[0] - torch.tensor(SPHERE[0])).norm()
    lengths = torch.linspace(float(distance - SPHERE[1]), float(distance + SPHERE[1]), POINTS)
    bundle = ImplicitronRayBundle(
        origins=origins[None],
        directions=directions[None],
        lengths=lengths.expand(1, len(origins), POINTS),
        xys=torch.zeros(1, len(origins), 2),
    )
    function = model.implicitron._implicit_functions[0]
    with torch.no_grad():
        density, color, _ = function(ray_bundle=bundle)
    rgb, mask, z = torch.zeros(len(origins), 3), torch.zeros(len(origins)), torch.zeros(len(origins))
    for ray in range(len(origins)):
        transmittance = 1.0
        for i in range(POINTS):
            delta = float(lengths[i + 1] - lengths[i]) if i + 1 < POINTS else 1e10  # as published
            alpha = 1 - math.exp(-max(0.0, float(density[0, ray, i, 0])) * delta)
            weight = transmittance * alpha
            point = origins[ray] + lengths[i] * directions[ray]
            rgb[ray] += weight * color[0, ray, i]
            z[ray] += weight * (point @ cam.R + cam.T)[2]
            mask[ray] += weight
            transmittance *= 1 - alpha
    depth = torch.where(mask > SURFACE_ALPHA, z / mask.clamp_min(SURFACE_ALPHA), 0)
    return rgb.T.reshape(3, cam.height, cam.width), depth.reshape(cam.height, cam.width), mask.reshape(cam.height, cam.width)


def test_a_rendered_view_is_the_naive_composite_with_depth_as_z():
    model = build(passes=1)
    view = model.render_view(camera(), chunk_rays=1000)
    rgb, depth, mask = naive_render(model, camera())
    assert ((mask > SURFACE_ALPHA) & (mask < 0.9)).any()  # else a depth that is not divided by the opacity passes too
    assert (view.rgb - rgb).abs().max() <= 1e-3  # products of other sizes round otherwise, and densities are large
    assert (view.mask[0] - mask).abs().max() <= 1e-3
    assert (view.depth[0] - depth).abs().max() <= 1e-3


def test_depth_of_an_opaque_ball_is_z_and_not_distance():
    model = build(passes=1, **{SAMPLER: {**SMALL[SAMPLER], "n_pts_per_ray_evaluation": 400}})
    center, radius = torch.tensor(SPHERE[0]), 1.2

    def ball(*, ray_bundle, **kwargs):
        points = ray_bundle.origins[..., None, :] + ray_bundle.lengths[..., None] * ray_bundle.directions[..., None, :]
        density = 1e4 * ((points - center).norm(dim=-1, keepdim=True) < radius).float()
        return density, torch.full_like(points, 0.25), {}

    model.implicitron._implicit_functions[0]._fn.forward = ball
    cam = camera(6, 8)
    view = model.render_view(cam, chunk_rays=20)
    origins, directions = pixel_rays(cam, pixel_centers(6, 8))
    along = ((center - origins) * directions).sum(-1)
    squared = radius**2 - ((center - origins) ** 2).sum(-1) + along**2
    clear = squared.abs() > 0.05  # away from the rim, where one sample more or less decides
    hit = squared > 0
    points = origins + (along - squared.clamp_min(0).sqrt())[:, None] * directions
    z = torch.where(hit, (points @ cam.R + cam.T)[:, 2], 0.0)
    assert hit[clear].any() and not hit[clear].all()
    assert (view.depth.flatten() - z)[clear].abs().max() < 3.0 / 399 + 1e-3
    assert torch.equal(view.mask.flatten()[clear] > 0.5, hit[clear])
    torch.testing.assert_close(view.rgb[:, hit.reshape(6, 8) & clear.reshape(6, 8)].unique(), torch.tensor([0.25]))


@pytest.mark.parametrize("model_class_type", TWO_PASSES)
def test_chunks_do_not_change_a_view(model_class_type):
    model = build(model_class_type)
    whole, chunked = (model.render_view(camera(), chunk_rays=n) for n in (1000, 7))
    for name in ("rgb", "depth", "mask"):
        assert (getattr(whole, name) - getattr(chunked, name)).abs().max() <= 1e-3


@pytest.mark.parametrize("size", [(5, 8), (9, 4), (6, 6)])
def test_a_view_has_the_size_of_its_camera_whatever_the_training_size(size):
    model = build()
    view = model.render_view(camera(*size), chunk_rays=16)
    assert view.rgb.shape == (3, *size) and view.depth.shape == view.mask.shape == (1, *size)
    assert torch.isfinite(model.losses(frames_batch(camera()))["loss_rgb_mse"])


@pytest.mark.parametrize("model_class_type", TWO_PASSES)
def test_losses_are_all_finite_scalars_and_two_steps_change_every_parameter(model_class_type):
    model = build(model_class_type)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        losses = model.losses(frames_batch(camera()))
        assert all(name.startswith("loss_") and v.ndim == 0 and torch.isfinite(v) for name, v in losses.items())
        optimizer.zero_grad()
        sum(weight * losses[name] for name, weight in model.loss_weights.items()).backward()
        optimizer.step()
    assert set(model.loss_weights) == {
        "loss_rgb_mse", "loss_prev_stage_rgb_mse", "loss_mask_bce", "loss_prev_stage_mask_bce"
    }
    assert all((p != b).any() for p, b in zip(model.parameters(), before))


def test_pictures_are_masked_by_the_model():
    model = build(passes=1)
    batch = frames_batch(camera())
    torch.manual_seed(3)
    clean = model.losses(batch)["loss_rgb_mse"]
    batch["image_rgb"] = torch.where(batch["fg_probability"] > 0.5, batch["image_rgb"], 0.77)  # another background
    torch.manual_seed(3)
    torch.testing.assert_close(model.losses(batch)["loss_rgb_mse"], clean)


def test_the_coarse_function_is_the_first_pass_of_overfit_models():
    model = build("OverfitModel")
    order = []
    for name in ("coarse_implicit_function", "implicit_function"):
        getattr(model.implicitron, name).register_forward_hook(lambda *_, name=name: order.append(name))
    model.render_view(camera(), chunk_rays=1000)
    assert order == ["coarse_implicit_function", "implicit_function"]


def test_the_scene_sphere_sets_near_and_far_unless_the_config_does():
    sampler = build().implicitron.raysampler
    assert sampler.scene_extent == pytest.approx(SPHERE[1]) and sampler.scene_center == pytest.approx(SPHERE[0])
    fixed = build(**{SAMPLER: {**SMALL[SAMPLER], "scene_extent": 8.0}}).implicitron.raysampler
    assert fixed.scene_extent == 8.0 and fixed.scene_center == pytest.approx((0, 0, 0))
    assert build(scene_sphere=None).implicitron.raysampler.scene_extent == 8.0  # the published distances


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pases": 2}, "num_pases"),
        ({NERF: {"n_hidden": 3}}, f"{NERF}.n_hidden"),
        ({"chunk_size_grid": "many"}, "chunk_size_grid"),
        ({"renderer_class_type": "Nope"}, "renderer_class_type='Nope'.*MultiPassEmissionAbsorptionRenderer"),
        ({RENDERER: {"raymarcher_class_type": "Nope"}}, "raymarcher_class_type='Nope'.*EmissionAbsorptionRaymarcher"),
        ({SAMPLER: {"n_rays_per_image_sampled_from_mask": None, "n_rays_total_training": 9}}, "n_rays_total_training"),
    ],
)
def test_settings_that_implicitron_does_not_have_are_errors_that_name_them(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_an_unknown_model_class_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="'Nope'.*GenericModel.*OverfitModel"):
        ImplicitronModel("Nope", {}, render_size=(5, 8))


def test_a_loss_weight_for_a_term_that_is_not_computed_is_an_error():
    model = build(loss_weights={"loss_autodecoder_norm": 0.01})
    with pytest.raises(ValueError, match="loss_autodecoder_norm"):
        model.losses(frames_batch(camera()))


def test_generic_models_render_only_their_target_views():
    assert build().rays_per_step(3) == 32
    assert build(n_train_target_views=0).rays_per_step(3) == 96
    assert build("OverfitModel").rays_per_step(3) == 96


def test_weights_move_between_models_of_different_picture_sizes():
    source, target = build(size=(5, 8)), build(size=(30, 20))
    for parameter in source.parameters():
        parameter.data.add_(0.01)
    target.load_state_dict(source.state_dict())
    views = [model.render_view(camera(), chunk_rays=100) for model in (source, target, copy.deepcopy(source))]
    assert torch.equal(views[0].rgb, views[1].rgb) and torch.equal(views[0].rgb, views[2].rgb)


@pytest.mark.parametrize("model_class_type", TWO_PASSES)
def test_near_and_far_travel_with_the_weights(model_class_type):
    source, target = build(model_class_type), build(model_class_type, scene_sphere=None)
    assert not torch.equal(source.render_view(camera(), 100).depth, target.render_view(camera(), 100).depth)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.render_view(camera(), 100).depth, target.render_view(camera(), 100).depth)


def test_an_interpolation_that_was_cut_from_its_config_is_an_error():
    with pytest.raises(ValueError, match="model_GenericModel_args.*training.n_rays"):
        build(**{SAMPLER: {"n_rays_per_image_sampled_from_mask": "${training.n_rays}"}})


def compose(experiment: str, *overrides: str):
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="experiment_schema", node=ExperimentConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("experiment_schema", overrides=[f"+experiment={experiment}", *overrides])


def test_the_published_experiment_is_implicitrons_published_configuration():
    config = compose("implicitron_nerf")
    implicitron = config.model.implicitron
    model = ImplicitronModel(implicitron.model_class_type, implicitron.args, render_size=(8, 8)).implicitron
    assert config.training.schedule == "steps" and config.training.max_steps == 400_000
    assert config.training.clip_grad_norm is None and not config.training.ema
    functions = [f._fn for f in model._implicit_functions]
    assert len(functions) == 2 and functions[0] is not functions[1]
    assert [len(f.xyz_encoder.mlp) for f in functions] == [8, 8]
    assert functions[0].density_layer.in_features == 256
    assert model.raysampler.scene_extent == 8.0 and model.raysampler.n_rays_per_image_sampled_from_mask == 1024
    assert model.renderer.raymarcher.background_opacity == 1e10 and model.renderer.density_noise_std_train == 1.0
    assert model.loss_weights == {
        "loss_rgb_mse": 1.0, "loss_prev_stage_rgb_mse": 1.0, "loss_mask_bce": 1.0, "loss_prev_stage_mask_bce": 1.0
    }


def test_the_laptop_experiment_shrinks_the_published_one_and_takes_its_rays_from_the_training_settings():
    config = compose("implicitron_nerf_laptop", "training.n_rays=77")
    implicitron = config.model.implicitron
    adapter = ImplicitronModel(implicitron.model_class_type, implicitron.args, render_size=(8, 8))
    assert adapter.rays_per_step(1) == 77 and config.data.longest_side == 200
    function = adapter.implicitron._implicit_functions[0]._fn
    assert len(function.xyz_encoder.mlp) == 6 and function.density_layer.in_features == 128
    assert adapter.implicitron.renderer.n_pts_per_ray_fine_training == 32
    assert config.training.schedule == "steps" and config.model.kind == "implicitron"
