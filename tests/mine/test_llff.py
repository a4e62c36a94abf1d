import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.functional.cameras import so3_exp
from co3d_ensemble.mine.llff import LLFF
from tests.mine.colmap_files import write_colmap

W, H = 120, 90
SIZE = {"height": 45, "width": 60}
PARAMETERS = {"SIMPLE_PINHOLE": [100.0, 60.0, 45.0], "RADIAL": [100.0, 61.0, 44.0, -0.15, 0.02], "SIMPLE_RADIAL": [100.0, 60.0, 45.0, 0.1]}


def distort(x, y, parameters):
    k1, k2 = (*parameters[3:], 0.0, 0.0)[:2]
    r2 = x * x + y * y
    return x * (1 + k1 * r2 + k2 * r2**2), y * (1 + k1 * r2 + k2 * r2**2)


def write_scene(root, name="fern", n=10, model="SIMPLE_PINHOLE", *, binary=True, folder="images", size=(W, H), suffix="JPG", names=None):
    """Photographs of bright dots in space on dark ground, drawn where the lens puts them, and their COLMAP model."""
    points = {10 + i: xyz for i, xyz in enumerate([(-1.0, -0.7, 4.0), (1.1, 0.8, 5.0), (0.1, 0.0, 4.5), (1.6, -1.1, 5.5)])}
    f, cx, cy = PARAMETERS[model][:3]
    images = []
    (root / name / folder).mkdir(parents=True, exist_ok=True)
    yy, xx = np.mgrid[:H, :W] + 0.5
    for i in range(n):
        R, t = so3_exp(torch.tensor([0.0, 0.01 * i, 0.0], dtype=torch.float64)).numpy(), np.array([-0.05 * i, 0.0, 0.0])
        picture, features = np.full((H, W), 0.0), []
        for key, X in points.items():
            x, y, z = R @ X + t
            u, v = distort(x / z, y / z, PARAMETERS[model])
            u, v = f * u + cx, f * v + cy
            features.append((u, v, key))
            picture += np.exp(-((xx - u) ** 2 + (yy - v) ** 2) / (2 * 2.5**2))
        file = names[i] if names else f"IMG_{i:02d}.{suffix}"
        image = Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).convert("RGB").resize(size)
        image.save(root / name / folder / file, **({"quality": 95} if file.lower().endswith("jpg") else {}))
        images.append((i + 1, f"IMG_{i:02d}.JPG", 1, R, t, [*features, (1.0, 1.0, -1)]))
    write_colmap(root / name / "sparse" / "0", {1: (model, W, H, PARAMETERS[model])}, images, points, binary=binary)
    return root


def peak(picture, x, y):
    """Centre of brightness around a pixel position."""
    row, column = int(y), int(x)
    part = picture[0, row - 3 : row + 4, column - 3 : column + 4]
    ys, xs = torch.meshgrid(torch.arange(row - 3, row + 4) + 0.5, torch.arange(column - 3, column + 4) + 0.5, indexing="ij")
    return ((part * xs).sum() / part.sum()).item(), ((part * ys).sum() / part.sum()).item()


@pytest.mark.parametrize("model", PARAMETERS)
@pytest.mark.parametrize("binary", [True, False])
def test_dots_in_the_undistorted_picture_stand_where_the_sparse_points_say(tmp_path, model, binary):
    pairs = LLFF(write_scene(tmp_path, n=3, model=model, binary=binary), n_points=8, random_target=False, **SIZE)
    checked = 0
    for i in range(len(pairs)):
        pair = pairs[i]
        for picture, points in ((pair.source, pair.source_points), (pair.target, pair.target_points)):
            for x, y, z in points[points[:, 2] > 0].tolist():
                if 4 < x < 56 and 4 < y < 41:
                    assert peak(picture, x, y) == pytest.approx((x, y), abs=0.12) and 3.5 < z < 6
                    checked += 1
    assert checked >= 12


