import json
import math
import os
import signal
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from co3d_ensemble.config import ExperimentConfig
from co3d_ensemble.files import write_bytes_atomic, write_json_atomic, written_atomically
from co3d_ensemble.training.lock import FolderLock, RunDirectoryBusy
from co3d_ensemble.training.run_directory import ConfigMismatch, RunDirectory, RunExists, flattened

HOLD = """
import os, sys, time
from pathlib import Path
from co3d_ensemble.training.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""


def make_config(**training):
    config = OmegaConf.structured(ExperimentConfig(dataset_root="/a", category="cape"))
    OmegaConf.update(config, "training", training)
    return config


def open_run(path, resume="auto", **training):
    return RunDirectory.open(path, make_config(**training), resume=resume)


def test_a_second_process_is_refused_by_name_and_let_in_after_kill_9(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())  # a forked worker, which must not inherit the lock
    try:
        with pytest.raises(RunDirectoryBusy, match=f"process {holder.pid} on .*, started 20"), FolderLock(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        with FolderLock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        os.kill(child, signal.SIGKILL)


def test_one_process_cannot_open_a_run_twice(tmp_path):
    with open_run(tmp_path), pytest.raises(RunDirectoryBusy, match=str(os.getpid())), open_run(tmp_path):
        pass
    with open_run(tmp_path):
        pass


def test_config_comes_back_resolved_and_unchanged(tmp_path):
    config = make_config(betas=[0.8, 0.99])
    with RunDirectory.open(tmp_path, config) as run:
        assert flattened(run.config) == flattened(config)
        assert run.config.training.lr == 5e-4
        with_same = run.config_digest
    with RunDirectory.open(tmp_path, config) as run:
        assert run.config_digest == with_same


def test_a_config_with_missing_values_is_refused(tmp_path):
    with pytest.raises(MissingMandatoryValue, match="dataset_root"), RunDirectory.open(tmp_path, ExperimentConfig()):
        pass


def test_another_config_is_refused_with_keys_and_both_values(tmp_path):
    with open_run(tmp_path, lr=1e-3, loss_weights={"a": 1.0}) as run:
        write_bytes_atomic(run.checkpoints / "last.pt", b"")
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigMismatch) as raised, open_run(tmp_path, lr=2e-3, loss_weights={"b": 2.0}):
        pass
    assert raised.value.differences == {
        "training.lr": (1e-3, 2e-3),
        "training.loss_weights.a": (1.0, "<absent>"),
        "training.loss_weights.b": ("<absent>", 2.0),
    }
    for part in ("training.lr", "0.001", "0.002", "training.loss_weights.b", str(tmp_path)):
        assert part in str(raised.value)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_run_that_never_reached_a_checkpoint_takes_another_config_and_starts_anew(tmp_path):
    with open_run(tmp_path, budget_minutes=1.0, lr=1e-3) as run:
        run.fix_max_steps(123, {})
    with open_run(tmp_path, budget_minutes=1.0, lr=2e-3) as run:
        assert run.config.training.lr == 2e-3 and run.budget is None


def test_a_loss_that_is_dropped_and_one_that_is_not_listed_are_the_same_run(tmp_path):
    for listed, now in (({}, {"loss_rgb": None}), ({"loss_rgb": None}, {})):
        path = tmp_path / str(len(listed))
        with open_run(path, loss_weights={"loss_tv_density": 1.0, **listed}) as run:
            digest = run.config_digest
            write_bytes_atomic(run.checkpoints / "last.pt", b"weights")
        config = make_config(loss_weights={"loss_tv_density": 1.0})
        config.training.loss_weights.update(now)
        with RunDirectory.open(path, config) as run:
            assert run.config_digest == digest  # what the checkpoint was written with
        config.training.loss_weights["loss_rgb"] = 1.0
        with pytest.raises(ConfigMismatch, match="loss_weights.loss_rgb: .* in the run, 1.0 now"), RunDirectory.open(path, config):
            pass


def test_keys_that_cannot_change_the_result_may_differ(tmp_path):
    with open_run(tmp_path, log_every=5) as run:
        digest = run.config_digest
    with open_run(tmp_path, log_every=7, progress=False, checkpoint_every_seconds=1.0) as run:
        assert run.config.training.log_every == 7 and run.config_digest == digest


def test_resume_never_refuses_an_existing_run_only(tmp_path):
    with open_run(tmp_path, "never"):
        pass
    with pytest.raises(RunExists, match="never"), open_run(tmp_path, "never"):
        pass


def test_restart_discards_the_run_and_nothing_else(tmp_path):
    with open_run(tmp_path, lr=1e-3) as run:
        run.checkpoints.mkdir()
        run.renders.mkdir()
        for file in (run.checkpoints / "last.pt", run.metrics_path, run.results_path, run.renders / "a.png", tmp_path / "notes.txt"):
            file.write_text("x")
    with open_run(tmp_path, "restart", lr=2e-3) as run:
        assert run.config.training.lr == 2e-3
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml", "environment.json", "notes.txt"]


def test_an_unknown_resume_mode_is_named(tmp_path):
    with pytest.raises(ValueError, match="'maybe'"), open_run(tmp_path, "maybe"):
        pass


def test_environment_describes_this_start_and_keeps_the_earlier_ones(tmp_path):
    for _ in range(3):
        with open_run(tmp_path) as run:
            environment = json.loads(run.environment_path.read_text())
    assert environment["command_line"] == sys.argv and environment["packages"]["torch"]
    assert len(environment["earlier_starts"]) == 2
    assert all("earlier_starts" not in start for start in environment["earlier_starts"])


def test_steps_fixed_by_a_budget_survive_resumes_whatever_the_command_says(tmp_path):
    with open_run(tmp_path, budget_minutes=1.0) as run:
        run.fix_max_steps(123, {"seconds_per_step": 0.1})
        assert run.config.training.max_steps == 123
        digest = run.config_digest
        write_bytes_atomic(run.checkpoints / "last.pt", b"")
    with open_run(tmp_path, budget_minutes=2.0) as run:
        assert run.config.training.max_steps == 123 and run.config_digest == digest and run.budget["seconds_per_step"] == 0.1
    with pytest.raises(ConfigMismatch, match="max_steps: 123 in the run, 350000 now"), open_run(tmp_path):
        pass


def test_a_kill_between_budget_and_config_is_made_good(tmp_path):
    with open_run(tmp_path, budget_minutes=1.0) as run:
        write_json_atomic(run.budget_path, {"max_steps": 123})
    with open_run(tmp_path, budget_minutes=1.0) as run:
        assert run.config.training.max_steps == 123


def test_temporaries_are_removed_on_opening(tmp_path):
    (tmp_path / "renders").mkdir()
    (tmp_path / "renders" / "a.png.tmp-1").write_text("half")
    (tmp_path / "config.yaml.tmp-2").write_text("half")
    with open_run(tmp_path):
        assert not list(tmp_path.rglob("*.tmp*"))


def test_json_has_null_for_what_json_lacks(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": (-math.inf,)}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": [None]}}


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_atomically(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
