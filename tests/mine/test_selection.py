"""A table says where its checkpoint was chosen on the split that it scores."""

from __future__ import annotations

import pytest

from co3d_ensemble.mine.evaluation_data import test_options as options_of
from co3d_ensemble.mine.evaluation_run import EvaluateConfig
from co3d_ensemble.mine.selection import chosen_on_what_is_scored
from tests.mine.stacks import mine_config


def told(dataset, *, run=None, trained_on=None, **settings):
    run = mine_config(**{"data.kind": trained_on or dataset, "data.root": "nowhere", **(run or {})})
    settings = EvaluateConfig(**{"checkpoint": "run/checkpoints/best.pt", **settings})
    return chosen_on_what_is_scored(settings, dataset, options_of(dataset, settings, run), run)


@pytest.mark.parametrize("dataset", ["co3d", "llff", "realestate10k"])
def test_data_sets_without_a_third_split_are_named(dataset):
    split = "test" if dataset == "realestate10k" else "val"
    assert f"32 pairs at most of the very split {split!r} of {dataset} scored here" in told(dataset)


@pytest.mark.parametrize("dataset", ["generated", "kitti_raw", "flowers"])
def test_a_split_of_its_own_is_not(dataset):
    assert told(dataset) is None
    assert told(dataset, trained_on="llff") is None
    assert told("llff", trained_on=dataset) is None


def test_what_is_said_about_the_splits_counts(tmp_path):
    assert told("kitti_raw", options={"split": "val"}) and told("flowers", options={"split": "val"})
    assert told("llff", options={"split": "train"}) is None
    apart = {"data.options": {}, "data.val_options": {"scenes": ["fern"]}}
    assert told("llff", run=apart, options={"scenes": ["horns"]}) is None and told("llff", run=apart, options={"scenes": ["fern", "a"]})
    listed = {"data.val_options": {"sequences": ["a", "b"]}}
    assert (
        told("kitti_raw", run=listed, options={"sequences": ["b"]}) and told("kitti_raw", run=listed, options={"sequences": ["c"]}) is None
    )
    assert told("generated", options={"first_scene": 500_007}) and told("generated", options={"first_scene": 500_008}) is None
    assert told("generated", options={"first_scene": 500_007, "seed": 1}) is None


def test_weights_that_were_not_chosen_and_pictures_of_another_folder_are_free_of_it(tmp_path):
    assert told("llff", checkpoint="run/checkpoints/last.pt") is None
    trained = {"data.root": str(tmp_path)}
    assert told("llff", run=trained, root=str(tmp_path / "other")) is None
    assert told("llff", run=trained, root=str(tmp_path / ".")) and told("llff", root=str(tmp_path))  # the training's was moved
