"""The object model: what it renders of fields known in closed form, scale, skipping, and the settings of build_nerf."""

import copy
from dataclasses import replace

import pytest
import torch
from pytorch3d.implicitron.models.metrics import ViewMetricsBase
from pytorch3d.implicitron.models.renderer.base import BaseRenderer

import co3d_ensemble.plugin  # noqa: F401 - registers the components
from co3d_ensemble.config import CameraJitterConfig, ModelConfig, NeRFConfig, OccupancyConfig, RendererConfig
from co3d_ensemble.fields.occupancy import OccupancyGrid
from co3d_ensemble.functional.cameras import pixel_centers, pixel_rays, so3_exp
from co3d_ensemble.functional.types import PinholeCamera, RayTargets
from co3d_ensemble.functional.visual_hull import voxel_centers
from co3d_ensemble.plugin.model import ObjectModel, build_component, build_nerf

TINY = {"n_layers": 2, "n_hidden": 16, "skip_layers": (1,), "n_hidden_color": 8, "n_harmonics_xyz": 2, "n_harmonics_dir": 1}
BOX = torch.tensor([[-1.0, -0.8, -0.6], [1.0, 0.8, 0.6]])
CUBE = torch.tensor([[-1.0] * 3, [1.0] * 3])


def camera(height=8, width=12, *, scale=1.0) -> PinholeCamera:
    return PinholeCamera(
        R=so3_exp(torch.tensor([0.4, -0.8, 0.3])),
        T=scale * torch.tensor([0.1, -0.2, 4.0]),
        focal=torch.tensor([17.0, 15.0]),
        principal=torch.tensor([5.1, 4.4]),
        height=height,
        width=width,
    )


def all_rays(cam: PinholeCamera):
    return pixel_rays(cam, pixel_centers(cam.height, cam.width))


def nerf(*, box=BOX, hull=None, near_far=None, seed=0, occupancy=True, jitter="off", renderer=(), coarse=(), **changes) -> ObjectModel:
    torch.manual_seed(seed)
    config = ModelConfig(
        nerf=NeRFConfig(**{**TINY, "density_noise_std": 0.0, **changes}),
        coarse_overrides=dict(coarse),
        renderer=RendererConfig(**{"n_pts_per_ray_coarse": 16, "n_pts_per_ray_fine": 8, **dict(renderer)}),
        occupancy=OccupancyConfig(enabled=occupancy, resolution=8),
        camera_jitter=CameraJitterConfig(mode=jitter, angle_std=0.5),
    )
    model = build_nerf(config, box=box, hull=hull, near_far=near_far)
    torch.manual_seed(0)
    for function in model.functions:
        for parameter in function.mlp.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model


class Analytic(torch.nn.Module):
    """A field given as a function of world points (..., 3); remembers nothing, skips nothing."""

    def __init__(self, density, color=0.25):
        super().__init__()
        self.density, self.color = density, color

    def forward(self, *, ray_bundle, **kwargs):
        points = ray_bundle.origins[..., None, :] + ray_bundle.lengths[..., None] * ray_bundle.directions[..., None, :]
        return self.density(points)[..., None], torch.full_like(points, self.color), {}


def analytic(density, *, box=CUBE, near_far=None, n=400, n_fine=8, occupancy=None) -> ObjectModel:
    renderer = build_component(BaseRenderer, "OccupancyAwareRenderer", {"n_pts_per_ray_fine": n_fine})
    metrics = build_component(ViewMetricsBase, "RecipeViewMetrics", {})
    functions = [Analytic(density), Analytic(density)]
    return ObjectModel(functions, renderer, metrics, n_pts_per_ray=n, box=box, near_far=near_far, occupancy=occupancy)


def targets(n, seed=0) -> RayTargets:
    generator = torch.Generator().manual_seed(seed)
    return RayTargets(torch.rand(n, 3, generator=generator), (torch.rand(n, generator=generator) > 0.5).float())


