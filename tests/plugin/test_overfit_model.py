"""Our components inside Implicitron's own models, built from nothing but a configuration that names them."""

import pytest
import torch
from omegaconf import OmegaConf
from pytorch3d.implicitron.models.generic_model import GenericModel
from pytorch3d.implicitron.models.overfit_model import OverfitModel
from pytorch3d.implicitron.models.renderer.base import EvaluationMode
from pytorch3d.implicitron.tools.config import expand_args_fields, get_default_args

import co3d_ensemble.plugin  # noqa: F401 - registers the components
from co3d_ensemble.fields.occupancy import OccupancyGrid
from co3d_ensemble.functional.cameras import pixel_centers, pixel_rays, so3_exp
from co3d_ensemble.functional.types import PinholeCamera
from co3d_ensemble.functional.visual_hull import voxel_centers
from co3d_ensemble.plugin.frames import pytorch3d_cameras
from co3d_ensemble.plugin.implicit_functions import NeRFImplicitFunction
from co3d_ensemble.plugin.raymarcher import OpacityRaymarcher
from co3d_ensemble.plugin.renderer import OccupancyAwareRenderer
from co3d_ensemble.plugin.view_metrics import RecipeViewMetrics

HEIGHT, WIDTH, RADIUS = 12, 16, 0.8
N_SAMPLES = 12
FIELD = {
    "n_layers": 3, "n_hidden": 32, "skip_layers": [1], "n_hidden_color": 16, "n_harmonics_xyz": 3, "n_harmonics_dir": 1,
    "box_min": [-1.0, -1.0, -1.0], "box_max": [1.0, 1.0, 1.0],
}
SAMPLER = {
    "scene_extent": 1.2,
    "n_rays_per_image_sampled_from_mask": 48,
    "n_pts_per_ray_training": N_SAMPLES,
    "n_pts_per_ray_evaluation": N_SAMPLES,
}
LOSSES = {
    "loss_roi_rgb": 1.0,
    "loss_prev_stage_roi_rgb": 1.0,
    "loss_alpha_bce": 1.0,
    "loss_prev_stage_alpha_bce": 1.0,
    "loss_sample_entropy": 1e-4,
}
CONFIG = {
    "render_image_height": HEIGHT,
    "render_image_width": WIDTH,
    "chunk_size_grid": N_SAMPLES * 50,
    "loss_weights": LOSSES,  # Implicitron's own, which are merged in, are not computed and so do not count
    "raysampler_AdaptiveRaySampler_args": SAMPLER,
    "renderer_class_type": "OccupancyAwareRenderer",
    "renderer_OccupancyAwareRenderer_args": {"n_pts_per_ray_fine": 8},
    "view_metrics_class_type": "RecipeViewMetrics",
    "implicit_function_class_type": "NeRFImplicitFunction",
    "implicit_function_NeRFImplicitFunction_args": FIELD,
}
TWO_PASSES = {
    OverfitModel: {
        "coarse_implicit_function_class_type": "NeRFImplicitFunction",
        "coarse_implicit_function_NeRFImplicitFunction_args": FIELD,
    },
    GenericModel: {"num_passes": 2, "image_feature_extractor_class_type": None, "n_train_target_views": 0},
}
MODELS = pytest.mark.parametrize("model_class", [OverfitModel, GenericModel])


def build(model_class, **changes):
    torch.manual_seed(0)
    expand_args_fields(model_class)
    config = OmegaConf.merge(get_default_args(model_class), CONFIG, TWO_PASSES[model_class], changes)
    return model_class(**config)


def batch(n=3):
    """Photographs of a ball whose colour follows its surface."""
    cameras = [
        PinholeCamera(
            so3_exp(torch.tensor([0.0, 2.1 * i, 0.0])), torch.tensor([0.0, 0.1, 3.5]), torch.tensor([22.0, 21.0]),
            torch.tensor([8.4, 5.8]), HEIGHT, WIDTH,
        )
        for i in range(n)
    ]
    rgb, mask = [], []
    for camera in cameras:
        origins, directions = pixel_rays(camera, pixel_centers(HEIGHT, WIDTH))
        along = -(origins * directions).sum(-1)
        squared = RADIUS**2 - origins.square().sum(-1) + along**2
        points = origins + (along - squared.clamp_min(0).sqrt())[:, None] * directions
        rgb.append((0.5 + 0.5 * points / RADIUS).clamp(0, 1).T.reshape(3, HEIGHT, WIDTH))
        mask.append((squared > 0).float().reshape(1, HEIGHT, WIDTH))
    masks = torch.stack(mask)
    return {
        "image_rgb": torch.stack(rgb),
        "fg_probability": masks,
        "mask_crop": torch.ones_like(masks),
        "camera": pytorch3d_cameras(cameras),
        "sequence_name": ["thing"] * n,
    }


