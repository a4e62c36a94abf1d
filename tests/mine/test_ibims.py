import builtins

import numpy as np
import pytest
import torch

from co3d_ensemble.mine.ibims import IBims

scipy_io = pytest.importorskip("scipy.io", reason="the extra [mine], scipy, is not installed")
SIZE = {"height": 24, "width": 32}
H, W = 48, 64


def content(**changes):
    """The struct's fields as the data set has them; calib is MATLAB's transposed matrix."""
    rows, columns = np.mgrid[:H, :W]
    rgb = np.stack((4 * rows, 3 * columns, np.full((H, W), 90)), axis=2).astype(np.uint8)
    depth = 1 + rows / H + columns / 640
    depth[5, 6] = 0
    invalid, transparent = np.ones((H, W), np.uint8), np.ones((H, W), np.uint8)
    invalid[10:14], transparent[:, 50:55] = 0, 0
    calib = np.array([[55.0, 0, 0], [0, 56, 0], [32.5, 24.5, 1]])
    fields = {"rgb": rgb, "depth": depth, "edges": np.zeros((H, W), np.uint8), "calib": calib}
    fields |= {"mask_invalid": invalid, "mask_transp": transparent, "mask_wall": np.zeros((H, W)), "mask_wall_paras": np.zeros((0, 0))}
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def write_ibims(root, names=("corridor_01", "office_02"), folder="", **changes):
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        scipy_io.savemat(root / folder / f"{name}.mat", {"data": content(**changes)})
    (root / "imagelist.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.mark.parametrize("folder", ["", "gt_depth", "ibims1_core_mat"])
def test_depth_counts_where_the_scan_and_both_masks_allow_it(tmp_path, folder):
    pairs = IBims(write_ibims(tmp_path, folder=folder), check="decode", **SIZE)
    assert len(pairs) == 2
    pair = pairs[1]
    assert pair.name == "ibims1/office_02" and pair.source_depth.shape == (1, H, W) and pair.source.shape == (3, 24, 32)
    expected = np.ones((H, W), bool)
    expected[5, 6] = expected[10:14] = expected[:, 50:55] = False
    assert np.array_equal((pair.source_depth[0] > 0).numpy(), expected)
    assert pair.source_depth[0, 20, 30].item() == pytest.approx(1 + 20 / H + 30 / 640)
    assert torch.equal(pair.source, pair.target) and torch.equal(pair.R, torch.eye(3)) and not pair.t.any()
    assert pair.source[0, 20, 4] > pair.source[0, 2, 4] and pair.source[1, 4, 28] > pair.source[1, 4, 2]
    assert pair.K_source.tolist() == [[27.5, 0, 16], [0, 28, 12], [0, 0, 1]]  # centres counted from 1 in the file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": None}, "data has no depth"),
        ({"mask_transp": None, "calib": None}, "data has no calib, mask_transp"),
        ({"mask_invalid": np.ones((H, W - 1))}, r"mask_invalid has the shape \(48, 63\)"),
        ({"rgb": np.zeros((H, W), np.uint8)}, "rgb has the shape"),
        ({"rgb": np.zeros((H, W, 3))}, "rgb is float64, expected uint8"),
        ({"calib": np.array([[55.0, 0, 32], [0, 56, 24], [0, 0, 1]])}, "calib is no transposed matrix"),
        ({"calib": np.full((3, 3), np.nan)}, "calib is no transposed matrix"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, changes, message):
    pairs = IBims(write_ibims(tmp_path, names=["a"], **changes), **SIZE)
    with pytest.raises(ValueError, match=f"a.mat: {message}"):
        pairs[0]
    with pytest.raises(ValueError, match=f"a.mat: {message}"):
        IBims(tmp_path, check="decode", **SIZE)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="imagelist.txt is missing"):
        IBims(tmp_path, **SIZE)
    root = write_ibims(tmp_path)
    path = root / "office_02.mat"
    whole = path.read_bytes()
    for end in (0, 60, 140, 300, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="office_02.mat"):
            IBims(root, **SIZE)[1]
    scipy_io.savemat(path, {"other": [1]})
    with pytest.raises(ValueError, match="office_02.mat: no struct data"):
        IBims(root, **SIZE)[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match="office_02.mat is missing"):
        IBims(root, **SIZE)
    (root / "imagelist.txt").write_text("\n")
    with pytest.raises(ValueError, match="imagelist.txt: empty"):
        IBims(root, **SIZE)
    (root / "imagelist.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="imagelist.txt: not a text file"):
        IBims(root, **SIZE)


def test_without_scipy_the_extra_is_named(tmp_path, monkeypatch):
    root, real = write_ibims(tmp_path), builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.split(".")[0] == "scipy":
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(RuntimeError, match=r"needs scipy.*co3d_ensemble\[mine\]"):
        IBims(root, **SIZE)[0]
