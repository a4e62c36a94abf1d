"""Files in ``configs/implicitron`` against the classes they name, and the command that hands over to Implicitron's trainer."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError
from pytorch3d.implicitron.dataset.data_loader_map_provider import SequenceDataLoaderMapProvider
from pytorch3d.implicitron.dataset.json_index_dataset_map_provider_v2 import JsonIndexDatasetMapProviderV2
from pytorch3d.implicitron.models.overfit_model import OverfitModel
from pytorch3d.implicitron.models.renderer.base import EvaluationMode
from pytorch3d.implicitron.tools.config import expand_args_fields, get_default_args

import co3d_ensemble.plugin  # noqa: F401 - makes pytorch3d importable, registers our components
from co3d_ensemble.functional.cameras import so3_exp
from co3d_ensemble.functional.types import PinholeCamera
from co3d_ensemble.plugin import compat, experiment
from co3d_ensemble.plugin.frames import pytorch3d_cameras

FILES = sorted(path.stem for path in experiment.CONFIG_DIR.glob("*.yaml"))
SMALL_FILES = [name for name in FILES if name.endswith("_small")]
TENSORF_FILES = [name for name in FILES if "tensorf" in name]
REPOSITORY = Path(__file__).parents[2]
MODEL = "model_factory_ImplicitronModelFactory_args.model_OverfitModel_args"
DATA = "data_source_ImplicitronDataSource_args"
DATASET = f"{DATA}.dataset_map_provider_JsonIndexDatasetMapProviderV2_args"
CLASSES = {  # where a file holds a component's settings, and the component
    MODEL: OverfitModel,
    DATASET: JsonIndexDatasetMapProviderV2,
    f"{DATA}.data_loader_map_provider_SequenceDataLoaderMapProvider_args": SequenceDataLoaderMapProvider,
}
OPEN = ("loss_weights", "implicit_function_TensoRFImplicitFunction_args.param_groups")  # their names are checked against a model, below
TRAINER, PROBLEMS = experiment.find_trainer()
ABSENT_PACKAGES = [name for module, name in experiment.NEEDED_PACKAGES.items() if importlib.util.find_spec(module) is None]
needs_trainer = pytest.mark.skipif(
    TRAINER is None or bool(ABSENT_PACKAGES),
    reason=f"Implicitron's whole trainer is not importable here: {PROBLEMS or ABSENT_PACKAGES}",
)


def composed(name: str, overrides: tuple[str, ...] = ()) -> DictConfig:
    """A file with the trainer's own defaults left empty: what the file itself sets."""
    ConfigStore.instance().store(name="default_config", node={})
    with initialize_config_dir(str(experiment.CONFIG_DIR), version_base="1.3"):
        return compose(name, list(overrides))


def merged(config: DictConfig, where: str) -> DictConfig:
    """The component's defaults with the file's settings over them; an unknown key is an error."""
    defaults = get_default_args(CLASSES[where])
    OmegaConf.set_struct(defaults, True)
    for key in OPEN:
        if (names := OmegaConf.select(defaults, key)) is not None:
            OmegaConf.set_struct(names, False)
    return OmegaConf.merge(defaults, OmegaConf.select(config, where, throw_on_missing=True))


def idle_settings(args: DictConfig, prefix: str = ""):
    """Yields the key of every component's settings that no ``*_class_type`` beside it selects."""
    for key, value in args.items():
        if isinstance(value, DictConfig) and key.endswith("_args"):
            stems = [k.removesuffix("class_type") for k in args if k.endswith("_class_type")]
            owners = [stem for stem in stems if key.startswith(stem)]
            if owners and key not in [f"{stem}{args[f'{stem}class_type']}_args" for stem in owners]:
                yield f"{prefix}{key}"
            yield from idle_settings(value, f"{prefix}{key}.")


@pytest.mark.parametrize("where", CLASSES)
@pytest.mark.parametrize("name", FILES)
def test_every_setting_of_a_file_exists_and_has_the_right_type(name, where):
    assert merged(composed(name), where)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("co3d_nerf_small", MODEL),
        ("co3d_nerf_small", f"{MODEL}.implicit_function_NeRFImplicitFunction_args"),
        ("co3d_nerf_small", f"{DATASET}.dataset_JsonIndexDataset_args"),
        ("co3d_tensorf_small", f"{MODEL}.implicit_function_TensoRFImplicitFunction_args"),
    ],
)
def test_a_setting_that_does_not_exist_is_an_error(name, where):
    config = composed(name, (f"+{where}.n_hiden=3",))
    with pytest.raises(ConfigKeyError, match="n_hiden"):
        merged(config, next(parent for parent in CLASSES if where.startswith(parent)))