def test_without_undistortion_the_same_dots_would_be_pixels_away(tmp_path):
    pairs = LLFF(write_scene(tmp_path, n=3, model="RADIAL"), n_points=8, **SIZE)
    camera = pairs._models[0].cameras[1]
    corner = torch.tensor([5.0, 5.0], dtype=torch.float64)
    assert (camera.distorted(corner) - corner).norm() > 4  # what the test above would miss by


@pytest.mark.parametrize("model", ["RADIAL", "SIMPLE_RADIAL"])
def test_the_undistorted_picture_shows_nothing_from_outside_the_photograph(tmp_path, model):
    pairs = LLFF(write_scene(tmp_path, n=3, model=model), **SIZE)
    camera, K = pairs._models[0].cameras[1], pairs[0].K_source.double()
    corners = torch.tensor([[0.0, 0, 1], [60, 0, 1], [0, 45, 1], [60, 45, 1]], dtype=torch.float64) @ torch.linalg.inv(K).T @ camera.K.T
    lens = camera.distorted(corners[:, :2])
    assert (lens >= -0.01).all() and (lens <= torch.tensor([W, H]) + 0.01).all()
    whole = K[0, 0].item() / (100.0 * 60 / W)  # how much it had to be enlarged for it
    assert (1 < whole < 1.3) if model == "SIMPLE_RADIAL" else whole == pytest.approx(1, abs=0.02)


