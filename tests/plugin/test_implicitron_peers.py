"""What the models beyond NeRF need of the adapter: source views, signed distances in the scene's sphere, precision."""

import pytest
import torch

import co3d_ensemble.plugin  # noqa: F401 - makes pytorch3d importable
from co3d_ensemble.functional.cameras import camera_center, pixel_centers, pixel_rays, so3_exp
from co3d_ensemble.functional.types import Frame, PinholeCamera
from co3d_ensemble.plugin.frames import pytorch3d_cameras
from co3d_ensemble.plugin.implicitron_model import ImplicitronModel
from co3d_ensemble.plugin.source_views import SourceSettings

SIZE = (8, 10)
NERF = {
    "num_passes": 2,
    "loss_weights": {"loss_mask_bce": 1.0, "loss_rgb_mse": 1.0, "loss_prev_stage_rgb_mse": 1.0},
    "implicit_function_NeuralRadianceFieldImplicitFunction_args": {
        "n_layers_xyz": 2, "n_hidden_neurons_xyz": 16, "n_hidden_neurons_dir": 8, "append_xyz": [1],
    },
    "raysampler_AdaptiveRaySampler_args": {
        "n_rays_per_image_sampled_from_mask": 16, "n_pts_per_ray_training": 6, "n_pts_per_ray_evaluation": 6,
    },
    "renderer_MultiPassEmissionAbsorptionRenderer_args": {"n_pts_per_ray_fine_training": 4, "n_pts_per_ray_fine_evaluation": 4},
}
POOLING = {
    "view_pooler_enabled": True,
    "image_feature_extractor_class_type": "ResNetFeatureExtractor",
    "image_feature_extractor_ResNetFeatureExtractor_args": {"name": "resnet18", "stages": [1], "proj_dim": 4, "image_rescale": 1.0},
}
SRN = {
    "num_passes": 1,
    "loss_weights": {"loss_rgb_mse": 200.0, "loss_mask_bce": 1.0, "loss_prev_stage_rgb_mse": 0.0},
    "implicit_function_class_type": "SRNImplicitFunction",
    "implicit_function_SRNImplicitFunction_args": {
        "raymarch_function_args": {"n_hidden_units": 16},
        "pixel_generator_args": {"n_hidden_units": 16, "n_hidden_units_color": 8},
    },
    "raysampler_class_type": "NearFarRaySampler",
    "raysampler_NearFarRaySampler_args": {
        "n_rays_per_image_sampled_from_mask": 16, "n_pts_per_ray_training": 1, "n_pts_per_ray_evaluation": 1,
        "min_depth": 0.05, "max_depth": 0.05,
    },
    "renderer_class_type": "LSTMRenderer",
}
IDR = {
    "num_passes": 1,
    "loss_weights": {"loss_rgb_mse": 1.0, "loss_mask_bce": 100.0, "loss_eikonal": 0.1, "loss_prev_stage_rgb_mse": 0.0},
    "implicit_function_class_type": "IdrFeatureField",
    "implicit_function_IdrFeatureField_args": {"dims": [32, 32, 32], "n_harmonic_functions_xyz": 2, "bias": 0.6},
    "renderer_class_type": "SignedDistanceFunctionRenderer",
    "renderer_SignedDistanceFunctionRenderer_args": {"ray_normal_coloring_network_args": {"dims": [16]}},
    "raysampler_AdaptiveRaySampler_args": {
        "n_rays_per_image_sampled_from_mask": 16, "n_pts_per_ray_training": 0, "n_pts_per_ray_evaluation": 0,
    },
}
NERFORMER = {
    **NERF, **POOLING,
    "implicit_function_class_type": "NeRFormerImplicitFunction",
    "implicit_function_NeRFormerImplicitFunction_args": {"n_hidden_neurons_xyz": 16, "n_hidden_neurons_dir": 8},
    "view_pooler_args": {"feature_aggregator_class_type": "IdentityFeatureAggregator"},
}
PEERS = {"nerf_wce": {**NERF, **POOLING}, "nerformer": NERFORMER, "srn": SRN, "srn_wce": {**SRN, **POOLING}, "idr": IDR}
POOLED = ["nerf_wce", "nerformer", "srn_wce"]


