import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.mine.pictures import (
    Fit,
    check_rotation,
    check_settings,
    fit_size,
    numbers,
    picture_size,
    pictures_by_stem,
    pictures_in,
    text_lines,
)


def test_a_stretched_picture_keeps_linear_ramps_where_the_intrinsics_put_them():
    ramp = np.tile(np.linspace(10, 240, 80, dtype=np.float32), (60, 1))
    K = torch.tensor([[70.0, 0, 41], [0, 65, 29], [0, 0, 1]], dtype=torch.float64)
    fit = fit_size((60, 80), height=30, width=20)
    small, K_small = fit.picture(Image.fromarray(ramp, mode=None)), fit.intrinsics(K)
    assert small.shape == (1, 30, 20)
    for x in (4, 10, 15):  # where a point of a given direction lands, its value is the original's
        direction = (x + 0.5 - K_small[0, 2]) / K_small[0, 0]
        original = K[0, 0] * direction + K[0, 2] - 0.5
        assert small[0, 15, x].item() == pytest.approx(10 + 230 * original.item() / 79, abs=0.5)
    assert K_small.tolist() == [[17.5, 0, 10.25], [0, 32.5, 14.5], [0, 0, 1]]


def test_a_crop_takes_the_largest_centred_part_of_the_new_shape_and_keeps_square_pixels():
    fit = fit_size((100, 100), height=20, width=40, mode="crop")
    assert fit.box == (0.0, 25.0, 100.0, 75.0)
    K = torch.tensor([[90.0, 0, 50], [0, 90, 50], [0, 0, 1]])
    assert fit.intrinsics(K).tolist() == [[36, 0, 20], [0, 36, 10], [0, 0, 1]]
    picture = np.zeros((100, 100, 3), dtype=np.uint8)
    picture[40:60, 60:80] = 255  # its middle is (70, 50): in the result (28, 10)
    small = fit.picture(Image.fromarray(picture))
    y, x = (small[0] > 0.5).nonzero().float().mean(dim=0) + 0.5
    assert (x.item(), y.item()) == pytest.approx((28, 10), abs=0.1) and small.max() == 1


def test_nearest_takes_the_pixel_that_holds_the_new_pixels_centre():
    values = torch.arange(24.0).reshape(1, 4, 6)
    assert Fit((0.0, 0.0, 6.0, 4.0), 2, 3).nearest(values).tolist() == [[[7, 9, 11], [19, 21, 23]]]
    assert Fit((2.0, 1.0, 4.0, 3.0), 2, 2).nearest(values).tolist() == [[[8, 9], [14, 15]]]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_damaged_picture_is_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    assert picture_size(path) == picture_size(path, "decode") == (40, 50)
    path.write_bytes(path.read_bytes()[:-300])
    assert picture_size(path) == (40, 50)  # the header is whole
    with pytest.raises(ValueError, match=f"a.{suffix}: is unreadable or truncated"):
        picture_size(path, "decode")
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=f"a.{suffix}: is unreadable or truncated: no picture"):
        picture_size(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"a.{suffix} is missing"):
        picture_size(path)


def test_what_systems_leave_behind_is_no_picture_and_two_of_one_name_are_named(tmp_path):
    for name in ("b.jpg", "a.PNG", "._b.jpg", "Thumbs.db", "note.txt", ".c.png", "__MACOSX/d.jpg", "e/f.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in pictures_in(tmp_path)] == ["a.PNG", "b.jpg"]
    assert [path.name for path in pictures_in(tmp_path, deep=True)] == ["a.PNG", "b.jpg", "f.jpeg"]
    assert list(pictures_by_stem(tmp_path)) == ["a", "b"]
    (tmp_path / "b.png").touch()
    with pytest.raises(ValueError, match="b.jpg and .*b.png are both the picture b"):
        pictures_by_stem(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_are_read_with_and_without_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("é 1\n\n  b\n", encoding=encoding)
    assert text_lines(tmp_path / "a.txt") == ["é 1", "b"]
    (tmp_path / "a.txt").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match="a.txt: not a text file"):
        text_lines(tmp_path / "a.txt")


def test_bad_settings_and_numbers_are_named():
    for settings in ({"height": 4}, {"width": 0}, {"fit": "pad"}, {"check": "some"}, {"n_points": -1}):
        name, value = next(iter(settings.items()))
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            check_settings(**{"height": 8, "width": 8, "fit": "crop", **settings})
    assert numbers(["1", "-2e3"], "f, line 2") == [1.0, -2000.0]
    for word in ("x", "nan", "inf"):
        with pytest.raises(ValueError, match=f"f, line 2: '{word}' is not a finite number"):
            numbers(["1", word], "f, line 2")
    check_rotation(torch.eye(3), "f")
    for R in (2 * np.eye(3), np.diag([1, 1, -1]), np.full((3, 3), np.nan)):
        with pytest.raises(ValueError, match="f, line 1: no rotation"):
            check_rotation(R, "f, line 1")
