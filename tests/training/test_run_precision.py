"""The precision of a run: what ``auto`` became is stored, a resumed run keeps it, an old one goes on, and slow machines are told."""

from __future__ import annotations

import functools
import json
import logging

import pytest
from omegaconf import OmegaConf

from co3d_ensemble.assembly import compose_experiment
from co3d_ensemble.base import precision as policy
from co3d_ensemble.mine.assembly import compose_mine
from co3d_ensemble.mine.config import FREE_KEYS
from co3d_ensemble.training.precision import (
    _warn_once,
    automatic_precision,
    network_keys,
    settle_precision,
    show_precision,
    tell_precision,
    used_precision,
)
from co3d_ensemble.training.run_directory import ConfigMismatch, RunDirectory, config_differences

PLACE = ("dataset_root=/a", "category=cape")
PRESETS = {
    "nerf_laptop": "model.nerf.precision",
    "tensorf_laptop": "model.tensorf.precision",
    "implicitron_nerf": "model.implicitron.precision",
}


@pytest.fixture
def machine(monkeypatch):
    """Sets whether this machine multiplies bfloat16 natively."""

    def pretend(native):
        monkeypatch.setattr(policy, "_cpu_multiplies_bfloat16", lambda: native)

    _warn_once.cache_clear()
    return pretend


@functools.cache  # composing takes longer than all else here
def composed(*overrides):
    return compose_experiment(overrides)


def experiment(preset="nerf_laptop", **precisions):
    """A preset with some ``model.<key>.precision``."""
    config = composed(f"experiment={preset}", *PLACE).copy()
    for name, value in precisions.items():
        config.model[name].precision = value
    return config


def opened(path, config, *, device="cpu"):
    return RunDirectory.open(path, config, device=device, precision=automatic_precision(config, device))


def start(path, config):
    """A run that has a checkpoint."""
    with opened(path, config) as run:
        run.checkpoints.mkdir(exist_ok=True)
        (run.checkpoints / "last.pt").write_bytes(b"")
        return run.config, run.config_digest


@pytest.mark.parametrize("preset", ["nerf", "nerf_published", "nerf_laptop", "nerf_demo", "tensorf", "tensorf_published", "tensorf_laptop"])
def test_every_preset_follows_the_machine(preset, machine):
    config = experiment(preset)
    assert [OmegaConf.select(config, key) for key in network_keys(config)] == ["auto"]
    for native in (True, False):
        machine(native)
        assert list(automatic_precision(config, "cpu").values()) == ["bfloat16" if native else "float32"]


@pytest.mark.parametrize("preset", ["mine_generated", "mine_realestate10k", "mine_llff", "mine_kitti_384", "mine_flowers", "mine_co3d"])
def test_every_preset_of_mine_follows_the_machine(preset, machine):
    config = compose_mine([f"experiment={preset}", "data.root=/a"])
    machine(True)
    assert config.model.precision == "auto" and automatic_precision(config, "cpu") == {"model.precision": "bfloat16"}


@pytest.mark.parametrize(
    ("preset", "expected"), [("implicitron_nerf", "bfloat16"), ("implicitron_idr", "float32"), ("implicitron_mine", "bfloat16")]
)
def test_signed_distances_are_float32_on_every_machine(preset, expected, machine):
    machine(True)
    assert automatic_precision(experiment(preset), "cpu") == {"model.implicitron.precision": expected}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_auto_became_is_in_the_configuration_and_the_environment(preset, native, machine, tmp_path):
    machine(native)
    stored, _ = start(tmp_path, experiment(preset))
    became = "bfloat16" if native else "float32"
    assert OmegaConf.select(stored, PRESETS[preset]) == used_precision(stored) == became
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["precision"] == {PRESETS[preset]: became}
    assert environment["bfloat16"].startswith("native" if native else "emulated") and environment["cpu"]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_keeps_its_precision_on_the_other_machine(preset, native, machine, tmp_path):
    machine(native)
    first = start(tmp_path, experiment(preset))
    machine(not native)
    assert start(tmp_path, experiment(preset)) == first  # the digest, too, which checkpoints are known by
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert starts["precision"] == starts["earlier_starts"][0]["precision"]
    assert starts["bfloat16"].split(":")[0] != starts["earlier_starts"][0]["bfloat16"].split(":")[0]


@pytest.mark.parametrize("before", ["float32", "bfloat16"])
@pytest.mark.parametrize("native", [True, False])
def test_a_run_from_before_auto_goes_on_as_it_is_stored(before, native, machine, tmp_path):
    machine(native)
    old = experiment(nerf=before, tensorf="float32", implicitron="float32")
    first = start(tmp_path, old)
    assert start(tmp_path, experiment()) == first


