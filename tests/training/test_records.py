import json
import logging

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from co3d_ensemble.training.records import MetricsLog, Progress, Records, read_metrics


def make_records(tmp_path, *, step=0, validated_step=0, progress=False):
    return Records(
        tmp_path / "metrics.jsonl", tmp_path / "events", max_steps=100, step=step, validated_step=validated_step, progress=progress
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


def test_without_a_terminal_the_speed_the_losses_and_the_time_left_are_log_lines(caplog):
    progress = Progress(100, 0, enabled=True)
    with caplog.at_level(logging.INFO):
        progress.validated(5, {"psnr_masked": 21.5})
        progress.show(10, {"loss_a": 0.25}, 2000.0, 65.0)
        progress.show(11, {"loss_a": 0.5}, 2000.0, 64.0)  # too soon after the line before
        progress.show(100, {"loss_a": 0.125}, 2000.0, 0.0)
    progress.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1] == "step 10/100: 01:05 left, psnr 21.50, 2,000 rays/s, a 0.25"
    assert len(lines) == 3 and "0.125" in lines[2]


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress(100, 40, enabled=True)
    progress.advance()
    progress.show(41, {"loss_a": 0.25}, None, 65.0)
    progress.close()
    shown = capsys.readouterr().err
    assert "41/100" in shown and "01:05 left" in shown and "a 0.25" in shown
