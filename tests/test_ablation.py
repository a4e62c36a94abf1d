"""The ablation: its rows compose, its cells are shared and ordered, and the whole goes on after interruptions."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import time

import pytest
import torch
from omegaconf import OmegaConf

from co3d_ensemble.ablation import cells
from co3d_ensemble.ablation import run as ablation_run
from co3d_ensemble.ablation.cells import Plan, best_row, owners
from co3d_ensemble.ablation.fused import FusedCell, read_fused
from co3d_ensemble.ablation.fused import main as fused_main
from co3d_ensemble.ablation.jobs import Outcome
from co3d_ensemble.ablation.results import Results, curve_rows
from co3d_ensemble.ablation.rows import ROWS, SWITCHES, rows_named
from co3d_ensemble.ablation.run import ablate, generate_missing
from co3d_ensemble.ablation.settings import PRESETS, AblationConfig, preset_defaults
from co3d_ensemble.assembly import compose_experiment, load_scene, make_task
from co3d_ensemble.base.quoting import for_device, override
from co3d_ensemble.pipeline import checkpoint_stamp, train_sequence
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.stepper import Stepper
from launch import ablation
from tests.tiny import MODEL, SIZES, TRAINING, generated

DEV = "manyview_dev_0"
NERF = [
    "experiment=nerf_laptop",
    "training.loss_weights.loss_rgb=null",
    "training.loss_weights.loss_prev_stage_rgb=null",
    *(f"{key}={value}" for key, value in (MODEL | TRAINING).items()),
    "training.max_steps=4",
]
TENSORF = [
    "experiment=tensorf_laptop",
    "training.loss_weights.loss_rgb=null",
    *(f"{key}={value}" for key, value in TRAINING.items()),
    "training.max_steps=4",
    "model.occupancy.resolution=16",
    "model.renderer.n_pts_per_ray_coarse=8",
    "model.tensorf.resolution=8",
    "model.tensorf.n_density=2",
    "model.tensorf.n_appearance=2",
    "model.tensorf.n_features=4",
    "model.tensorf.n_hidden=8",
    "model.grid.final_resolution=12",
]


compose_once = functools.cache(lambda *overrides: compose_experiment(overrides))


@pytest.fixture(autouse=True)
def compositions_are_kept(monkeypatch):
    """A plan composes every row, which takes seconds; here they are the same from test to test."""
    monkeypatch.setattr(cells, "compose_experiment", lambda overrides: compose_once(*overrides))


def settings_of(tmp_path, **given) -> AblationConfig:
    defaults = {"dataset_root": str(tmp_path / "root"), "sequences": [f"mug/{DEV}"], "output_dir": str(tmp_path / "out")}
    return AblationConfig(**{**defaults, "nerf": NERF, "tensorf": TENSORF, "seeds": [0], "threads": 1, "devices": ["cpu"], **given})


def plan_of(tmp_path, **given) -> Plan:
    settings = settings_of(tmp_path, **given)
    return Plan(settings, rows_named(settings.row_names))


@pytest.fixture
def root(tmp_path):
    return generated(tmp_path / "root", {"mug": [DEV]})


# Rows


def test_row_names_are_unique_and_every_reference_is_a_row_above():
    seen = set()
    for row in ROWS:
        assert row.name not in seen and {*row.members} <= seen and (row.builds_on is None or row.builds_on in seen)
        assert set(row.without) <= set(SWITCHES)
        assert row.is_trained == (not row.members)
        seen.add(row.name)


def test_the_slides_rows_add_one_part_each():
    rows = {row.name: row for row in ROWS}
    chain = ["nerf_baseline", "nerf_ema_warmup", "nerf_entropy"]
    assert [rows[name].builds_on for name in chain] == [None, *chain[:-1]]
    assert [set(rows[name].without) for name in chain] == [{"ema", "warmup", "entropy", "jitter"}, {"entropy", "jitter"}, {"jitter"}]
    modes = [row.overrides[0].split("=")[1] for row in ROWS if row.name.startswith("nerf_jitter")]
    assert modes == ["view_direction", "fixed_gauge", "extrinsics"]


@pytest.mark.parametrize("row", [row for row in ROWS if row.is_trained], ids=lambda row: row.name)
def test_a_rows_switches_change_just_what_it_says(row):
    kind = NERF[:3] if row.kind == "nerf" else TENSORF[:2]
    whole, changed = compose_once(*kind), compose_once(*kind, *row.recipe())
    differs = {key for key in ("model", "training", "data") if whole[key] != changed[key]}
    is_whole = row.name in ("tensorf", "nerf_entropy")  # the presets have jitter off
    assert differs == set() if is_whole else differs <= {"model", "training"} and differs


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    root = generated(tmp_path_factory.mktemp("root"), {"mug": [DEV]})
    return load_scene(compose_experiment([*NERF, f"dataset_root={root}", "category=mug"]))


@pytest.mark.parametrize("row", [row for row in ROWS if row.is_trained], ids=lambda row: row.name)
def test_every_row_makes_a_step_with_its_losses_and_no_other(row, scene):
    recipe = NERF if row.kind == "nerf" else TENSORF
    config = compose_experiment([*recipe, *row.recipe(), "category=mug"])
    task = make_task(config, config.training, scene, torch.device("cpu"))
    stepper = Stepper(task, config.training, deferred=False)
    stepper.run(0)  # raises where a weighted loss is not computed
    assert stepper.weights
    assert ("loss_roi_rgb" in stepper.weights) == ("full_rgb" not in row.name)
    assert ("loss_rgb" in stepper.weights) == (row.name.split("_no_")[0].endswith(("full_rgb", "both_rgb")))
    assert ("loss_alpha_bce" in stepper.weights) == ("bce" not in row.without)
    assert (task.model.occupancy is None) == ("occupancy" in row.without)
    assert (stepper.ema is None) == ("ema" in row.without)


def test_asking_for_an_ensemble_asks_for_what_it_fuses_in_the_tables_order():
    names = [row.name for row in rows_named(["ensemble"])]
    assert names[-2:] == ["nerf_best", "ensemble"] and {"tensorf", "nerf_baseline", "nerf_jitter_extrinsics"} <= set(names)
    with pytest.raises(ValueError, match="nerf_basline.*there are nerf_baseline"):
        rows_named(["nerf_basline"])


# Settings


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_composes_for_all_its_rows(preset, tmp_path):
    settings = OmegaConf.to_object(preset_defaults(preset))
    settings.generated, settings.output_dir = list(settings.generated_sequences), str(tmp_path)
    plan = Plan(settings, rows_named(settings.row_names))
    assert len(plan.sequences) >= 3 and len(settings.seeds) >= 2
    trained = [row for row in plan.rows if row.is_trained]
    assert len(plan.cells) == len(trained) * len(plan.sequences) * len(settings.seeds)  # no two rows are the same
    noise = [(s.get("mask_noise", 0), s.get("pose_noise", 0)) for s in settings.generated_sequences.values()]
    assert any(mask for mask, _ in noise) and any(pose for _, pose in noise)


def test_an_unknown_key_of_a_preset_is_an_error(tmp_path):
    (tmp_path / "mine.yaml").write_text("colour: red\n")
    with pytest.raises(Exception, match="colour"):
        preset_defaults("mine", tmp_path)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("colour=red", "colour"),
        ("rows=[nope]", "nope"),
        ("row_overrides={nope: []}", "nope"),
        ("row_overrides={ensemble: [training.lr=1]}", "row_overrides.ensemble"),
        ("devices=[cuda:0,cuda:1]", "more than jobs=1"),
        ("preset=nope", "preset='nope'"),
        ("jobs=0", "jobs=0"),
        ("budget=-1", "budget=-1"),
        ("seeds=[1,1]", "seeds=[1, 1]"),
        ("seeds=[]", "seeds=[]"),
        ("sequences=[mug/manyview_dev_0]", "dataset_root"),
        ("generated=[elephant]", "elephant"),
        ("generated_sequences.bear.mask_nose=0.1", "mask_nose"),
        ("generated_sequences.bear.mask_noise=0.9", "mask_noise=0.9"),
    ],
)
def test_a_wrong_argument_ends_with_2_and_is_named(argument, told, tmp_path, capsys):
    assert ablation.main([f"output_dir={tmp_path}/out", argument]) == 2
    message = capsys.readouterr().err
    assert told in message and message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_wrong_override_is_named_with_its_row_before_anything_runs(tmp_path, capsys):
    arguments = [f"output_dir={tmp_path}/out", "generated=[bear]", "rows=[nerf_entropy]", "nerf=[training.learning_rate=1]"]
    assert ablation.main(arguments) == 1
    message = capsys.readouterr().err
    assert "training.learning_rate" in message and "nerf_baseline" in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_help_lists_settings_and_rows(capsys):
    assert ablation.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(row.name in shown and row.what in shown for row in ROWS)
    assert all(text in shown for text in ("ablation_laptop", "report_only", "130", "budget"))


# Cells


def test_a_seed_of_all_rows_on_all_sequences_comes_before_the_next_seed(tmp_path):
    plan = plan_of(tmp_path, sequences=[f"mug/{DEV}", f"cup/{DEV}"], seeds=[3, 5], rows=["nerf_baseline", "nerf_entropy"])
    assert [cell.name for cell in plan.cells] == [
        f"{category}/{DEV}/{row}_seed{seed}" for seed in (3, 5) for category in ("mug", "cup") for row in ("nerf_baseline", "nerf_entropy")
    ]


def test_rows_of_one_configuration_share_their_runs_whatever_rows_are_asked_for(tmp_path):
    same = {"nerf_entropy": ["training.loss_weights.loss_sample_entropy=null"]}  # then it equals the row before it
    plan = plan_of(tmp_path, rows=["nerf_ema_warmup", "nerf_entropy"], row_overrides=same)
    assert [cell.row for cell in plan.cells] == ["nerf_ema_warmup"]
    alone = plan_of(tmp_path, rows=["nerf_entropy"], row_overrides=same)
    assert alone.cell("nerf_entropy", f"mug/{DEV}", 0).name == plan.cells[0].name
    assert "nerf_ema_warmup" in Results(plan).scores(plan.rows[1]).note


def test_a_row_without_the_one_that_it_builds_on_says_so_in_the_table_and_the_log(tmp_path, caplog):
    settings = settings_of(tmp_path, rows=["nerf_baseline", "nerf_entropy"], report_only=True)
    assert ablate(settings) == 0
    told = "nerf_entropy: no difference, because nerf_ema_warmup, which it builds on, is not in this table"
    assert f"- {told}" in (tmp_path / "out" / "table.md").read_text() and told in caplog.text
    assert "nerf_baseline: no" not in caplog.text
    caplog.clear()
    settings.rows.append("nerf_ema_warmup")
    assert ablate(settings) == 0
    assert "no difference, because" not in (tmp_path / "out" / "table.md").read_text() + caplog.text


def test_the_member_name_alone_makes_no_difference_between_configurations():
    configs = {"a": {"member": "a", "x": 1}, "b": {"member": "b", "x": 1}, "c": {"member": "c", "x": 2}}
    assert owners({name: OmegaConf.create(config) for name, config in configs.items()}) == {"a": "a", "b": "a", "c": "c"}


def test_a_cells_overrides_compose_to_its_configuration(tmp_path):
    strange = tmp_path / "it's, a = [strange] {folder}"
    plan = plan_of(tmp_path, output_dir=str(strange), rows=["nerf_entropy"], seeds=[7], budget=0.5)
    (cell,) = plan.cells
    assert compose_experiment(cell.overrides) == cell.config
    assert cell.config.training.seed == 7 and cell.config.training.budget_minutes == 0.5
    assert cell.run.path == strange / "mug" / DEV / "nerf_entropy_seed7"


@pytest.mark.parametrize("value", ["a,b", "it's", "x=[1]", "back\\slash", "\\' \\\\'", "end\\\\", "", "null", "a b"])
def test_quoted_values_come_through_hydra_unchanged(value):
    assert compose_experiment([override("dataset_root", value)]).dataset_root == value


def test_the_best_row_is_compared_where_all_candidates_are_finished():
    validations = {("a", "x", 0): 20.0, ("b", "x", 0): 21.0, ("a", "y", 0): 40.0, ("b", "y", 0): None}
    assert best_row(["a", "b"], validations) == "b"  # y does not count: b has no score there
    assert best_row(["a", "b"], {("a", "x", 0): 20.0}) is None


def test_a_place_with_two_sequences_of_one_name_is_refused(tmp_path):
    given = {"bear": {}}
    with pytest.raises(ValueError, match="bear/manyview_dev_0"):
        plan_of(tmp_path, sequences=[f"bear/{DEV}"], generated=["bear"], generated_sequences=given, rows=["nerf_entropy"])


def test_curves_are_shown_of_what_leads_up_to_the_ensemble_and_not_of_leave_one_out_rows():
    names = [row.name for row in curve_rows(ROWS)]
    assert "tensorf" in names and "nerf_baseline" in names and not any("_no_" in name for name in names)


# Runs


def test_a_table_is_trained_and_reported_a_failing_cell_named_and_what_is_done_left_alone(root, tmp_path, monkeypatch):
    broken = {"nerf_baseline": ["data.min_known_frames=99"]}
    settings = settings_of(tmp_path, rows=["nerf_baseline", "nerf_entropy"], row_overrides=broken, jobs=2)
    assert ablate(settings, ["python", "launch/ablation.py", f"output_dir={tmp_path}/out"]) == 1
    out = tmp_path / "out"
    text = (out / "table.md").read_text()
    assert "| nerf_entropy |" in text and str(tmp_path) not in text.partition("Failed cells")[0]
    assert f"mug/{DEV}/nerf_baseline_seed0: exit 1: " in text and "min_known_frames" in text
    rows = {row["row"]: row for row in csv.DictReader(io.StringIO((out / "table.csv").read_text()))}
    results = json.loads((out / "mug" / DEV / "nerf_entropy_seed0" / "results.json").read_text())
    assert float(rows["nerf_entropy"]["psnr_masked"]) == pytest.approx(results["metrics"]["psnr_masked"], rel=1e-4)
    assert [rows[name]["missing"] for name in ("nerf_baseline", "nerf_entropy")] == ["1", "0"]
    assert (out / "curves.png").exists() and len((out / "cells.csv").read_text().splitlines()) == 2

    monkeypatch.setattr(ablation_run, "run_jobs", refuse_any_job)
    settings.rows = ["nerf_entropy"]
    assert ablate(settings) == 0


def refuse_any_job(pending, **_):
    assert list(pending({})) == []
    return Outcome({}, 0)


def finish(cell, psnr, *, validation=20.0):
    """Makes a run look finished."""
    run = cell.run
    run.path.mkdir(parents=True)
    run.config_path.write_text(OmegaConf.to_yaml(cell.config))
    records = [
        {"kind": "train", "step": 2, "losses": {"loss_roi_rgb": 0.03}},
        {"kind": "validation", "step": 2, "metrics": {"psnr_masked": validation - 1, "psnr_fg": 18.0}},
        {"kind": "validation", "step": 4, "metrics": {"psnr_masked": validation, "psnr_fg": 19.0}},
    ]
    run.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    results = {"metrics": {"psnr_masked": psnr, "iou": 0.9}, "seconds": 6.0, "steps": 4, "best_step": 4}
    run.results_path.write_text(json.dumps(results))


def fuse_by_hand(cell: FusedCell, mean, auto):
    cell.results_path.parent.mkdir(parents=True, exist_ok=True)
    scores = {"metrics": {"psnr_masked": auto, "iou": 0.95}, "methods": {"mean": {"psnr_masked": mean, "iou": 0.94}}}
    cell.results_path.write_text(json.dumps(scores))


def test_fusing_waits_for_a_seed_to_be_trained_and_takes_the_nerf_that_validates_best(tmp_path):
    plan = plan_of(tmp_path, rows=["ensemble", "ensemble_auto"], seeds=[0, 1])
    first_seed = [cell for cell in plan.cells if cell.seed == 0]
    for cell in first_seed[:-1]:
        finish(cell, 20.0, validation=25.0 if cell.row == "nerf_ema_warmup" else 20.0)
    todo = ablation_run._Ablation(plan, "")
    assert [job.name for job in todo.pending({})] == [first_seed[-1].name, *(cell.name for cell in plan.cells if cell.seed == 1)]

    finish(first_seed[-1], 20.0)
    fused = f"mug/{DEV}/ensemble_nerf_ema_warmup_tensorf_seed0"
    jobs = list(todo.pending({}))
    assert [job.name for job in jobs if "seed0" in job.name] == [fused]  # once, for both methods
    assert jobs[0].name == fused
    assert override("members.nerf_ema_warmup_seed0.experiment", "nerf_ema_warmup") in jobs[0].command

    (cell,) = todo.results.fusable(0)
    fuse_by_hand(cell, 21.0, 22.0)
    assert fused not in [job.name for job in todo.pending({})]
    rows = {row.name: todo.results.scores(row) for row in plan.rows}
    assert rows["ensemble"].scores[f"mug/{DEV}", 0]["psnr_masked"] == 21.0
    assert rows["ensemble_auto"].scores[f"mug/{DEV}", 0]["psnr_masked"] == 22.0
    assert "nerf_ema_warmup" in rows["nerf_best"].note and rows["nerf_best"].missing == 1


def test_the_command_of_a_fused_cell_fuses_its_runs_and_both_methods_are_read_from_it(root, tmp_path):
    strange = tmp_path / "it's, a = [strange] #1 ${folder} {device}\\"
    plan = plan_of(tmp_path, rows=["nerf_entropy", "tensorf"], output_dir=str(strange))
    for cell in plan.cells:
        assert train_sequence(OmegaConf.merge(cell.config, {"device": "cpu"})).exit_status == 0
    best = FusedCell(tuple(plan.cells), "auto")
    command = for_device(best.command(), "cpu")
    assert command[1:3] == ["-m", "co3d_ensemble.ablation.fused"]
    assert not best.is_finished() and fused_main(command[3:]) == 0 and best.is_finished()
    results = json.loads((strange / "mug" / DEV / "ensemble_nerf_entropy_tensorf_seed0" / "results.json").read_text())
    assert set(results["members"]) == {"nerf_entropy_seed0", "tensorf_seed0"}
    assert read_fused(best).metrics == results["metrics"]
    assert read_fused(FusedCell(tuple(plan.cells), "mean")).metrics == results["methods"]["mean"]


def test_a_fusion_of_runs_that_were_trained_again_is_made_again(tmp_path):
    plan = plan_of(tmp_path, rows=["ensemble"])
    for cell in plan.cells:
        finish(cell, 20.0)
    (fused,) = Results(plan).fusable(0)
    fuse_by_hand(fused, 21.0, 21.0)
    assert Results(plan).fusable(0) == []
    later = time.time_ns() + 10**9
    os.utime(fused.cells[0].run.results_path, ns=(later, later))
    assert [cell.name for cell in Results(plan).fusable(0)] == [fused.name]


def test_the_fusion_of_runs_that_were_only_scored_again_stays_finished(tmp_path):
    plan = plan_of(tmp_path, rows=["ensemble"])
    for cell in plan.cells:
        finish(cell, 20.0)
    (fused,) = Results(plan).fusable(0)
    fuse_by_hand(fused, 21.0, 21.0)
    for cell in fused.cells:
        cell.run.checkpoints.mkdir(parents=True, exist_ok=True)
        Checkpoints(cell.run.checkpoints).best.write_bytes(b"weights")
    made_from = {"members": {cell.member: checkpoint_stamp(cell.run) for cell in fused.cells}}
    fused.results_path.write_text(json.dumps({**json.loads(fused.results_path.read_text()), "made_from": made_from}))
    later = time.time_ns() + 10**9
    os.utime(fused.cells[0].run.results_path, ns=(later, later))
    assert Results(plan).fusable(0) == [] and Results(plan).scores(plan.rows[-1]).missing == 0
    Checkpoints(fused.cells[0].run.checkpoints).best.write_bytes(b"other weights")
    assert [cell.name for cell in Results(plan).fusable(0)] == [fused.name]


def test_a_failed_candidate_is_left_out_of_the_choice_and_does_not_hold_up_the_fusion(tmp_path):
    plan = plan_of(tmp_path, rows=["ensemble"])
    for cell in plan.cells[1:]:
        finish(cell, 20.0)
    todo = ablation_run._Ablation(plan, "")
    assert [job.name for job in todo.pending({})] == [plan.cells[0].name]
    assert ["ensemble" in job.name for job in todo.pending({plan.cells[0].name: "exit 1: broken"})] == [True]


def test_a_run_of_other_settings_is_a_failure_that_names_them_and_is_not_touched(tmp_path):
    finish(plan_of(tmp_path, rows=["nerf_entropy"]).cells[0], 20.0)
    plan = plan_of(tmp_path, rows=["nerf_entropy"], nerf=[*NERF, "training.lr=0.125"])
    found = Results(plan)
    (reason,) = found.failures.values()
    assert "training.lr" in reason and "0.125" in reason and "output_dir" in reason
    assert found.scores(plan.rows[0]).missing == 1


def test_steps_that_a_budget_fixed_are_no_other_settings(tmp_path):
    (cell,) = plan_of(tmp_path, rows=["nerf_entropy"], budget=1.0).cells
    finish(cell, 20.0)
    stored = OmegaConf.merge(cell.config, {"training": {"max_steps": 17}})
    cell.run.config_path.write_text(OmegaConf.to_yaml(stored))
    cell.run.budget_path.write_text(json.dumps({"max_steps": 17}))
    assert cell.is_finished()


def test_a_report_alone_photographs_nothing(tmp_path):
    small = dict(SIZES) | {"n_known": 2, "n_val": 1, "n_unseen": 1}
    settings = settings_of(tmp_path, generated=["bear"], generated_sequences={"bear": small}, report_only=True)
    generate_missing(settings, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_heading_shows_the_last_part_of_places_and_leaves_the_rest_of_the_command(tmp_path):
    command = ["python", "launch/ablation.py", "output_dir=.", f"dataset_root={tmp_path / 'root'}"]
    told = ablation_run.describe(settings_of(tmp_path, output_dir="."), command)
    assert "`python launch/ablation.py output_dir=. dataset_root=root`" in told


def test_generated_sequences_are_made_once_and_never_mixed(tmp_path):
    small = dict(SIZES) | {"n_known": 2, "n_val": 1, "n_unseen": 1}
    settings = settings_of(tmp_path, generated=["bear"], generated_sequences={"bear": {**small, "mask_noise": 0.1}})
    generate_missing(settings, tmp_path)
    picture = tmp_path / "bear" / f"synthetic_{DEV}" / "images" / "frame000001.jpg"
    made = picture.stat().st_mtime_ns
    generate_missing(settings, tmp_path)
    assert picture.stat().st_mtime_ns == made
    (tmp_path / "bear.json").unlink()  # as after a kill
    generate_missing(settings, tmp_path)
    assert picture.stat().st_mtime_ns > made
    settings.generated_sequences["bear"]["mask_noise"] = 0.2
    with pytest.raises(ValueError, match="other settings"):
        generate_missing(settings, tmp_path)
