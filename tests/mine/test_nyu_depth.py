import pickle

import h5py
import numpy as np
import pytest
import torch

from co3d_ensemble.mine.nyu_depth import NYUDepth

scipy_io = pytest.importorskip("scipy.io", reason="the extra [mine], scipy, is not installed")
SIZE = {"height": 24, "width": 32}
N = 4


def write_nyu(root, *, test=(2, 4), train=(1, 3)):
    """Four pictures as MATLAB's v7.3 files have them: HDF5, the axes of images (480, 640, 3, n) the other way round."""
    images, depths = np.zeros((480, 640, 3, N), np.uint8), np.zeros((480, 640, N), np.float32)
    rows, columns = np.mgrid[:480, :640]
    for i in range(N):
        images[..., 0, i], images[..., 1, i], images[..., 2, i] = rows // 2, columns // 3, 50 * i
        depths[..., i] = 1 + i + rows / 480 + columns / 6400
    raw = depths.copy()
    raw[200:220, 300:330] = 0
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        for name, values in (("images", images), ("depths", depths), ("rawDepths", raw)):
            file.create_dataset(name, data=values.T, compression="gzip", compression_opts=1, chunks=(1, *values.T.shape[1:]))
    scipy_io.savemat(root / "splits.mat", {"testNdxs": np.array(test)[:, None], "trainNdxs": np.array(train)[:, None]})
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_nyu(tmp_path_factory.mktemp("nyu"))


def test_pictures_and_depths_stand_upright_and_the_split_counts_from_one(root):
    pairs = NYUDepth(root, **SIZE)
    assert len(pairs) == 2 and pairs[1].name == "nyu_depth_v2/0004"
    pair = pairs[0]
    assert pair.source.shape == (3, 24, 32) and pair.source_depth.shape == (1, 480, 640)
    assert torch.equal(pair.source, pair.target) and torch.equal(pair.R, torch.eye(3)) and not pair.t.any()
    red, green, blue = pair.source * 255
    assert blue.mean().item() == pytest.approx(50, abs=0.5)  # picture 2
    assert red[20, 5] > red[3, 5] + 100 and green[5, 28] > green[5, 3] + 100  # rows run down, columns to the right
    assert pair.source_depth[0, 100, 500].item() == pytest.approx(2 + 100 / 480 + 500 / 6400)
    K = pair.K_source * torch.tensor([[20.0], [20], [1]])
    assert K[0].tolist() == pytest.approx([518.8579, 0, 325.0824], abs=1e-3)
    assert K[1].tolist() == pytest.approx([0, 519.4696, 253.2362], abs=1e-3)
    assert len(NYUDepth(root, split="train", **SIZE)) == 2


def test_only_eigens_crop_counts(root):
    known = NYUDepth(root, **SIZE)[0].source_depth[0] > 0
    assert known[45:471, 41:601].all() and known.sum() == (471 - 45) * (601 - 41)
    assert (NYUDepth(root, eigen_crop=False, **SIZE)[0].source_depth > 0).all()


def test_raw_depth_has_the_sensors_holes(root):
    raw = NYUDepth(root, depth="rawDepths", **SIZE)[0].source_depth[0]
    assert not raw[200:220, 300:330].any() and raw[199, 300] > 0


def test_a_data_set_travels_to_worker_processes(root):
    pairs = NYUDepth(root, **SIZE)
    copy = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(copy[1].source, pairs[1].source)


def test_missing_and_damaged_files_are_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="nyu_depth_v2_labeled.mat is missing"):
        NYUDepth(tmp_path, **SIZE)
    root = write_nyu(tmp_path)
    splits, labeled = root / "splits.mat", root / "nyu_depth_v2_labeled.mat"
    whole = splits.read_bytes()
    splits.unlink()
    with pytest.raises(FileNotFoundError, match="splits.mat is missing"):
        NYUDepth(root, **SIZE)
    for end in (10, 130, len(whole) - 20):
        splits.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="splits.mat"):
            NYUDepth(root, **SIZE)
    scipy_io.savemat(splits, {"trainNdxs": [1]})
    with pytest.raises(ValueError, match="splits.mat: no variable testNdxs"):
        NYUDepth(root, **SIZE)
    for indices in ([0, 1], [5]):
        scipy_io.savemat(splits, {"testNdxs": indices})
        with pytest.raises(ValueError, match="splits.mat: testNdxs must be indices from 1 to 4"):
            NYUDepth(root, **SIZE)
    content = labeled.read_bytes()
    labeled.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="nyu_depth_v2_labeled.mat: damaged"):
        NYUDepth(root, **SIZE)
    for name, shape, message in (
        ("pictures", (2, 3, 640, 480), "no variable images"),
        ("images", (2, 3, 480, 640), "images has the shape"),
    ):
        with h5py.File(labeled, "w") as file:
            file.create_dataset(name, shape, dtype="u1")
            file.create_dataset("depths", (2, 640, 480), dtype="f4")
        with pytest.raises(ValueError, match=f"nyu_depth_v2_labeled.mat: {message}"):
            NYUDepth(root, **SIZE)


@pytest.mark.parametrize("settings", [{"split": "val"}, {"depth": "filled"}, {"width": 0}])
def test_bad_settings_are_named(root, settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        NYUDepth(root, **{**SIZE, **settings})
