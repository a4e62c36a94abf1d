"""The benchmark of the VM step runs end to end at toy size, and its sides do what it says they do."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import report, vm_step
from benchmarks.common import experiment
from benchmarks.implicitron_vm import implicitron_stepper
from co3d_ensemble.data.synthetic import SyntheticConfig, generate_dataset

CPU = torch.device("cpu")
SIZES = ["--rays", "64", "--samples", "24", "--resolution", "12", "--longest-side", "32", "--device", "cpu", "--repeats", "2"]


@pytest.fixture(scope="module", autouse=True)
def small_scene():
    """A generated scene of 12 + 2 + 2 small frames instead of the benchmark's, and a coarse hull: carving a fine one takes seconds."""
    settings = SyntheticConfig(n_known=12, n_val=2, n_unseen=2, height=24, width=32, supersample=1)
    coarse = lambda overrides, **place: experiment([*overrides, "model.occupancy.resolution=24"], **place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vm_step, "SyntheticConfig", lambda: settings)
        patch.setattr(vm_step, "experiment", coarse)
        yield settings


@pytest.fixture(scope="module")
def root(tmp_path_factory, small_scene):
    return generate_dataset(tmp_path_factory.mktemp("sequence"), {"mug": ["manyview_dev_0"]}, small_scene)


def place(root):
    return ["--dataset-root", str(root), "--category", "mug"]


def made(name, root, tmp_path, *more):
    return vm_step.make_case(name, vm_step.parse_arguments([*SIZES, *place(root), *more]), tmp_path, CPU)


def test_it_writes_its_figures_and_no_folder(root, tmp_path, capsys):
    path = tmp_path / "vm.json"
    more = ["--no-memory", "--scaling", "--scaling-resolutions", "8", "12", "1000000", "--json", str(path)]
    assert vm_step.main([*SIZES, *place(root), *more]) == 0
    result = json.loads(path.read_text())
    assert result["ratio"] == pytest.approx(result["implicitron_s"] / result["ours_s"])
    first, second = result["cases"]
    assert (first["name"], second["name"]) == ("generated", "hull")
    assert (first["bar"], second["bar"]) == (25, 15)
    assert first["sides"].keys() == {f"ours_{p}{s}" for p in ("bfloat16", "float32") for s in ("", "_all_samples")}
    assert first["sides"]["ours_float32_all_samples"]["bar"] == 1
    assert result["ours_s"] == first["sides"]["ours_float32"]["seconds"] and result["ours_precision"] == result["auto_precision"]
    small, larger, skipped = result["scaling"]
    assert small["parameters"] < larger["parameters"] and "GiB are free" in skipped["skipped"]
    for row in (small, larger):
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["shares"].keys() == {"field and losses", "penalties", "clip", "Adam", "EMA", "rest"}
        assert min(row["shares"][name] for name in ("field and losses", "penalties", "clip", "Adam", "EMA")) > 0
    assert str(tmp_path) not in path.read_text() and str(root) not in path.read_text()
    assert "implicitron" in capsys.readouterr().out
    assert "| Implicitron |" in report.figures([result])


def test_the_child_process_that_measures_memory_prints_one_line(root, capsys):
    for name in ("implicitron", "ours_float32", "ours_float32_all_samples"):
        assert vm_step.main([*SIZES, *place(root), "--memory-of", name]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["peak_memory_mb"] >= 0


@pytest.mark.parametrize("share", [0.03, 0.2])
def test_the_generated_scene_has_the_share_of_occupied_samples_that_was_asked_for(root, tmp_path, share):
    case = made("generated", root, tmp_path, "--occupied-share", str(share), "--rays", "512")
    assert case.occupied_share == pytest.approx(share, abs=0.02 * share + 0.002)
    model = case.steppers["ours_float32"].task.model
    batch = case.steppers["ours_float32"].task.batch(0)
    counted = model.renderer._occupied(model.bundle(batch.origins, batch.directions)).float().mean()
    assert counted == pytest.approx(share, rel=0.15)  # another way to count, on one batch
    assert case.steppers["ours_float32_all_samples"].task.model.occupancy is None


def test_both_sides_have_the_same_parameters_rays_and_samples(root, tmp_path):
    case = made("hull", root, tmp_path)
    ours, theirs = case.steppers["ours_float32"].task, case.steppers["implicitron"].task
    sizes = lambda module: sorted(parameter.numel() for parameter in module.parameters())
    assert sizes(ours.model) == sizes(theirs.model)
    seen = {}
    for name, task in (("ours", ours), ("theirs", theirs)):
        function = task.model.functions[0] if name == "ours" else task.model["function"]
        hook = lambda module, args, kwargs, name=name: seen.update({name: kwargs["ray_bundle"]})
        handle = function.register_forward_pre_hook(hook, with_kwargs=True)
        case.steppers["ours_float32" if name == "ours" else "implicitron"].run(0)
        handle.remove()
    for attribute in ("origins", "directions", "lengths"):
        assert torch.equal(getattr(seen["ours"], attribute), getattr(seen["theirs"], attribute))
    assert seen["ours"].lengths.shape == (64, 24)


def test_implicitrons_grid_is_trained_and_its_rays_are_not_opaque_from_the_start(root, tmp_path):
    case = made("hull", root, tmp_path)
    task = case.steppers["ours_float32"].task
    config = vm_step.configuration(vm_step.parse_arguments([*SIZES, *place(root)]), root, "mug", CPU)
    stepper = implicitron_stepper(config, task, CPU)
    before = [parameter.detach().clone() for parameter in stepper.task.model.parameters()]
    batch = task.batch(0)
    bundle = task.model.bundle(batch.origins, batch.directions)
    alpha = stepper.task.model["renderer"](ray_bundle=bundle, implicit_functions=[stepper.task.model["function"]]).masks
    assert 0 < alpha.max() < 0.01
    stepper.run(0)
    assert all(not torch.equal(a, b) for a, b in zip(before, stepper.task.model.parameters()))


def test_our_colour_network_is_run_on_every_occupied_sample(root, tmp_path, monkeypatch):
    task = made("generated", root, tmp_path).steppers["ours_float32"].task
    model, seen = task.model, []
    color = model.field.color
    monkeypatch.setattr(model.field, "color", lambda points, *rest: (seen.append(len(points)), color(points, *rest))[1])
    occupied = model.renderer._occupied
    monkeypatch.setattr(model.renderer, "_occupied", lambda bundle: seen.append(occupied(bundle)[..., :-1].sum()) or occupied(bundle))
    task.losses(task.batch(0))
    assert seen[0] == seen[1] > 0  # all but the last of a ray, whose interval is 0


def test_the_ratio_is_that_of_the_medians():
    samples = {"ours_bfloat16": [1.0, 9.0, 2.0], "ours_bfloat16_all_samples": [10.0] * 3, "implicitron": [30.0, 20.0, 0.0]}
    result = vm_step.summary("generated", samples)
    assert (result["ours_s"], result["implicitron_s"], result["ratio"], result["bar"]) == (2.0, 20.0, 10.0, 25.0)
    assert result["sides"]["ours_bfloat16_all_samples"] == {"seconds": 10.0, "ratio": 2.0, "bar": 1.0}
