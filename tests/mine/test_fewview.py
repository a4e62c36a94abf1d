"""Few-view eval batches through MINE: every target once, from its own sources only, into a checked and scored archive."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.functional.types import RenderedView
from co3d_ensemble.mine import co3d_points, fewview
from co3d_ensemble.mine.co3d_points import read_depth
from co3d_ensemble.mine.fewview import batches_to_render, export_fewview, model_of_run, render_eval_batches
from co3d_ensemble.plugin.frames import load_frames
from co3d_ensemble.plugin.mine_model import build_mine_model
from launch import export_fewview as export_fewview_script
from tests.tiny import generated

CPU, SUBSET = torch.device("cpu"), "fewview_dev"
SMALL = {"encoder": "resnet18", "poolings": 0, "n_planes": 2, "near_disparity": 0.5, "far_disparity": 0.05}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A generated sequence with few-view lists of its own: its first target twice, with one source and with two."""
    root = generated(tmp_path_factory.mktemp("data"), {"mug": ["manyview_dev_0"]})
    mug = root / "mug"
    lists = json.loads((mug / "set_lists" / "set_lists_manyview_dev_0.json").read_text())
    known, (first, second) = lists["train"], lists["test"][:2]
    (mug / "set_lists" / f"set_lists_{SUBSET}.json").write_text(json.dumps(lists))
    batches = [[first, known[0]], [first, known[1], known[2]], [second, known[3]]]
    (mug / "eval_batches" / f"eval_batches_{SUBSET}.json").write_text(json.dumps(batches))
    (root / "category_to_subset_name_list.json").write_text(json.dumps({"mug": ["manyview_dev_0", SUBSET]}))
    return root


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_mine_model(**SMALL, n_sources=2).eval()


def test_a_target_is_rendered_once_from_its_largest_batch_and_from_no_other_frame(root, model):
    subset = CO3DIndex(root).subset("mug", SUBSET)
    counts = [len(batch.sources) for batch in batches_to_render(subset).values()]
    assert counts == [2, 1]
    rendered = []
    for record, view in render_eval_batches(model, root, subset, device=CPU):
        sources = [source.key for source in batches_to_render(subset)[record.key].sources]
        frames = load_frames(str(root), "mug", SUBSET, sources, load_depths=False)
        torch.testing.assert_close(model.source_views.rgb, torch.stack([frame.rgb for frame in frames]))
        assert view.rgb.shape == (3, record.height, record.width)
        rendered.append(record.key)
    assert rendered == [record.key for record in subset.targets]


def test_the_archive_holds_every_target_and_is_scored(root, model, tmp_path):
    done = export_fewview(model, root, tmp_path, sequence_set="dev", device=CPU)
    assert done["archive"].name == "submission_fewview_dev.hdf5" and done["archive"].is_file()
    assert done["results"]["subsets"][f"mug/{SUBSET}"]["n_frames"] == 2
    assert json.loads((tmp_path / "submission" / "results_fewview.json").read_text())["mean"]["psnr_masked"] > 0


def test_targets_without_sources_are_named(root):
    subset = CO3DIndex(root).subset("mug", "manyview_dev_0")
    with pytest.raises(ValueError, match=subset.targets[0].name):
        batches_to_render(subset)


def run_config(calibrate_scale=True, shown=None, **planes):
    network = {"encoder": "resnet18", "encoding": "reference", "n_harmonics": 10, "mode": "sigma", "precision": "float32", "compile": False}
    network |= {"poolings": 0, "density_unit": "depth", "density_scale": 1.0}
    data = SimpleNamespace(kind="co3d", height=64, width=96)
    training = SimpleNamespace(calibrate_scale=calibrate_scale)
    evaluation = SimpleNamespace(n_planes=shown)
    return SimpleNamespace(model=SimpleNamespace(**network, **planes), data=data, training=training, evaluation=evaluation)


PLANES = {"n_planes": 5, "n_fine_planes": 2, "near_disparity": 2.0, "far_disparity": 0.1, "blend_source": False, "plane_chunk": 4}


def test_the_model_of_a_run_has_its_network_and_its_settings(model, monkeypatch):
    monkeypatch.setattr(fewview, "load_trained_mine", lambda *_: (model.network, run_config(**PLANES)))
    loaded = model_of_run("run", n_planes=7)
    assert loaded.n_fine_planes == 2 and loaded.scene_scale is None
    assert (loaded.n_planes, loaded.far_disparity, loaded.longest_side, loaded.blend_source) == (7, 0.1, 96, False)
    assert not loaded.training and loaded.network.poolings == 0 and model_of_run("run").n_planes == 5
    torch.testing.assert_close(dict(loaded.network.state_dict()), dict(model.network.state_dict()))


def test_a_run_is_shown_with_the_planes_of_its_validations(model, monkeypatch):
    monkeypatch.setattr(fewview, "load_trained_mine", lambda *_: (model.network, run_config(shown=9, **PLANES)))
    assert model_of_run("run").n_planes == 9 and model_of_run("run", n_planes=7).n_planes == 7


def test_a_run_that_learned_in_the_sequences_own_units_keeps_them(model, monkeypatch):
    monkeypatch.setattr(fewview, "load_trained_mine", lambda *_: (model.network, run_config(calibrate_scale=False, **PLANES)))
    assert model_of_run("run").scene_scale == 1 and model_of_run("run", scene_scale=2.0).scene_scale == 2


def test_each_batch_has_the_unit_of_its_own_sources_and_a_sequence_without_points_is_named(root, model, monkeypatch, caplog):
    subset, units = CO3DIndex(root).subset("mug", SUBSET), []

    def rendered():
        return [model.world_unit.item() for _ in render_eval_batches(model, root, subset, device=CPU)]

    monkeypatch.setattr(model, "render_view", lambda camera: RenderedView(*[torch.zeros(1)] * 3))
    units = rendered()
    assert len(set(units)) == 2 and all(unit > 0 and unit != 1 for unit in units)
    # twice the depth, twice the unit
    monkeypatch.setattr(co3d_points, "read_depth", lambda record: 2 * read_depth(record))
    assert rendered() == pytest.approx([2 * unit for unit in units])
    monkeypatch.setattr(co3d_points, "has_depth", lambda record: False)
    model._told_unit_of.clear()
    assert rendered() == [1, 1]
    assert caplog.text.count(f"sequence {subset.targets[0].sequence_name}: no depth and no point cloud") == 1


def test_the_script_exports_and_names_what_is_wrong(root, model, tmp_path, monkeypatch, capsys):
    place = [f"dataset_root={root}", f"output_dir={tmp_path}", "device=cpu"]
    assert export_fewview_script.main([*place, f"run={tmp_path / 'none'}"]) == 1
    assert "neither a run directory" in capsys.readouterr().err
    assert export_fewview_script.main([*place, "run=x", "n_sources=0"]) == 2
    assert "n_sources=0" in capsys.readouterr().err
    monkeypatch.setattr(fewview, "load_trained_mine", lambda *_: (model.network, run_config(**PLANES)))
    assert export_fewview_script.main([*place, "run=x", "n_planes=2", "fine_planes=1"]) == 0
    assert "submission_fewview_dev.hdf5: checked" in capsys.readouterr().out