def camera_at(angle: float, *, center=(0.0, 0.0, 0.0), scale=1.0, size=SIZE) -> PinholeCamera:
    """On an orbit of radius ``4 scale`` around ``center``, looking at it."""
    rotation = so3_exp(torch.tensor([0.1, angle, 0.0]))
    return PinholeCamera(
        R=rotation,
        T=torch.tensor([0.0, 0.0, 4.0 * scale]) - torch.tensor(center) @ rotation,
        focal=torch.tensor([1.2, 1.2]) * size[1],
        principal=torch.tensor([size[1] / 2, size[0] / 2]),
        height=size[0],
        width=size[1],
    )


def frames(count=5, *, seed=0, **where) -> list[Frame]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Frame(
            name=f"thing/{number}",
            sequence_name="thing",
            frame_number=number,
            rgb=torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8),
            mask=torch.full((1, *SIZE), 255, dtype=torch.uint8),
            camera=camera_at(1.1 * number, **where),
        )
        for number in range(count)
    ]


def build(peer: str, *, seed=0, sphere=((0.0, 0.0, 0.0), 1.5), photographs=None, precision="float32", **changes) -> ImplicitronModel:
    torch.manual_seed(seed)
    return ImplicitronModel(
        "GenericModel",
        {**PEERS[peer], **changes},
        render_size=SIZE,
        scene_sphere=sphere,
        training_frames=frames() if photographs is None else photographs,
        source_settings=SourceSettings(views=3),
        precision=precision,
    )


def batch_of(photographs: list[Frame]) -> dict:
    mask = torch.stack([frame.mask for frame in photographs]).float() / 255
    return {
        "image_rgb": torch.stack([frame.rgb for frame in photographs]).float() / 255,
        "fg_probability": mask,
        "mask_crop": torch.ones_like(mask),
        "camera": pytorch3d_cameras([frame.camera for frame in photographs]),
        "sequence_name": ["thing"] * len(photographs),
    }


def objective(model: ImplicitronModel, photographs: list[Frame]) -> torch.Tensor:
    losses = model.losses(batch_of(photographs))
    return sum(weight * losses[name] for name, weight in model.loss_weights.items())


@pytest.mark.parametrize("peer", POOLED)
def test_a_view_looks_at_the_nearest_photographs_and_at_no_others(peer):
    photographs = frames()
    model = build(peer, photographs=photographs)
    before = model.render_view(camera_at(0.0), 50).rgb
    near = model.source_views.nearest(camera_at(0.0), 3, around=torch.zeros(3)).tolist()
    far = next(i for i in range(5) if i not in near)
    model.source_views.rgb[far] = 255 - model.source_views.rgb[far]
    assert torch.equal(model.render_view(camera_at(0.0), 50).rgb, before)
    model.source_views.rgb[near[0]] = 255 - model.source_views.rgb[near[0]]
    assert not torch.equal(model.render_view(camera_at(0.0), 50).rgb, before)


@pytest.mark.parametrize("peer", POOLED)
def test_a_target_s_own_picture_is_not_among_the_pooled_features(peer):
    model = build(peer).eval()  # batch statistics would see it
    batch = batch_of(frames())
    rendered = []
    model.implicitron.renderer.register_forward_hook(lambda module, inputs, output: rendered.append(output.features))
    for picture in (0.0, 1.0):
        batch["image_rgb"][0] = picture
        torch.manual_seed(1)
        model.losses(batch)
    assert torch.equal(*rendered)


@pytest.mark.parametrize("peer", PEERS)
def test_a_loaded_state_renders_the_same_view_without_any_photograph_at_hand(peer):
    source = build(peer, sphere=((0.1, -0.2, 0.3), 1.7))
    target = ImplicitronModel("GenericModel", PEERS[peer], render_size=(64, 64), source_settings=SourceSettings(views=3))
    target.load_state_dict(source.state_dict())
    for size in (SIZE, (13, 7)):
        expected, loaded = (model.render_view(camera_at(0.4, size=size), 30) for model in (source, target))
        for name in ("rgb", "depth", "mask"):
            assert torch.equal(getattr(expected, name), getattr(loaded, name))


