"""The dry run's probe: hours where nothing has been trained yet."""

from __future__ import annotations

import pytest

from co3d_ensemble.fleet.probe import Cost
from launch import train_all_sequences
from tests.tiny import MODEL, TRAINING, generated

SMALL = [f"{key}={value}" for key, value in (MODEL | TRAINING).items()]


def test_a_job_costs_its_loading_its_loop_and_both_kinds_of_renders():
    cost = Cost(start_seconds=6.0, frames=100, loop_seconds=60.0, pixel_seconds=1e-3, pixel_share=0.25, precision="float32")
    assert cost.job_seconds(frames=50, pixels=8000) == pytest.approx(3.0 + 60.0 + 8.0 + 2.0)


def test_where_the_run_has_the_original_size_targets_are_rendered_once():
    cost = Cost(start_seconds=0.0, frames=1, loop_seconds=0.0, pixel_seconds=1e-3, pixel_share=1.0, precision="float32")
    assert cost.job_seconds(frames=1, pixels=8000) == pytest.approx(8.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generated(tmp_path_factory.mktemp("root"), {"mug": ["manyview_dev_0"]})


@pytest.fixture
def arguments(root, tmp_path):
    given = [f"dataset_root={root}", f"output_dir={tmp_path / 'out'}", "dry_run=true", "probe_seconds=0.1", "audit_workers=1", "threads=1"]
    return [*given, "experiment=nerf_laptop", *SMALL]


@pytest.mark.slow
def test_the_dry_run_tells_hours_from_a_probe_and_leaves_no_run_behind(arguments, tmp_path, capsys):
    assert train_all_sequences.main(arguments) == 0
    hours = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("expected hours: "))
    assert "unknown" not in hours and "from a probe on mug/manyview_dev_0: nerf" in hours
    assert not (tmp_path / "out" / "mug").exists()


@pytest.mark.slow
def test_a_model_that_cannot_be_probed_is_named_with_its_reason(arguments, capsys):
    assert train_all_sequences.main([*arguments, "device=cuda:77"]) == 0
    assert "expected hours: unknown (nerf cannot be probed: " in capsys.readouterr().out
