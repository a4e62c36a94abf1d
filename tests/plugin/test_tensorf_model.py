"""The TensoRF component and model: what they make of rays, and what changes of the grid do to pictures and parameters."""

import copy

import pytest
import torch
from pytorch3d.implicitron.models.implicit_function.voxel_grid import VMFactorizedVoxelGrid
from pytorch3d.implicitron.models.metrics import RegularizationMetricsBase
from pytorch3d.implicitron.models.overfit_model import OverfitModel
from pytorch3d.implicitron.models.renderer.base import EvaluationMode, ImplicitronRayBundle
from pytorch3d.implicitron.models.renderer.raymarcher import EmissionAbsorptionRaymarcher
from pytorch3d.implicitron.tools.config import expand_args_fields, get_default_args

import co3d_ensemble.plugin  # noqa: F401 - registers the components
from co3d_ensemble.config import CameraJitterConfig, ModelConfig, OccupancyConfig, RendererConfig, TensoRFConfig
from co3d_ensemble.fields.vm_field import PENALTIES, VMField
from co3d_ensemble.functional.cameras import pixel_centers, pixel_rays, so3_exp
from co3d_ensemble.functional.types import PinholeCamera, RayTargets
from co3d_ensemble.functional.vm import vm_project
from co3d_ensemble.functional.volume_rendering import interval_lengths, rendering_weights
from co3d_ensemble.plugin.frames import pytorch3d_cameras
from co3d_ensemble.plugin.model import build_component
from co3d_ensemble.plugin.tensorf_model import TensoRFModel, build_tensorf

TINY = {"resolution": 8, "n_density": 3, "n_appearance": 4, "n_features": 5, "n_hidden": 8, "density_shift": -1.0, "init_std": 1.0}
BOX = torch.tensor([[-1.0, -0.8, -0.6], [1.0, 0.8, 0.6]])


def camera(height=8, width=12, *, scale=1.0) -> PinholeCamera:
    return PinholeCamera(
        R=so3_exp(torch.tensor([0.4, -0.8, 0.3])),
        T=scale * torch.tensor([0.1, -0.2, 4.0]),
        focal=torch.tensor([17.0, 15.0]),
        principal=torch.tensor([5.1, 4.4]),
        height=height,
        width=width,
    )


def tensorf(*, box=BOX, hull=None, jitter="off", occupancy=True, penalties=PENALTIES, seed=0, **changes) -> TensoRFModel:
    torch.manual_seed(seed)
    config = ModelConfig(
        kind="tensorf",
        tensorf=TensoRFConfig(**{**TINY, **changes}),
        renderer=RendererConfig(n_pts_per_ray_coarse=24),
        occupancy=OccupancyConfig(enabled=occupancy, resolution=10),
        camera_jitter=CameraJitterConfig(mode=jitter, angle_std=0.5),
    )
    return build_tensorf(config, box=box, hull=hull, penalties=penalties)


def hull_of(shape=(10, 8, 6), low=(3, 2, 1), high=(7, 6, 5)) -> torch.Tensor:
    hull = torch.zeros(shape, dtype=torch.bool)
    hull[tuple(slice(a, b) for a, b in zip(low, high))] = True
    return hull


def same_view(one, other, **tolerance):
    for name in ("rgb", "mask", "depth"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **tolerance)


def bundle(shape=(2, 5, 1), n_samples=7) -> ImplicitronRayBundle:
    generator = torch.Generator().manual_seed(1)
    origins = 0.3 * torch.randn(*shape, 3, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(*shape, 3, generator=generator), dim=-1)
    lengths = torch.rand(*shape, n_samples, generator=generator).sort(dim=-1).values
    return ImplicitronRayBundle(origins=origins, directions=directions, lengths=lengths, xys=torch.zeros(*shape, 2))


# The component


