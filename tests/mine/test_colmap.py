import math
import struct

import pytest
import torch

from co3d_ensemble.functional.cameras import so3_exp
from co3d_ensemble.mine.colmap import ColmapCamera, read_colmap_model
from tests.mine.colmap_files import write_colmap

R = so3_exp(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)).numpy()
CAMERAS = {3: ("SIMPLE_RADIAL", 40, 30, [35.0, 20.5, 14.5, -0.1]), 7: ("PINHOLE", 20, 10, [21.0, 22.0, 10.0, 5.0])}
POINTS = {11: (1.0, 2.0, 3.0), 5: (-0.5, 0.25, 8.0), 900: (0.0, 0.0, 4.0)}
IMAGES = [
    (2, "b.jpg", 3, R, (0.1, 0.2, 0.3), [(1.5, 2.5, 11), (3.0, 4.0, -1), (7.0, 8.0, 900)]),
    (9, "a b.jpg", 7, torch.eye(3).numpy(), (0.0, 0.0, -1.0), []),
]


@pytest.mark.parametrize("binary", [True, False])
def test_both_formats_give_the_same_model(tmp_path, binary):
    model = read_colmap_model(write_colmap(tmp_path, CAMERAS, IMAGES, POINTS, binary=binary))
    assert [image.name for image in model.images] == ["a b.jpg", "b.jpg"]  # sorted by name
    empty, image = model.images
    assert (empty.camera_id, empty.point_ids, image.camera_id, image.point_ids) == (7, (), 3, (11, 900))
    torch.testing.assert_close(image.R, torch.from_numpy(R), atol=1e-12, rtol=0)
    assert image.t.tolist() == pytest.approx([0.1, 0.2, 0.3])
    camera = model.cameras[3]
    assert (camera.model, camera.width, camera.height) == ("SIMPLE_RADIAL", 40, 30)
    assert camera.K.tolist() == [[35, 0, 20.5], [0, 35, 14.5], [0, 0, 1]] and camera.distorts
    assert model.cameras[7].K.tolist() == [[21, 0, 10], [0, 22, 5], [0, 0, 1]] and not model.cameras[7].distorts
    expected = [[sum(R[i][j] * X[j] for j in range(3)) + (0.1, 0.2, 0.3)[i] for i in range(3)] for X in (POINTS[11], POINTS[900])]
    torch.testing.assert_close(model.points_of(image), torch.tensor(expected, dtype=torch.float64))
    assert model.points_of(empty).shape == (0, 3)


