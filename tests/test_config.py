"""The schema of the settings: documented, checked, and loud about what it does not know."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, ValidationError

from co3d_ensemble.assembly import compose_experiment
from co3d_ensemble.config import FREE_KEYS, ExperimentConfig, TrainingConfig
from co3d_ensemble.config_checks import validate
from co3d_ensemble.settings import settings_with_help

SETTINGS = {key: (default, text) for key, default, text in settings_with_help(ExperimentConfig)}


def experiment(*overrides: str):
    return OmegaConf.merge(OmegaConf.structured(ExperimentConfig), OmegaConf.from_dotlist(list(overrides)))


def test_the_defaults_are_valid():
    validate(ExperimentConfig())
    validate(experiment())


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_has_one_line_of_help(key):
    text = SETTINGS[key][1]
    assert text.strip() and "\n" not in text


def test_the_listing_has_every_leaf_of_the_schema():
    def leaves(node, prefix=""):
        for key in node:
            # dictionaries with free keys are one setting; dataclasses are opened
            child = None if OmegaConf.is_missing(node, key) else node._get_node(key)
            if OmegaConf.is_dict(child) and OmegaConf.get_type(child) is not dict:
                yield from leaves(child, f"{prefix}{key}.")
            else:
                yield prefix + key

    assert set(leaves(OmegaConf.structured(ExperimentConfig))) == set(SETTINGS)


def test_mutable_defaults_are_not_shared():
    ExperimentConfig().training.loss_weights["loss_roi_rgb"] = 7.0
    assert ExperimentConfig().training.loss_weights["loss_roi_rgb"] == 1.0


@pytest.mark.parametrize("key", ["training.learning_rate", "model.nerf.n_hiden", "colour"])
def test_an_unknown_key_is_named(key):
    with pytest.raises(ConfigKeyError, match=key.split(".")[-1]):
        experiment(f"{key}=1")


def test_a_value_of_the_wrong_type_is_named():
    with pytest.raises(ValidationError, match="training.n_rays"):
        experiment("training.n_rays=many")


def test_the_dataset_has_no_default():
    with pytest.raises(MissingMandatoryValue, match="dataset_root"):
        _ = experiment().dataset_root


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.kind=gaussians", "model.kind='gaussians'"),
        ("model.nerf.density_activation=tanh", "model.nerf.density_activation='tanh'"),
        ("model.nerf.precision=float16", "model.nerf.precision='float16'"),
        ("model.camera_jitter.mode=on", "model.camera_jitter.mode"),
        ("data.bounds.mode=sphere", "data.bounds.mode='sphere'"),
        ("training.schedule=cosine", "training.schedule='cosine'"),
        ("training.resume=maybe", "training.resume='maybe'"),
        ("training.max_steps=0", "training.max_steps=0"),
        ("training.n_rays=-1", "training.n_rays=-1"),
        ("training.lr=0", "training.lr=0"),
        ("rendering.chunk_rays=0", "rendering.chunk_rays=0"),
        ("model.occupancy.resolution=0", "model.occupancy.resolution=0"),
        ("data.bounds.near=30", "data.bounds.near, far"),
        ("data.bounds.overrides.cape=[5.0,2.0]", "data.bounds.overrides.cape"),
        ("data.bounds.overrides.cape=[5]", "data.bounds.overrides.cape"),
        ("data.bounds.overrides.cape=near", "data.bounds.overrides.cape"),
        ("model.renderer.n_pts_per_ray_coarse=2", "model.renderer.n_pts_per_ray_coarse=2"),
        ("data.longest_side=4", "data.longest_side=4"),
        ("data.val_share=1.0", "data.val_share=1.0"),
        ("data.max_val_frames=0", "data.max_val_frames=0: must lie in [1, inf)"),
        ("data.bounds.hull_tolerance=1.0", "data.bounds.hull_tolerance=1.0: must lie in [0, 1)"),
        ("data.bounds.hull_tolerance=-0.1", "data.bounds.hull_tolerance=-0.1"),
        ("data.bounds.hull_margin=-0.1", "data.bounds.hull_margin=-0.1: must lie in [0, inf)"),
        ("model.occupancy.refine_from=1.5", "model.occupancy.refine_from=1.5: must lie in [0, 1]"),
        ("model.occupancy.refine_every=0.0", "model.occupancy.refine_every=0.0: must lie in (0, 1]"),
        ("model.occupancy.decay=1.0", "model.occupancy.decay=1.0: must lie in [0, 1)"),
        ("model.occupancy.opacity_threshold=0.0", "model.occupancy.opacity_threshold=0.0: must lie in (0, 1)"),
        ("model.occupancy.opacity_threshold=1.0", "model.occupancy.opacity_threshold=1.0"),
        ("model.renderer.n_pts_per_ray_fine=0", "model.renderer.n_pts_per_ray_fine=0: must lie in [1, inf)"),
        ("model.renderer.occupied_floor=0.0", "model.renderer.occupied_floor=0.0: must lie in (0, inf)"),
        ("model.implicitron.frames_per_step=0", "model.implicitron.frames_per_step=0"),
        ("model.nerf.skip_layers=[8]", "model.nerf: skip_layers=[8]: must be trunk layers from 1 to n_layers - 1 = 7"),
        ("model.nerf.skip_layers=[0,5]", "model.nerf: skip_layers=[0, 5]"),
        ("model.coarse_overrides.n_layers=4", "model.coarse_overrides over model.nerf: skip_layers=[5]: must be trunk layers from 1"),
        ("model.coarse_overrides.n_hiden=4", "model.coarse_overrides has no n_hiden: expected keys among"),
        ("model.coarse_overrides.n_layers=few", "n_layers"),
        ("model.nerf.n_hidden_color=0", "model.nerf.n_hidden_color=0: must be positive"),
        ("model.nerf.density_noise_std=-0.1", "model.nerf.density_noise_std=-0.1: must lie in [0, inf)"),
        ("model.tensorf.n_harmonics_dir=-1", "model.tensorf.n_harmonics_dir=-1: must lie in [0, inf)"),
        ("model.tensorf.density_shift=nan", "model.tensorf.density_shift=nan"),
        ("model.camera_jitter.angle_std=-0.1", "model.camera_jitter.angle_std=-0.1: must lie in [0, inf)"),
        ("model.camera_jitter.extrinsics_shift_std=nan", "model.camera_jitter.extrinsics_shift_std=nan"),
        ("training.lr=inf", "training.lr=inf: must be positive and finite"),
        ("training.lr=nan", "training.lr=nan"),
        ("training.lr_network=inf", "training.lr_network=inf: must lie in (0, inf)"),
        ("training.adam_eps=inf", "training.adam_eps=inf: must lie in (0, inf)"),
        ("training.betas=[0.9,inf]", "training.betas=[0.9, inf]: expected two numbers in [0, 1)"),
        ("training.loss_weights.loss_roi_rgb=inf", "training.loss_weights.loss_roi_rgb=inf: must be finite"),
        ("training.clip_grad_norm=inf", "training.clip_grad_norm=inf"),
        ("model.nerf.density_scale=inf", "model.nerf.density_scale=inf"),
        ("model.tensorf.distance_scale=inf", "model.tensorf.distance_scale=inf: must be positive and finite"),
        ("model.tensorf.init_std=inf", "model.tensorf.init_std=inf"),
        ("data.bounds.far=inf", "data.bounds.near, far=(3.0, inf): expected two finite distances"),
        ("data.bounds.overrides.cape=[2.0,.inf]", "data.bounds.overrides.cape=[2.0, inf]: expected two finite distances"),
        ("training.budget_minutes=0", "training.budget_minutes=0.0: must lie in (0, inf)"),
        ("training.lr_final=1.5", "training.lr_final=1.5: must lie in [0, 1]"),
        ("training.warmup=1.0", "training.warmup=1.0: must lie in [0, 1)"),
        ("training.ramp=-0.5", "training.ramp=-0.5: must lie in [0, 1]"),
        ("training.ramp=nan", "training.ramp=nan"),
        ("training.clip_grad_norm=0", "training.clip_grad_norm=0.0: must lie in (0, inf)"),
        ("training.ema_horizon=0", "training.ema_horizon=0.0: must lie in (0, inf)"),
        ("training.validate_every=2", "training.validate_every=2.0: must lie in (0, 1]"),
        ("training.early_stopping_patience=0", "training.early_stopping_patience=0: must lie in [1, inf)"),
        ("training.checkpoint_every_seconds=-1", "training.checkpoint_every_seconds=-1.0: must lie in [0, inf)"),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_key(override, named):
    with pytest.raises(ValueError) as caught:
        validate(experiment(override))
    assert named in str(caught.value)


@pytest.mark.parametrize("given", ["data.bounds.near=2.0", "data.bounds.far=9.0", "data.bounds.overrides.cape=[2.0,9.0]"])
def test_distances_that_no_ray_takes_are_a_warning_that_names_the_key(given, caplog):
    mode = "data.bounds.mode=near_far"
    validate(experiment(given, mode, "model.kind=nerf"))
    assert not caplog.records
    for unread in ((mode, "model.kind=tensorf"), ("model.kind=tensorf",), ("model.kind=nerf",)):
        caplog.clear()
        validate(experiment(given, *unread))
        assert given.partition("=")[0] in caplog.text and "without effect" in caplog.text


@pytest.mark.parametrize("name", ["nerf_published", "nerf_laptop", "tensorf_published", "tensorf", "tensorf_laptop", "implicitron_nerf"])
def test_no_preset_warns_of_distances(name, caplog):
    compose_experiment([f"experiment={name}", "dataset_root=x", "category=mug"])
    assert not caplog.records


def test_upsamplings_that_would_coarsen_the_grid_are_an_error_that_names_both_resolutions():
    coarser = ("model.tensorf.resolution=200", "model.grid.final_resolution=160")
    with pytest.raises(ValueError, match=r"model.grid.final_resolution=160: .* model.tensorf.resolution=200"):
        validate(experiment("model.kind=tensorf", *coarser))
    validate(experiment("model.kind=tensorf", *coarser, "model.grid.upsample_at=[]"))
    validate(experiment("model.kind=nerf", *coarser))


@pytest.mark.parametrize(
    "override",
    [
        "model.occupancy.refine_from=1",
        "model.occupancy.refine_every=1",
        "model.occupancy.decay=0",
        "data.bounds.hull_tolerance=0",
        "data.bounds.hull_margin=0",
        "training.warmup=0",
        "training.ramp=0",
        "training.validate_every=1",
        "training.budget_minutes=null",
        "training.clip_grad_norm=null",
        "training.early_stopping_patience=null",
        "training.checkpoint_every_seconds=0",
        "model.nerf.skip_layers=[1,7]",
        "model.nerf.skip_layers=[]",
        "model.nerf.n_harmonics_xyz=0",
        "model.nerf.density_noise_std=0",
        "model.camera_jitter.angle_std=0",
    ],
)
def test_the_ends_of_a_range_and_null_are_allowed_where_they_mean_something(override):
    validate(experiment(override))


@pytest.mark.parametrize(
    ("override", "key", "instead"),
    [
        ("training.loss_weights.loss_roi_rgb=2.0", "training.loss_weights=", "model.implicitron.args.loss_weights"),
        ("training.loss_weights.loss_rgb_mse=1.0", "training.loss_weights=", "model.implicitron.args.loss_weights"),
        ("data.bounds.mode=near_far", "data.bounds.mode=near_far", "raysampler_NearFarRaySampler_args.min_depth"),
    ],
)
def test_what_an_implicitron_model_would_ignore_is_an_error_that_names_what_it_takes_instead(override, key, instead):
    validate(experiment(override))
    with pytest.raises(ValueError) as caught:
        validate(experiment("model.kind=implicitron", override))
    assert key in str(caught.value) and instead in str(caught.value)


def test_an_implicitron_model_goes_with_untouched_loss_weights_and_with_none():
    validate(experiment("model.kind=implicitron"))
    validate(experiment("model.kind=implicitron", *(f"training.loss_weights.{name}=null" for name in TrainingConfig().loss_weights)))


@pytest.mark.parametrize("name", ["implicitron_nerf", "implicitron_nerf_laptop"])
def test_the_implicitron_experiments_store_no_loss_weight_that_is_not_used(name):
    config = compose_experiment([f"experiment={name}", "dataset_root=x", "category=mug"])
    assert set(config.training.loss_weights.values()) == {None}
    assert all(weight > 0 for weight in config.model.implicitron.args.loss_weights.values())


@pytest.mark.parametrize("key", FREE_KEYS)
def test_free_keys_exist(key):
    assert key in SETTINGS


def test_nothing_that_changes_the_result_is_free():
    assert not {"training.seed", "training.max_steps", "training.n_rays", "training.lr", "data.longest_side"} & set(FREE_KEYS)