@pytest.mark.parametrize("name", FILES)
def test_no_file_sets_a_component_that_it_does_not_select(name):
    assert list(idle_settings(composed(name))) == []


@pytest.mark.parametrize("name", FILES)
def test_pictures_are_rendered_at_the_size_they_are_loaded_at(name):
    config = composed(name)
    loaded, model = OmegaConf.select(config, f"{DATASET}.dataset_JsonIndexDataset_args"), OmegaConf.select(config, MODEL)
    assert loaded.image_height == loaded.image_width == model.render_image_height == model.render_image_width
    assert model.chunk_size_grid % model.raysampler_NearFarRaySampler_args.n_pts_per_ray_evaluation == 0


@pytest.mark.parametrize("name", [name for name in FILES if name not in TENSORF_FILES])
def test_both_passes_have_the_same_settings_so_that_their_order_does_not_matter(name):
    model = OmegaConf.select(composed(name), MODEL)
    assert model.implicit_function_NeRFImplicitFunction_args == model.coarse_implicit_function_NeRFImplicitFunction_args


def test_the_published_file_has_the_settings_of_our_own_published_experiment():
    ours = OmegaConf.load(REPOSITORY / "configs" / "experiment" / "nerf_published.yaml")
    config = composed("co3d_nerf_published")
    model = merged(config, MODEL)
    function, sampler = model.implicit_function_NeRFImplicitFunction_args, model.raysampler_NearFarRaySampler_args
    assert {key: function[key] for key in ours.model.nerf} == ours.model.nerf
    assert model.renderer_OccupancyAwareRenderer_args.n_pts_per_ray_fine == ours.model.renderer.n_pts_per_ray_fine
    assert sampler.n_pts_per_ray_training == ours.model.renderer.n_pts_per_ray_coarse
    assert sampler.n_rays_per_image_sampled_from_mask == ours.training.n_rays
    assert (sampler.min_depth, sampler.max_depth) == (ours.data.bounds.near, ours.data.bounds.far)
    assert function.gauge_angle_std == ours.model.camera_jitter.angle_std
    assert {key: weight for key, weight in model.loss_weights.items() if weight} == ours.training.loss_weights
    loop = config.training_loop_ImplicitronTrainingLoop_args
    steps = config[DATA].data_loader_map_provider_SequenceDataLoaderMapProvider_args.dataset_length_train * loop.max_epochs
    assert (steps, loop.clip_grad) == (ours.training.max_steps, ours.training.clip_grad_norm)
    assert config.optimizer_factory_ImplicitronOptimizerFactory_args.lr == ours.training.lr


def test_the_published_tensorf_file_has_the_settings_of_our_own_published_experiment_but_the_growing_grid():
    ours = OmegaConf.load(REPOSITORY / "configs" / "experiment" / "tensorf_published.yaml")
    config = composed("co3d_tensorf_published")
    model = merged(config, MODEL)
    function, sampler = model.implicit_function_TensoRFImplicitFunction_args, model.raysampler_NearFarRaySampler_args
    resolution = ours.model.tensorf.pop("resolution")
    assert {key: function[key] for key in ours.model.tensorf} == ours.model.tensorf
    assert resolution <= function.resolution <= ours.model.grid.final_resolution
    assert sampler.n_pts_per_ray_training == ours.model.renderer.n_pts_per_ray_coarse
    assert sampler.n_rays_per_image_sampled_from_mask == ours.training.n_rays
    assert (sampler.min_depth, sampler.max_depth) == (ours.data.bounds.near, ours.data.bounds.far)
    assert function.gauge_angle_std == ours.model.camera_jitter.angle_std
    wanted = {key: weight for key, weight in ours.training.loss_weights.items() if weight is not None}
    assert {key: weight for key, weight in model.loss_weights.items() if weight} == wanted
    loop, optimizer = config.training_loop_ImplicitronTrainingLoop_args, config.optimizer_factory_ImplicitronOptimizerFactory_args
    steps = config[DATA].data_loader_map_provider_SequenceDataLoaderMapProvider_args.dataset_length_train * loop.max_epochs
    assert (steps, loop.clip_grad) == (ours.training.max_steps, ours.training.clip_grad_norm)
    assert (optimizer.lr, optimizer.group_learning_rates) == (ours.training.lr, {"network": ours.training.lr_network})
    assert optimizer.betas == ours.training.betas


