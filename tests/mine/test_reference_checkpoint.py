"""A checkpoint file laid out as MINE's authors publish theirs: trained on, scored, rendered from, and shown on CO3D."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from co3d_ensemble.fields.mpi_reference_weights import _decoder_names
from co3d_ensemble.mine.assembly import build_network, load_trained_mine
from co3d_ensemble.mine.fewview import model_of_run
from co3d_ensemble.mine.task import MINETask
from co3d_ensemble.plugin.mine_model import build_mine_model
from launch import evaluate_mine, render_mine, train_mine
from tests.mine.stacks import mine_config
from tests.mine.test_realestate10k import write_clip

PARAMETERS = """
data.name: realestate10k
data.img_h: 32
data.img_w: 48
mpi.num_bins_coarse: 4
mpi.num_bins_fine: 0
mpi.disparity_start: 0.9
mpi.disparity_end: 0.05
mpi.use_alpha: false
model.pos_encoding_multires: 10
lr.decay_steps: 4,8
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Our network of random weights under the authors' names, as their ``DistributedDataParallel`` saves them."""
    torch.manual_seed(3)
    network = build_network(mine_config(**{"model.encoder": "resnet50"}).model)
    backbone = {f"module.encoder.{name}": value for name, value in network.encoder.state_dict().items()}
    backbone["module.encoder.fc.weight"] = torch.zeros(10, 2048)
    theirs, decoder = {ours: name for name, ours in _decoder_names().items()}, {}
    for name, value in network.state_dict().items():
        if not name.startswith("encoder."):
            prefix = next(ours for ours in theirs if name.startswith(ours + "."))
            decoder[f"module.{theirs[prefix]}{name.removeprefix(prefix)}"] = value
    folder = tmp_path_factory.mktemp("MINE_realestate10k")
    torch.save({"backbone": backbone, "decoder": decoder, "optimizer": {"state": {}}}, folder / "checkpoint.pth")
    (folder / "params.yaml").write_text(PARAMETERS)
    return folder / "checkpoint.pth", network.state_dict()


def same(network, weights):
    state = network.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], value) for name, value in weights.items())


def test_their_file_and_its_parameters_are_a_trained_network(published):
    path, weights = published
    network, config = load_trained_mine(path)
    assert same(network, weights) and not network.training
    assert (config.data.kind, config.data.height, config.data.width, config.data.root) == ("realestate10k", 32, 48, None)
    assert (config.model.n_planes, config.model.near_disparity, config.model.far_disparity) == (4, 0.9, 0.05)
    _, config = load_trained_mine(path, "cpu", "mine_kitti_768")
    assert (config.data.kind, config.data.width, config.model.near_disparity) == ("kitti_raw", 768, 0.2)


def test_they_are_scored_and_rendered_from(published, tmp_path, capsys):
    path, _ = published
    write_clip(tmp_path / "re10k", split="test", n=14)
    lpips = ["lpips=null", "options.n_points=0", "max_pictures=1", "planes=[2]"]
    assert evaluate_mine.main([f"checkpoint={path}", f"root={tmp_path / 're10k'}", "device=cpu", *lpips]) == 0
    results = json.loads((path.parent / "evaluation" / "realestate10k" / "results.json").read_text())
    assert results["results"]["n=5"]["2"]["psnr"] > 3 and not results["checkpoint_chosen_on_what_is_scored"]
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "photo.png")
    more = [f"output_dir={tmp_path}", "device=cpu", "video=false", "export=false"]
    assert render_mine.main([f"image={tmp_path / 'photo.png'}", f"checkpoint={path}", *more]) == 0
    assert json.loads((tmp_path / "photo" / "render.json").read_text())["planes"] == 4


def test_training_and_models_of_co3d_start_from_them(published):
    path, weights = published
    config = mine_config(**{"model.encoder": "resnet50", "model.reference_weights": str(path)})
    assert same(MINETask(config, config.training, [None] * 4, [None], device=torch.device("cpu")).model, weights)
    assert same(build_mine_model(checkpoint=str(path)).network, weights)
    model = model_of_run(path)
    assert same(model.network, weights) and model.longest_side == 48 and model.scene_scale is None


def test_what_is_wrong_with_them_is_named(published, tmp_path, capsys):
    path, _ = published
    smaller = mine_config(**{"model.reference_weights": str(path)})
    with pytest.raises(ValueError, match="checkpoint.pth is no checkpoint of the network"):
        build_network(smaller.model)
    not_theirs = "empty.pth is no checkpoint of the network.*no 'backbone'"
    for name, message in (("gone.pth", "gone.pth: cannot be read"), ("empty.pth", not_theirs)):
        torch.save({}, tmp_path / "empty.pth")
        with pytest.raises(ValueError, match=message):
            build_network(mine_config(**{"model.reference_weights": str(tmp_path / name)}).model)
    alone = tmp_path / "checkpoint.pth"
    alone.symlink_to(path)
    with pytest.raises(ValueError, match="neither a run directory nor a checkpoint in one.*params.yaml beside it or say.*preset="):
        load_trained_mine(alone)
    with pytest.raises(ValueError, match="preset=mine: expected one of mine_co3d"):
        load_trained_mine(alone, "cpu", "mine")
    for parameters, message in (("data.name: nyu", "data.name='nyu': expected one of realestate10k"), ("a: [", "params.yaml: cannot be")):
        (tmp_path / "params.yaml").write_text(parameters)
        with pytest.raises(ValueError, match=message):
            load_trained_mine(alone)
    for override, message in (
        ("model.poolings=0", "model.poolings=0: the network of model.reference_weights has 2"),
        ("model.weights=resnet.pth", "model.weights=resnet.pth: model.reference_weights has weights of the encoder"),
    ):
        arguments = ["experiment=mine_llff", "data.root=x", "model.reference_weights=x", override]
        assert train_mine.main(arguments) == 2
        assert message in capsys.readouterr().err
