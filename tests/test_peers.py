"""The models of the challenge's table, each from its experiment: two steps, scores, an export, at toy sizes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from co3d_ensemble.assembly import compose_experiment
from co3d_ensemble.config import ModelConfig
from co3d_ensemble.plugin.implicitron_model import ImplicitronModel
from tests.tiny import export, train

DEV = "manyview_dev_0"
PEERS = ("nerf", "nerf_wce", "nerformer", "srn", "srn_wce", "srn_noharm", "srn_wce_noharm", "idr")
POOLED = ("nerf_wce", "nerformer", "srn_wce", "srn_wce_noharm")
ARGS = "model__implicitron__args__{}".format
_MLP = "implicit_function_NeuralRadianceFieldImplicitFunction_args__"
_SRN = "implicit_function_SRNImplicitFunction_args__"
_SAMPLES = {
    ARGS("raysampler_AdaptiveRaySampler_args__n_pts_per_ray_training"): 6,
    ARGS("raysampler_AdaptiveRaySampler_args__n_pts_per_ray_evaluation"): 6,
    ARGS("renderer_MultiPassEmissionAbsorptionRenderer_args__n_pts_per_ray_fine_training"): 4,
    ARGS("renderer_MultiPassEmissionAbsorptionRenderer_args__n_pts_per_ray_fine_evaluation"): 4,
}
_SMALL_MLP = {
    ARGS(f"{_MLP}n_layers_xyz"): 2,
    ARGS(f"{_MLP}n_hidden_neurons_xyz"): 16,
    ARGS(f"{_MLP}n_hidden_neurons_dir"): 8,
    ARGS(f"{_MLP}append_xyz"): "[1]",
}
_SMALL_SRN = {
    ARGS(f"{_SRN}raymarch_function_args__n_hidden_units"): 16,
    ARGS(f"{_SRN}pixel_generator_args__n_hidden_units"): 16,
}
_SMALL_ENCODER = {
    ARGS("image_feature_extractor_ResNetFeatureExtractor_args__stages"): "[1]",
    ARGS("image_feature_extractor_ResNetFeatureExtractor_args__proj_dim"): 4,
    ARGS("image_feature_extractor_ResNetFeatureExtractor_args__image_rescale"): 1.0,
}
TOY = {
    "nerf": {**_SMALL_MLP, **_SAMPLES},
    "nerf_wce": {**_SMALL_MLP, **_SAMPLES, **_SMALL_ENCODER},
    "nerformer": {ARGS("implicit_function_NeRFormerImplicitFunction_args__n_hidden_neurons_xyz"): 16, **_SAMPLES, **_SMALL_ENCODER},
    "srn": _SMALL_SRN,
    "srn_noharm": _SMALL_SRN,
    "srn_wce": {**_SMALL_SRN, **_SMALL_ENCODER},
    "srn_wce_noharm": {**_SMALL_SRN, **_SMALL_ENCODER},
    "idr": {
        ARGS("implicit_function_IdrFeatureField_args__dims"): "[64,64,64]",
        ARGS("implicit_function_IdrFeatureField_args__skip_in"): "[2]",
        ARGS("renderer_SignedDistanceFunctionRenderer_args__ray_normal_coloring_network_args__dims"): "[16]",
    },
}


@functools.cache
def model_of(experiment: str) -> ImplicitronModel:
    spec = compose_experiment([f"experiment={experiment}", "dataset_root=x", "category=mug"]).model.implicitron
    return ImplicitronModel(spec.model_class_type, spec.args, render_size=(16, 16))


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_trains_renders_scores_and_is_exported(root, tmp_path, peer):
    settings = {"experiment": f"implicitron_{peer}_laptop", "training__max_steps": 2, "training__validate_every": 1.0, **TOY[peer]}
    assert train(root, tmp_path, **settings) == 0
    results = json.loads((tmp_path / "mug" / DEV / "nerf" / "results.json").read_text())
    assert results["steps"] == 2 and results["metrics"]["psnr_masked"] > 0 and 0 <= results["metrics"]["iou"] <= 1
    hidden = Path(root).rename(tmp_path / "elsewhere")  # what is left of a data set after training: its targets' cameras
    try:
        assert export(hidden, tmp_path, "allow_missing=true") == 0
    finally:
        hidden.rename(root)
    exported = json.loads((tmp_path / "submission" / "results.json").read_text())
    assert exported["subsets"][f"mug/{DEV}"]["n_frames"] == 2


@pytest.mark.parametrize("peer", PEERS)
def test_the_published_experiment_composes_and_its_laptop_preset_is_no_larger(peer):
    published, laptop = (model_of(f"implicitron_{peer}{suffix}") for suffix in ("", "_laptop"))
    assert published.rays_per_step(1) >= laptop.rays_per_step(1)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (published, laptop)]
    assert sizes[0] >= sizes[1]


@pytest.mark.parametrize("peer", PEERS)
def test_the_published_loss_weights_and_schedule(peer):
    config = compose_experiment([f"experiment=implicitron_{peer}", "dataset_root=x", "category=mug"])
    srn, idr = {"loss_rgb_mse": 200.0, "loss_mask_bce": 1.0}, {"loss_rgb_mse": 1.0, "loss_mask_bce": 100.0, "loss_eikonal": 0.1}
    nerf = dict.fromkeys(("loss_rgb_mse", "loss_mask_bce", "loss_prev_stage_rgb_mse", "loss_prev_stage_mask_bce"), 1.0)
    expected = srn if peer.startswith("srn") else idr if peer == "idr" else nerf
    assert model_of(f"implicitron_{peer}").loss_weights == expected
    training = config.training
    assert training.lr == (5e-5 if peer.startswith("srn") else 5e-4)
    assert (training.max_steps, training.schedule, training.ema) == (400_000, "steps", False)
    rays = {"nerf": 1024, "nerf_wce": 850, "nerformer": 800, "idr": 1024}.get(peer, 2048)
    assert training.n_rays == rays == model_of(f"implicitron_{peer}").rays_per_step(1)
    assert config.member == f"implicitron_{peer}"


@pytest.mark.parametrize("peer", ["srn", "srn_wce"])
def test_noharm_is_without_positional_encoding(peer):
    for suffix, octaves in (("", (3, 4)), ("_noharm", (0, 0))):
        function = model_of(f"implicitron_{peer}{suffix}").implicitron._implicit_functions[0]._fn
        found = (function.raymarch_function.n_harmonic_functions, function.pixel_generator.n_harmonic_functions)
        assert found == octaves


@pytest.mark.parametrize("peer", POOLED)
def test_published_models_pool_from_nine_photographs_at_most(peer):
    model = model_of(f"implicitron_{peer}")
    assert (model.source_settings.views, model.source_settings.min_views) == (9, 1)
    assert ModelConfig().implicitron.source_views == 9
    assert model.implicitron.image_feature_extractor.name == "resnet34"


def test_idr_is_published_with_eight_layers_of_512_in_a_sphere():
    model = model_of("implicitron_idr").implicitron
    function = model._implicit_functions[0]._fn
    assert list(function.dims) == [512] * 8 and function.bias == 0.6 and function.skip_in == (6,)
    tracer = model.renderer.ray_tracer
    assert (tracer.sdf_threshold, tracer.line_step_iters, tracer.n_steps, tracer.n_secant_steps) == (5e-5, 3, 100, 8)


def test_an_encoder_of_local_weights_is_named_where_it_is_not_there(root, tmp_path, caplog, capsys):
    settings = {"experiment": "implicitron_nerf_wce_laptop", "model__implicitron__encoder_weights": tmp_path / "absent.pth"}
    assert train(root, tmp_path, **settings, **TOY["nerf_wce"]) != 0
    assert "absent.pth: there is no such file" in caplog.text + capsys.readouterr().err