def test_density_and_colour_are_the_fields_at_the_samples_of_the_bundle():
    function, rays = tensorf(color_threshold=0.0).functions[0].eval(), bundle()
    density, color, aux = function(ray_bundle=rays)
    assert density.shape == (2, 5, 1, 7, 1) and color.shape == (2, 5, 1, 7, 3) and aux == {}
    for b in range(2):
        for r in range(5):
            points = rays.origins[b, r] + rays.lengths[b, r, 0, :, None] * rays.directions[b, r]
            expected = function.field.density(points)
            torch.testing.assert_close(density[b, r, 0, :, 0], expected, rtol=1e-5, atol=1e-5)
            weights, _, _ = rendering_weights(expected, interval_lengths(rays.lengths[b, r, 0]))
            colors = function.field.color(points, rays.directions[b, r], torch.zeros(7, dtype=torch.long))
            torch.testing.assert_close(color[b, r, 0], torch.where(weights[:, None] > 0, colors, 0), rtol=1e-4, atol=1e-6)


def test_only_samples_whose_weight_exceeds_the_threshold_get_a_colour():
    rays, everything = bundle(), tensorf(color_threshold=0.0).functions[0].eval()
    frugal = tensorf(color_threshold=0.1).functions[0].eval()
    density, color, _ = frugal(ray_bundle=rays)
    full_density, full_color, _ = everything(ray_bundle=rays)
    assert torch.equal(density, full_density)
    weights, _, _ = rendering_weights(density[..., 0], interval_lengths(rays.lengths))
    seen = weights > 0.1
    assert 0 < seen.sum() < seen.numel() / 2
    assert (color[~seen] == 0).all()
    torch.testing.assert_close(color[seen], full_color[seen])  # not to the bit: products of fewer rows may be rounded otherwise


def test_skipped_samples_have_no_density_and_cost_no_lookup(monkeypatch):
    function, rays = tensorf().functions[0].train(), bundle()
    occupied = torch.rand(rays.lengths.shape, generator=torch.Generator().manual_seed(3)) > 0.6
    looked_up = []
    original = VMField.density
    monkeypatch.setattr(VMField, "density", lambda self, points: looked_up.append(len(points)) or original(self, points))
    density, color, _ = function(ray_bundle=rays, occupied=occupied)
    assert looked_up == [int(occupied.sum())]
    torch.testing.assert_close(density, function(ray_bundle=rays)[0] * occupied[..., None], rtol=1e-5, atol=1e-5)
    assert (density > 0).any() and (color[~occupied] == 0).all()


def test_a_fixed_capacity_changes_neither_losses_nor_gradients():
    model = tensorf(hull=hull_of()).train()
    origins, directions = pixel_rays(camera(), pixel_centers(8, 12))
    targets = RayTargets(torch.rand(96, 3), (torch.rand(96) > 0.5).float())

    def outcome():
        torch.manual_seed(2)
        model.zero_grad()
        losses = model.losses(origins, directions, targets)
        sum(losses.values()).backward()
        return [loss.item() for loss in losses.values()], [p.grad.clone() for p in model.parameters()]

    losses, gradients = outcome()
    model.follow_counts()
    function = model.functions[0]
    assert function._compaction.capacity is not None and function._color_compaction.capacity is not None
    padded_losses, padded_gradients = outcome()
    assert padded_losses == pytest.approx(losses, rel=1e-5)
    for one, other in zip(gradients, padded_gradients):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * one.abs().max().item())


def test_it_is_a_single_pass():
    model = tensorf()
    assert not model.functions[0].allows_multiple_passes()
    origins, directions = pixel_rays(camera(), pixel_centers(8, 12))
    output, _ = model(origins, directions)
    assert output.prev_stage is None and output.features.shape == (96, 3)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_pictures_and_opacities_do_not_depend_on_the_scale_of_the_scene_before_and_after_a_shrink(scale):
    one, scaled = tensorf(hull=hull_of()), tensorf(hull=hull_of(), box=scale * BOX)
    for shrunk in (False, True):
        if shrunk:
            one.shrink(), scaled.shrink()
        view, other = one.render_view(camera(), 50), scaled.render_view(camera(scale=scale), 50)
        other.depth.div_(scale)
        same_view(view, other, rtol=1e-3, atol=1e-4)
        assert view.mask.max() > 0.5


