"""launch/train_all_sequences.py as its users meet it: one command to a scored submission, bad data, settings, the dry run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from co3d_ensemble.fleet.checks import check_all
from co3d_ensemble.fleet.plan import compose_models, make_plan
from co3d_ensemble.fleet.settings import FleetConfig, split_arguments
from co3d_ensemble.settings import settings_with_help
from launch import status, train_all_sequences
from tests.children import environment_of_child
from tests.conftest import REPOSITORY
from tests.tiny import MODEL, TENSORF, TRAINING, generated

SMALL = [f"{key}={value}" for key, value in (MODEL | TENSORF | TRAINING).items()]
SUBSETS = [("mug", "manyview_dev_0"), ("mug", "manyview_test_0"), ("bear", "manyview_dev_0")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generated(tmp_path_factory.mktemp("root"), {"mug": ["manyview_dev_0", "manyview_test_0"], "bear": ["manyview_dev_0"]})


def broken(root, folder):
    """The same sequences, of which one has lost its pictures."""
    folder.mkdir()
    for path in root.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "bear").unlink()
    (folder / "bear").mkdir()
    for path in (root / "bear").iterdir():
        if not path.name.startswith("synthetic"):
            (folder / "bear" / path.name).symlink_to(path)
    return folder


def run(*arguments):
    environment = environment_of_child()
    command = [sys.executable, str(REPOSITORY / "launch" / "train_all_sequences.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


@pytest.mark.slow
def test_one_command_trains_fuses_scores_and_exports_and_reports_a_broken_sequence(root, tmp_path, capsys):
    output = tmp_path / "lien vers données, essai=2 (1)" / "[v2] #1 it's ${x} {device}\\"
    arguments = [f"dataset_root={broken(root, tmp_path / 'mes données [1] #2')}", f"output_dir={output}", "sequence_set=[dev,test]"]
    arguments += ["experiment=ensemble_laptop", "models=[tensorf]", "max_attempts=1", "threads=1", *SMALL]
    done = run(*arguments)
    assert done.returncode == 3, done.stderr
    assert json.loads((output / "fleet_state.json").read_text())["state"] == "failed"
    summary = (output / "summary.md").read_text()
    assert "`bear/manyview_dev_0/tensorf`: exit 1" in summary and "**MEAN**" in summary
    assert all((output / "submission" / f"submission_manyview_{name}.hdf5").exists() for name in ("dev", "test"))
    rows = list(csv.DictReader((output / "summary.csv").read_text().splitlines()))
    assert {row["subset"] for row in rows if row["psnr_masked"]} == {"mug/manyview_dev_0", "MEAN"}
    assert status.main([f"output_dir={output}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"running": 0, "waiting": 0, "interrupted": 0, "done": 2, "failed": 1}


def test_the_jobs_are_all_subsets_times_all_models_with_their_own_recipes(root, tmp_path):
    settings = FleetConfig(dataset_root=str(root), output_dir=str(tmp_path), sequence_set=["dev", "test"], experiment="ensemble_laptop")
    plan = make_plan(settings, ["members.nerf.overrides.training.seed=7", "training.max_steps=20"])
    assert {job.name for job in plan.jobs} == {f"{c}/{s}/{model}" for c, s in SUBSETS for model in ("nerf", "tensorf")}
    recipes = {job.name.rpartition("/")[2]: job.recipe for job in plan.jobs}
    assert len({job.recipe for job in plan.jobs}) == 2
    other = {job.name.rpartition("/")[2]: job.recipe for job in make_plan(settings, ["training.max_steps=20"]).jobs}
    assert other["tensorf"] == recipes["tensorf"] and other["nerf"] != recipes["nerf"]
    seeds = {model: config.training.seed for model, config in plan.models.configs.items()}
    assert seeds == {"nerf": 7, "tensorf": 0}
    (nerf,) = (job for job in plan.jobs if job.name == "mug/manyview_dev_0/nerf")
    assert "experiment=nerf_laptop" in nerf.command and "training.seed=7" in nerf.command and "category='mug'" in nerf.command


def test_a_choice_of_one_model_leaves_nothing_to_fuse():
    models = compose_models("ensemble_laptop", [], ["nerf"])
    assert models.ensemble is None and models.exported == "nerf"
    assert compose_models("ensemble_laptop", []).exported == "ensemble"
    with pytest.raises(ValueError, match="nerf, tensorf"):
        compose_models("ensemble_laptop", [], ["srn"])


@pytest.mark.parametrize("argument", ["category=mug", "subset_name=manyview_dev_0", "+member=x"])
def test_what_the_fleet_sets_itself_cannot_be_set(argument):
    with pytest.raises(ValueError, match="categories=, subsets= and models="):
        split_arguments([argument])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["colour=red"], "colour"),
        (["max_attempts=0"], "max_attempts=0"),
        (["sequence_set=[train]"], "sequence_set=['train']"),
        (["audit=some"], "audit='some'"),
        (["models=[srn]"], "srn"),
        (["categories=[pear]"], "pear"),
        (["experiment=ensembel"], "ensembel"),
    ],
)
def test_a_wrong_setting_is_named_and_ends_with_2(root, tmp_path, capsys, arguments, told):
    given = [f"dataset_root={root}", f"output_dir={tmp_path / 'out'}", "dry_run=true", *arguments]
    assert train_all_sequences.main(given) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and told in message and message.count("\n") == 1


def test_help_lists_every_setting_with_its_line(capsys):
    assert train_all_sequences.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for key, default, text in settings_with_help(FleetConfig):
        assert f"  {key}={default}\n      {text}\n" in shown + "\n"


def test_the_dry_run_tells_jobs_order_disk_hours_and_faults_and_starts_nothing(root, tmp_path, capsys):
    given = [f"dataset_root={broken(root, tmp_path / 'broken')}", f"output_dir={tmp_path / 'out'}", "sequence_set=[dev,test]"]
    assert train_all_sequences.main([*given, "dry_run=true", "experiment=ensemble_laptop", "audit_workers=1", *SMALL]) == 3
    shown = capsys.readouterr().out
    assert "6 jobs (0 done): 3 subsets x nerf, tensorf" in shown and "disk: about" in shown and "expected hours: unknown" in shown
    assert "bear/manyview_dev_0: ERROR" in shown and "1 cannot be trained or exported" in shown
    assert not list((tmp_path / "out").rglob("attempts.json"))


def test_a_full_audit_finds_black_pictures_and_decodes_again_only_what_has_changed(root, tmp_path, monkeypatch):
    import shutil

    from PIL import Image

    copy = shutil.copytree(root, tmp_path / "copy")
    picture = next((copy / "bear").rglob("images/frame000001.jpg"))
    settings = {"decode": True, "min_known_frames": 4, "workers": 1}
    dev = [pair for pair in SUBSETS if "dev" in pair[1]]
    assert not any(report["warnings"] for report in check_all(copy, tmp_path / "out", dev, **settings).values())
    with Image.open(picture) as before:
        Image.new("RGB", before.size).save(picture)
    decoded = []
    monkeypatch.setattr("co3d_ensemble.fleet.checks.check_subset", count_calls(decoded, tmp_path / "calls"))
    reports = check_all(copy, tmp_path / "out", dev, **settings)
    assert (tmp_path / "calls").read_text().split() == ["bear"]
    assert "black" in reports["bear", "manyview_dev_0"]["warnings"][0] and reports["mug", "manyview_dev_0"]["warnings"] == []


def count_calls(calls, path):
    from co3d_ensemble.fleet.checks import check_subset

    def counting(index, subset, **settings):
        with open(path, "a") as file:  # in the pool's process
            file.write(subset.category + "\n")
        return check_subset(index, subset, **settings)

    return counting
