"""Cameras and masks that contradict each other, met by the scripts: named before training, in the dry run, and after an empty one."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from co3d_ensemble.assembly import compose_experiment, load_scene
from launch import train_all_sequences, train_sequence
from tests.tiny import generated, train, train_arguments

DEV = "manyview_dev_0"
CASES = Path(__file__).parents[2] / "shared/cases"
REAL_ROOT = Path(__file__).parents[2] / "shared/data/co3d"


@pytest.fixture(scope="module")
def inverted(tmp_path_factory):
    root = generated(tmp_path_factory.mktemp("inverted"), {"truck": [DEV]}, mask_noise=0.02)
    for path in root.rglob("masks/*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    return root


def scene_of(root, tmp_path, *, category="truck", **settings):
    return load_scene(compose_experiment(train_arguments(root, tmp_path, category=category, **settings)))


@pytest.mark.parametrize("bounds", ["visual_hull", "near_far"])
def test_training_on_inverted_masks_ends_before_its_first_step_in_one_line(inverted, tmp_path, capsys, bounds):
    assert train(inverted, tmp_path, category="truck", data__bounds__mode=bounds) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"truck/{DEV}" in line and "they are inverted" in line and "data.check_agreement=warn" in line
    assert not list(tmp_path.rglob("*.pt"))


def test_a_warning_instead_is_a_setting(inverted, tmp_path, caplog):
    assert scene_of(inverted, tmp_path, data__check_agreement="warn").train
    assert "they are inverted" in caplog.text
    caplog.clear()
    assert scene_of(inverted, tmp_path, data__check_agreement="off").train
    assert "inverted" not in caplog.text


@pytest.mark.parametrize("audit", ["headers", "full"])
def test_the_dry_run_finds_what_training_would_find(inverted, tmp_path, capsys, audit):
    given = [f"dataset_root={inverted}", f"output_dir={tmp_path}", "dry_run=true", f"audit={audit}", "audit_workers=1"]
    assert train_all_sequences.main([*given, "experiment=nerf_laptop"]) == 3
    assert f"truck/{DEV}: ERROR the masks are foreground" in capsys.readouterr().out
    assert train_all_sequences.main([*given, "experiment=nerf_laptop", "data.check_agreement=warn"]) == 0
    shown = capsys.readouterr().out
    assert "the masks are foreground" in shown and "ERROR" not in shown
    assert train_all_sequences.main([*given, "experiment=nerf_laptop", "data.check_agreement=off"]) == 0
    assert "the masks are foreground" not in capsys.readouterr().out


@pytest.mark.parametrize(("case", "told"), [("mask_inverted", "they are inverted"), ("cameras_opencv", "OpenCV's axes")])
def test_the_reported_cases_are_refused(case, told, tmp_path, capsys):
    if not (CASES / case).is_dir() or not REAL_ROOT.is_dir():
        pytest.skip(f"{case} is not at ../shared/cases")
    subprocess.run([sys.executable, CASES / case / "make.py"], check=True, env={**os.environ, "CASES_OUT": str(tmp_path)})
    arguments = train_arguments(tmp_path / case, tmp_path / "out", category="cape")
    assert train_sequence.main(arguments) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("category", ["cape", "apple"])
def test_real_sequences_are_not_refused(category, tmp_path):
    if not (REAL_ROOT / category).is_dir():
        pytest.skip(f"{category} is not at ../shared/data/co3d")
    assert scene_of(REAL_ROOT, tmp_path, category=category, data__longest_side=60).train


@pytest.mark.parametrize("noise", [{"mask_noise": 0.02}, {"pose_noise": 0.005}, {"mask_noise": 0.01, "pose_noise": 0.003}], ids=str)
def test_generated_roots_with_the_errors_of_the_ablation_are_not_refused(noise, tmp_path):
    root = generated(tmp_path / "root", {"bear": [DEV]}, n_known=12, height=60, width=48, **noise)
    assert scene_of(root, tmp_path, category="bear").train


def test_an_empty_model_says_so_and_why(tmp_path, caplog):
    root = generated(tmp_path / "root", {"mug": [DEV]})
    settings = {"experiment": "tensorf_laptop", "member": "nerf", "model__tensorf__density_shift": -60, "training__max_steps": 2}
    assert train(root, tmp_path, **settings) == 0
    results = json.loads((tmp_path / "mug" / DEV / "nerf" / "results.json").read_text())
    assert results["metrics"]["iou"] == 0 and "never showed the object in 2 steps" in results["empty"]
    assert results["empty"] in caplog.text


def test_single_frames_of_a_root_are_named_while_loading(tmp_path, caplog):
    root = generated(tmp_path / "root", {"truck": [DEV]}, n_known=14)
    path = root / "truck" / "frame_annotations.jgz"
    entries = json.loads(gzip.decompress(path.read_bytes()))
    known = [entry for entry in entries if entry["meta"]["frame_type"] == "dev_known"]
    known[5]["viewpoint"]["T"][0] += 0.5
    path.write_bytes(gzip.compress(json.dumps(entries).encode()))
    assert scene_of(root, tmp_path).train
    told = [record.message for record in caplog.records if "disagrees with the rest" in record.message]
    assert len(told) == 1 and f"frame synthetic_{DEV}/{known[5]['frame_number']} " in told[0]