def test_poses_are_the_models(tmp_path):
    pair = LLFF(write_scene(tmp_path, n=4), n_points=0, n_neighbours=1, random_target=False, **SIZE)[0]
    assert pair.name == "fern/IMG_01->IMG_02" and pair.source_points is None
    R, t = so3_exp(torch.tensor([0.0, 0.01, 0.0], dtype=torch.float64)), torch.tensor([-0.05, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(pair.R, R.float())
    torch.testing.assert_close(pair.t, (2 * t - R @ t).float())
    assert pair.K_source.tolist() == [[50, 0, 30], [0, 50, 22.5], [0, 0, 1]]


def test_every_eighth_photograph_is_held_out(tmp_path):
    root = write_scene(tmp_path, n=10)
    train, val = LLFF(root, **SIZE), LLFF(root, split="val", **SIZE)
    assert [source for (_, source), _ in train._pairs] == [1, 2, 3, 4, 5, 6, 7, 9]
    assert all(target not in (0, 8) and target != source for (_, source), targets in train._pairs for _, target in targets)
    assert [source for (_, source), _ in val._pairs] == [0, 8]
    assert [target for _, target in val._pairs[0][1]] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_reduced_copies_are_taken_by_name_or_by_order(tmp_path):
    for i, names in enumerate((None, [f"image{i:03d}.png" for i in range(4)])):
        root = write_scene(tmp_path / str(i), n=4, folder="images_2", size=(W // 2, H // 2), suffix="png", names=names)
        pair = LLFF(root, images="images_2", n_points=8, random_target=False, **SIZE)[0]
        assert pair.K_source.tolist() == [[50, 0, 30], [0, 50, 22.5], [0, 0, 1]]
        x, y, _ = pair.source_points[pair.source_points[:, 2] > 0][0].tolist()
        assert peak(pair.source, x, y) == pytest.approx((x, y), abs=0.25)


def test_scenes_are_all_that_have_a_model_or_those_named(tmp_path):
    for name in ("fern", "room"):
        write_scene(tmp_path, name, n=4)
    (tmp_path / "notes").mkdir()
    assert {LLFF(tmp_path, **SIZE)[i].name.split("/")[0] for i in (0, 5)} == {"fern", "room"}
    assert len(LLFF(tmp_path, scenes=["room"], **SIZE)) == 3
    with pytest.raises(FileNotFoundError, match="trex is missing: expected the folder of scene trex"):
        LLFF(tmp_path, scenes=["trex"], **SIZE)


def test_missing_and_damaged_files_are_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        LLFF(tmp_path / "nowhere", **SIZE)
    with pytest.raises(FileNotFoundError, match="no scene in it has a COLMAP model"):
        LLFF(tmp_path, **SIZE)
    root = write_scene(tmp_path, n=4)
    with pytest.raises(FileNotFoundError, match="images_8 is missing"):
        LLFF(root, images="images_8", **SIZE)
    picture = root / "fern/images/IMG_02.JPG"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="IMG_02.JPG: is unreadable or truncated"):
        LLFF(root, check="decode", **SIZE)
    Image.new("RGB", (W, H - 9)).save(picture)
    with pytest.raises(ValueError, match="IMG_02.JPG: is 120x81 .*no reduced copy of the 120x90"):
        LLFF(root, **SIZE)
    picture.unlink()
    with pytest.raises(FileNotFoundError, match="IMG_02.JPG is missing: .* has 4 images, the folder 3"):
        LLFF(root, **SIZE)
    picture.write_bytes(whole)
    points = root / "fern/sparse/0/points3D.bin"
    points.write_bytes(points.read_bytes()[:-4])
    with pytest.raises(ValueError, match="points3D.bin: truncated"):
        LLFF(root, **SIZE)


@pytest.mark.parametrize("settings", [{"split": "test"}, {"n_neighbours": 0}, {"width": 3}])
def test_bad_settings_are_named(tmp_path, settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        LLFF(tmp_path, **{**SIZE, **settings})


def test_a_model_without_points_is_named_where_points_are_wanted(tmp_path):
    root = write_scene(tmp_path, n=3, binary=False)
    images = root / "fern/sparse/0/images.txt"
    images.write_text("\n".join(line if "IMG" in line else "" for line in images.read_text().splitlines()))
    with pytest.raises(ValueError, match="fern/sparse/0: none of its images sees a point; n_points=0"):
        LLFF(root, n_points=8, **SIZE)
    assert LLFF(root, n_points=0, **SIZE)[0].source_points is None


def test_one_photograph_is_no_pair(tmp_path):
    with pytest.raises(ValueError, match="no scene has two photographs for split='train'"):
        LLFF(write_scene(tmp_path, n=2), **SIZE)


def test_masks_beside_the_photographs_are_not_taken_for_them(tmp_path):
    """images/ has IMG_00.JPG and its mask IMG_00.png; the model names IMG_00.JPG."""
    root = write_scene(tmp_path, n=4)
    expected = LLFF(root, random_target=False, **SIZE)[0]
    for path in list((root / "fern/images").iterdir()):
        Image.new("L", (W, H), 255).save(path.with_suffix(".png"))
    pair = LLFF(root, random_target=False, **SIZE)[0]
    assert torch.equal(pair.source, expected.source) and torch.equal(pair.target, expected.target)
    (root / "fern/images/IMG_01.JPG").unlink()
    with pytest.raises(ValueError, match="IMG_01.JPG is missing, and .*IMG_01.png is gray, as masks are"):
        LLFF(root, **SIZE)
    Image.new("RGB", (W, H)).save(root / "fern/images/IMG_01.jpeg")
    with pytest.raises(ValueError, match="IMG_01.JPG is missing, and both .*IMG_01.jpeg and .*IMG_01.png could be the image IMG_01.JPG of"):
        LLFF(root, **SIZE)


def renamed_images(root, names, model="0"):
    """The text model's images get other names."""
    path = root / "fern/sparse" / model / "images.txt"
    text = path.read_text()
    for i, name in enumerate(names):
        text = text.replace(f" IMG_{i:02d}.JPG\n", f" {name}\n")
    path.write_text(text)


def test_names_with_folders_are_found_as_they_are(tmp_path):
    root = write_scene(tmp_path, n=4, binary=False, names=[f"IMG_{i:02d}.JPG" for i in range(4)])
    images = root / "fern/images"
    names = ["a/0001.JPG", "a/0002.JPG", "b c/0001.JPG", "b c/0002.JPG"]
    expected = [path.read_bytes() for path in sorted(images.iterdir())]
    for old, name in zip(sorted(images.iterdir()), names):
        (images / name).parent.mkdir(exist_ok=True)
        old.rename(images / name)
    renamed_images(root, names)
    pairs = LLFF(root, n_points=0, **SIZE)
    assert [path.read_bytes() for path in pairs._paths[0]] == expected
    assert pairs[0].name.startswith("fern/a/0002->")
    for path in list(images.rglob("*.JPG")):  # a reduced copy in another format
        path.rename(path.with_suffix(".jpeg"))
    assert [path.read_bytes() for path in LLFF(root, n_points=0, **SIZE)._paths[0]] == expected


@pytest.mark.parametrize("name", ["../../secret.JPG", "/etc/secret.JPG"])
def test_image_names_that_leave_the_folder_are_refused_and_links_are_not(tmp_path, name):
    root = write_scene(tmp_path, n=3, binary=False)
    (tmp_path / "elsewhere").mkdir()
    photo = root / "fern/images/IMG_02.JPG"
    photo.rename(tmp_path / "elsewhere/photo.JPG")
    photo.symlink_to(tmp_path / "elsewhere/photo.JPG")
    assert len(LLFF(root, n_points=0, **SIZE)) == 2
    renamed_images(root, ["IMG_00.JPG", "IMG_01.JPG", name])
    with pytest.raises(ValueError, match="sparse/0: image name '.*secret.JPG' (leads out of|is no path relative to)"):
        LLFF(root, n_points=0, **SIZE)
    with pytest.raises(ValueError, match="leads out of"):
        LLFF(root, scenes=["../fern"], **SIZE)


def test_two_images_on_one_photograph_are_named(tmp_path):
    root = write_scene(tmp_path, n=3, binary=False)
    renamed_images(root, ["IMG_00.JPG", "IMG_01.JPG", "IMG_01.png"])
    (root / "fern/images/IMG_02.JPG").unlink()
    with pytest.raises(ValueError, match="IMG_01.JPG: .*sparse/0 has two images for it, IMG_01.JPG and IMG_01.png"):
        LLFF(root, n_points=0, **SIZE)


def test_of_several_models_the_one_with_most_images_is_taken_and_it_is_said(tmp_path, caplog):
    root = write_scene(tmp_path, n=10)
    sparse = root / "fern/sparse"
    (sparse / "0").rename(sparse / "1")
    write_scene(tmp_path / "other", n=3)
    (tmp_path / "other/fern/sparse/0").rename(sparse / "0")
    for name in ("IMG_98.JPG", "IMG_99.JPG", "._IMG_00.JPG"):
        Image.new("RGB", (W, H)).save(root / "fern/images" / name, "JPEG")
    with caplog.at_level("WARNING"):
        pairs = LLFF(root, **SIZE)
    assert pairs._models[0].path == sparse / "1" and len(pairs) == 8
    assert f"{root}/fern: of 2 COLMAP models the one with most images is taken, sparse/1 with 10; " in caplog.text
    assert "of 12 photographs in images, 2 are in no model" in caplog.text


def test_a_turned_photograph_follows_the_models_size(tmp_path):
    root = write_scene(tmp_path, n=3)
    expected = LLFF(root, random_target=False, n_points=0, **SIZE)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "fern/images/IMG_01.JPG"
    with Image.open(path) as photo:
        photo.load()
    photo.save(path, quality=98, exif=exif)  # the model is of the stored pixels
    assert (LLFF(root, random_target=False, n_points=0, **SIZE)[0].source - expected.source).abs().max() < 0.1
    photo.transpose(Image.Transpose.ROTATE_90).save(path, quality=98, exif=exif)  # of the turned ones
    assert (LLFF(root, random_target=False, n_points=0, **SIZE)[0].source - expected.source).abs().max() < 0.1
    exif[0x0112] = 3
    photo.save(path, exif=exif)
    with pytest.raises(ValueError, match="IMG_01.JPG: is turned by EXIF"):
        LLFF(root, **SIZE)
