"""The benchmarks run end to end at toy size, and their arithmetic is right."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import cells, common, nerf_step, report, step_timing, time_to_quality
from co3d_ensemble.base import precision as policy
from co3d_ensemble.data.synthetic import SyntheticConfig, generate_dataset
from co3d_ensemble.functional.cameras import pixel_centers, pixel_rays
from co3d_ensemble.functional.types import Frame, PinholeCamera


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A generated sequence of 12 + 2 + 2 small frames."""
    settings = SyntheticConfig(n_known=12, n_val=2, n_unseen=2, height=24, width=32, supersample=1)
    return generate_dataset(tmp_path_factory.mktemp("sequence"), {"mug": ["manyview_dev_0"]}, settings)


@pytest.fixture(autouse=True)
def short_probes_and_coarse_hulls(monkeypatch):
    """Carving a hull at the presets' resolution takes seconds."""
    coarse = lambda overrides, **place: common.experiment([*overrides, "model.occupancy.resolution=24"], **place)
    monkeypatch.setattr(nerf_step, "experiment", coarse)
    monkeypatch.setattr(time_to_quality, "experiment", coarse)
    monkeypatch.setattr(cells, "PROBE_STEPS", 2)
    monkeypatch.setattr(cells, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(time_to_quality, "HULL_SAMPLES", 32)


def toy_step(root, tmp_path, *more):
    path = tmp_path / "step.json"
    sizes = ["--mlp", "toy", "--rays", "16", "--samples", "6", "4", "--repeats", "2", "--longest-side", "32"]
    place = ["--dataset-root", str(root), "--category", "mug", "--device", "cpu", "--json", str(path)]
    assert nerf_step.main([*sizes, *place, *more]) == 0
    return json.loads(path.read_text())


def test_the_step_benchmark_writes_its_figures_and_no_folder(root, tmp_path, capsys):
    result = toy_step(root, tmp_path, "--scaling", "--no-memory")
    assert result["ratio"] == pytest.approx(result["implicitron_s"] / result["ours_s"])
    assert result["auto_precision"] == result["ours_precision"] == result["implicitron_precision"] == "float32"
    assert result["bfloat16"].startswith("emulated: a")
    assert result["ours_s"] == result["ours_float32_s"] and result["ours_bfloat16_s"] > 0
    assert 0 < result["occupied_share"] < 1
    assert (result["rays"], result["samples"], result["device"]) == (16, [6, 4], "cpu")
    assert {"threads", "torch", "pytorch3d", "machine", "peak_memory_mb"} <= result.keys()
    assert [(case["frames"], case["longest_side"]) for case in result["scaling"]] == [(12, 100), (10, 200), (12, 200), (12, 400)]
    assert str(tmp_path) not in result["command"] and str(root) not in result["command"]
    assert "implicitron" in capsys.readouterr().out
    assert "| Implicitron, float32 |" in report.figures([result])


def test_the_child_process_that_measures_memory_prints_one_line(root, capsys):
    sizes = ["--mlp", "toy", "--rays", "16", "--samples", "6", "4", "--longest-side", "32", "--device", "cpu"]
    assert nerf_step.main([*sizes, "--dataset-root", str(root), "--category", "mug", "--memory-of", "implicitron"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["peak_memory_mb"] >= 0


def test_peak_memory_is_what_is_needed_above_the_start():
    before = torch.ones(16 * 2**20 // 4)
    peak = common.PeakMemory(torch.device("cpu"))
    peak.start()
    torch.ones(64 * 2**20 // 4).sum()
    assert 60 < peak.mebibytes() < 90
    peak.set_back()
    assert peak.mebibytes() < 30
    assert before.sum() > 0


def test_both_sides_have_mlps_of_one_size(root):
    arguments = nerf_step.parse_arguments(["--dataset-root", str(root), "--category", "mug", "--longest-side", "32"])
    device = torch.device("cpu")
    configs = nerf_step.configurations(arguments, root, "mug", device)
    scene = nerf_step.load_scene(configs["ours_float32"])
    ours = common.make_stepper(configs["ours_float32"], scene, device).task.model
    theirs = common.make_stepper(configs["implicitron"], scene, device).task.model.implicitron
    assert type(theirs).__mro__[1].__name__ == "OverfitModel" and theirs.coarse_implicit_function is not theirs.implicit_function
    assert type(theirs.implicit_function).__name__ == "NeuralRadianceFieldImplicitFunction"
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    # the encodings differ in whether they pass the coordinates on: a few weights of the first layers
    assert count(ours) == pytest.approx(count(theirs), rel=0.02)
    assert count(ours.functions[0]) > 8 * 256 * 256 * 0.9
    assert (theirs.raysampler.n_pts_per_ray_training, theirs.renderer.n_pts_per_ray_fine_training) == (96, 96)
    assert (ours.n_pts_per_ray, ours.renderer.n_pts_per_ray_fine) == (96, 96)


def test_the_ratio_is_that_of_the_medians():
    samples = {"ours_bfloat16": [1.0, 9.0, 2.0], "ours_float32": [4.0, 4.0, 100.0], "implicitron": [30.0, 20.0, 0.0]}
    result = nerf_step.summary(samples, refine_s=50.0, refine_every=100)
    assert (result["ours_s"], result["implicitron_s"], result["ratio"]) == (2.0, 20.0, 10.0)
    assert result["ratio_float32"] == 5.0
    assert result["ours_with_refinement_s"] == 2.5 and result["ratio_with_refinement"] == 8.0
    assert nerf_step.summary({"ours_float32": [4.0], "implicitron": [8.0]}, refine_s=0.0, refine_every=1)["ours_s"] == 4.0


@pytest.mark.parametrize(("native", "order"), [(True, ["bfloat16", "float32"]), (False, ["float32", "bfloat16"])])
def test_the_precision_of_the_presets_on_this_device_is_measured_first(native, order, monkeypatch):
    monkeypatch.setattr(policy, "_cpu_multiplies_bfloat16", lambda: native)
    asked = {name: nerf_step.parse_arguments(["--precision", name]) for name in ("both", "auto", "bfloat16")}
    found = {name: step_timing.precisions(arguments, torch.device("cpu")) for name, arguments in asked.items()}
    assert found == {"both": order, "auto": order[:1], "bfloat16": ["bfloat16"]}


@pytest.mark.parametrize("native", [True, False])
def test_a_cell_goes_on_in_its_precision_on_the_other_machine(native, root, tmp_path, monkeypatch):
    def cell_run():
        overrides = ("experiment=nerf_laptop",)
        begun = cells.CellRun.begun_with(tmp_path)
        config = common.experiment(overrides, root=root, category="mug", device=torch.device("cpu"), stored=begun)
        return cells.CellRun(tmp_path, cells.Cell("ours", overrides, 1.0, 2, steps=5), config, stride=1)

    monkeypatch.setattr(cells, "seconds_per_step", lambda *_: 1.0)
    monkeypatch.setattr(policy, "_cpu_multiplies_bfloat16", lambda: native)
    first = cell_run()
    first.max_steps(None, torch.device("cpu"))
    monkeypatch.setattr(policy, "_cpu_multiplies_bfloat16", lambda: not native)
    again = cell_run()
    assert again.max_steps(None, torch.device("cpu")) == 5
    assert again.config.model.nerf.precision == first.config.model.nerf.precision == ("bfloat16" if native else "float32")


def test_sides_take_turns_and_warm_up_does_not_count():
    order = []
    sides = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    samples = step_timing.alternate(sides, repeats=3, warm_up=2, steps_per_sample=2)
    assert order == ["a", "a", "b", "b"] * 5
    assert [len(values) for values in samples.values()] == [3, 3]


@pytest.mark.parametrize(
    ("level", "expected"),
    [(15.0, 15.0), (20.0, 20.0), (18.0, 18.0), (21.0, 60.0), (22.0, 100.0), (22.1, None), (5.0, 10.0)],
)
def test_crossings_lie_on_the_line_between_two_points_and_count_the_first_time(level, expected):
    seconds, values = [10.0, 20.0, 30.0, 40.0, 60.0, 100.0], [10.0, 20.0, 12.0, 19.0, 21.0, 22.0]
    assert common.crossing(seconds, values, level) == (None if expected is None else pytest.approx(expected))


def curve(*points, **more):
    listed = [{"step": i, "seconds": s, "psnr_masked": v} for i, (s, v) in enumerate(points)]
    return {"points": listed, "seconds": points[-1][0], "max_steps": 9, "peak_memory_mb": 1.0, "final": None, **more}


def test_the_headline_is_against_the_better_baseline():
    results = {
        "ours": curve((10.0, 14.0), (20.0, 18.0), (100.0, 22.0)),
        "slow": curve((100.0, 10.0), (200.0, 15.0), (400.0, 16.0)),
        "better": curve((100.0, 12.0), (300.0, 20.0)),
    }
    summary = time_to_quality.summarise(results, 12.0)
    assert summary["level_db"] == 14.0 and summary["better_baseline"] == "better"
    assert summary["runs"]["slow"]["ours_reaches_final_s"] == pytest.approx(15.0)
    assert summary["runs"]["slow"]["ratio"] == pytest.approx(400 / 15)
    assert summary["runs"]["better"]["level_s"] == pytest.approx(150.0) and summary["ratio_at_level"] == pytest.approx(15.0)
    assert summary["ratio"] == pytest.approx(300 / 60)
    assert summary["runs"]["slow"]["exceeds_level"] and not time_to_quality.summarise(results, 15.0)["runs"]["slow"]["exceeds_level"]


def test_a_baseline_that_ours_never_reaches_has_no_ratio():
    summary = time_to_quality.summarise({"ours": curve((1.0, 10.0)), "implicitron": curve((9.0, 11.0))}, 5.0)
    assert summary["ratio"] is None
    assert time_to_quality.summarise({"ours": curve((1.0, 10.0))}, 5.0)["ratio"] is None


def test_evaluations_are_spread_evenly_in_the_logarithm_and_end_with_the_last_step():
    assert cells.evaluation_steps(10_000, 3) == [200, 1414, 10_000]
    assert cells.evaluation_steps(3, 20) == [1, 2, 3]
    assert cells.evaluation_steps(7, 1) == [7]


@pytest.mark.parametrize(("height", "width", "stride"), [(7, 10, 3), (8, 6, 2), (5, 5, 1)])
def test_a_strided_frame_has_the_rays_and_pixels_of_the_full_one(height, width, stride):
    camera = PinholeCamera(torch.eye(3), torch.tensor([0.1, 0.2, 3.0]), torch.tensor([9.0, 8.0]), torch.tensor([4.3, 3.1]), height, width)
    pixels = torch.arange(3 * height * width).reshape(3, height, width).to(torch.uint8)
    frame = Frame(name="s/0", sequence_name="s", frame_number=0, rgb=pixels, mask=pixels[:1], camera=camera)
    small = frame.strided(stride)
    _, every = pixel_rays(camera, pixel_centers(height, width))
    _, found = pixel_rays(small.camera, pixel_centers(small.camera.height, small.camera.width))
    expected = every.reshape(height, width, 3)[::stride, ::stride].reshape(-1, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(small.rgb, pixels[:, ::stride, ::stride])


def toy_quality(root, output, *more):
    place = ["--output", str(output), "--dataset-root", str(root), "--category", "mug", "--device", "cpu", "--longest-side", "32"]
    budget = ["--minutes-ours", "0.005", "--minutes-theirs", "0.005", "--minutes-published", "0.005", "--learning-rates", "1e-3"]
    return time_to_quality.main([*place, *budget, "--toy", "--evaluations-ours", "3", "--evaluations-theirs", "2", *more])


def test_time_to_quality_runs_every_cell_once(root, tmp_path, monkeypatch, capsys):
    output, path = tmp_path / "cells", tmp_path / "result.json"
    assert toy_quality(root, output, "--cells", "ours") == 0
    assert toy_quality(root, output, "--json", str(path)) == 0
    result = json.loads(path.read_text())
    assert {"ours", "implicitron_published", "implicitron_laptop_lr0.001"} == result["runs"].keys()
    assert {"ratio", "reference_db", "level_db", "better_baseline", "curves", "machine", "command"} <= result.keys()
    assert 5 < result["reference_db"] < 40
    assert result["runs"]["ours"]["final"].keys() >= {"psnr_masked", "ssim", "iou"}
    assert path.with_suffix(".png").stat().st_size > 5_000
    assert str(tmp_path) not in path.read_text()
    assert "### Time to quality" in report.figures([result])

    def forbidden(*_, **__):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(cells, "make_stepper", forbidden)
    assert toy_quality(root, output, "--json", str(path)) == 0
    assert json.loads(path.read_text())["runs"] == result["runs"]
    assert toy_quality(root, output, "--minutes-ours", "3") == 1  # other settings
    assert "ours holds a cell of other settings (cell)" in capsys.readouterr().err


def test_an_interrupted_cell_goes_on_where_it_was(root, tmp_path, monkeypatch):
    output = tmp_path / "cells"
    whole = cells.evaluate
    calls = 0

    def interrupted(*positional, **named):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("interrupted")
        return whole(*positional, **named)

    monkeypatch.setattr(cells, "evaluate", interrupted)
    assert toy_quality(root, output, "--cells", "ours") == 1
    points = output / "ours" / "points.jsonl"
    first = points.read_text()
    points.write_text(first + '{"step": 99')  # the write that a kill cut off
    plan = (output / "ours" / "cell.json").read_text()
    assert toy_quality(root, output, "--cells", "ours") == 0
    assert (output / "ours" / "cell.json").read_text() == plan
    assert points.read_text().startswith(first)
    steps = [json.loads(line)["step"] for line in points.read_text().splitlines()]
    assert steps == cells.evaluation_steps(json.loads(plan)["max_steps"], 3)
    seconds = [json.loads(line)["seconds"] for line in points.read_text().splitlines()]
    assert seconds == sorted(seconds)


def test_an_unknown_cell_is_an_error(root, tmp_path, capsys):
    assert toy_quality(root, tmp_path, "--cells", "theirs") == 1
    assert "--cells theirs: expected some of ours, implicitron_published" in capsys.readouterr().err


def test_the_hull_in_its_mean_colour_is_perfect_for_an_object_of_one_colour(root):
    config = time_to_quality.experiment(
        ["experiment=nerf_laptop", "data.longest_side=32"], root=root, category="mug", device=torch.device("cpu")
    )
    scene = time_to_quality.load_scene(config)
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8)
    flat = [replace(f, rgb=colour[:, None, None] * torch.ones_like(f.rgb), mask=torch.full_like(f.mask, 255)) for f in scene.train[:3]]
    everywhere = replace(scene, train=flat, hull=torch.ones_like(scene.hull), box=scene.box.new_tensor([[-99.0] * 3, [99.0] * 3]))
    assert torch.allclose(time_to_quality.mean_foreground(flat) * 255, colour.float(), atol=1e-3)
    assert time_to_quality.hull_reference(everywhere, flat) > 60
    assert time_to_quality.hull_reference(replace(everywhere, hull=torch.zeros_like(scene.hull)), flat) < 10


def test_the_report_replaces_what_is_between_the_marks():
    readme = f"a\n{report.BEGIN}\nold\n{report.END}\nz"
    assert report.with_figures(readme, "new") == f"a\n{report.BEGIN}\n\nnew\n\n{report.END}\nz"
    assert report.with_figures((report.HERE / "README.md").read_text(), "new").count("new\n\n" + report.END) == 1
    with pytest.raises(ValueError, match="marks"):
        report.with_figures("no marks", "new")