@pytest.mark.parametrize("name", TENSORF_FILES)
def test_the_network_group_is_basis_and_colour_network_and_has_a_learning_rate(name):
    function = toy_model(name).implicit_function
    named = [function.get_submodule(module) for module in function.param_groups]
    assert {id(p) for module in named for p in module.parameters()} == {id(p) for p in function.field.network()}
    rates = composed(name).optimizer_factory_ImplicitronOptimizerFactory_args.group_learning_rates
    assert set(function.param_groups.values()) == set(rates)


TOY = (
    "render_image_height=8",
    "render_image_width=8",
    "raysampler_NearFarRaySampler_args.n_rays_per_image_sampled_from_mask=12",
    "raysampler_NearFarRaySampler_args.n_pts_per_ray_training=6",
    "raysampler_NearFarRaySampler_args.n_pts_per_ray_evaluation=6",
    "chunk_size_grid=60",
)
TOY_NERF = ("renderer_OccupancyAwareRenderer_args.n_pts_per_ray_fine=5",)
TOY_TENSORF = ("implicit_function_TensoRFImplicitFunction_args.resolution=8",)


def toy_model(name: str):
    torch.manual_seed(0)
    expand_args_fields(OverfitModel)
    lines = (*TOY, *(TOY_TENSORF if name in TENSORF_FILES else TOY_NERF))
    return OverfitModel(**merged(composed(name, tuple(f"{MODEL}.{line}" for line in lines)), MODEL))


def toy_batch() -> dict:
    camera = PinholeCamera(
        R=so3_exp(torch.tensor([0.3, -0.9, 0.2])),
        T=torch.tensor([0.1, 0.2, 12.0]),
        focal=torch.tensor([9.0, 9.0]),
        principal=torch.tensor([4.0, 4.0]),
        height=8,
        width=8,
    )
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    pictures = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {
        "image_rgb": pictures,
        "fg_probability": mask,
        "mask_crop": torch.ones_like(mask),
        "camera": pytorch3d_cameras([camera]),
        "sequence_name": ["thing"],
    }


@pytest.mark.parametrize("name", FILES)
def test_the_model_of_a_file_trains_all_its_parameters_on_all_losses_but_that_of_the_full_pictures(name):
    model = toy_model(name).train()
    predictions = model(**toy_batch(), evaluation_mode=EvaluationMode.TRAINING)
    weights = {key: weight for key, weight in model.loss_weights.items() if weight}
    unweighted = {"loss_rgb", "loss_prev_stage_rgb"}
    assert set(weights) == {key for key in predictions if key.startswith("loss_")} - unweighted
    expected = sum(weight * predictions[key] for key, weight in weights.items())
    torch.testing.assert_close(predictions["objective"], expected)
    predictions["objective"].backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all(gradient.abs().max() > 0 for key, gradient in gradients.items() if key.endswith("weight"))


@pytest.mark.parametrize("name", FILES)
def test_background_rays_start_where_the_mask_loss_has_a_gradient(name):
    """Fails at a NeRF's density_bias 0: rays 21 units long start with alpha > 1 - 1e-6, where the BCE of background is clamped."""
    model = toy_model(name).train()
    batch = toy_batch()
    batch["fg_probability"] = torch.zeros_like(batch["fg_probability"])
    predictions = model(**batch, evaluation_mode=EvaluationMode.TRAINING)
    passes = [key for key in model.loss_weights if key.endswith("alpha_bce")]
    assert passes and all(predictions[key] < 3 for key in passes)  # 13.8 is the clamp


@pytest.mark.parametrize("name", FILES)
def test_the_model_of_a_file_renders_whole_pictures_in_chunks(name):
    model = toy_model(name).eval()
    with torch.no_grad():
        whole = model(**toy_batch(), evaluation_mode=EvaluationMode.EVALUATION)["implicitron_render"]
    assert whole.image_render.shape == (1, 3, 8, 8) and whole.mask_render.shape == (1, 1, 8, 8)
    assert torch.isfinite(whole.depth_render).all() and 0 < whole.mask_render.min() <= whole.mask_render.max() <= 1


@pytest.mark.parametrize("name", SMALL_FILES)
def test_logged_names_are_losses_that_are_computed(name):
    model = toy_model(name).train()
    predictions = model(**toy_batch(), evaluation_mode=EvaluationMode.TRAINING)
    assert set(model.log_vars) - {"epoch", "sec/it"} <= set(predictions)  # these two the trainer adds