def implicitron_values(field: VMField, kind: str, basis: torch.Tensor | None):
    """The same factors as Implicitron holds them: channel first, one grid, axes of a plane in the same order."""
    planes, lines = getattr(field, f"{kind}_planes"), getattr(field, f"{kind}_lines")
    names = {"matrix_components": ("xy", "xz", "yz"), "vector_components": ("z", "y", "x")}
    values = {f"matrix_components_{name}": planes[m].movedim(-1, 0)[None] for m, name in enumerate(names["matrix_components"])}
    values |= {f"vector_components_{name}": lines[m].movedim(-1, 0)[None] for m, name in enumerate(names["vector_components"])}
    return VMFactorizedVoxelGrid.values_type(**values, basis_matrix=None if basis is None else basis.T[None])


def test_density_and_features_equal_those_of_implicitrons_grid_on_the_same_factors():
    torch.manual_seed(0)
    field = VMField(BOX.double(), resolution=(6, 5, 4), n_density=2, n_appearance=3, n_features=7, init_std=1.0).double()
    points = BOX[0] + torch.rand(200, 3, dtype=torch.float64) * (BOX[1] - BOX[0])
    local = (points / BOX[1])[None]  # Implicitron's local frame is [-1, 1]; this box lies around the origin
    expand_args_fields(VMFactorizedVoxelGrid)
    grid = VMFactorizedVoxelGrid(n_components=6, n_features=1, basis_matrix=False)

    raw = grid.evaluate_local(local, implicitron_values(field, "density", None))[0, :, 0]
    expected = torch.nn.functional.softplus(raw - 10) * 25 * 3 / 2.0  # per world unit: the box's longest side is 2
    torch.testing.assert_close(field.density(points), expected)

    features = grid.evaluate_local(local, implicitron_values(field, "appearance", field.basis.weight))[0]
    projected = vm_project(field.appearance_planes, field.appearance_lines, (points - BOX[0]) / (BOX[1] - BOX[0]), field.basis.weight)
    torch.testing.assert_close(projected, features)


def test_it_trains_inside_implicitrons_own_overfit_model():
    settings = {name: value for name, value in TINY.items()} | {"box_min": BOX[0].tolist(), "box_max": BOX[1].tolist()}
    expand_args_fields(OverfitModel)
    config = get_default_args(OverfitModel)
    config.implicit_function_class_type = "TensoRFImplicitFunction"
    config.implicit_function_TensoRFImplicitFunction_args.update(settings)
    config.raysampler_class_type = "NearFarRaySampler"
    config.raysampler_NearFarRaySampler_args.update(
        {"min_depth": 2.0, "max_depth": 6.0, "n_rays_per_image_sampled_from_mask": 32, "n_pts_per_ray_training": 12}
    )
    config.renderer_MultiPassEmissionAbsorptionRenderer_args.raymarcher_class_type = "OpacityRaymarcher"
    config.view_metrics_class_type = "RecipeViewMetrics"
    config.regularization_metrics_class_type = "VMRegularization"
    config.render_image_height, config.render_image_width = 8, 12
    config.loss_weights = {"loss_roi_rgb": 1.0, "loss_alpha_bce": 1.0, "loss_tv_density": 1.0, "loss_l1_appearance": 0.1}
    torch.manual_seed(0)
    model = OverfitModel(**config)
    mask = (torch.rand(2, 1, 8, 12) > 0.5).float()
    predictions = model(
        image_rgb=torch.rand(2, 3, 8, 12), fg_probability=mask, mask_crop=torch.ones_like(mask), camera=pytorch3d_cameras([camera()] * 2),
        evaluation_mode=EvaluationMode.TRAINING, sequence_name=["thing"] * 2,
    )
    predictions["objective"].backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert {f"loss_{name}" for name in PENALTIES} <= predictions.keys()


