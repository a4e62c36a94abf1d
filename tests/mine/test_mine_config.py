"""The settings of MINE: the reference's table, documented keys, and loud errors."""

from __future__ import annotations

import inspect

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.functional.mpi_losses import edge_threshold_smoothness
from co3d_ensemble.mine.assembly import CONFIG_DIR, compose_mine
from co3d_ensemble.mine.config import FREE_KEYS, MINEConfig, MINETrainingConfig, active_weights, check_points, resolve_steps, validate
from co3d_ensemble.settings import settings_with_help
from co3d_ensemble.training.run_directory import flattened, is_free
from launch import train_mine

SETTINGS = {key: text for key, _, text in settings_with_help(MINEConfig)}
PRESETS = sorted(path.stem for path in (CONFIG_DIR / "mine").glob("*.yaml"))


def changed(**changes):
    """The defaults with some settings changed; ``__`` stands for a dot."""
    config = OmegaConf.structured(MINEConfig)
    for key, value in {"training__max_steps": 10, **changes}.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    return config


def test_every_setting_has_one_line_of_help():
    assert all(text.strip() and "\n" not in text for text in SETTINGS.values())


@pytest.mark.parametrize("document", [train_mine.__doc__, (CONFIG_DIR.parent / "README.md").read_text()], ids=["help", "README"])
def test_the_documents_commands_for_several_processes_give_each_of_them_a_share(document):
    commands = [line.split() for line in document.splitlines() if "torchrun" in line and "launch/train_mine.py" in line]
    assert commands
    for command in commands:
        n_processes = int(command[command.index("--nproc_per_node") + 1])
        config = compose_mine(command[command.index("launch/train_mine.py") + 1 :])
        assert config.training.batch_size % n_processes == 0


@pytest.mark.parametrize("key", FREE_KEYS)
def test_free_keys_exist(key):
    assert any(is_free(setting, [key]) for setting in SETTINGS)


