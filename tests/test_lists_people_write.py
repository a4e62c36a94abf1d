"""Set lists and annotations as people write and damage them: the dry run finds what a training would, both name file and key."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest

from co3d_ensemble.assembly import compose_experiment, load_scene
from co3d_ensemble.fleet.checks import check_all
from launch import train_all_sequences
from tests.tiny import train, train_arguments

SUBSET = "manyview_dev_0"
LISTS, BATCHES = f"mug/set_lists/set_lists_{SUBSET}.json", f"mug/eval_batches/eval_batches_{SUBSET}.json"
FRAMES, SUBSETS = "mug/frame_annotations.jgz", "category_to_subset_name_list.json"


@pytest.fixture
def own(root, tmp_path):
    """A root whose lists can be changed."""
    own = tmp_path / "own"
    own.mkdir()
    for path in root.iterdir():
        if path.name != "mug":
            shutil.copy(path, own)
    (own / "mug").mkdir()
    for path in (root / "mug").iterdir():
        if path.name.startswith("synthetic"):
            (own / "mug" / path.name).symlink_to(path)  # the pictures
        elif path.is_dir():
            shutil.copytree(path, own / "mug" / path.name)
        else:
            shutil.copy(path, own / "mug")
    return own


def change(path, edit):
    packed = path.suffix == ".jgz"
    content = json.loads(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    edited = edit(content)
    content = edited if isinstance(edited, dict) else content  # most edit it in place
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text) if packed else text)


def reports(own, tmp_path):
    return check_all(own, tmp_path / "checked", [("mug", SUBSET)], decode=False, min_known_frames=8, workers=1)["mug", SUBSET]


def test_no_validation_frames_and_byte_order_marks_train_and_the_dry_run_agrees(own, tmp_path):
    change(own / LISTS, lambda lists: lists.update(val=None))
    for name in (LISTS, BATCHES, SUBSETS):
        (own / name).write_bytes(b"\xef\xbb\xbf" + (own / name).read_bytes())
    assert reports(own, tmp_path)["errors"] == []
    scene = load_scene(compose_experiment(train_arguments(own, tmp_path / "out")))
    assert len(scene.val) == 1 and len(scene.train) == 9  # one of the ten known frames is held out


NAME = "set_lists_manyview_dev_0.json"
DAMAGES = {
    "train is null": (LISTS, lambda lists: lists.update(train=None), f"{NAME}: expected a list of entries, got NoneType"),
    "val is text": (LISTS, lambda lists: lists.update(val="none"), f"{NAME}: expected a list of entries, got str"),
    "a frame number of 3.7": (LISTS, lambda lists: lists["train"][2].__setitem__(1, 3.7), f"{NAME}: entry"),
    "a mask outside": (FRAMES, lambda frames: frames[0]["mask"].update(path="../../a.png"), "mask.path: '../../a.png' leads out of"),
    "a picture outside": (FRAMES, lambda frames: frames[0]["image"].update(path="/etc/passwd"), "'/etc/passwd' is no path relative"),
    "infinite focal lengths": (FRAMES, lambda frames: [f["viewpoint"].update(focal_length=[1e999, 1]) for f in frames], "finite focal"),
    "batches are an object": (BATCHES, lambda batches: {"0": batches}, "eval_batches_manyview_dev_0.json: expected a list"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_ends_a_training_ends_the_dry_run_with_the_same_words(own, tmp_path, capsys, damage):
    name, edit, told = DAMAGES[damage]
    change(own / name, edit)
    errors = reports(own, tmp_path)["errors"]
    assert any(told in error for error in errors), errors
    assert train(own, tmp_path / "out") == 1
    message = capsys.readouterr().err
    line = next(line for line in message.splitlines() if line.startswith("error: "))
    assert told in line and "Traceback" not in message
    assert line.removeprefix("error: ") in errors


def test_a_subset_name_that_is_no_text_ends_both_before_anything_is_made(own, tmp_path, capsys):
    change(own / SUBSETS, lambda subsets: {"mug": [SUBSET, 3]})
    assert train(own, tmp_path / "out") == 1
    given = [f"dataset_root={own}", f"output_dir={tmp_path / 'out'}", "experiment=ensemble_laptop", "dry_run=true"]
    assert train_all_sequences.main(given) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("category_to_subset_name_list.json: category 'mug', subset name=3" in line for line in lines)
    assert not (tmp_path / "out").exists()