def test_rendering_without_photographs_is_an_error():
    with pytest.raises(ValueError, match="pools features from photographs"):
        build("nerf_wce", photographs=[]).render_view(camera_at(0.0), 50)


@pytest.mark.parametrize("peer", PEERS)
def test_a_view_repeats_to_the_bit_in_chunks_of_any_size_and_draws_nothing(peer):
    model = build(peer)
    state = torch.get_rng_state()
    whole, again, chunked = (model.render_view(camera_at(0.2), n) for n in (1000, 1000, 7))
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("rgb", "depth", "mask"):
        assert torch.equal(getattr(whole, name), getattr(again, name))
        assert (getattr(whole, name) - getattr(chunked, name)).abs().max() <= 1e-3


@pytest.mark.parametrize("peer", PEERS)
def test_two_steps_are_finite_and_change_the_weights(peer):
    model = build(peer)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for _ in range(2):
        total = objective(model, frames(4))
        assert torch.isfinite(total)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    unchanged = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not [name for name in unchanged if "image_feature_extractor.layers" not in name], unchanged


def test_srn_starts_marching_to_the_far_end_of_the_scene():
    model = build("srn", sphere=((0.5, 0.0, 0.0), 1.5))
    centers = [camera_center(frame.camera.R, frame.camera.T) for frame in frames()]
    distance = sum(float((center - torch.tensor([0.5, 0.0, 0.0])).norm()) for center in centers) / 5
    assert model.implicitron.renderer.init_depth == pytest.approx(distance + 1.5)
    set_by_hand = build("srn", renderer_LSTMRenderer_args={"init_depth": 17.0})
    assert set_by_hand.implicitron.renderer.init_depth == 17.0


@pytest.mark.parametrize(("center", "scale"), [((0.0, 0.0, 0.0), 1.0), ((3.0, -1.0, 2.0), 0.1), ((-2.0, 5.0, 1.0), 20.0)])
def test_a_signed_distance_field_renders_the_same_scene_at_any_place_and_scale(center, scale):
    reference = build("idr").render_view(camera_at(0.3), 30)
    model = build("idr", sphere=(center, 1.5 * scale))
    view = model.render_view(camera_at(0.3, center=center, scale=scale), 30)
    assert (view.rgb - reference.rgb).abs().max() < 1e-3 and (view.mask - reference.mask).abs().max() < 1e-2
    assert (view.depth / scale - reference.depth).abs().max() < 1e-2


def test_the_depth_of_a_signed_distance_field_is_the_z_of_its_surface():
    center, radius = torch.tensor([0.2, -0.1, 0.4]), 0.9
    model = build("idr", sphere=(tuple(center.tolist()), 1.5))

    def ball(*, rays_points_world, **kwargs):
        distance = rays_points_world.norm(dim=-1, keepdim=True) - radius / 1.5  # in the scene's unit sphere
        return torch.cat((distance, rays_points_world), dim=-1)

    model.implicitron._implicit_functions[0]._fn.forward = ball
    camera = camera_at(0.7, center=tuple(center.tolist()), size=(16, 20))
    view = model.render_view(camera, 1000)
    origins, directions = pixel_rays(camera, pixel_centers(16, 20))
    along = ((center - origins) * directions).sum(-1)
    squared = radius**2 - ((center - origins) ** 2).sum(-1) + along**2
    hit = squared > 0.02  # away from the rim
    points = origins + (along - squared.clamp_min(0).sqrt())[:, None] * directions
    z = (points @ camera.R + camera.T)[:, 2]
    assert 20 < hit.sum() < 16 * 20
    assert (view.depth.flatten() - z)[hit].abs().max() < 1e-3
    assert (view.mask.flatten()[hit] == 1).all() and (view.mask.flatten()[squared < -0.5] < 0.01).all()


