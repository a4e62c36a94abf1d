import numpy as np
import pytest
import torch

from co3d_ensemble.mine.point_cloud import read_ply_points, seen_points

POINTS = np.array([[0.5, -1.25, 3.0], [1.0, 2.0, 4.5], [-0.125, 0.0, 2.0]])


def write_ply(path, points, layout="binary_little_endian"):
    """As CO3Dv2's clouds: positions, normals and colours, and here a face list behind them."""
    header = f"ply\nformat {layout} 1.0\ncomment made by a test\nelement vertex {len(points)}\n"
    header += "".join(f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz"))
    header += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
    header += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    if layout == "ascii":
        body = "".join(f"{x} {y} {z} 0 0 1 10 20 30\n" for x, y, z in points).encode() + b"3 0 1 2\n"
    else:
        order = "<" if "little" in layout else ">"
        kind = np.dtype([("p", order + "f4", 6), ("c", "u1", 3)])
        rows = np.zeros(len(points), kind)
        rows["p"][:, :3], rows["p"][:, 5], rows["c"] = points, 1, (10, 20, 30)
        body = rows.tobytes() + b"\x03\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00"
    path.write_bytes(header.encode() + body)
    return path


@pytest.mark.parametrize("layout", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_vertices_of_a_ply_file(tmp_path, layout):
    assert read_ply_points(write_ply(tmp_path / "a.ply", POINTS, layout)).tolist() == POINTS.tolist()


@pytest.mark.parametrize("layout", ["ascii", "binary_little_endian"])
def test_a_damaged_ply_file_is_named(tmp_path, layout):
    path = write_ply(tmp_path / "a.ply", POINTS, layout)
    whole = path.read_bytes()
    body = whole.index(b"end_header\n") + len(b"end_header\n")
    for content, message in [
        (whole[: body + 20], "a.ply: .*expected 3"),
        (b"plyx" + whole, "a.ply: not a PLY"),
        (whole[:40], "a.ply: not a PLY"),
        (whole.replace(b"property float y", b"property float q"), "a.ply: vertices need"),
        (whole.replace(b"element vertex", b"element thing"), "a.ply: expected vertices first"),
        (whole.replace(b"element vertex 3", b"element vertex many"), "a.ply: expected vertices first, and their number"),
        (whole.replace(b"element vertex 3", b"element vertex"), "a.ply: expected vertices first, and their number"),
        (whole.replace(f"format {layout} 1.0".encode(), b"format"), "a.ply: expected vertices first"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_ply_points(path)
    write_ply(path, np.where(POINTS == 0, np.nan, POINTS), layout)
    with pytest.raises(ValueError, match="a.ply: expected 3 finite"):
        read_ply_points(path)
    with pytest.raises(FileNotFoundError, match="b.ply"):
        read_ply_points(tmp_path / "b.ply")


def test_points_behind_the_front_of_an_object_are_not_seen():
    grid = torch.cartesian_prod(torch.linspace(-1, 1, 60), torch.linspace(-1, 1, 60))
    front, back = (torch.cat((grid, torch.full((len(grid), 1), z)), dim=1) for z in (3.0, 4.0))
    beside = torch.tensor([[4.0, 0.0, 6.0]])
    K = torch.tensor([[20.0, 0, 20], [0, 20, 20], [0, 0, 1]])
    seen = seen_points(torch.cat((back, front, beside)), K, height=40, width=40)
    assert (seen[:, 2] == 3).sum() == len(front) and (seen[:, 2] == 6).sum() == 1 and not (seen[:, 2] == 4).any()
