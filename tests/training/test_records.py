import json
import logging
import time

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from co3d_ensemble.training.records import MetricsLog, Progress, Records, read_metrics


def make_records(tmp_path, *, step=0, validated_step=0, bar=False):
    return Records(
        tmp_path / "metrics.jsonl", tmp_path / "events", max_steps=100, step=step, validated_step=validated_step, bar=bar
    )


def log(records, *steps):
    for step in steps:
        records.training(step, {"loss_a": float(step)}, {"trunk": 0.1}, seconds_per_step=0.5, rays_per_second=2.0, seconds_left=1.0)


def test_lines_after_the_checkpoint_are_superseded_not_repeated(tmp_path):
    with make_records(tmp_path) as records:
        log(records, 10, 20, 30)
        records.validation(20, {"psnr_masked": 1.0}, [], seconds=0.1)
    with make_records(tmp_path, step=20, validated_step=10) as records:  # saved at step 20, before its validation
        records.validation(20, {"psnr_masked": 2.0}, [], seconds=0.1)
        log(records, 30)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl", "train")] == [10, 20, 30]
    assert [record["metrics"] for record in read_metrics(tmp_path / "metrics.jsonl", "validation")] == [{"psnr_masked": 2.0}]


def test_a_torn_last_line_is_dropped_with_a_warning_and_the_next_line_stands_alone(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    for torn in ('{"kind": "train", "step": 2, "lo', '{"kind": "train", "step": 2}'):
        path.write_text('{"kind": "train", "step": 1}\n' + torn)
        assert [record["step"] for record in read_metrics(path)] == [1]
        with caplog.at_level(logging.WARNING):
            lines = MetricsLog(path)
        lines.append("train", 3)
        lines.close()
        assert "line 2" in caplog.text
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_values_that_json_lacks_are_null(tmp_path):
    lines = MetricsLog(tmp_path / "a.jsonl")
    lines.append("train", 1, losses={"a": float("nan")})
    lines.close()
    assert read_metrics(tmp_path / "a.jsonl") == [{"kind": "train", "step": 1, "losses": {"a": None}}]


def test_events_hold_losses_rates_speed_metrics_and_pictures_and_a_resume_purges_later_ones(tmp_path):
    with make_records(tmp_path) as records:
        log(records, 10, 20, 30)
    time.sleep(1.01)  # files are read in the order of their names, which begin with the second; a later start is a later one
    with make_records(tmp_path, step=20, validated_step=0) as records:
        log(records, 25)
        records.validation(25, {"psnr_masked": 2.0}, [("val/frame", torch.zeros(3, 4, 4, dtype=torch.uint8))], seconds=0.1)
    events = EventAccumulator(str(tmp_path / "events"), purge_orphaned_data=True)
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/loss_a", "lr/trunk", "speed/seconds_per_step", "speed/rays_per_second", "validation/psnr_masked"
    }  # fmt: skip
    assert events.Tags()["images"] == ["val/frame"]
    assert [event.step for event in events.Scalars("loss/loss_a")] == [10, 20, 25]


def test_score_speed_and_losses_stand_behind_the_steps_and_the_time_left():
    shown = Progress(100, 9, enabled=False)
    shown.advance()
    shown.validating()
    assert shown._shown.line().endswith("left, validating")
    shown.validated(5, {"psnr_masked": 21.5})
    shown.show({"loss_a": 0.25}, 2000.0, 65.9)
    assert shown._shown.line() == "training: 10 of 100 steps, 01:05 left, psnr 21.50, 2,000 rays/s, a 0.25"
    shown.close()


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shown = Progress(100, 40, enabled=True)
    shown.advance()
    shown.show({"loss_a": 0.25}, None, 65.9)
    shown.close()
    told = capsys.readouterr().err
    assert "41/100" in told and "01:05 left" in told and "a 0.25" in told