def test_distortion_matches_opencvs_formula_written_out_for_every_model():
    values = {"k1": -0.2, "k2": 0.05, "k3": 0.01, "k4": 0.02, "k5": -0.03, "k6": 0.004, "p1": 0.003, "p2": -0.002}
    for names in ((), ("k1",), ("k1", "k2"), ("k1", "k2", "p1", "p2"), tuple(values)):
        chosen = {name: values[name] for name in names}
        camera = ColmapCamera("m", 30, 40, {"fx": 35.0, "fy": 33.0, "cx": 20.0, "cy": 15.0, **chosen})
        for u, v in [(2.5, 3.5), (38.0, 28.0), (20.0, 15.0)]:
            k = {name: chosen.get(name, 0.0) for name in values}
            x, y = (u - 20) / 35, (v - 15) / 33
            r = math.hypot(x, y)
            scale = (1 + k["k1"] * r**2 + k["k2"] * r**4 + k["k3"] * r**6) / (1 + k["k4"] * r**2 + k["k5"] * r**4 + k["k6"] * r**6)
            moved = (
                x * scale + 2 * k["p1"] * x * y + k["p2"] * (r**2 + 2 * x**2),
                y * scale + k["p1"] * (r**2 + 2 * y**2) + 2 * k["p2"] * x * y,
            )
            found = camera.distorted(torch.tensor([u, v], dtype=torch.float64)).tolist()
            assert found == pytest.approx([35 * moved[0] + 20, 33 * moved[1] + 15], abs=1e-12)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_a_missing_or_truncated_file_is_named(tmp_path, binary, name):
    folder = write_colmap(tmp_path, CAMERAS, IMAGES, POINTS, binary=binary)
    path = folder / f"{name}.{'bin' if binary else 'txt'}"
    whole = path.read_bytes()
    line = whole.rstrip().rindex(b"\n", 0, -30) + 1 if not binary else 0  # of an image: the one with its pose
    path.write_bytes(whole[: len(whole) - 25] if binary else whole[: line + 10])
    with pytest.raises(ValueError, match=path.name):
        read_colmap_model(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        read_colmap_model(folder)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("cameras", "7 PINHOLE", "7 OPENCV_FISHEYE", "cameras.txt, line 4: camera model OPENCV_FISHEYE is not supported"),
        ("cameras", "21.0 22.0", "21.0", "cameras.txt, line 4: PINHOLE needs"),
        ("cameras", "21.0", "nan", "cameras.txt, line 4: 'nan' is not a finite number"),
        ("cameras", "35.0", "-35.0", "cameras.txt, line 3: SIMPLE_RADIAL needs"),
        ("cameras", "22.0", "-22.0", "cameras.txt, line 4: PINHOLE needs"),
        ("images", "1.5 2.5 11", "1.5 11", "images.txt, line 3: expected X Y POINT3D_ID"),
        ("images", "0.1 0.2 0.3 3", "inf 0.2 0.3 3", "images.txt, line 2: 'inf'"),
        ("images", "0.1 0.2 0.3 3", "0.1 0.2 0.3 4", "images.txt: image b.jpg has camera 4, which .*cameras.txt lacks"),
        ("images", "1.5 2.5 11", "1.5 2.5 12", "images.txt: image b.jpg sees point 12, which .*points3D.txt lacks"),
        ("images", "1.0 0.0 0.0 0.0", "0.5 0.0 0.0 0.0", "images.txt, line 4: the pose of image a b.jpg"),
        ("points3D", "8.0", "eight", "points3D.txt, line 3: 'eight'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, name, old, new, message):
    folder = write_colmap(tmp_path, CAMERAS, IMAGES, POINTS, binary=False)
    path = folder / f"{name}.txt"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_colmap_model(folder)


@pytest.mark.parametrize("parameters", [[math.nan, 22.0, 10.0, 5.0], [21.0, 0.0, 10.0, 5.0], [21.0, 22.0, math.inf, 5.0]])
def test_a_camera_of_a_binary_file_that_is_none_is_named(tmp_path, parameters):
    folder = write_colmap(tmp_path, {1: ("PINHOLE", 20, 10, parameters)}, [], {}, binary=True)
    with pytest.raises(ValueError, match="cameras.bin: camera 1: PINHOLE needs"):
        read_colmap_model(folder)


@pytest.mark.parametrize(("number", "name"), [(5, "OPENCV_FISHEYE"), (11, "RAD_TAN_THIN_PRISM_FISHEYE"), (17, "EQUIRECTANGULAR")])
def test_camera_models_that_are_not_supported_are_named_and_not_numbered(tmp_path, number, name):
    (tmp_path / "images.bin").write_bytes(bytes(8))
    (tmp_path / "points3D.bin").write_bytes(bytes(8))
    (tmp_path / "cameras.bin").write_bytes(struct.pack("<QiiQQ", 1, 7, number, 4, 4) + bytes(64))
    with pytest.raises(ValueError, match=f"cameras.bin: camera 7: camera model {name} is not supported; supported are SIMPLE_PINHOLE"):
        read_colmap_model(tmp_path)
    (tmp_path / "cameras.bin").write_bytes(struct.pack("<QiiQQ", 1, 7, 99, 4, 4))
    with pytest.raises(ValueError, match="camera model number 99, which is none of COLMAP's known ones"):
        read_colmap_model(tmp_path)


def test_a_text_model_with_byte_order_marks_is_read(tmp_path):
    folder = write_colmap(tmp_path, {1: ("PINHOLE", 20, 10, [9.0, 9.0, 10.0, 5.0])}, [], {}, binary=False)
    for path in folder.iterdir():
        path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("#")), encoding="utf-8-sig")
    assert read_colmap_model(folder).cameras[1].K[0, 0] == 9
