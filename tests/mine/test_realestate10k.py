import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.functional.cameras import so3_exp
from co3d_ensemble.mine import realestate10k
from co3d_ensemble.mine.realestate10k import RealEstate10K, read_cameras
from tests.mine.colmap_files import write_colmap

SIZE = {"height": 16, "width": 24}
H, W = 32, 64  # of the extracted frames


def pose(i):
    R = so3_exp(torch.tensor([0.01, 0.02, -0.01], dtype=torch.float64) * i)
    return torch.cat((R, torch.tensor([[0.1 * i], [0.0], [-0.05 * i]])), dim=1).numpy()


def timestamp(i):
    return 62_000_000 + 33_367 * i


def write_clip(root, name="0a1b", split="train", n=12, missing=(), cameras=None):
    """A clip as published, with frames as the usual extraction scripts name them."""
    lines = ["https://www.youtube.com/watch?v=aaaaaaaaaaa"]
    for i in range(n):
        numbers = [0.9, 1.8, 0.5, 0.5, 0.0, 0.0, *pose(i).ravel()]
        lines.append(f"{timestamp(i)} " + " ".join(f"{value:.9f}" for value in numbers))
    path = (root / split if cameras is None else cameras) / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    folder = root / "frames" / split / name
    folder.mkdir(parents=True, exist_ok=True)
    for i in set(range(n)) - set(missing):
        picture = np.full((H, W, 3), 10 * i + 5, np.uint8)
        Image.fromarray(picture).save(folder / f"{timestamp(i)}.{'png' if i % 2 else 'jpg'}")
    return path


def test_a_pair_has_the_frames_pictures_and_cameras_of_the_text_file(tmp_path):
    write_clip(tmp_path)
    pairs = RealEstate10K(tmp_path, frame_distance=5, random_target=False, **SIZE)
    assert len(pairs) == 7
    pair = pairs[2]
    assert pair.name == f"0a1b/{timestamp(2)}->{timestamp(7)}"
    assert pair.source.mean().item() == pytest.approx(25 / 255, abs=0.01) and pair.target.mean().item() == pytest.approx(75 / 255, abs=0.01)
    # shares of the sides, whatever the size of the frames
    assert torch.allclose(pair.K_source, torch.tensor([[0.9 * 24, 0, 12], [0, 1.8 * 16, 8], [0, 0, 1]]))
    X = torch.tensor([0.3, -0.4, 5.0, 1.0], dtype=torch.float64)
    source, target = torch.from_numpy(pose(2)) @ X, torch.from_numpy(pose(7)) @ X
    torch.testing.assert_close(pair.R.double() @ source + pair.t.double(), target, atol=1e-5, rtol=0)
    assert pair.source_points is None


def test_a_crop_keeps_the_middle_and_square_pixels(tmp_path):
    write_clip(tmp_path)
    K = RealEstate10K(tmp_path, fit="crop", height=16, width=16, **{})[0].K_source
    assert torch.allclose(K, torch.tensor([[0.9 * 32, 0, 8], [0, 1.8 * 16, 8], [0, 0, 1]]))


def test_targets_lie_in_the_window_of_the_camera_file_whatever_frames_are_missing(tmp_path):
    write_clip(tmp_path, missing=(3, 4))
    pairs = RealEstate10K(tmp_path, max_frame_distance=3, **SIZE)
    clip = pairs._clips[0]
    assert clip.numbers.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    for i in range(len(pairs)):
        (_, source), targets = pairs.choices(i)
        distances = [abs(int(clip.numbers[target] - clip.numbers[source])) for _, target in targets]
        expected = [abs(n - clip.numbers[source]) for n in clip.numbers if 0 < abs(n - clip.numbers[source]) <= 3]
        assert distances == sorted(expected)
    exact = RealEstate10K(tmp_path, frame_distance=3, **SIZE)
    assert exact.clips["0a1b"].timestamps == [timestamp(i) for i in clip.numbers.tolist()]
    assert exact.clip_view("0a1b", 3).name == str(timestamp(5))
    chosen = [exact.choices(i) for i in range(len(exact))]
    found = [(int(clip.numbers[s]), [int(clip.numbers[t]) for _, t in targets]) for (_, s), targets in chosen]
    assert found == [(2, [5]), (5, [8]), (6, [9]), (7, [10]), (8, [11])]


def test_sources_can_be_spread_over_a_clip_and_clips_chosen(tmp_path):
    for name in ("b", "a", "c"):
        write_clip(tmp_path, name, split="test", cameras=tmp_path / "cameras" / "test")
    pairs = RealEstate10K(tmp_path, split="test", clips=["c", "a"], sources_per_clip=3, frame_distance=2, **SIZE)
    assert [pairs[i].name for i in range(len(pairs))] == [
        f"{clip}/{timestamp(i)}->{timestamp(i + 2)}" for clip in ("c", "a") for i in (1, 5, 8)
    ]
    with pytest.raises(ValueError, match="has no d.txt"):
        RealEstate10K(tmp_path, split="test", clips=["d"], **SIZE)