def gradients(model, losses):
    model.zero_grad()
    sum(losses.values()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ---- pictures of fields in closed form


def sphere_hits(cam, radius):
    """z depth of the first surface of a centred ball, 0 where it is missed, and what is far from the rim."""
    origins, directions = all_rays(cam)
    along = -(origins * directions).sum(-1)
    squared = radius**2 - origins.square().sum(-1) + along**2
    z = ((origins + (along - squared.clamp_min(0).sqrt())[:, None] * directions) @ cam.R + cam.T)[:, 2]
    return torch.where(squared > 0, z, 0), squared.abs() > 0.03


@pytest.mark.parametrize("near_far", [None, (2.0, 6.0)])
def test_an_opaque_ball_has_its_analytic_z_depth_mask_and_colour(near_far):
    cam = camera()
    view = analytic(lambda points: 1e4 * (points.norm(dim=-1) < 0.9), near_far=near_far).render_view(cam, chunk_rays=50)
    z, clear = sphere_hits(cam, 0.9)
    assert view.rgb.shape == (3, 8, 12) and view.depth.shape == view.mask.shape == (1, 8, 12)
    assert (z[clear] > 0).any() and (z[clear] == 0).any()
    assert (view.depth.flatten() - z)[clear].abs().max() < 4 / 400 + 1e-3
    torch.testing.assert_close(view.mask.flatten()[clear], (z > 0).float()[clear])
    torch.testing.assert_close(view.rgb.mean(0).flatten()[clear], 0.25 * (z > 0).float()[clear])


def test_depth_of_a_plane_across_the_view_is_the_same_in_every_corner():
    cam = camera(6, 9)
    view = analytic(lambda points: 1e4 * ((points @ cam.R + cam.T)[..., 2] > 4.0), near_far=(3.0, 5.0)).render_view(cam, chunk_rays=99)
    torch.testing.assert_close(view.depth, torch.full((1, 6, 9), 4.0), rtol=0, atol=2 / 400 + 1e-3)  # distances reach 4.3


def test_depth_of_a_translucent_sheet_is_that_of_the_sheet():
    cam = camera(6, 9)

    def sheet(points):
        return 20.0 * (((points @ cam.R + cam.T)[..., 2] - 4.0).abs() < 0.01)

    view = analytic(sheet, near_far=(3.0, 5.0), n=2000).render_view(cam, chunk_rays=99)
    assert view.mask.min() > 0.2 and view.mask.max() < 0.45  # 1 - exp(-0.4)
    torch.testing.assert_close(view.depth, torch.full((1, 6, 9), 4.0), rtol=0, atol=0.02)
    torch.testing.assert_close(view.rgb[0], 0.25 * view.mask[0])  # premultiplied, on black


def test_what_is_barely_there_has_no_depth():
    view = analytic(lambda points: torch.full(points.shape[:-1], 1e-4), near_far=(3.0, 5.0)).render_view(camera(), chunk_rays=99)
    assert 0 < view.mask.max() < 1e-3 and not view.depth.any()


def test_rays_that_miss_the_box_are_black():
    view = analytic(lambda points: torch.full(points.shape[:-1], 1e4), box=0.1 * CUBE).render_view(camera(), chunk_rays=99)
    assert 0 < (view.mask > 0.99).sum() < 30 and (view.mask < 0.01).sum() > 50
    assert torch.isfinite(view.rgb).all() and torch.isfinite(view.depth).all()


# ---- rendering


@pytest.mark.parametrize("chunk_rays", [1, 7, 95, 1000])
def test_the_chunk_size_does_not_change_a_render(chunk_rays):
    model = nerf()
    whole, chunked = model.render_view(camera(), 96), model.render_view(camera(), chunk_rays)
    for name in ("rgb", "depth", "mask"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), rtol=1e-4, atol=1e-5)