def test_the_first_smoothness_has_one_default():
    parameters = inspect.signature(edge_threshold_smoothness).parameters
    own = (parameters["min_gradient"].default, parameters["edge_ratio"].default)
    assert own == (MINETrainingConfig.smoothness_gmin, MINETrainingConfig.smoothness_ratio) == (2.0, 0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_named_after_their_file(name):
    config = compose_mine([f"experiment={name}", "data.root=somewhere"])
    assert config.name == name and f"mine_{config.data.kind}".startswith(name[:9])


@pytest.mark.parametrize(
    ("name", "size", "disparities", "rates", "epochs", "milestones", "smoothness", "batch"),
    [
        ("mine_realestate10k", (384, 256), (1.0, 0.001), (2e-4, 1e-3), 10, (4, 8), (0.5, 0.01), 4),
        ("mine_kitti_384", (384, 128), (0.2, 0.001), (1e-3, 1e-3), 120, (40, 80, 100), (0, 0.01), 4),
        ("mine_kitti_768", (768, 256), (0.2, 0.001), (1e-3, 1e-3), 120, (40, 80, 100), (0, 0.01), 4),
        ("mine_flowers", (512, 384), (3.0, 0.03), (2e-4, 1e-3), 20, (5, 10, 15), (0, 0.01), 2),
        ("mine_llff", (512, 384), (1.0, 0.001), (1e-3, 1e-3), 200, (60, 90, 120), (0, 0), 2),
    ],
)
def test_presets_are_the_rows_of_the_references_table(name, size, disparities, rates, epochs, milestones, smoothness, batch):
    config = compose_mine([f"experiment={name}", "data.root=somewhere"])
    model, training = config.model, config.training
    assert (config.data.width, config.data.height) == size
    assert (model.near_disparity, model.far_disparity) == disparities and model.n_planes == 32 and model.encoder == "resnet50"
    assert (training.lr_encoder, training.lr_decoder) == rates and training.weight_decay == 4e-5
    assert training.epochs == epochs and [share * epochs for share in training.milestones] == pytest.approx(milestones, abs=1e-4)
    assert training.batch_size == batch and not training.ema
    weights = active_weights(training)
    found = (weights.get("loss_smooth_v1_target", 0), weights.get("loss_smooth_v2_source", 0), weights.get("loss_smooth_v2_target", 0))
    assert found == (smoothness[0], smoothness[1], smoothness[1])
    with_points = name in ("mine_realestate10k", "mine_llff")
    assert training.calibrate_scale == with_points and ("loss_disparity_source" in weights) == with_points
    assert config.data.n_points == (256 if with_points else 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__kind": "dtu"}, "data.kind='dtu': expected one of generated"),
        ({"data__kind": "llff"}, "data.root is missing: data.kind=llff"),
        ({"data__height": 8}, r"data.height=8: must lie in \[16, inf\)"),
        ({"data__workers": -1}, "data.workers=-1"),
        ({"model__near_disparity": 0.001}, "model.near_disparity=0.001: must be greater than model.far_disparity=0.001"),
        ({"model__far_disparity": 0.0}, "model.far_disparity=0.0: must be positive"),
        ({"model__n_planes": 1}, "model.n_planes=1"),
        ({"model__poolings": 3}, "model.poolings=3"),
        ({"model__encoder": "vgg"}, "model.encoder='vgg'"),
        ({"training__batch_size": 0}, "training.batch_size=0: must be positive"),
        ({"training__betas": [0.9, 1.0]}, r"training.betas=\[0.9, 1.0\]: expected two numbers in \[0, 1\)"),
        ({"training__betas": [0.9]}, r"training.betas=\[0.9\]: expected two"),
        ({"training__adam_eps": -1e-8}, r"training.adam_eps=-1e-08: must lie in \(0, inf\)"),
        ({"training__max_steps": None}, "training.max_steps and training.epochs are both null"),
        ({"training__milestones": [0.8, 0.4], "training__schedule": "milestones"}, "training.milestones=.0.8, 0.4.: expected ascending"),
        ({"training__milestones": [0.4]}, "only training.schedule=milestones takes them"),
        ({"training__schedule": "milestones"}, "training.milestones is empty, so training.schedule=milestones would never lower"),
        ({"training__loss_weights": {"loss_rgb": 1.0}}, "name loss_rgb: expected loss_rgb_target"),
        ({"training__loss_weights__loss_rgb_target": -1.0}, "training.loss_weights.loss_rgb_target=-1.0: must not be negative"),
        ({"training__loss_weights": {"loss_rgb_target": 0, "loss_ssim_target": None}}, "or no colour is learned"),
        ({"training__ramped_losses": ["loss_smooth_v1_target"]}, "ramped_losses=.'loss_smooth_v1_target'.: have no weight"),
        (
            {"data__n_points": 0},
            "no sparse points .data.n_points=0. for training.loss_weights.loss_disparity_source, .*: "
            "training.loss_weights.loss_disparity_source=null training.loss_weights.loss_disparity_target=null "
            "training.calibrate_scale=false does without",
        ),
        ({"evaluation__sampling": "random"}, "evaluation.sampling='random'"),
        ({"name": "a/b"}, "name='a/b': must be one plain part of a path"),
    ],
)
def test_bad_values_are_named(changes, message):
    config = changed()
    if "training__loss_weights" in changes:
        config.training.loss_weights = dict.fromkeys(config.training.loss_weights)
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_a_scale_without_points_cannot_be_fitted():
    without = changed(training__loss_weights={"loss_disparity_source": None, "loss_disparity_target": 0.0})
    with pytest.raises(ValueError, match="no sparse points .why. for training.calibrate_scale: training.calibrate_scale=false does"):
        check_points(without, has_points=False, why="why")
    without.training.calibrate_scale = False
    check_points(without, has_points=False, why="why")


@pytest.mark.parametrize("override", ["training.lr=1e-3", "+data.colour=1", "experiment=mine_nothing", "model.n_planes=many"])
def test_unknown_keys_experiments_and_types_are_refused(override, capsys):
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)):
        compose_mine([override])
    assert train_mine.main([override]) == 2
    assert override.split("=")[-1 if "experiment" in override else 0].strip("+").split(".")[-1] in capsys.readouterr().err


def test_epochs_become_steps_once_the_data_are_known():
    config = changed(training__max_steps=None, training__epochs=2.5, training__batch_size=4)
    resolve_steps(config, n_pairs=100)
    assert config.training.max_steps == 62
    resolve_steps(config, n_pairs=1000)
    assert config.training.max_steps == 62  # a number wins
    assert flattened(config)["training.epochs"] == 2.5


def test_the_command_shows_its_settings(capsys):
    assert train_mine.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown for key in SETTINGS) and all(name in shown for name in PRESETS) and "; without it mine_generated\n" in shown
    assert train_mine.main(["experiment=mine_kitti_384", "data.root=x", "--cfg"]) == 0
    assert "kitti_raw" in capsys.readouterr().out
