import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.mine.flowers import BASELINE, FOCAL, SPLITS, Flowers

ROWS, COLUMNS = 24, 54  # lenses
SIZE = {"height": 24, "width": 54}


def write_eslf(path, *, disparity=2.0, rows=ROWS, columns=COLUMNS, seed=0):
    """A plane with dots, ``disparity`` pixels between neighbouring views, as the plenoptic camera's decoder writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yy, xx = np.mgrid[:rows, :columns] + 0.5
    pixels = np.zeros((rows, 14, columns, 14, 3), np.uint8)
    for v in range(14):
        for u in range(14):
            x, y = columns / 2 - disparity * (u - 7), rows / 2 - disparity * (v - 7)
            dot = np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * 1.5**2))
            pixels[:, v, :, u] = (255 * (0.02 + 0.9 * dot))[..., None].clip(0, 255)
    Image.fromarray(pixels.reshape(rows * 14, columns * 14, 3)).save(path)
    return path


def peak(picture):
    weight = (picture[0] > 0.8 * picture[0].max()).float() * picture[0]
    y, x = (weight.sum(dim=1), weight.sum(dim=0))
    rows, columns = torch.arange(len(y)) + 0.5, torch.arange(len(x)) + 0.5
    return ((x * columns).sum() / x.sum()).item(), ((y * rows).sum() / y.sum()).item()


@pytest.mark.parametrize("focus", [0.0, 1.5])
def test_the_cameras_predict_how_a_plane_moves_between_views(tmp_path, focus):
    focal = FOCAL * COLUMNS / 540
    plane = 0.75 / (focal * BASELINE) + focus  # the disparity, 1 / z, that moves it by 0.75 pixels against a far focus
    write_eslf(tmp_path / "a_eslf.png", disparity=0.75)
    pairs = Flowers(tmp_path, files=["a_eslf.png"], focus_disparity=focus, random_target=False, **SIZE)
    assert len(pairs) == 4
    for i, (v, u) in enumerate([(0, 0), (0, 7), (7, 0), (7, 7)]):
        pair = pairs[i]
        assert pair.name == f"a_eslf/4_4->{v}_{u}" and pair.source_points is None
        x, y = peak(pair.source)
        ray = torch.linalg.inv(pair.K_source) @ torch.tensor([x, y, 1.0])
        projected = pair.K_target @ (pair.R @ (ray / plane) + pair.t)
        expected = (projected[:2] / projected[2]).tolist()
        assert peak(pair.target) == pytest.approx(expected, abs=0.15)
        assert abs(expected[0] - x) > 2 or u == 4


def test_cameras_are_those_that_mines_authors_publish(tmp_path):
    """Their file: per view (column_row) fx, fy, cx, cy in shares of the sides, and the pose. Only differences of cx, cy and t count."""
    first = "0.868056 1.250000 0.500000 0.500000 0.0 0.0 1.0 0.0 0.0 0.500000  0.0 1.0 0.0 0.500000  0.0 0.0 1.0 0.0"  # 0_0
    last = "0.868056 1.250000 0.512963 0.513333 0.0 0.0 1.0 0.0 0.0 0.491040  0.0 1.0 0.0 0.493600  0.0 0.0 1.0 0.0"  # 7_5
    tables = [[float(word) for word in line.split()] for line in (first, last)]
    write_eslf(tmp_path / "a.png", rows=75, columns=108)
    lights = Flowers(tmp_path, files=["a.png"], height=75, width=108)
    views = [lights._view(tmp_path / "a.png", row, column) for row, column in ((0, 0), (5, 7))]
    sides = torch.tensor([108.0, 75.0], dtype=torch.float64)
    for view, table in zip(views, tables):
        assert (view.K[[0, 1], [0, 1]] / sides).tolist() == pytest.approx(table[:2], abs=1e-5)
    slide = ((views[1].K - views[0].K)[:2, 2] / sides).tolist()
    assert slide == pytest.approx([tables[1][i] - tables[0][i] for i in (2, 3)], abs=2e-6)
    assert (views[1].t - views[0].t).tolist() == pytest.approx([tables[1][i] - tables[0][i] for i in (9, 13, 17)], abs=1e-6)


def test_published_lists_are_the_split(tmp_path):
    names = [f"imgs/{i:02d}_eslf.png" for i in range(30)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (COLUMNS * 14, ROWS * 14)).save(tmp_path / name)
    (tmp_path / "train.list").write_text("\n".join(names[:27]) + "\n")
    (tmp_path / "test.list").write_text("\n".join(names[27:]) + "\n")
    splits = {split: [str(path.relative_to(tmp_path)) for path in Flowers(tmp_path, split=split, **SIZE)._paths] for split in SPLITS}
    assert splits["test"] == names[27:] and splits["val"] == [names[0], names[25]]
    assert splits["train"] == [name for name in names[:27] if name not in splits["val"]]
    (tmp_path / "test.list").write_text("imgs/gone.png\n")
    with pytest.raises(FileNotFoundError, match="gone.png is missing"):
        Flowers(tmp_path, split="test", **SIZE)
    (tmp_path / "test.list").unlink()
    with pytest.raises(FileNotFoundError, match="test.list is missing: the published split is train.list and test.list"):
        Flowers(tmp_path, split="train", **SIZE)


def test_views_are_the_middle_ones_brightened(tmp_path):
    path = tmp_path / "a.png"
    pixels = np.zeros((ROWS, 14, COLUMNS, 14, 3), np.uint8)
    for v in range(14):
        for u in range(14):
            pixels[:, v, :, u] = (10 * v, 10 * u, 100)
    Image.fromarray(pixels.reshape(ROWS * 14, COLUMNS * 14, 3)).save(path)
    pair = Flowers(tmp_path, files=["a.png"], random_target=False, **SIZE)[3]
    for picture, place in ((pair.source, 4), (pair.target, 7)):
        expected = torch.tensor([10 * (place + 3), 10 * (place + 3), 100]) / 255
        torch.testing.assert_close(picture[:, 5, 5], expected**0.4)
    assert torch.equal(pair.R, torch.eye(3)) and pair.t.tolist() == pytest.approx([-3 * BASELINE, -3 * BASELINE, 0])


def test_training_pairs_are_drawn_among_all_views(tmp_path):
    write_eslf(tmp_path / "a.png")
    pairs = Flowers(tmp_path, files=["a.png"], **SIZE)
    assert len(pairs) == 1
    torch.manual_seed(1)
    names = [pairs[0].name for _ in range(30)]
    torch.manual_seed(1)
    assert names == [pairs[0].name for _ in range(30)] and len(set(names)) > 20
    for name in names:
        source, target = name.split("/")[1].split("->")
        assert source != target


def test_the_split_is_a_partition_that_does_not_depend_on_the_machine(tmp_path):
    for i in range(20):
        path = tmp_path / f"sub{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (COLUMNS * 14, ROWS * 14)).save(path)
    splits = [[path.stem for path in Flowers(tmp_path, split=split, **SIZE)._paths] for split in ("train", "val", "test")]
    assert [len(names) for names in splits] == [14, 3, 3]
    expected = sorted(path for path in tmp_path.rglob("*.png"))
    np.random.RandomState(0).shuffle(expected)
    assert sum(splits, []) == [path.stem for path in expected]


def test_missing_and_damaged_files_are_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        Flowers(tmp_path / "nowhere", **SIZE)
    with pytest.raises(FileNotFoundError, match="no light fields"):
        Flowers(tmp_path, **SIZE)
    with pytest.raises(FileNotFoundError, match="b.png is missing"):
        Flowers(tmp_path, files=["b.png"], **SIZE)
    path = write_eslf(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match="a.png: is unreadable or truncated"):
        Flowers(tmp_path, files=["a.png"], check="decode", **SIZE)
    with pytest.raises(ValueError, match="a.png: is unreadable or truncated"):
        Flowers(tmp_path, files=["a.png"], **SIZE)[0]
    Image.new("RGB", (COLUMNS * 14, ROWS * 14 + 1)).save(path)
    with pytest.raises(ValueError, match="a.png: 756x337 pixels"):
        Flowers(tmp_path, files=["a.png"], **SIZE)


@pytest.mark.parametrize("settings", [{"split": "all"}, {"fit": "pad"}, {"height": 2}])
def test_bad_settings_are_named(tmp_path, settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Flowers(tmp_path, **{**SIZE, **settings})


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "b/../../a.png"])
def test_light_fields_outside_of_the_root_are_refused(tmp_path, name):
    (tmp_path / "root").mkdir()
    with pytest.raises(ValueError, match="files: .*(leads out of|no path relative to)"):
        Flowers(tmp_path / "root", files=[name], **SIZE)
    for file in ("train.list", "test.list"):
        (tmp_path / "root" / file).write_text(f"{name}\n")
    with pytest.raises(ValueError, match="train.list: .*(leads out of|no path relative to)"):
        Flowers(tmp_path / "root", **SIZE)


def test_what_systems_leave_behind_is_no_light_field(tmp_path):
    write_eslf(tmp_path / "a.png")
    for name in ("._a.png", "__MACOSX/a.png", ".trash/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    sizes = {split: len(Flowers(tmp_path, split=split, random_target=True, **SIZE)) for split in ("train",)}
    assert sizes == {"train": 1}