def test_rendering_asks_for_no_more_rays_at_once_than_allowed():
    model, asked = nerf(), []
    model.renderer.register_forward_pre_hook(lambda module, args, kwargs: asked.append(len(kwargs["ray_bundle"].origins)), with_kwargs=True)
    model.render_view(camera(), 10)
    assert max(asked) == 10 and sum(asked) == 96


@pytest.mark.parametrize("training", [True, False])
def test_rendering_is_deterministic_without_noise_and_leaves_the_mode_as_it_was(training):
    model = nerf(density_noise_std=1.0, jitter="view_direction").train(training)
    first, second = (model.render_view(camera(), 50) for _ in range(2))
    assert torch.equal(first.rgb, second.rgb) and torch.equal(first.depth, second.depth)
    assert all(module.training is training for module in model.modules())


def test_training_rays_are_stratified_anew_and_evaluation_rays_are_not():
    model = nerf()
    origins, directions = all_rays(camera())
    lengths = [model.train().bundle(origins, directions).lengths for _ in range(2)]
    assert not torch.equal(*lengths)
    assert torch.equal(*(model.eval().bundle(origins, directions).lengths for _ in range(2)))


def test_rays_are_clipped_to_the_box_or_to_fixed_distances():
    origins, directions = all_rays(camera())
    lengths = nerf(near_far=(2.5, 9.0)).bundle(origins, directions).lengths
    assert (lengths >= 2.5).all() and (lengths <= 9).all() and (lengths[:, -1] - lengths[:, 0] > 5).all()
    clipped = nerf().bundle(origins, directions).lengths
    points = origins[:, None] + clipped[..., None] * directions[:, None]
    hit = clipped[:, -1] > 0
    assert hit.any() and not hit.all()
    assert ((points[hit] >= BOX[0] - 1e-4) & (points[hit] <= BOX[1] + 1e-4)).all()


def test_bfloat16_renders_close_to_float32():
    exact, rough = (nerf(precision=p).render_view(camera(), 96) for p in ("float32", "bfloat16"))
    assert 0 < (exact.rgb - rough.rgb).abs().max() < 0.03
    assert (exact.mask - rough.mask).abs().max() < 0.03
    assert (exact.depth - rough.depth).abs().median() < 0.03


