"""What the command line makes of an ensemble: its own settings, those of all members and those of one."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from co3d_ensemble.assembly import CONFIG_DIR
from co3d_ensemble.composition import compose_ensemble, is_ensemble
from co3d_ensemble.config import EnsembleConfig, FusionConfig, MemberConfig
from co3d_ensemble.config_checks import validate_ensemble
from co3d_ensemble.settings import settings_with_help
from launch import train_sequence

PLACE = ["dataset_root=x", "category=mug"]


def composed(*overrides: str):
    return compose_ensemble(["experiment=ensemble_laptop", *PLACE, *overrides])


ENSEMBLES = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml") if is_ensemble([f"experiment={path.stem}"]))


def test_the_presets_are_ensembles_of_a_nerf_and_a_tensorf():
    assert {"ensemble", "ensemble_laptop", "ensemble_demo"} <= set(ENSEMBLES)
    assert not is_ensemble(["experiment=nerf_laptop"]) and not is_ensemble(["experiment=nope"]) and not is_ensemble(["category=mug"])


@pytest.mark.parametrize("name", ENSEMBLES)
def test_every_preset_composes_into_members_that_share_their_place(name):
    config, members = compose_ensemble([f"experiment={name}", *PLACE, "output_dir=OUT", "device=cpu"])
    assert list(members) == list(config.members) and len(members) >= 2
    for key, member in members.items():
        assert (member.member, member.dataset_root, member.category, member.output_dir, member.device) == (key, "x", "mug", "OUT", "cpu")
    assert {"nerf", "tensorf"} <= {member.model.kind for member in members.values()}


def test_a_setting_that_is_not_the_ensemble_s_goes_to_every_member():
    config, members = composed("training.max_steps=7", "+data.bounds.overrides={mug/manyview_dev_0:[1.0,2.0]}")
    assert [member.training.max_steps for member in members.values()] == [7, 7]
    assert all(member.data.bounds.overrides["mug/manyview_dev_0"] == [1.0, 2.0] for member in members.values())
    assert list(config.overrides) == ["training.max_steps=7", "+data.bounds.overrides={mug/manyview_dev_0:[1.0,2.0]}"]


def test_a_member_s_own_setting_comes_last():
    config, members = composed("members.tensorf.overrides.training.max_steps=9", "training.max_steps=7")
    assert (members["nerf"].training.max_steps, members["tensorf"].training.max_steps) == (7, 9)
    assert "training.max_steps=9" in config.members.tensorf.overrides


def test_a_setting_for_all_on_the_command_line_wins_over_what_the_experiment_s_file_gives_a_member(tmp_path):
    (tmp_path / "experiment").mkdir()
    for source in CONFIG_DIR.glob("*.yaml"):
        (tmp_path / source.name).write_text(source.read_text())
    for source in (CONFIG_DIR / "experiment").glob("nerf*.yaml"):
        (tmp_path / "experiment" / source.name).write_text(source.read_text())
    (tmp_path / "experiment" / "two.yaml").write_text(
        "# @package _global_\noverrides: [training.n_rays=3, training.lr=0.5]\nmembers:\n  a: {experiment: nerf}\n"
        "  b:\n    experiment: nerf_laptop\n    overrides: [training.max_steps=5, training.lr=0.25]\n"
    )
    (tmp_path / "experiment" / "three.yaml").write_text(
        "# @package _global_\ndefaults: [two, _self_]\nmembers:\n  c:\n    experiment: nerf\n    overrides: [training.seed=3]\n"
    )
    _, members = compose_ensemble(["experiment=two", *PLACE], tmp_path)
    assert [(m.training.n_rays, m.training.lr) for m in members.values()] == [(3, 0.5), (3, 0.25)]
    assert members["b"].training.max_steps == 5
    _, members = compose_ensemble(["experiment=two", *PLACE, "training.max_steps=7"], tmp_path)
    assert [member.training.max_steps for member in members.values()] == [7, 7]
    assert is_ensemble(["experiment=three"], tmp_path)  # by what it builds on
    _, members = compose_ensemble(["experiment=three", *PLACE], tmp_path)
    assert [(name, member.training.seed) for name, member in members.items()] == [("a", 0), ("b", 0), ("c", 3)]


def test_a_warning_of_a_member_s_settings_is_told_once(caplog):
    composed("data.bounds.mode=near_far", "data.bounds.near=2.0")
    assert [record.getMessage().count("data.bounds.near=2.0: without effect") for record in caplog.records] == [1]


def test_members_can_be_added_and_dropped():
    added = ["+members.nerf_turned.experiment=nerf_laptop", "members.nerf_turned.overrides.model.camera_jitter.mode=fixed_gauge"]
    _, members = composed(*added, "members.nerf_turned.overrides.training.seed=4", "~members.tensorf")
    assert list(members) == ["nerf", "nerf_turned"]
    assert members["nerf_turned"].training.seed == 4 and members["nerf_turned"].model.camera_jitter.mode == "fixed_gauge"
    assert members["nerf"].training.seed == 0 and members["nerf"].model.camera_jitter.mode == "off"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.learning_rate=1", ["member nerf", "training.learning_rate"]),
        ("+training.learning_rate=1", ["member nerf", "training.learning_rate"]),
        ("colour=red", ["colour"]),
        ("training.n_rays=0", ["member nerf", "training.n_rays=0"]),
        ("members.tensorf.overrides.training.learning_rate=1", ["member tensorf", "training.learning_rate"]),
        ("members.other.overrides.training.seed=1", ["members.other", "nerf, tensorf"]),
        ("members.nerf.colour=red", ["colour"]),
        ("members.nerf.experiment=nope", ["member nerf", "nope"]),
        ("members.nerf.experiment=ensemble", ["member nerf", "ensemble itself"]),
        ("+members.more.overrides=[]", ["members.more.experiment is missing"]),
        ("members.nerf.overrides.category=cup", ["members.nerf", "category=cup"]),
        ("members.nerf.overrides.member=x", ["members.nerf", "member=x"]),
        ("member=x", ["member=x"]),
        ("~members.tensorf", ["at least two"]),
        ("+members={a b:{experiment:nerf},c:{experiment:nerf}}", ["'a b'"]),
        ("name=nerf", ["name=nerf"]),
        ("name=../up", ["'../up'"]),
        ("fusion.colour=red", ["fusion.colour"]),
        ("+fusion.colour=red", ["colour"]),
        ("fusion.method=median", ["fusion.method='median'", "confidence"]),
        ("fusion.max_val_frames=many", ["max_val_frames", "'many'"]),
        ("fusion.max_val_frames=0", ["fusion.max_val_frames=0"]),
        ("fusion.min_gain_psnr=-1", ["fusion.min_gain_psnr=-1"]),
        ("fusion.min_standard_errors=nan", ["fusion.min_standard_errors=nan"]),
        ("fusion.method=weights", ["nerf, tensorf"]),
        ("+fusion.weights={nerf:1.0}", ["only fusion.method=weights"]),
    ],
)
def test_a_wrong_argument_ends_with_2_and_is_named(override, told, tmp_path, capsys):
    assert train_sequence.main(["experiment=ensemble_laptop", *PLACE, f"output_dir={tmp_path}", override]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in told), message
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", [{"a": 1.0, "c": 1.0}, {"a": -1.0, "b": 2.0}, {"a": 0.0, "b": 0.0}, {"a": float("nan"), "b": 1.0}])
def test_weights_need_one_per_member_and_a_sum(weights):
    config = EnsembleConfig(members={"a": MemberConfig("nerf"), "b": MemberConfig("nerf")})
    config.fusion = FusionConfig(method="weights", weights={"a": 3.0, "b": 0.0})
    validate_ensemble(config)
    config.fusion.weights = weights
    with pytest.raises(ValueError, match="fusion.weights"):
        validate_ensemble(config)


@pytest.mark.parametrize("missing", ["dataset_root", "category"])
def test_a_missing_mandatory_setting_is_named(missing, capsys):
    given = [override for override in PLACE if not override.startswith(missing)]
    assert train_sequence.main(["experiment=ensemble_laptop", *given]) == 2
    assert missing in capsys.readouterr().err


def test_cfg_prints_the_ensemble_and_each_member_without_running(tmp_path, capsys):
    assert train_sequence.main(["--cfg", "experiment=ensemble_laptop", "training.lr=0.125", f"output_dir={tmp_path}"]) == 0
    documents = [OmegaConf.create(text) for text in capsys.readouterr().out.split("---\n")]
    assert [document.get("member") for document in documents] == [None, "nerf", "tensorf"]
    assert documents[0].fusion.method == "auto" and documents[2].training.lr == 0.125
    assert not list(tmp_path.iterdir())


def test_help_lists_every_setting_of_an_ensemble_with_its_line(capsys):
    assert train_sequence.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for key, default, text in [*settings_with_help(EnsembleConfig), *settings_with_help(MemberConfig, "members.NAME.")]:
        assert text.strip() and f"  {key}={default}\n      {text}\n" in shown
    assert "ensemble_laptop" in shown


def test_the_schema_refuses_unknown_keys():
    with pytest.raises(ConfigKeyError, match="colour"):
        OmegaConf.merge(OmegaConf.structured(EnsembleConfig), {"fusion": {"colour": 1}})