def test_implicitrons_raymarcher_shows_what_ours_does_without_its_background_and_rays_that_end_inside_opaque_with_it():
    function, rays = tensorf(density_shift=-3.0, init_std=0.1).functions[0].eval(), bundle()
    density, color, _ = function(ray_bundle=rays)
    expand_args_fields(EmissionAbsorptionRaymarcher)

    def marched(**settings):
        marcher = EmissionAbsorptionRaymarcher(surface_thickness=1, **settings)
        return marcher(rays_densities=density, rays_features=color, aux={}, ray_lengths=rays.lengths)

    weights, _, alpha = rendering_weights(density[..., 0], interval_lengths(rays.lengths))
    without = marched(background_opacity=0.0)
    torch.testing.assert_close(without.masks[..., 0], alpha)
    torch.testing.assert_close(without.features, (weights[..., None] * color).sum(dim=-2), atol=1e-6, rtol=1e-5)
    ends_inside = density[..., -1, 0] > 0
    assert alpha.max() < 0.99 and ends_inside.any() and not ends_inside.all()
    torch.testing.assert_close(marched().masks[..., 0], torch.where(ends_inside, 1.0, alpha))


# Penalties


def test_penalties_are_those_asked_for_and_the_fields_own():
    model = tensorf(penalties=["tv_density", "l1_appearance"]).train()
    origins, directions = pixel_rays(camera(), pixel_centers(8, 12))
    losses = model.losses(origins, directions, RayTargets(torch.rand(96, 3), torch.ones(96)))
    assert not any("tv" in name or "l1" in name for name in losses)
    assert model.penalty_names == ("loss_tv_density", "loss_l1_appearance")
    added = model.add_penalties({"loss_tv_density": 1.0})
    assert added == {"loss_tv_density": pytest.approx(model.field.penalties(["tv_density"])["tv_density"].item(), rel=1e-5)}
    with pytest.raises(ValueError, match="tv_colour"):
        tensorf(penalties=["tv_colour"])


def test_the_regularization_component_adds_up_the_fields_of_a_model_and_refuses_unknown_penalties():
    metric = build_component(RegularizationMetricsBase, "VMRegularization", {})
    one, two = tensorf(), tensorf(seed=1)
    both = metric(model=torch.nn.ModuleList([one, two]))
    assert both["loss_l1_density"] == metric(model=one)["loss_l1_density"] + metric(model=two)["loss_l1_density"]
    assert metric(model=torch.nn.Linear(2, 2)) == {}
    with pytest.raises(ValueError, match="tv_colour"):
        build_component(RegularizationMetricsBase, "VMRegularization", {"penalties": ["tv_colour"]})(model=one)


# Changes of the grid


def test_shrinking_keeps_the_picture_and_follows_the_occupied_voxels():
    model = tensorf(hull=hull_of())
    before, view = model.box.clone(), model.render_view(camera(), 50)
    mapped = model.shrink()
    size = (BOX[1] - BOX[0]) / torch.tensor([10, 8, 6])
    expected = BOX[0] + torch.tensor([[3, 2, 1], [7, 6, 5]]) * size
    torch.testing.assert_close(model.box, expected)
    assert (model.field.box[0] <= expected[0] + 1e-6).all() and (model.field.box[1] >= expected[1] - 1e-6).all()
    assert ((model.field.box[1] - model.field.box[0]) / (before[1] - before[0])).prod() < 0.5
    assert all(mapped(name, value).shape == value.shape for name, value in model.named_parameters() if "mlp" in name)
    dense = tensorf(hull=hull_of())
    for one in (model, dense):
        one.n_pts_per_ray = 600  # so many that where they lie does not matter: the shrunk rays are sampled elsewhere
    same_view(dense.render_view(camera(), 50), model.render_view(camera(), 50), rtol=0.02, atol=0.02)
    assert view.mask.max() > 0.5


def test_the_first_shrink_follows_the_hull_and_not_a_density_that_is_still_forming():
    model = tensorf(hull=hull_of())
    model.occupancy.occupied.zero_()
    model.occupancy.occupied[5, 5, 3] = True
    by_hull, by_density = copy.deepcopy(model), copy.deepcopy(model)
    by_hull.shrink(to_hull=True)
    by_density.shrink()
    assert (by_hull.box[1] - by_hull.box[0] > by_density.box[1] - by_density.box[0]).all()


