import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.mine.kitti_raw import CITY_SEQUENCES, KITTIRaw, city_sequences, read_calibration

W, H = 62, 19
SIZE = {"height": 16, "width": 48}
NAME = "2011_09_26_drive_0001"
FOCAL, CX, CY = 36.0, 30.4, 8.6
LEFT_T, RIGHT_T = 0.06, -0.47  # metres along x, of the two cameras against camera 0


def calibration(**changes):
    """The entries of the day's file as the devkit describes them, sizes and numbers of tiny pictures."""
    lines = {"calib_time": "09-Jan-2012 13:57:47", "corner_dist": "9.950000e-02"}
    for camera, shift in ((0, 0.0), (1, -0.54), (2, LEFT_T), (3, RIGHT_T)):
        lines[f"S_0{camera}"] = "1.392000e+03 5.120000e+02"
        lines[f"K_0{camera}"] = "9.597910e+02 0.0e+00 6.960217e+02 0.0e+00 9.569251e+02 2.241806e+02 0.0e+00 0.0e+00 1.0e+00"
        lines[f"R_rect_0{camera}"] = "1 0 0 0 1 0 0 0 1"
        lines[f"S_rect_0{camera}"] = f"{W:e} {H:e}"
        lines[f"P_rect_0{camera}"] = " ".join(f"{v:e}" for v in (FOCAL, 0, CX, FOCAL * shift, 0, FOCAL, CY, 0, 0, 0, 1, 0))
    return "\n".join(f"{key}: {value}" for key, value in {**lines, **changes}.items() if value is not None) + "\n"


def write_drive(root, name=NAME, n=3, suffix="png"):
    (root / name[:10]).mkdir(parents=True, exist_ok=True)
    (root / name[:10] / "calib_cam_to_cam.txt").write_text(calibration())
    for camera in (2, 3):
        folder = root / name[:10] / f"{name}_sync" / f"image_0{camera}" / "data"
        folder.mkdir(parents=True)
        for i in range(n):
            Image.fromarray(np.full((H, W, 3), 40 * camera + i, np.uint8)).save(folder / f"{i:010d}.{suffix}")
    return root


def test_a_point_at_a_depth_moves_by_the_baselines_disparity(tmp_path):
    pairs = KITTIRaw(write_drive(tmp_path), sequences=[NAME], sources="left", height=H, width=W)
    pair = pairs[1]
    assert len(pairs) == 3 and pair.name == f"{NAME}/0000000001_left->0000000001_right"
    assert pair.source[0, 3, 3].item() * 255 == pytest.approx(81) and pair.target[0, 3, 3].item() * 255 == pytest.approx(121)
    assert pair.source_points is None
    X = torch.tensor([1.2, -0.3, 9.0])
    u, v = (pair.K_source @ X / 9)[:2]
    assert (u.item(), v.item()) == pytest.approx((FOCAL * 1.2 / 9 + CX + 0.5, -FOCAL * 0.3 / 9 + CY + 0.5))  # centres at + 0.5
    moved = pair.R @ X + pair.t
    u_right, v_right = (pair.K_target @ moved / moved[2])[:2]
    assert (u - u_right).item() == pytest.approx(FOCAL * 0.53 / 9, rel=1e-4) and v_right.item() == pytest.approx(v.item())


def test_both_directions_are_inverse_and_sizes_take_the_intrinsics_along(tmp_path):
    pairs = KITTIRaw(write_drive(tmp_path, suffix="jpg"), sequences=[NAME], **SIZE)
    assert len(pairs) == 6 and pairs[3].name == f"{NAME}/0000000001_right->0000000001_left"
    assert torch.equal(pairs[2].t, -pairs[3].t) and pairs[2].t[0] < 0
    expected = torch.tensor([[FOCAL * 48 / W, 0, (CX + 0.5) * 48 / W], [0, FOCAL * 16 / H, (CY + 0.5) * 16 / H], [0, 0, 1]])
    torch.testing.assert_close(pairs[2].K_source, expected)


def test_the_split_is_the_published_one():
    assert len(CITY_SEQUENCES) == 28
    splits = [city_sequences(split) for split in ("train", "val", "test")]
    assert [len(names) for names in splits] == [20, 4, 4] and set().union(*splits) == set(CITY_SEQUENCES)
    # as the published recipe gives it, and as other projects list it
    assert sorted(splits[1]) == [f"2011_09_26_drive_{number}" for number in ("0009", "0017", "0048", "0117")]
    assert sorted(splits[2]) == [f"2011_09_26_drive_{number}" for number in ("0001", "0057", "0084", "0106")]
    with pytest.raises(ValueError, match="split='all'"):
        city_sequences("all")


