"""Videos play, have the pictures that were given, and appear whole or not at all."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from co3d_ensemble.mine.video import check_video, write_video

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="the extra [video] is not installed")


def flat(value, height=48, width=64):
    return torch.full((3, height, width), value, dtype=torch.uint8)


def decoded(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    frames = [np.frombuffer(frame, np.uint8).reshape(meta["size"][1], meta["size"][0], 3) for frame in reader]
    return meta, frames


# imageio-ffmpeg's reader leaves its pipes open
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_video_has_the_frames_the_size_and_the_speed_that_were_asked_for(tmp_path):
    values = [20, 80, 140, 200, 250]
    assert write_video(tmp_path / "a.mp4", (flat(value) for value in values), fps=10) == 5
    meta, frames = decoded(tmp_path / "a.mp4")
    assert meta["size"] == (64, 48) and meta["fps"] == 10 and meta["codec"] == "h264" and "yuv420p" in meta["pix_fmt"]
    assert [frame.mean() for frame in frames] == pytest.approx(values, abs=4)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"]


@pytest.mark.parametrize(
    ("frames", "told"),
    [([flat(0, 47)], "64 x 47"), ([flat(0), flat(0, 48, 32)], "frame 1 has 32 x 48"), ([], "at least one frame")],
)
def test_an_impossible_video_is_refused_and_leaves_nothing(tmp_path, frames, told):
    with pytest.raises(ValueError, match=told):
        write_video(tmp_path / "a.mp4", frames, fps=10)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_video_leaves_the_earlier_one(tmp_path):
    def frames():
        yield flat(0)
        raise KeyboardInterrupt

    (tmp_path / "a.mp4").write_bytes(b"earlier")
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", frames(), fps=10)
    assert (tmp_path / "a.mp4").read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(RuntimeError, match=r"co3d_ensemble\[video\]"):
        check_video()
