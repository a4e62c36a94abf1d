"""MINE on a sequence as a member like any other: trained, scored, loaded, exported, fused; and in few-view evaluations."""

from __future__ import annotations

import json

import pytest
import torch

from co3d_ensemble.assembly import compose_experiment
from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.mine.member import completed_settings
from co3d_ensemble.pipeline import load_trained
from co3d_ensemble.plugin.frames import load_frames
from co3d_ensemble.plugin.implicitron_args import plain
from co3d_ensemble.plugin.mine_model import MINEModel, build_mine_model
from co3d_ensemble.training.run_directory import RunDirectory
from tests.mine.stacks import write_run
from tests.tiny import export, generated, train

SUBSET = "manyview_dev_0"
ARGS = {
    "encoder": "resnet18",
    "poolings": 0,  # pictures of 32 pixels
    "n_planes": 3,
    "near_disparity": 0.5,
    "far_disparity": 0.05,
    "plane_chunk": "null",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generated(tmp_path_factory.mktemp("data"), {"mug": [SUBSET]})


@pytest.fixture(scope="module")
def output(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    settings = {f"model.implicitron.args.{name}": value for name, value in ARGS.items()}
    assert train(root, folder, experiment="implicitron_mine", training__max_steps=2, **settings) == 0
    return folder


def test_a_run_is_trained_scored_and_exported_from_its_checkpoint_alone(root, output):
    run = RunDirectory(output / "mug" / SUBSET / "nerf")
    results = json.loads(run.results_path.read_text())
    assert results["steps"] == 2 and results["metrics"]["psnr_masked"] > 0
    assert export(root, output, "models=[nerf]") == 0
    exported = json.loads((output / "submission" / "results.json").read_text())
    assert exported["subsets"][f"mug/{SUBSET}"]["n_frames"] == 2
    model, _ = load_trained(run, torch.device("cpu"))
    subset = CO3DIndex(root).subset("mug", SUBSET)
    assert isinstance(model, MINEModel) and len(model.source_views) == len(subset.known)
    unit = model.world_unit.item()  # of the known frames' depth maps, fitted once and kept
    assert unit > 0 and unit != 1
    # its photographs are the known frames', never those of targets
    frames = load_frames(str(root), "mug", SUBSET, [record.key for record in subset.known], longest_side=24, load_depths=False)
    torch.testing.assert_close(model.source_views.rgb, torch.stack([frame.rgb for frame in frames]))


def test_a_trained_run_needs_none_of_the_files_that_it_started_from(output):
    run = RunDirectory(output / "mug" / SUBSET / "nerf")
    text = run.config_path.read_text()
    assert "checkpoint: null" in text
    try:
        run.config_path.write_text(text.replace("checkpoint: null", "checkpoint: gone.pt"))
        load_trained(RunDirectory(run.path), torch.device("cpu"))
    finally:
        run.config_path.write_text(text)


def test_a_wrong_setting_is_named(root, tmp_path, capsys):
    arguments = {"experiment": "implicitron_mine", "+model.implicitron.args.n_plane": 3}
    assert train(root, tmp_path, **arguments) != 0
    assert "no setting n_plane" in capsys.readouterr().err


def test_a_member_has_network_and_planes_of_the_run_that_it_starts_from(root, tmp_path):
    started_from = write_run(tmp_path / "run", model__density_unit="disparity", model__density_scale=20.0, evaluation__n_planes=3)
    checkpoint = f"model.implicitron.args.checkpoint={started_from}"
    place = ["experiment=implicitron_mine", f"dataset_root={root}", "category=mug"]
    args = compose_experiment([*place, checkpoint]).model.implicitron.args
    assert (args.encoder, args.density_unit, args.density_scale, args.far_disparity) == ("resnet18", "disparity", 20.0, 0.05)
    assert (args.n_planes, args.longest_side, args.plane_chunk) == (3, 48, 32)
    assert args.checkpoint == str(started_from / "checkpoints" / "best.pt")
    args = compose_experiment([*place, checkpoint, "model.implicitron.args.n_planes=5"]).model.implicitron.args
    assert args.n_planes == 5
    lone = tmp_path / "lone.pt"
    lone.write_bytes((started_from / "checkpoints" / "best.pt").read_bytes())
    of_lone = compose_experiment([*place, f"model.implicitron.args.checkpoint={lone}", "model.implicitron.args.poolings=1"])
    assert (of_lone.model.implicitron.args.encoder, of_lone.model.implicitron.args.poolings) == ("resnet50", 1)
    with pytest.raises(ValueError, match="absent: neither a run directory"):
        compose_experiment([*place, f"model.implicitron.args.checkpoint={tmp_path / 'absent'}"])
    with pytest.raises(ValueError, match=r"best.pt is of another network \(.*config.yaml: density_scale=20.0 there, 1.0 here\)"):
        build_mine_model(**{**plain(args), "density_scale": 1.0})


def test_the_experiment_composes_with_the_settings_of_the_model():
    config = compose_experiment(["experiment=implicitron_mine", "dataset_root=x", "category=mug"])
    assert config.model.implicitron.model_class_type == "MINEModel" and config.model.implicitron.args.n_planes == 32


def test_a_null_that_no_run_has_a_value_for_is_the_model_s_default(tmp_path, monkeypatch):
    write_run(tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    args = {"loss_weights": None, "n_sources": None}
    alone, of_run = completed_settings(args), completed_settings({**args, "checkpoint": 2024})
    assert alone == {"loss_weights": {"loss_rgb_target": 1.0, "loss_ssim_target": 1.0}, "n_sources": 1}
    assert alone.items() <= of_run.items() and of_run["checkpoint"] == "2024/checkpoints/best.pt"