def test_a_split_reads_all_its_sequences_and_leaves_one_frame_out(tmp_path):
    for name in city_sequences("test"):
        write_drive(tmp_path, name, n=1)
    assert len(KITTIRaw(tmp_path, split="test", **SIZE)) == 4
    write_drive(tmp_path, "2011_09_26_drive_0117", n=76)
    frames = KITTIRaw(tmp_path, sequences=["2011_09_26_drive_0117"], sources="left", **SIZE)
    names = [frames._pairs[i][0][2].stem for i in range(len(frames))]
    assert len(names) == 75 and "0000000074" not in names and "0000000075" in names


def test_missing_folders_and_files_are_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        KITTIRaw(tmp_path / "nowhere", **SIZE)
    with pytest.raises(FileNotFoundError, match="calib_cam_to_cam.txt is missing"):
        KITTIRaw(tmp_path, sequences=[NAME], **SIZE)
    write_drive(tmp_path)
    with pytest.raises(FileNotFoundError, match="2011_09_26_drive_0002_sync/image_02/data is missing"):
        KITTIRaw(tmp_path, sequences=["2011_09_26_drive_0002"], **SIZE)
    data = tmp_path / f"2011_09_26/{NAME}_sync/image_03/data"
    picture = data / "0000000002.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="0000000002.png: is unreadable or truncated"):
        KITTIRaw(tmp_path, sequences=[NAME], check="decode", **SIZE)
    Image.new("RGB", (W, H + 1)).save(picture)
    with pytest.raises(ValueError, match=f"0000000002.png: is {W}x{H + 1} .*S_rect_03 .*says {W}x{H}"):
        KITTIRaw(tmp_path, sequences=[NAME], **SIZE)
    picture.unlink()
    with pytest.raises(FileNotFoundError, match="frame 0000000002 is in only one"):
        KITTIRaw(tmp_path, sequences=[NAME], **SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"P_rect_03": None}, "no entry P_rect_03"),
        ({"S_rect_02": None}, "no entry S_rect_02"),
        ({"P_rect_02": "1 2 3"}, r"line \d+: P_rect_02 has 3 numbers, expected 12"),
        ({"P_rect_02": "nan " * 12}, r"line \d+: 'nan' is not a finite number"),
        ({"P_rect_02": "0 " * 12}, "P_rect_02 is no projection"),
    ],
)
def test_a_malformed_calibration_is_named(tmp_path, changes, message):
    path = tmp_path / "calib_cam_to_cam.txt"
    path.write_text(calibration(**changes))
    with pytest.raises(ValueError, match=f"calib_cam_to_cam.txt.*{message}"):
        read_calibration(path)


@pytest.mark.parametrize("settings", [{"split": "all"}, {"sources": "right"}, {"height": 0}, {"fit": "pad"}])
def test_bad_settings_are_named(tmp_path, settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        KITTIRaw(tmp_path, **{**SIZE, **settings})


@pytest.mark.parametrize("name", ["../outside", "/etc", ".."])
def test_sequences_are_plain_names(tmp_path, name):
    with pytest.raises(ValueError, match="sequences='"):
        KITTIRaw(tmp_path, sequences=[name], **SIZE)


def test_two_pictures_of_one_frame_are_named_and_what_systems_leave_is_none(tmp_path):
    write_drive(tmp_path)
    data = tmp_path / f"2011_09_26/{NAME}_sync/image_02/data"
    for name in ("._0000000000.png", ".DS_Store", "Thumbs.db"):
        (data / name).write_bytes(b"no picture")
    assert len(KITTIRaw(tmp_path, sequences=[NAME], sources="left", **SIZE)) == 3
    Image.new("L", (W, H)).save(data / "0000000001.jpg")
    with pytest.raises(ValueError, match="0000000001.jpg and .*0000000001.png are both the picture"):
        KITTIRaw(tmp_path, sequences=[NAME], **SIZE)


def test_a_16_bit_photograph_is_not_white(tmp_path):
    write_drive(tmp_path)
    path = tmp_path / f"2011_09_26/{NAME}_sync/image_02/data/0000000001.png"
    Image.fromarray(np.full((H, W), 100 * 257, np.uint16)).save(path)
    source = KITTIRaw(tmp_path, sequences=[NAME], sources="left", **SIZE)[1].source
    assert torch.allclose(source, torch.tensor(100 / 255), atol=1e-6)