def run_command(*arguments: str, hide: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own; ``hide`` names a package that it shall not find."""
    code = "import runpy, sys; sys.argv = ['experiment', *sys.argv[1:]]\n"
    if hide:
        code += f"sys.modules[{hide!r}] = None\n"
    code += "runpy.run_module('co3d_ensemble.plugin.experiment', run_name='__main__')"
    path = os.pathsep.join([str(REPOSITORY), *(entry for entry in sys.path if entry)])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_the_trainer_the_command_says_what_is_missing_and_ends_with_3(monkeypatch, capsys):
    monkeypatch.setattr(experiment, "TRAINERS", ("pytorch3d.no_trainer", "projects.no_trainer"))
    assert experiment.main(["--config-name", "co3d_nerf_small"]) == experiment.EXIT_MISSING == 3
    message = capsys.readouterr().err
    assert "pytorch3d.no_trainer or projects.no_trainer" in message
    version = ".".join(map(str, compat.pytorch3d_version()))
    assert f"git clone --branch v{version} https://github.com/facebookresearch/pytorch3d" in message


def test_a_trainer_without_its_parts_is_missing_and_the_parts_are_named(monkeypatch, tmp_path):
    """As in PyTorch3D's wheel: the entry point is there, what it imports is not."""
    folder = tmp_path / "half_a_trainer"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "experiment.py").write_text("from .impl.model_factory import ModelFactoryBase\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(experiment, "TRAINERS", ("half_a_trainer", "projects.no_trainer"))
    trainer, problems = experiment.find_trainer()
    assert trainer is None
    parts = [f"half_a_trainer.impl.{name}" for name in ("model_factory", "optimizer_factory", "training_loop")]
    assert problems[0].startswith(", ".join(parts) + ":")


def test_a_clone_is_found_behind_the_empty_package_that_wheels_install(monkeypatch, tmp_path):
    for folder in ("wheel/projects", "clone/projects/implicitron_trainer/impl"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "wheel/projects/__init__.py").touch()
    for name in experiment.NEEDED_MODULES:
        (tmp_path / "clone/projects/implicitron_trainer" / f"{name.replace('.', '/')}.py").touch()
    for name in [name for name in sys.modules if name.split(".")[0] == "projects"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "clone"))
    monkeypatch.syspath_prepend(str(tmp_path / "wheel"))
    monkeypatch.setattr(experiment, "TRAINERS", ("pytorch3d.no_trainer", "projects.implicitron_trainer"))
    assert experiment.find_trainer() == ("projects.implicitron_trainer", [])
    for name in [name for name in sys.modules if name.split(".")[0] == "projects"]:
        monkeypatch.delitem(sys.modules, name)


def test_the_command_in_a_process_of_its_own_ends_with_3_and_without_a_traceback():
    done = run_command("--config-name", "co3d_nerf_small", hide="accelerate")
    assert done.returncode == 3, done.stderr
    assert "pip install accelerate" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        (["--config-name", "x", "a=1"], ["--config-path", str(experiment.CONFIG_DIR), "--config-name", "x", "a=1"]),
        (["-cp=/there", "--help"], ["--config-path", "/there", "--help"]),
        (["--config-dir", "/here", "a=1"], ["--config-path", "/here", "a=1"]),
        (["--config-dir", "/here", "--config-path=/there"], ["--config-path", "/there", "--config-dir", "/here"]),
    ],
)
def test_our_files_are_on_the_search_path_unless_the_user_names_a_folder(given, passed_on):
    assert experiment.with_config_path(given) == passed_on


@needs_trainer
@pytest.mark.parametrize("name", SMALL_FILES)
def test_the_trainer_composes_a_file_through_hydra(tmp_path, name):
    """The small files, which include the published ones."""
    done = run_command("--config-name", name, "--cfg", "job", f"exp_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    printed = OmegaConf.create(done.stdout)
    assert OmegaConf.select(printed, f"{MODEL}.renderer_class_type") == "OccupancyAwareRenderer"
    assert printed.seed == 0 and printed.detect_anomaly is False  # the latter from the trainer's own defaults


@needs_trainer
def test_the_trainer_refuses_an_unknown_setting():
    done = run_command("--config-name", "co3d_nerf_small", "--cfg", "job", f"{MODEL}.n_hiden=3")
    assert done.returncode == 1 and "n_hiden" in done.stderr
