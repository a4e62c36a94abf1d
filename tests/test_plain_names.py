"""A name that would lead a run out of output_dir is refused at every door, and nothing is written."""

from __future__ import annotations

import json

import pytest

from co3d_ensemble.ablation.settings import AblationConfig
from co3d_ensemble.config import EnsembleConfig, ExperimentConfig, MemberConfig
from co3d_ensemble.config_checks import validate, validate_ensemble
from co3d_ensemble.fusing import recorded_fusion
from co3d_ensemble.pipeline import run_directory
from co3d_ensemble.submission import export_submission
from launch import train_all_sequences, train_sequence

BAD = ("..", "../up", "a/b", "/tmp", "a\\b", "")


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("key", ["category", "subset_name", "member"])
def test_an_experiments_names_are_plain_parts(key, name):
    with pytest.raises(ValueError, match=f"{key}=.*must be one plain part"):
        validate(ExperimentConfig(**{key: name}))
    with pytest.raises(ValueError, match=f"{key}=.*must be one plain part"):
        run_directory("outputs", **{"category": "cup", "subset_name": "manyview_dev_0", "member": "nerf", key: name})


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("key", ["category", "subset_name", "name"])
def test_an_ensembles_names_are_plain_parts(key, name):
    config = EnsembleConfig(members={"a": MemberConfig("nerf"), "b": MemberConfig("nerf")}, **{key: name})
    with pytest.raises(ValueError, match=f"{key}=.*must be one plain part"):
        validate_ensemble(config)


@pytest.mark.parametrize("argument", ["category=..", "subset_name=../up", "member=../../up", "member='..'"])
def test_train_sequence_ends_with_2_and_names_the_setting(tmp_path, capsys, argument):
    place = ["experiment=nerf_laptop", "dataset_root=root", "category=cup", f"output_dir={tmp_path / 'out'}", "training.resume=restart"]
    assert train_sequence.main([*place, argument]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {argument.partition('=')[0]}='..") and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("category", "subset"), [("..", "manyview_dev_0"), ("mug", "manyview_dev_0/../../../up")])
def test_a_data_set_with_such_a_name_starts_no_fleet(root, tmp_path, capsys, category, subset):
    (tmp_path / "data").mkdir()
    for path in root.iterdir():
        (tmp_path / "data" / path.name).symlink_to(path)
    (tmp_path / "data" / "category_to_subset_name_list.json").unlink()
    (tmp_path / "data" / "category_to_subset_name_list.json").write_text(json.dumps({"mug": ["manyview_dev_0"], category: [subset]}))
    given = [f"dataset_root={tmp_path / 'data'}", f"output_dir={tmp_path / 'out'}", "experiment=ensemble_laptop"]
    assert train_all_sequences.main([*given, "dry_run=true"]) == 2
    message = capsys.readouterr().err
    assert "category_to_subset_name_list.json: category" in message and message.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_an_exports_models_and_a_recorded_fusions_members_are_plain_parts(root, tmp_path):
    with pytest.raises(ValueError, match="models='../nerf': must be one plain part"):
        export_submission(root, tmp_path / "out", sequence_set="dev", models=["../nerf"])
    rule = {"method": "mean"}
    (tmp_path / "fusion.json").write_text(json.dumps({"members": ["../nerf", "a"], "color": rule, "mask": rule}))
    with pytest.raises(ValueError, match=r"fusion\.json: .*members='\.\./nerf'"):
        recorded_fusion(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sequence", ["../manyview_dev_0", "cup/..", "/cup", "cup/", "cup"])
def test_an_ablations_sequences_are_plain_parts(sequence):
    with pytest.raises(ValueError, match="sequences: "):
        AblationConfig(dataset_root="root", sequences=[sequence])


def test_an_ablations_generated_sequences_are_plain_parts():
    with pytest.raises(ValueError, match="generated_sequences: name='../bear'"):
        AblationConfig(generated=["../bear"], generated_sequences={"../bear": {}})


def test_names_of_other_scripts_and_spaces_are_taken(tmp_path):
    assert run_directory(tmp_path, "Tasse é", "manyview dev [0]", "a=b,c#") == tmp_path / "Tasse é" / "manyview dev [0]" / "a=b,c#"
    validate(ExperimentConfig(category="Tasse é", member="a=b,c#"))