def train(model, steps=30):
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    data, history = batch(), []
    for _ in range(steps):
        predictions = model(**data, evaluation_mode=EvaluationMode.TRAINING)
        optimizer.zero_grad()
        predictions["objective"].backward()
        optimizer.step()
        history.append(predictions["objective"].item())
    return history, predictions


def assert_learns(model):
    history, predictions = train(model)
    assert all(value == value and abs(value) < 1e6 for value in history)
    assert sum(history[-5:]) < 0.6 * sum(history[:5])
    wanted = sum(weight * predictions[name] for name, weight in LOSSES.items())  # all of them are there, and nothing else counts
    torch.testing.assert_close(predictions["objective"], wanted)


@MODELS
def test_a_model_built_from_names_alone_consists_of_our_components_and_learns(model_class):
    model = build(model_class)
    assert type(model.renderer) is OccupancyAwareRenderer and type(model.renderer.raymarcher) is OpacityRaymarcher
    assert type(model.view_metrics) is RecipeViewMetrics
    assert sum(isinstance(module, NeRFImplicitFunction) for module in model.modules()) == 2
    assert_learns(model)


@MODELS
def test_packed_rays_of_many_cameras_train_as_well(model_class):
    packed = {"n_rays_per_image_sampled_from_mask": None, "n_rays_total_training": 100}
    model = build(model_class, raysampler_AdaptiveRaySampler_args=packed)
    bundles = []
    model.view_metrics.register_forward_pre_hook(lambda module, args, kwargs: bundles.append(kwargs["ray_bundle"]), with_kwargs=True)
    assert_learns(model)
    assert all(bundle.is_packed() and len(bundle.origins) == 100 for bundle in bundles)


@MODELS
def test_our_function_and_raymarcher_learn_inside_implicitrons_own_renderer(model_class):
    model = build(
        model_class,
        renderer_class_type="MultiPassEmissionAbsorptionRenderer",
        renderer_MultiPassEmissionAbsorptionRenderer_args={
            "raymarcher_class_type": "OpacityRaymarcher", "n_pts_per_ray_fine_training": 8, "n_pts_per_ray_fine_evaluation": 8,
        },
    )
    assert_learns(model)


@MODELS
@pytest.mark.parametrize("training_mode", [False, True])
def test_a_full_grid_rendered_in_chunks_is_the_one_rendered_at_once(model_class, training_mode):
    data = {key: value[:1] if isinstance(value, (torch.Tensor, list)) else value[[0]] for key, value in batch().items()}
    functions = [f"{prefix}implicit_function_NeRFImplicitFunction_args" for prefix in ("", "coarse_")]
    quiet = {key: {"density_noise_std": 0.0} for key in functions if key in {**CONFIG, **TWO_PASSES[model_class]}}
    pictures = []
    for chunk in (N_SAMPLES * 50, N_SAMPLES * HEIGHT * WIDTH):
        model = build(model_class, chunk_size_grid=chunk, **quiet)
        model.train(training_mode)  # whoever forgets eval() gets a picture all the same
        with torch.no_grad():
            pictures.append(model(**data, evaluation_mode=EvaluationMode.EVALUATION))
    for name, channels in (("images_render", 3), ("depths_render", 1), ("masks_render", 1)):
        assert pictures[0][name].shape == (1, channels, HEIGHT, WIDTH)
        torch.testing.assert_close(pictures[0][name], pictures[1][name], rtol=1e-4, atol=1e-5)
    assert pictures[0]["masks_render"].std() > 0
    torch.testing.assert_close(pictures[0]["loss_alpha_bce"], pictures[1]["loss_alpha_bce"])


@MODELS
def test_an_occupancy_grid_set_on_the_renderer_empties_the_rest_of_the_picture(model_class):
    model = build(model_class).eval()
    data = {key: value[:1] if isinstance(value, (torch.Tensor, list)) else value[[0]] for key, value in batch().items()}
    box = torch.tensor([[-1.0] * 3, [1.0] * 3])
    model.renderer.set_occupancy(OccupancyGrid(box, voxel_centers(box, (10, 10, 10)).norm(dim=-1) < 0.5))
    with torch.no_grad():
        mask = model(**data, evaluation_mode=EvaluationMode.EVALUATION)["masks_render"][0, 0]
    assert (mask > 0).any() and not mask[(data["fg_probability"][0, 0] == 0)].any()


def test_a_weight_of_a_loss_is_what_the_configuration_says():
    model = build(OverfitModel, loss_weights={"loss_alpha_bce": 3.0})
    predictions = train(model, steps=1)[1]
    wanted = sum({**LOSSES, "loss_alpha_bce": 3.0}[name] * predictions[name] for name in LOSSES)
    torch.testing.assert_close(predictions["objective"], wanted)