@pytest.mark.parametrize("binary", [True, False])
def test_points_come_from_the_model_beside_the_clip(tmp_path, binary):
    write_clip(tmp_path, n=3)
    cameras = {1: ("PINHOLE", W, H, [0.9 * W, 1.8 * H, 0.5 * W, 0.5 * H])}
    world = {4: (0.2, 0.1, 4.0), 6: (-0.5, 0.3, 6.0), 8: (0.0, 0.0, -3.0)}
    names = [f"{timestamp(i)}.{'png' if i % 2 else 'jpg'}" for i in range(3)]
    images = [
        (i + 1, names[i], 1, pose(i)[:, :3], pose(i)[:, 3], [(1.0, 1.0, 4), (2.0, 2.0, 8), *([(3.0, 3.0, 6)] if i == 0 else [])])
        for i in range(2)
    ]
    write_colmap(tmp_path / "frames/train/0a1b/sparse", cameras, images, world, binary=binary)
    pairs = RealEstate10K(tmp_path, n_points=5, frame_distance=1, **SIZE)
    pair = pairs[0]
    for points, i, seen in ((pair.source_points, 0, (4, 6)), (pair.target_points, 1, (4,))):
        known = points[points[:, 2] > 0]
        assert len(known) == len(seen) and points.shape == (5, 3)  # what is behind the camera is no point
        for row, key in zip(known, seen):
            X = pose(i) @ [*world[key], 1.0]
            assert row.tolist() == pytest.approx([24 * (0.9 * X[0] / X[2] + 0.5), 16 * (1.8 * X[1] / X[2] + 0.5), X[2]], abs=1e-4)
    assert not pairs[1].target_points.any()  # a frame that COLMAP could not register


def test_points_without_a_model_are_an_error_that_names_the_script(tmp_path):
    write_clip(tmp_path)
    with pytest.raises(FileNotFoundError, match="0a1b/sparse has no COLMAP model.*make_realestate10k_points.py"):
        RealEstate10K(tmp_path, n_points=8, **SIZE)


def write_model(root, name, *, prefix="", moved=0.0, turned=0.0, sees=(4,), n=3):
    """A model of the first n frames of a clip whose cameras are moved and turned from the clip's."""
    turn = so3_exp(torch.tensor([0.0, turned, 0.0], dtype=torch.float64)).numpy()
    names = [f"{prefix}{timestamp(i)}.{'png' if i % 2 else 'jpg'}" for i in range(n)]
    features = [(1.0, 1.0, key) for key in sees]
    images = [(i + 1, names[i], 1, turn @ pose(i)[:, :3], turn @ pose(i)[:, 3] + moved, features) for i in range(n)]
    write_colmap(
        root / "frames/train" / name / "sparse", {1: ("PINHOLE", W, H, [57.0, 57.0, 32.0, 16.0])}, images, {4: (0.2, 0.1, 4.0)}, binary=True
    )