@pytest.mark.parametrize("occupancy", [False, True])
def test_shrinking_to_nothing_changes_nothing(occupancy):
    model = tensorf(occupancy=occupancy)
    if occupancy:
        model.occupancy.occupied.zero_()
    state = copy.deepcopy(model.state_dict())
    mapped = model.shrink()
    assert all(torch.equal(value.nan_to_num(), state[name].nan_to_num()) for name, value in model.state_dict().items())
    assert torch.equal(mapped("functions.0.field.density_planes.0", torch.ones(2, 2)), torch.ones(2, 2))


def test_upsampling_changes_the_resolution_and_no_picture_of_a_field_that_its_grid_resolves():
    model = tensorf()
    generator = torch.Generator().manual_seed(0)
    for factor in model.field.factors():  # linear along every axis: any finer grid holds it exactly
        with torch.no_grad():
            factor.zero_()
            for dim, n in enumerate(factor.shape[:-1]):
                slope = torch.randn(factor.shape[-1], generator=generator)
                factor.add_(torch.linspace(0, 1, n).view(-1, *[1] * (factor.dim() - 1 - dim)) * slope)
    view = model.render_view(camera(), 50)
    model.upsample(20**3)
    assert model.field.resolution == (26, 20, 15)
    same_view(view, model.render_view(camera(), 50), rtol=1e-3, atol=1e-4)


def test_a_gauge_turns_the_grid_and_a_shrink_still_holds_every_occupied_voxel():
    model = tensorf(jitter="fixed_gauge", hull=hull_of())
    gauge = model.functions[0].gauge
    assert not torch.allclose(gauge, torch.eye(3), atol=0.01)
    plain = tensorf(hull=hull_of())
    side = (model.field.initial_box[1] - model.field.initial_box[0]).max()
    assert side > (plain.field.initial_box[1] - plain.field.initial_box[0]).max()
    # the unit of density is the object's box whatever the gauge: same factors, same density at the centre
    model.field.load_state_dict({**plain.field.state_dict(), "box": model.field.box, "initial_box": model.field.initial_box})
    center = BOX.mean(dim=0, keepdim=True)
    torch.testing.assert_close(model.functions[0].density(center), plain.functions[0].density(center))
    whole = model.render_view(camera(), 50)
    model.shrink()
    size = (BOX[1] - BOX[0]) / torch.tensor([10, 8, 6])
    corners = torch.cartesian_prod(*torch.stack((BOX[0] + torch.tensor([3, 2, 1]) * size, BOX[0] + torch.tensor([7, 6, 5]) * size)).T)
    local = model.functions[0].to_field(corners)
    assert (local >= model.field.box[0] - 1e-5).all() and (local <= model.field.box[1] + 1e-5).all()
    assert whole.mask.max() > 0.5


@pytest.mark.parametrize("jitter", ["off", "fixed_gauge"])
def test_a_saved_model_renders_the_same_after_shrinking_and_upsampling(jitter):
    model = tensorf(hull=hull_of(), jitter=jitter)
    model.shrink()
    model.upsample(14**3)
    model.shrink()
    state = copy.deepcopy(model.state_dict())
    fresh = tensorf(box=state["functions.0.box"], hull=state["renderer.occupancy.hull"], jitter=jitter, seed=5)
    fresh.load_state_dict(state)
    assert fresh.field.resolution == model.field.resolution
    one, other = model.render_view(camera(), 50), fresh.render_view(camera(), 50)
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("rgb", "mask", "depth"))


def test_factors_and_network_have_their_own_learning_rates_and_are_all_there():
    model = tensorf()
    factors, network = model.parameter_groups(0.02, 0.001)
    assert (factors["lr"], network["lr"]) == (0.02, 0.001)
    assert {*factors["params"], *network["params"]} == set(model.parameters())
    assert model.parameter_groups(0.02, None)[1]["lr"] == 0.02
