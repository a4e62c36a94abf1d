"""Photographs of all kinds become the same picture with the camera that belongs to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from co3d_ensemble.mine.photo import DEFAULT_FOV, load_photo

WIDTH, HEIGHT = 60, 40


def ramp(width=WIDTH, height=HEIGHT):
    """Red grows to the right, green downwards: a picture whose pixels tell where they are from."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.stack((255 * x, 255 * y, np.zeros_like(x)), -1).round().astype(np.uint8))


def saved(path, picture=None, **options):
    (picture or ramp()).save(path, **options)
    return path


def field_of_view(photo):
    return math.degrees(2 * math.atan(photo.image.shape[2] / 2 / photo.K[0, 0].item()))


def test_the_given_field_of_view_is_that_of_the_whole_width(tmp_path):
    photo = load_photo(saved(tmp_path / "a.png"), height=32, width=48, fov=60.0)
    assert photo.image.shape == (3, 32, 48) and photo.original_size == (HEIGHT, WIDTH)
    assert field_of_view(photo) == pytest.approx(60.0)
    assert photo.K[0, 0] == pytest.approx(photo.K[1, 1]) and photo.K[:2, 2].tolist() == [24, 16]
    assert photo.image.min() >= 0 and photo.image.max() <= 1


def test_a_crop_takes_the_centre_and_narrows_the_field_of_view(tmp_path):
    photo = load_photo(saved(tmp_path / "a.png"), height=32, width=32, fov=60.0, fit="crop")
    assert photo.image.shape == (3, 32, 32)
    cut = 2 * math.degrees(math.atan(math.tan(math.radians(30)) * HEIGHT / WIDTH))
    assert field_of_view(photo) == pytest.approx(cut) and photo.K[0, 0] == pytest.approx(photo.K[1, 1])
    assert photo.K[:2, 2].tolist() == [16, 16]
    assert photo.image[0].min() > 0.15 and photo.image[0].max() < 0.85  # a sixth of the width is gone on either side
    assert photo.image[1].min() < 0.05 and photo.image[1].max() > 0.95


def test_the_whole_photograph_keeps_its_aspect_at_the_networks_number_of_pixels(tmp_path):
    photo = load_photo(saved(tmp_path / "a.png", ramp(90, 160)), height=32, width=48, fov=50.0)
    height, width = photo.image.shape[1:]
    assert height > width and height % 8 == width % 8 == 0
    assert height * width == pytest.approx(32 * 48, rel=0.3) and height / width == pytest.approx(16 / 9, rel=0.2)
    assert field_of_view(photo) == pytest.approx(50.0)
    assert photo.image[:2].amin(dim=(1, 2)).max() < 0.06 and photo.image[:2].amax(dim=(1, 2)).min() > 0.94  # nothing is cut off


def test_a_stretched_photograph_keeps_its_geometry_by_unequal_focal_lengths(tmp_path):
    photo = load_photo(saved(tmp_path / "a.png"), height=64, width=48, fov=60.0, fit="stretch")
    assert photo.image.shape == (3, 64, 48) and field_of_view(photo) == pytest.approx(60.0)
    vertical = 2 * math.degrees(math.atan(math.tan(math.radians(30)) * HEIGHT / WIDTH))
    assert math.degrees(2 * math.atan(32 / photo.K[1, 1].item())) == pytest.approx(vertical)


def test_exif_turns_the_photograph_upright_and_tells_its_field_of_view(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = 26
    photo = load_photo(saved(tmp_path / "a.jpg", exif=exif, quality=95), height=48, width=32)
    assert photo.original_size == (WIDTH, HEIGHT)
    assert photo.image[0, 0].mean() < 0.1 and photo.image[0, -1].mean() > 0.9  # red, once to the right, now grows downwards
    assert photo.image[1, :, 0].mean() > 0.9 and photo.image[1, :, -1].mean() < 0.1
    focal = 26 / math.hypot(36, 24) * math.hypot(WIDTH, HEIGHT)
    assert photo.fov_source == "EXIF" and photo.fov == pytest.approx(2 * math.degrees(math.atan(HEIGHT / 2 / focal)))
    assert load_photo(tmp_path / "a.jpg", height=48, width=32, fov=33.0).fov == 33.0


def test_without_any_hint_the_field_of_view_is_assumed_and_said(tmp_path, caplog):
    photo = load_photo(saved(tmp_path / "a.png"), height=32, width=48)
    assert (photo.fov, photo.fov_source) == (DEFAULT_FOV, "default")
    assert "60 degrees are assumed" in caplog.text


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    gray = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    expected = load_photo(saved(tmp_path / "rgb.png", Image.fromarray(np.stack([gray] * 3, -1))), height=32, width=48, fov=60.0).image
    kinds = {
        "L.png": Image.fromarray(gray),
        "I16.png": Image.fromarray(gray.astype(np.uint16) * 257),
        "P.png": Image.fromarray(gray).convert("P"),
        "LA.png": Image.fromarray(np.stack((gray, np.full_like(gray, 255)), -1)),
        "CMYK.jpg": Image.fromarray(np.stack([gray] * 3, -1)).convert("CMYK"),
    }
    for name, picture in kinds.items():
        image = load_photo(saved(tmp_path / name, picture), height=32, width=48, fov=60.0).image
        assert image.shape == (3, 32, 48) and (image - expected).abs().max() < 0.03, name


@pytest.mark.parametrize("background", [1.0, 0.0])
def test_what_is_transparent_shows_the_background_whatever_its_hidden_colour(tmp_path, background):
    pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    pixels[:, :30] = (255, 0, 0, 255)
    pixels[:, 30:] = (7, 99, 200, 0)
    photo = load_photo(saved(tmp_path / "a.png", Image.fromarray(pixels)), height=32, width=48, fov=60.0, background=background)
    assert torch.allclose(photo.image[:, :, 40], torch.tensor(background), atol=1e-3)
    assert torch.allclose(photo.image[:, :, 5], torch.tensor([[1.0], [0.0], [0.0]]), atol=1e-3)


def test_a_file_that_is_no_picture_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jpg is missing"):
        load_photo(tmp_path / "nowhere.jpg", height=32, width=48)
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match="text.jpg: is unreadable or truncated: no picture"):
        load_photo(tmp_path / "text.jpg", height=32, width=48)
    cut = saved(tmp_path / "cut.jpg", ramp(600, 400))
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cut.jpg: is unreadable or truncated"):
        load_photo(cut, height=32, width=48)
    with pytest.raises(ValueError, match="tiny.png: 8 x 40 pixels"):
        load_photo(saved(tmp_path / "tiny.png", ramp(8, 40)), height=32, width=48)


@pytest.mark.parametrize(("setting", "value"), [("fov", 0.0), ("fov", 180.0), ("fit", "squeeze")])
def test_a_wrong_setting_is_named(tmp_path, setting, value):
    with pytest.raises(ValueError, match=f"{setting}="):
        load_photo(saved(tmp_path / "a.png"), height=32, width=48, **{setting: value})