def test_clips_without_a_model_are_left_out_and_said(tmp_path, caplog):
    for name in ("a", "b", "c"):
        write_clip(tmp_path, name, n=3)
    write_model(tmp_path, "b")
    with caplog.at_level(logging.WARNING):
        pairs = RealEstate10K(tmp_path, n_points=8, **SIZE)
    assert list(pairs.clips) == ["b"] and pairs[0].source_points.any()
    assert "2 of 3 clips have no COLMAP model in sparse/, such as a" in caplog.text
    assert list(RealEstate10K(tmp_path, **SIZE).clips) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix": "frame_"}, "none of its 3 images, such as frame_62000000.jpg, has the name of one of the clip's frames"),
        ({"sees": ()}, "none of the clip's 3 frames sees a point"),
        ({"moved": 3.0}, "its camera of 62000000.jpg is not the clip's"),
        ({"turned": 0.2}, "its camera of 62000000.jpg is not the clip's"),
        ({"moved": 1e-3, "turned": 1e-3}, None),
        ({"moved": 5e-3, "n": 1}, None),  # a model of one frame: what is little is told by the clip
    ],
)
def test_a_model_that_is_not_of_the_clip_is_named(tmp_path, changes, message):
    write_clip(tmp_path, n=3)
    write_model(tmp_path, "0a1b", **changes)
    pairs = RealEstate10K(tmp_path, n_points=8, **SIZE)
    if message is None:  # refined a little
        assert pairs[0].source_points.any()
        return
    with pytest.raises(ValueError, match=f"0a1b/sparse: {message}"):
        pairs[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: words[:-1], "0a1b.txt, line 4: 18 columns"),
        (lambda words: [*words[:8], "nan", *words[9:]], "0a1b.txt, line 4: 'nan' is not a finite number"),
        (lambda words: [words[0], "-0.9", *words[2:]], "0a1b.txt, line 4: focal lengths"),
        (lambda words: [*words[:5], "0.1", *words[6:]], "0a1b.txt, line 4: distortion"),
        (lambda words: [*words[:7], "3.0", *words[8:]], "0a1b.txt, line 4: no rotation"),
        (lambda words: ["12.5", *words[1:]], "0a1b.txt, line 4: timestamp '12.5'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, change, message):
    path = write_clip(tmp_path)
    lines = path.read_text().splitlines()
    lines[3] = " ".join(change(lines[3].split()))
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        RealEstate10K(tmp_path, **SIZE)


def test_an_empty_camera_file_is_named(tmp_path):
    path = tmp_path / "x.txt"
    for text in ("", "https://www.youtube.com/watch?v=a\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="x.txt: no cameras"):
            read_cameras(path)


def test_missing_folders_and_damaged_pictures_are_named_at_once(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        RealEstate10K(tmp_path / "nowhere", **SIZE)
    with pytest.raises(FileNotFoundError, match="no camera files"):
        RealEstate10K(tmp_path, **SIZE)
    write_clip(tmp_path, "none", missing=range(12))
    with pytest.raises(FileNotFoundError, match="no clip has two frames"):
        RealEstate10K(tmp_path, **SIZE)
    write_clip(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(RealEstate10K(tmp_path, **SIZE)) == 12
    assert "1 of 2 clips" in caplog.text and "none" in caplog.text
    broken = tmp_path / "frames/train/0a1b" / f"{timestamp(4)}.jpg"
    broken.write_bytes(broken.read_bytes()[:-15])
    with pytest.raises(ValueError, match=f"{broken.name}: is unreadable or truncated"):
        RealEstate10K(tmp_path, check="decode", **SIZE)
    with pytest.raises(ValueError, match=f"{broken.name}: is unreadable or truncated"):
        RealEstate10K(tmp_path, frame_distance=1, **SIZE)[4]
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{broken.name}: is unreadable or truncated: no picture"):
        RealEstate10K(tmp_path, check="headers", **SIZE)


def test_one_picture_per_clip_is_opened_before_the_start_unless_more_is_asked_for(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_clip(tmp_path, name, n=5, missing=(0,))
    opened = []
    monkeypatch.setattr(realestate10k, "picture_size", lambda path, check: opened.append((path.parent.name, path.stem, check)))
    for how, expected in (({}, 2), ({"check": "headers"}, 8), ({"check": "decode"}, 8), ({"check": "none"}, 0)):
        opened.clear()
        RealEstate10K(tmp_path, **how, **SIZE)
        assert len(opened) == len(set(opened)) == expected
        if not how:
            assert opened == [(name, str(timestamp(1)), "sample") for name in ("a", "b")]
    monkeypatch.undo()
    (tmp_path / "frames/train/b" / f"{timestamp(1)}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="b/62033367.png: is unreadable or truncated: no picture"):
        RealEstate10K(tmp_path, **SIZE)
    with pytest.raises(ValueError, match="check='all': expected one of sample, headers, decode, none"):
        RealEstate10K(tmp_path, check="all", **SIZE)


@pytest.mark.parametrize("settings", [{"max_frame_distance": 0}, {"frame_distance": 0}, {"sources_per_clip": 0}, {"height": 1}])
def test_bad_settings_are_named(tmp_path, settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        RealEstate10K(tmp_path, **{**SIZE, **settings})
    write_clip(tmp_path, n=4)
    with pytest.raises(ValueError, match="are 9 to 9 frames apart"):
        RealEstate10K(tmp_path, frame_distance=9, **SIZE)


def test_frames_are_no_python_objects_of_which_a_data_set_would_have_millions(tmp_path):
    write_clip(tmp_path)
    clip = RealEstate10K(tmp_path, **SIZE).clips["0a1b"]
    assert all(isinstance(value, (str, Path, np.ndarray)) for value in vars(clip).values())
    assert [path.stem for path in clip.frames] == [str(time) for time in clip.timestamps] and all(path.is_file() for path in clip.frames)


@pytest.mark.parametrize("shift", [1, -1, 900, -900, 16_600])
def test_frames_named_by_a_decoders_clock_are_matched_within_half_a_frame(tmp_path, shift):
    """It counts time otherwise than the published files do, by 33 to 900 microseconds in reports."""
    write_clip(tmp_path, missing=(3, 7))
    folder = tmp_path / "frames/train/0a1b"
    for path in list(folder.iterdir()):
        path.rename(folder / f"{int(path.stem) + shift}{path.suffix}")
    pairs = RealEstate10K(tmp_path, frame_distance=5, random_target=False, **SIZE)
    clip = pairs.clips["0a1b"]
    assert clip.numbers.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert clip.timestamps == [timestamp(i) for i in clip.numbers]  # the published lists of pairs have these
    for i in range(len(pairs)):
        (_, source), _ = pairs.choices(i)
        assert pairs[i].source.mean().item() == pytest.approx((10 * clip.numbers[source] + 5) / 255, abs=0.01)


@pytest.mark.parametrize("name", [lambda i: f"{i:05d}", lambda i: f"{timestamp(i) // 1000}", lambda i: f"frame{i}", lambda i: "²" + str(i)])
def test_frames_of_other_names_are_an_error_that_shows_one_beside_one_expected(tmp_path, name):
    write_clip(tmp_path, n=3)
    folder = tmp_path / "frames/train/0a1b"
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{name(i)}{path.suffix}")
    shown = rf"0a1b/{name(0)}.jpg is called otherwise than, for example, {timestamp(0)}.jpg"
    with pytest.raises(FileNotFoundError, match=rf"no clip has two frames named <clip>/<timestamp>.jpg or .png; .*{shown}"):
        RealEstate10K(tmp_path, **SIZE)


def test_a_clip_whose_frames_have_other_names_is_said_beside_one_that_is_read(tmp_path, caplog):
    for clip in ("a", "b"):
        write_clip(tmp_path, clip, n=3)
    for i, path in enumerate(sorted((tmp_path / "frames/train/b").iterdir())):
        path.rename(path.with_stem(f"{i:05d}"))
    with caplog.at_level(logging.WARNING):
        assert list(RealEstate10K(tmp_path, **SIZE).clips) == ["a"]
    assert f"such as b; {tmp_path}/frames/train/b/00000.jpg is called otherwise than, for example, {timestamp(0)}.jpg" in caplog.text


def test_times_are_matched_as_a_loop_matches_them():
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = np.unique(rng.integers(0, 400, rng.integers(1, 12)))
        rng.shuffle(wanted)
        present = np.unique(rng.integers(0, 400, rng.integers(1, 12)))
        rng.shuffle(present)
        found = realestate10k._nearest(wanted, present)
        assert len(set(found[found >= 0])) == (found >= 0).sum()  # no file is two frames
        for time, index in zip(wanted, found):
            distances = np.abs(present - time)
            gap = min((abs(other - time) for other in wanted if other != time), default=0)
            near = distances.min() == 0 or 2 * distances.min() < gap
            assert (distances[index] == distances.min()) if near else index == -1
    assert realestate10k._nearest(np.array([3, 4]), np.array([], dtype=np.int64)).tolist() == [-1, -1]


def test_what_macos_leaves_beside_camera_files_and_frames_is_ignored(tmp_path):
    write_clip(tmp_path, n=3)
    (tmp_path / "train/._0a1b.txt").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(60))
    (tmp_path / f"frames/train/0a1b/._{timestamp(0)}.jpg").write_bytes(b"no picture")
    assert len(RealEstate10K(tmp_path, check="headers", **SIZE).clips["0a1b"]) == 3


def test_a_camera_file_with_a_byte_order_mark_is_read(tmp_path):
    path = write_clip(tmp_path, n=3)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_cameras(path)[0] == [timestamp(i) for i in range(3)]


def test_a_timestamp_that_stands_twice_or_is_no_number_is_named(tmp_path):
    path = write_clip(tmp_path, n=3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[2]]))
    with pytest.raises(ValueError, match=f"0a1b.txt, line 5: timestamp {timestamp(1)} is that of line 3 as well"):
        read_cameras(path)
    for word in ("²", "1" * 30, "-5", "1.5"):
        path.write_text("\n".join([lines[0], " ".join([word, *lines[1].split()[1:]])]))
        with pytest.raises(ValueError, match="0a1b.txt, line 2: timestamp '.*' is not a whole number"):
            read_cameras(path)


def test_two_pictures_of_one_frame_are_named(tmp_path):
    write_clip(tmp_path, n=3)
    Image.new("L", (W, H)).save(tmp_path / f"frames/train/0a1b/{timestamp(0)}.png")
    with pytest.raises(ValueError, match=f"{timestamp(0)}.jpg and .*{timestamp(0)}.png are both the picture"):
        RealEstate10K(tmp_path, **SIZE)