def test_an_explicit_precision_that_is_not_the_runs_is_refused(machine, tmp_path):
    machine(False)
    start(tmp_path, experiment())
    with pytest.raises(ConfigMismatch, match="model.nerf.precision: 'float32' in the run, 'bfloat16' now"):
        start(tmp_path, experiment(nerf="bfloat16"))
    start(tmp_path, experiment(nerf="float32"))  # what it became may be said


def test_a_run_without_a_checkpoint_that_is_begun_anew_follows_the_new_machine(machine, tmp_path):
    machine(True)
    with opened(tmp_path, experiment()):
        pass
    machine(False)
    other = experiment()
    other.training.lr = 0.125
    with opened(tmp_path, other) as run:
        assert run.config.model.nerf.precision == "float32"


def test_auto_agrees_with_whatever_a_run_has_and_with_nothing_that_it_has_not():
    stored = {"model": {"precision": "bfloat16"}, "fusion": {"method": "mean"}}
    asked = {"model": {"precision": "auto"}, "fusion": {"method": "mean"}}
    assert config_differences(stored, asked, ()) == {}
    assert set(config_differences(stored, {**asked, "fusion": {"method": "auto"}}, ())) == {"fusion.method"}
    assert set(config_differences({"model": {"kind": "nerf"}}, asked, ())) > {"model.precision"}


def test_a_coarse_network_of_its_own_precision_is_settled_and_told(machine):
    machine(True)
    config = experiment()
    config.model.coarse_overrides = {"precision": "float32"}
    settle_precision(config, automatic_precision(config, "cpu"))
    assert used_precision(config) == "bfloat16, coarse float32"


def test_an_unknown_precision_of_the_coarse_network_is_refused():
    with pytest.raises(ValueError, match="model.coarse_overrides over model.nerf: precision='half': expected one of auto, float32"):
        composed(*PLACE, "experiment=nerf_laptop", "+model.coarse_overrides.precision=half")


def told(caplog, config, path):
    caplog.clear()
    with caplog.at_level(logging.INFO), opened(path, config) as run:
        tell_precision(config, run.config, run.path, "cpu")
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING], caplog.text


@pytest.mark.parametrize("native", [True, False])
def test_the_log_says_what_auto_became_and_why(native, machine, tmp_path, caplog):
    machine(native)
    warnings, log = told(caplog, experiment(), tmp_path)
    became = "bfloat16" if native else "float32"
    assert not warnings and f"precision: {became} (model.nerf.precision=auto, on {policy.bfloat16_words('cpu')})" in log


def test_an_explicit_bfloat16_is_warned_of_once_with_its_cost_where_it_is_emulated(machine, tmp_path, caplog):
    explicit = experiment(nerf="bfloat16")
    machine(True)
    assert not told(caplog, explicit, tmp_path / "native")[0]
    machine(False)
    (warning,) = told(caplog, explicit, tmp_path / "first")[0]
    assert "precision=bfloat16 on a CPU" in warning and "2,346 in float32" in warning and "precision=auto takes float32" in warning
    assert not told(caplog, explicit, tmp_path / "second")[0]
    assert not told(caplog, experiment("tensorf_laptop", tensorf="bfloat16"), tmp_path / "third")[0]


def test_a_run_that_goes_on_where_it_is_slow_says_so(machine, tmp_path, caplog):
    machine(True)
    start(tmp_path, experiment())
    machine(False)
    (warning,) = told(caplog, experiment(), tmp_path)[0]
    assert str(tmp_path) in warning and "was started in bfloat16 and goes on in it" in warning and "2,346 in float32" in warning


@pytest.mark.parametrize(("trained", "shown"), [("bfloat16", "auto"), ("float32", "float32")])
def test_a_trained_network_is_shown_in_bfloat16_only_where_that_is_native(trained, shown):
    config = experiment(nerf=trained)
    show_precision(config)
    assert config.model.nerf.precision == shown


def test_a_run_of_mine_is_stored_and_kept_alike(machine, tmp_path):
    config = compose_mine(["experiment=mine_generated"])
    for native in (True, False):
        machine(native)
        automatic = automatic_precision(config, "cpu")
        with RunDirectory.open(tmp_path, config, free_keys=FREE_KEYS, precision=automatic) as run:
            assert run.config.model.precision == "bfloat16"
            run.checkpoints.mkdir(exist_ok=True)
            (run.checkpoints / "last.pt").write_bytes(b"")