# ---- scale


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_pictures_and_losses_do_not_depend_on_the_scale_of_the_scene(scale):
    reference, scaled = nerf(), nerf(box=scale * BOX)
    view, scaled_view = reference.render_view(camera(), 96), scaled.render_view(camera(scale=scale), 96)
    assert 0.05 < view.mask.mean() < 0.95
    torch.testing.assert_close(scaled_view.rgb, view.rgb, rtol=0, atol=2e-3)
    torch.testing.assert_close(scaled_view.mask, view.mask, rtol=0, atol=2e-3)
    torch.testing.assert_close(scaled_view.depth / scale, view.depth, rtol=0, atol=2e-2)
    results = []
    for model, cam in ((reference, camera()), (scaled, camera(scale=scale))):
        torch.manual_seed(3)
        losses = model.losses(*all_rays(cam), targets(96))
        results.append((losses, gradients(model, losses)))
    (losses, gradient), (scaled_losses, scaled_gradient) = results
    for name, value in losses.items():
        torch.testing.assert_close(scaled_losses[name], value, rtol=1e-3, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(gradient, scaled_gradient, dim=0) > 0.9999
    assert scaled_gradient.norm().item() == pytest.approx(gradient.norm().item(), rel=1e-2)


# ---- skipping


class BallOfDensity(torch.nn.Module):
    """Wraps a radiance MLP: positive in a ball in box coordinates, outside its raw density is -1, which ReLU makes 0."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, points, directions, ray):
        raw, color = self.mlp(points, directions, ray)
        return torch.where(points.norm(dim=-1) < 0.55, raw.abs(), -1.0), color


def test_skipping_changes_neither_losses_nor_gradients_where_what_is_skipped_is_empty():
    hull = voxel_centers(CUBE, (12, 12, 12)).norm(dim=-1) < 0.55 + 0.5 * 3**0.5 / 6
    results = []
    for occupancy in (True, False):
        # without a floor both draw importance samples from the coarse weights alone
        settings = {"density_activation": "relu", "density_scale": 2.0, "renderer": {"occupied_floor": 0.0}}
        model = nerf(box=CUBE, hull=hull, occupancy=occupancy, **settings)
        assert (model.occupancy is not None) is occupancy
        for function in model.functions:
            function.mlp = BallOfDensity(function.mlp)
        torch.manual_seed(4)
        losses = model.losses(*all_rays(camera()), targets(96))
        results.append((losses, gradients(model, losses)))
    assert 0.1 < hull.float().mean() < 0.5
    (skipping, skipping_gradient), (full, full_gradient) = results
    assert set(skipping) == set(full) and len(full) == 7
    for name, value in full.items():
        assert value > 1e-3
        torch.testing.assert_close(skipping[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert full_gradient.abs().max() > 1e-3
    torch.testing.assert_close(skipping_gradient, full_gradient, rtol=1e-3, atol=1e-5)


def small_hull() -> torch.Tensor:
    hull = torch.zeros(8, 6, 5, dtype=torch.bool)
    hull[3:5, 2:4, 2:4] = True
    return hull


def test_rays_without_an_occupied_sample_are_black_and_count_in_the_bce_but_not_in_the_gradient():
    model = nerf(hull=small_hull())
    origins, directions = all_rays(camera())
    output, _ = model(origins, directions)
    empty = output.masks[:, 0] == 0
    assert 10 < empty.sum() < 90
    assert not output.features[empty].any() and not output.depths[empty].any()
    ones = RayTargets(rgb=torch.rand(96, 3), mask=torch.ones(96))
    torch.manual_seed(0)
    losses = model.losses(origins[empty], directions[empty], RayTargets(ones.rgb[empty], ones.mask[empty]))
    assert losses["loss_alpha_bce"].item() == pytest.approx(13.8155, rel=1e-3)  # -log of the floor, for each such ray
    assert losses["loss_roi_rgb"].item() == pytest.approx(ones.rgb[empty].square().sum(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_without_any_occupied_sample_backpropagates_to_zero(precision):
    model = nerf(hull=torch.zeros(8, 6, 5, dtype=torch.bool), precision=precision)
    losses = model.losses(*all_rays(camera()), targets(96))
    assert all(torch.isfinite(value) and value.requires_grad for name, value in losses.items())
    model.zero_grad()
    sum(losses.values()).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_entropy_averages_over_skipped_samples_too():
    hull = small_hull()
    model = nerf(hull=hull)
    torch.manual_seed(0)
    losses = model.losses(*all_rays(camera()), targets(96))
    torch.manual_seed(0)
    output, _ = model(*all_rays(camera()))
    opacities = output.aux["opacities"]
    assert opacities.shape == (96, 24) and (opacities == 0).float().mean() > 0.5
    p = opacities[opacities > 0].double()
    assert losses["loss_sample_entropy"].item() == pytest.approx((-p * p.log()).sum().item() / opacities.numel(), rel=1e-4)


def test_samples_in_the_hull_of_a_plain_ball_render_as_without_a_grid():
    cam = camera()
    hull = voxel_centers(CUBE, (20, 20, 20)).norm(dim=-1) < 0.7 + 3**0.5 / 20

    def ball(points):
        return 30.0 * (points.norm(dim=-1) < 0.7)

    whole = analytic(ball, n_fine=200).render_view(cam, 96)
    grid = analytic(ball, n_fine=200, occupancy=OccupancyGrid(CUBE, hull)).render_view(cam, 96)
    assert (whole.mask - grid.mask).abs().mean() < 0.01 and (whole.rgb - grid.rgb).abs().mean() < 0.01


# ---- building


def test_losses_have_the_names_of_the_default_weights_and_of_the_colour_loss_that_they_leave_out():
    from co3d_ensemble.config import TrainingConfig

    names = set(nerf().losses(*all_rays(camera()), targets(96)))
    assert names == set(TrainingConfig().loss_weights) | {"loss_rgb", "loss_prev_stage_rgb"}


def test_the_coarse_pass_takes_its_own_settings_and_only_those():
    model = nerf(coarse={"n_hidden": 12})
    assert [function.mlp.trunk[0].out_features for function in model.functions] == [12, 16]
    assert model.functions[0].mlp.color_hidden.out_features == model.functions[1].mlp.color_hidden.out_features == 8


def test_an_unknown_coarse_setting_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no setting n_hiden; it has: .*n_hidden"):
        nerf(coarse={"n_hiden": 12})


def test_without_a_hull_the_grid_starts_out_full_in_nearly_cubic_voxels():
    occupancy = nerf(hull=None).occupancy
    assert occupancy.occupied.shape == (8, 6, 5) and occupancy.occupied.all()


def test_the_modes_of_camera_jitter_reach_the_passes():
    off, gauge, view = (nerf(jitter=mode, seed=5) for mode in ("off", "fixed_gauge", "view_direction"))
    eye = torch.eye(3)
    assert all(torch.equal(f.gauge, eye) and f.view_jitter_angle_std == 0 for f in off.functions)
    assert not torch.allclose(gauge.functions[0].gauge, eye, atol=0.01)
    assert torch.equal(gauge.functions[0].gauge, gauge.functions[1].gauge)  # one world, one gauge
    assert all(torch.equal(f.gauge, eye) and f.view_jitter_angle_std == 0.5 for f in view.functions)
    assert all(f.view_jitter_angle_std == 0 for f in gauge.functions)


def test_density_is_the_larger_of_the_passes_without_noise():
    model = nerf(density_noise_std=2.0).train()
    points = BOX[0] + torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * (BOX[1] - BOX[0])
    density = model.density(points)
    assert torch.equal(density, model.density(points)) and model.training
    model.eval()
    passes = [function.density(points) for function in model.functions]
    assert all((density >= p).all() for p in passes) and torch.equal(density, torch.maximum(*passes))
    assert (passes[0] > passes[1]).any() and (passes[1] > passes[0]).any()


def test_refining_by_the_models_own_density_keeps_its_picture():
    model = nerf(density_bias=-2.0)
    for function in model.functions:  # a field whose box is mostly empty
        function.mlp = BallOfDensity(function.mlp)
        function.density_activation = "relu"
        function.density_bias = 0.5
    before = model.render_view(camera(), 96)
    torch.manual_seed(0)
    for _ in range(5):
        model.occupancy.refine(model.density)
    assert model.occupancy.occupied.float().mean() < 0.9
    after = model.render_view(camera(), 96)
    assert before.mask.max() > 0.3 and (before.mask - after.mask).abs().mean() < 0.02


def test_a_state_dict_renders_the_same_picture_in_a_model_of_other_weights_and_occupancy():
    source = nerf(hull=small_hull(), jitter="fixed_gauge", seed=1)
    target = nerf(hull=torch.ones(8, 6, 5, dtype=torch.bool), jitter="fixed_gauge", seed=2)
    for parameter in target.parameters():
        parameter.data.add_(0.1)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert torch.equal(source.render_view(camera(), 96).rgb, target.render_view(camera(), 96).rgb)


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_a_compiled_model_has_the_same_losses(monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compiler(fn, **options, backend="eager"))
    results = []
    for compiled in (False, True):
        model = nerf(compile=compiled)
        torch.manual_seed(0)
        results.append(model.losses(*all_rays(camera()), targets(96)))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_camera_inside_the_box_renders():
    view = nerf().render_view(replace(camera(), T=torch.tensor([0.0, 0.0, 0.1])), 96)
    assert torch.isfinite(view.rgb).all() and view.mask.max() > 0.1
