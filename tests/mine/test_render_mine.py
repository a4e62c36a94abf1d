"""launch/render_mine.py as its users meet it: what it writes, and how it tells what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.files import write_text_atomic
from co3d_ensemble.mine import render_photo as module
from co3d_ensemble.mine.mpi_export import read_mpi
from co3d_ensemble.mine.render_photo import RenderConfig
from co3d_ensemble.settings import settings_with_help
from launch import render_mine
from tests.mine.stacks import smooth_picture, write_run

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="the extra [video] is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def photo(tmp_path):
    pixels = (smooth_picture(60, 90).permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "my photo.png")
    return tmp_path / "my photo.png"


def render(photo, run, *more):
    output = photo.parent / "out"
    fixed = [f"image={photo}", f"checkpoint={run}", f"output_dir={output}", "device=cpu", "frames=3"]
    return render_mine.main([*fixed, *more]), output / photo.stem


def picture(path):
    with Image.open(path) as opened:
        return np.array(opened)


def test_a_photograph_becomes_a_video_pictures_planes_and_a_report(photo, run, capsys):
    status, folder = render(photo, run, "fov=50", "planes=5", "depth_video=true")
    assert status == 0
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    planes = {f"mpi/plane_{number:03d}.png" for number in range(5)}
    assert files == {"video.mp4", "depth.mp4", "rgb.png", "depth.png", "mpi/mpi.json", "render.json"} | planes
    report = json.loads((folder / "render.json").read_text())
    assert (report["width"], report["height"], report["planes"], report["fov_degrees"]) == (48, 32, 5, 50.0)
    assert picture(folder / "rgb.png").shape == picture(folder / "depth.png").shape == (32, 48, 3)
    assert read_mpi(folder / "mpi").rgb.shape == (5, 3, 32, 48)
    for name in ("video.mp4", "depth.mp4"):
        assert imageio_ffmpeg.count_frames_and_secs(str(folder / name))[0] == 3
    shown = capsys.readouterr().out
    assert "48 x 32 pixels, 5 planes, field of view 50.0 degrees (given)" in shown and str(folder / "video.mp4") in shown


def test_the_network_sees_the_photograph_once_for_all_views(photo, run, monkeypatch):
    calls = {"encode": 0, "decode": 0}
    load = module.load_trained_mine

    def counting(*arguments):
        network, config = load(*arguments)
        for name in calls:
            original = getattr(network, name)

            def counted(*given, name=name, original=original, **named):
                calls[name] += 1
                return original(*given, **named)

            setattr(network, name, counted)
        return network, config

    monkeypatch.setattr(module, "load_trained_mine", counting)
    assert render(photo, run, "frames=7", "export=false")[0] == 0
    assert calls == {"encode": 1, "decode": 1}


def test_without_videos_and_export_only_pictures_are_written(photo, run):
    status, folder = render(photo, run, "video=false", "export=false")
    assert status == 0 and {path.name for path in folder.iterdir()} == {"rgb.png", "depth.png", "render.json"}


def test_a_rendering_replaces_all_of_the_one_before_it_and_nothing_else(photo, run):
    _, folder = render(photo, run, "depth_video=true")
    for others in (folder / "notes.txt", folder / "mpi" / "viewer.html"):
        others.write_text("somebody else's")
    assert render(photo, run, "video=false", "export=false")[0] == 0
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"rgb.png", "depth.png", "render.json", "notes.txt", "mpi/viewer.html"}
    (folder / "mpi" / "viewer.html").unlink()
    render(photo, run, "video=false")
    render(photo, run, "video=false", "export=false")
    assert not (folder / "mpi").exists()


def test_a_run_is_shown_with_the_planes_of_its_validations(photo, tmp_path):
    run = write_run(tmp_path / "run", evaluation__n_planes=6)
    for argument, planes in (("planes=null", 6), ("planes=3", 3)):
        status, folder = render(photo, run, "video=false", argument)
        assert status == 0 and json.loads((folder / "render.json").read_text())["planes"] == planes


def test_an_enlarged_output_has_the_photographs_detail(photo, run):
    status, folder = render(photo, run, "output_scale=2", "plane_chunk=2")
    assert status == 0
    large = torch.from_numpy(picture(folder / "rgb.png")).permute(2, 0, 1).float() / 255
    assert large.shape == (3, 64, 96)
    assert read_mpi(folder / "mpi").K[0, 0] == pytest.approx(2 * 24 / np.tan(np.radians(30)), rel=1e-5)


def test_chunks_of_planes_change_nothing(photo, run):
    _, folder = render(photo, run, "video=false", "export=false")
    whole = picture(folder / "rgb.png")
    render(photo, run, "video=false", "export=false", "plane_chunk=1")
    assert np.abs(whole.astype(int) - picture(folder / "rgb.png")).max() <= 1


def test_planes_stand_where_the_list_says_and_where_surfaces_were_found(photo, run):
    status, folder = render(photo, run, "disparities=[0.9,0.4,0.1]", "video=false")
    listed = read_mpi(folder / "mpi").disparity
    assert status == 0 and torch.equal(listed, torch.tensor([0.9, 0.4, 0.1]))
    assert render(photo, run, "disparities=[0.9,0.4,0.1]", "fine_planes=2", "video=false")[0] == 0
    finer = read_mpi(folder / "mpi").disparity
    assert len(finer) == json.loads((folder / "render.json").read_text())["planes"] == 5 and set(listed.tolist()) < set(finer.tolist())


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("fov=200", "fov=200.0: must lie in [1, 175]"),
        ("trajectory=square", "trajectory='square': expected one of circle, line, spiral"),
        ("colour=red", "colour"),
        ("planes=many", "planes"),
        ("photo.png", "'photo.png': expected key=value"),
        ("planes=1", "planes=1: must lie in [2, 1024]"),
        ("disparities=[0.2,0.5]", "disparities must descend (nearest plane first), got 0.2 before 0.5"),
        ("disparities=[inf,0.2]", "disparities must be above 0 and finite, got 0.2 to inf"),
        ("fine_planes=-1", "fine_planes=-1: must lie in [0, 1024]"),
        ("amplitude=0.5", "amplitude=0.5"),
        ("look_at=me", "look_at='me'"),
        ("fps=nan", "fps=nan"),
    ],
)
def test_a_wrong_argument_ends_with_2_and_one_line(photo, run, capsys, argument, told):
    status, folder = render(photo, run, argument)
    message = capsys.readouterr().err
    assert status == 2 and told in message and message.startswith("error: ") and message.count("\n") == 1
    assert not folder.exists()


def test_what_is_missing_is_named(capsys):
    assert render_mine.main(["image=a.jpg"]) == 2
    assert "checkpoint" in capsys.readouterr().err


def test_wrong_files_end_with_1_and_one_line(photo, run, tmp_path, capsys):
    def told(image, checkpoint):
        assert render_mine.main([f"image={image}", f"checkpoint={checkpoint}", f"output_dir={tmp_path / 'out'}", "device=cpu"]) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1 and not (tmp_path / "out").exists()
        return message

    assert "nowhere.jpg: no such file" in told(tmp_path / "nowhere.jpg", run)
    (tmp_path / "text.jpg").write_text("no picture")
    assert "text.jpg: is unreadable or truncated: no picture of a known format" in told(tmp_path / "text.jpg", run)
    assert "neither a run directory" in told(photo, tmp_path / "nowhere")
    for name in "ab":
        write_text_atomic(tmp_path / "outputs" / "mine" / name / "config.yaml", "")
    for above in (tmp_path / "outputs", tmp_path / "outputs" / "mine"):
        assert f"runs in it: {tmp_path}/outputs/mine/a, {tmp_path}/outputs/mine/b" in told(photo, above)
    write_text_atomic(tmp_path / "nerf" / "config.yaml", "model: {kind: nerf}\n")
    assert "holds a run of something else than MINE" in told(photo, tmp_path / "nerf")
    damaged = run / "checkpoints" / "damaged.pt"
    damaged.write_bytes((run / "checkpoints" / "best.pt").read_bytes()[:-1000])
    assert "is damaged" in told(photo, damaged)


def test_names_that_look_like_other_values_are_names(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "[a]: 1e3.png")
    assert render_mine.main(["image=[a]: 1e3.png", f"checkpoint={run}", "video=false", "export=false", "device=cpu"]) == 0
    assert (tmp_path / "outputs" / "renders" / "[a]: 1e3" / "rgb.png").is_file()


def test_help_lists_every_setting(capsys):
    assert render_mine.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {key}={default}\n      {text}\n" in shown for key, default, text in settings_with_help(RenderConfig))