def test_a_chunk_of_rays_that_all_miss_the_surface_is_not_opaque():
    camera = camera_at(0.7, size=(16, 20))
    view = build("idr").render_view(camera, 20)  # a row at a time: the upper ones see nothing
    assert (view.mask[0, 0] < 0.05).all() and view.mask.max() > 0.99


def test_a_ray_that_misses_the_traced_sphere_sees_nothing():
    camera = camera_at(0.7, size=(16, 20))
    view = build("idr", sphere=((0.0, 0.0, 0.0), 0.8)).render_view(camera, 1000)
    origins, directions = pixel_rays(camera, pixel_centers(16, 20))
    misses = torch.linalg.cross(origins, directions).norm(dim=-1) > 0.8
    assert misses.any() and (view.mask.flatten()[misses] == 0).all() and (view.depth.flatten()[misses] == 0).all()
    assert (view.mask.flatten()[~misses] > 0.5).any()


def test_a_traced_sphere_of_the_settings_own_keeps_the_world_s_scale():
    model = build("idr", raysampler_AdaptiveRaySampler_args={**IDR["raysampler_AdaptiveRaySampler_args"], "scene_extent": 8.0})
    assert model.implicitron.renderer.object_bounding_sphere == 8.0
    scaled = build("idr").implicitron.renderer
    assert scaled.object_bounding_sphere == scaled.ray_tracer.object_bounding_sphere == 1.0
    moved = model._in_models_world(pytorch3d_cameras([camera_at(0.3)]))
    torch.testing.assert_close(moved.T[0], camera_at(0.3).T)


@pytest.mark.parametrize("peer", ["nerf_wce", "nerformer", "srn", "srn_wce"])
def test_bfloat16_is_the_precision_of_the_implicit_functions_and_of_nothing_else(peer):
    model = build(peer, precision="bfloat16")
    inside: dict[str, set[torch.dtype]] = {"functions": set(), "elsewhere": set()}

    def note(place):
        return lambda module, inputs, output: inside[place].add((output[0] if isinstance(output, tuple) else output).dtype)

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LSTMCell)):
            module.register_forward_hook(note("functions" if "_implicit_functions" in name else "elsewhere"))
    pooled = []
    if model.source_views is not None:
        model.implicitron.view_pooler.register_forward_hook(lambda module, inputs, output: pooled.append(output.dtype))
    total = objective(model, frames(3))
    total.backward()
    assert inside["functions"] == {torch.bfloat16} and inside["elsewhere"] <= {torch.float32}
    assert set(pooled) <= {torch.float32} and total.dtype == torch.float32
    exact = objective(build(peer), frames(3)).item()
    assert abs(total.item() - exact) < 0.2 * exact


def test_points_are_projected_in_float32_under_bfloat16():
    seen = []
    for precision in ("float32", "bfloat16"):
        model = build("nerf_wce", precision=precision).eval()
        sampler = model.implicitron.view_pooler.view_sampler
        sampler.register_forward_hook(lambda module, inputs, output: seen.append(next(iter(output[0].values()))))
        torch.manual_seed(2)
        model.losses(batch_of(frames(3)))
    assert torch.equal(seen[0], seen[2])  # of the coarse pass; the samples of the fine one follow from bfloat16 densities


def test_bfloat16_signed_distances_are_refused():
    with pytest.raises(ValueError, match="precision='bfloat16': the signed distances of IdrFeatureField need float32"):
        build("idr", precision="bfloat16")


def test_weights_that_would_be_downloaded_are_refused():
    encoder = "image_feature_extractor_ResNetFeatureExtractor_args"
    with pytest.raises(ValueError, match="pretrained=true would download"):
        build("nerf_wce", **{encoder: {**POOLING[encoder], "pretrained": True}})


def test_a_size_that_a_component_cannot_have_is_an_error_with_its_reason():
    function = "implicit_function_NeRFormerImplicitFunction_args"
    with pytest.raises(ValueError, match="model_GenericModel_args: embed_dim must be divisible by num_heads"):
        build("nerformer", **{function: {"n_hidden_neurons_xyz": 20}})
