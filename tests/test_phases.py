"""A signal in every phase after the training, and folders of any name: the scripts in this process, on a tiny run."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from co3d_ensemble import pipeline
from co3d_ensemble.challenge import archive as archives
from co3d_ensemble.challenge import scoring
from co3d_ensemble.plugin.model import ObjectModel
from co3d_ensemble.plugin.tensorf_model import TensoRFModel
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.ray_bank_task import RayBankTask
from co3d_ensemble.training.records import read_metrics
from co3d_ensemble.training.validation import FrameValidation
from tests.tiny import evaluate, export, train

DEV = "manyview_dev_0"
ODD = ("mes données, essai=2 (1)", "lien vers [v2] #1 it's ${x} {device} \\")


def run_of(output: Path) -> Path:
    return output / "mug" / DEV / "nerf"


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory) -> Path:
    """A run that was trained and not scored, as a kill before its evaluation leaves it."""
    output = tmp_path_factory.mktemp("trained")
    assert train(root, output) == 0
    for folder in ("views", "renders"):
        shutil.rmtree(run_of(output) / folder)
    (run_of(output) / "results.json").unlink()
    return output


@pytest.fixture
def output(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "output"))


def signal_at(monkeypatch, owner, name, count, number=signal.SIGTERM):
    """Raises the signal before the ``count``-th call (from 0); the list that is returned counts the calls."""
    original, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        calls.append(name)
        if len(calls) == count + 1:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)
    return calls


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_rendering_stops_at_once_and_goes_on_with_the_frame_it_was_at(root, output, monkeypatch, number, code):
    signal_at(monkeypatch, ObjectModel, "render_view", 1, number)
    assert train(root, output) == code
    assert not (run_of(output) / "results.json").exists() and not list(output.rglob("*.tmp*"))
    monkeypatch.undo()
    rendered = signal_at(monkeypatch, ObjectModel, "render_view", -1)
    monkeypatch.setattr(RayBankTask, "losses", None)  # nothing is trained again
    assert train(root, output) == 0
    assert len(rendered) == 1 and len(json.loads((run_of(output) / "results.json").read_text())["frames"]) == 2


def test_the_last_validation_stops_at_once_and_the_same_command_validates_and_scores(root, tmp_path, monkeypatch):
    signal_at(monkeypatch, FrameValidation, "run", 1)  # of two, at steps 4 and 8
    assert train(root, tmp_path) == 143
    clock = Checkpoints(run_of(tmp_path) / "checkpoints").load_last()["clock"]
    assert (clock["step"], clock["validated_step"], clock["stopped"]) == (8, 4, "")
    assert not (run_of(tmp_path) / "results.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(RayBankTask, "losses", None)
    assert train(root, tmp_path) == 0 and (run_of(tmp_path) / "results.json").exists()


@pytest.mark.parametrize(
    ("owner", "name"), [(pipeline, "score_frame"), (pipeline, "comparison_sheet"), (pipeline, "training_curve"), (pipeline, "load_frame")]
)
def test_scoring_stops_at_once_and_renders_nothing_twice(root, output, monkeypatch, owner, name):
    signal_at(monkeypatch, owner, name, 0)
    assert train(root, output) == 143
    assert not (run_of(output) / "results.json").exists()
    monkeypatch.undo()
    rendered = signal_at(monkeypatch, ObjectModel, "render_view", -1)
    assert train(root, output) == 0
    assert len(rendered) == {"score_frame": 1, "load_frame": 2}.get(name, 0)


def test_exporting_and_scoring_an_archive_stop_at_once_and_leave_no_half_archive(root, output, monkeypatch):
    archive = output / "submission" / "submission_manyview_dev.hdf5"
    signal_at(monkeypatch, ObjectModel, "render_view", 1)
    assert export(root, output) == 143
    monkeypatch.undo()
    signal_at(monkeypatch, archives, "encode_view", 1)
    assert export(root, output) == 143
    assert not archive.exists() and not list(output.rglob("*.tmp*"))
    monkeypatch.undo()
    monkeypatch.setattr(ObjectModel, "render_view", None)  # all frames are there
    assert export(root, output) == 0
    signal_at(monkeypatch, scoring, "score_view", 1, signal.SIGINT)
    assert evaluate(archive, root, f"output={output / 'scores.json'}") == 130
    assert not (output / "scores.json").exists()
    monkeypatch.undo()
    assert evaluate(archive, root, f"output={output / 'scores.json'}") == 0


def test_folders_of_any_name_are_taken_literally_from_training_to_scores(root, tmp_path):
    """../shared/cases/odd_path: the root behind a symbolic link, its files read-only."""
    odd = tmp_path / ODD[0] / ODD[1]
    data, link = shutil.copytree(root, odd / "co3d [v2] #1"), tmp_path / "lien vers données"
    link.symlink_to(data)
    for path in (*data.rglob("*"), data):
        path.chmod(0o555 if path.is_dir() else 0o444)
    output = odd / "out"
    assert train(link, output, training__max_steps=2, member="it's, a = [member]") == 0
    assert export(link, output, "models=[\"it's, a = [member]\"]") == 0
    archive = output / "submission" / "submission_manyview_dev.hdf5"
    named = archive.rename(odd / "1e3: [my] archive.hdf5")
    assert evaluate(named, link, f"output={odd / 'scores, 1.json'}", "task=manyview", "sequence_set=dev") == 0
    assert json.loads((odd / "scores, 1.json").read_text())["subsets"]
    for path in (*data.rglob("*"), data):
        path.chmod(0o755)


@pytest.mark.parametrize("experiment", ["nerf_laptop", "tensorf_laptop"])
def test_a_finished_run_goes_on_to_more_steps_with_what_it_has_and_is_scored_again(root, trained, tmp_path, monkeypatch, experiment):
    output, member = tmp_path / "output", experiment.partition("_")[0]
    run = output / "mug" / DEV / member
    if member == "nerf":
        shutil.copytree(trained, output)
    assert train(root, output, experiment=experiment) == 0
    before = Checkpoints(run / "checkpoints").load_last()
    upsampled = signal_at(monkeypatch, TensoRFModel, "upsample", -1)
    cropped = signal_at(monkeypatch, TensoRFModel, "shrink", -1)
    assert train(root, output, experiment=experiment, training__max_steps=16, training__resume="extend") == 0
    results = json.loads((run / "results.json").read_text())
    assert (results["steps"], results["stopped"]) == (16, "max_steps")
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl", "train")] == list(range(2, 17, 2))
    after = Checkpoints(run / "checkpoints").load_last()
    assert not upsampled and not cropped  # all were made by step 8
    assert {name: value.shape for name, value in before["model"].items()} == {name: value.shape for name, value in after["model"].items()}
    assert train(root, output, experiment=experiment, training__max_steps=16, training__resume="extend") == 0  # and is finished
