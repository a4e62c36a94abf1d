"""Pictures of all modes become what they show, or are refused by name; what a header tells is checked before pixels are decoded."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from co3d_ensemble.base.pictures import (
    MAX_PIXELS,
    TURNS,
    PictureError,
    exactly,
    photo_size,
    read_depth,
    read_depth_mask,
    read_header,
    read_mask,
    read_photo,
    read_rgba,
)
from co3d_ensemble.base.png import SIGNATURE, png_chunk

HEIGHT, WIDTH = 24, 36
GRAY = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).round().astype(np.uint8)
COLOR = np.stack((GRAY, GRAY[::-1], GRAY[:, ::-1]), -1)
OPAQUE = np.full_like(GRAY, 255)


def saved(path, picture, **options):
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(path, **options)
    return path


def png_of_16_bits(color_type, pixels):
    """PNG bytes of uint16 ``pixels`` (H, W, C), which Pillow writes for gray only."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def turned(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


PHOTOS = {
    "rgb.png": (COLOR, COLOR, 0),
    "rgb.jpg": (COLOR, COLOR, 12),
    "rgba.png": (np.dstack((COLOR, GRAY)), COLOR, 0),
    "gray.png": (GRAY, GRAY, 0),
    "gray_alpha.png": (np.dstack((GRAY, OPAQUE)), GRAY, 0),
    "bits.png": (Image.fromarray(GRAY).point(lambda v: 255 * (v > 99)).convert("1"), (GRAY > 99) * np.uint8(255), 0),
    "palette.png": (Image.fromarray(GRAY).convert("P"), GRAY, 0),
    "gray16.png": (GRAY.astype(np.uint16) * 257, GRAY, 0),
    "gray16.tif": (GRAY.astype(np.uint16) * 257, GRAY, 0),
    "cmyk.jpg": (Image.fromarray(COLOR).convert("CMYK"), COLOR, 12),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_a_photograph_of_any_mode_is_read_as_what_it_shows(tmp_path, name):
    picture, expected, tolerance = PHOTOS[name]
    photo = read_photo(saved(tmp_path / name, picture, **({"quality": 98} if name.endswith("jpg") else {})))
    assert photo.mode == "RGB" and photo.size == (WIDTH, HEIGHT)
    expected = expected if expected.ndim == 3 else np.stack([expected] * 3, -1)
    assert np.abs(np.asarray(photo).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_of_all_kinds_are_scaled_and_not_cut(tmp_path, color_type, channels):
    values = np.random.default_rng(color_type).integers(0, 65536, (HEIGHT, WIDTH, channels), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png_of_16_bits(color_type, values))
    color = values[..., :3] if channels > 2 else values[..., [0, 0, 0]]
    assert np.abs(np.asarray(read_photo(tmp_path / "a.png")) - color / 257).max() <= 1


def test_alpha_is_left_out_of_colours_or_laid_over_a_background(tmp_path):
    pixels = np.dstack((COLOR, GRAY))
    path = saved(tmp_path / "a.png", pixels)
    assert (np.asarray(read_photo(path)) == COLOR).all() and read_header(path).has_alpha
    alpha = GRAY[..., None] / 255
    for background in (0.0, 1.0):
        expected = COLOR * alpha + 255 * background * (1 - alpha)
        assert np.abs(np.asarray(read_photo(path, background=background)) - expected).max() <= 1
    palette = Image.fromarray(GRAY).convert("P")
    path = saved(tmp_path / "p.png", palette, transparency=bytes(range(256)))  # Pillow warns where it is converted to RGB at once
    assert (np.asarray(read_photo(path)) == GRAY[..., None]).all()


@pytest.mark.parametrize(("name", "picture"), [("f.tif", GRAY.astype(np.float32)), ("i.tif", GRAY.astype(np.int32)), ("l.tif", "LAB")])
def test_modes_whose_range_nobody_knows_are_refused_by_name(tmp_path, name, picture):
    path = saved(tmp_path / name, Image.new(picture, (WIDTH, HEIGHT)) if isinstance(picture, str) else picture)
    for read in (read_photo, photo_size):
        with pytest.raises(PictureError, match=f"{name}: has PIL mode '(F|I|LAB)' .TIFF., whose range is unknown: save it with 8 bits"):
            read(path)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_turns_a_picture_that_has_no_camera(tmp_path, orientation, suffix):
    path = saved(tmp_path / f"a.{suffix}", COLOR, exif=turned(orientation), **({"quality": 98} if suffix == "jpg" else {}))
    expected = np.asarray(Image.fromarray(COLOR).transpose(TURNS[orientation]))
    photo = read_photo(path, upright=True)
    assert np.abs(np.asarray(photo).astype(int) - expected).max() <= (12 if suffix == "jpg" else 0)
    assert photo_size(path, upright=True) == expected.shape[:2] == photo_size(path, upright=True, decode=True)


@pytest.mark.parametrize("orientation", TURNS)
def test_a_turned_picture_follows_its_cameras_size_or_is_refused(tmp_path, orientation):
    path = saved(tmp_path / "a.png", COLOR, exif=turned(orientation))
    if orientation < 5:  # both ways have the same size
        for expected in (None, exactly((HEIGHT, WIDTH))):
            with pytest.raises(PictureError, match=f"a.png: is turned by EXIF .orientation {orientation}.*save it without the tag"):
                read_photo(path, expected)
        return
    assert (np.asarray(read_photo(path, exactly((HEIGHT, WIDTH)))) == COLOR).all()
    upright = np.asarray(Image.fromarray(COLOR).transpose(TURNS[orientation]))
    assert (np.asarray(read_photo(path, exactly((WIDTH, HEIGHT)))) == upright).all()
    assert photo_size(path, exactly((WIDTH, HEIGHT))) == (WIDTH, HEIGHT)
    with pytest.raises(PictureError, match="turned by EXIF"):
        read_photo(path)
    with pytest.raises(PictureError, match=r"a.png: is 36x24 \(width x height\), annotated as 5x9 \(width x height\)"):
        read_photo(path, exactly((9, 5), "annotated as"))


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_tiff_is_refused_where_it_has_a_camera(tmp_path, orientation):
    path = saved(tmp_path / "a.tif", COLOR, exif=turned(orientation))  # Pillow turns it by itself
    assert (np.asarray(read_photo(path, upright=True)) == np.asarray(Image.fromarray(COLOR).transpose(TURNS[orientation]))).all()
    with pytest.raises(PictureError, match="turned by EXIF"):
        read_photo(path, exactly(photo_size(path, upright=True)))


def test_damaged_exif_turns_nothing(tmp_path):
    path = saved(tmp_path / "a.jpg", COLOR, exif=b"Exif\0\0no exif at all")
    assert read_header(path).orientation == 1 and read_photo(path).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_of_too_many_pixels_is_refused_from_its_header(tmp_path, suffix):
    """169 megapixels take half a gigabyte and more to decode; here there is nothing to decode."""
    path = saved(tmp_path / f"a.{suffix}", COLOR)
    data = path.read_bytes()
    if suffix == "png":
        start = len(SIGNATURE) + 8
        header = struct.pack(">II", 13_000, 13_000) + data[start + 8 : start + 13]
        data = SIGNATURE + png_chunk(b"IHDR", header) + data[start + 13 + 4 :]
    else:
        data = data.replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", 13_000, 13_000))
    path.write_bytes(data)
    for read in (read_header, photo_size, read_photo, read_mask):
        with pytest.raises(PictureError, match=f"a.{suffix}: has .*more than {MAX_PIXELS:,}( pixels)?: reduce it") as error:
            read(path)
        assert error.value.fault == "size"


def test_another_size_is_refused_before_the_pixels_are_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", GRAY)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    for read in (read_photo, read_mask, read_depth, read_depth_mask, read_rgba):
        with pytest.raises(PictureError, match=r"a.png: is 36x24 \(width x height\), expected 24x36"):
            read(path, exactly((WIDTH, HEIGHT)))


def test_a_flipped_bit_anywhere_in_a_png_is_found(tmp_path):
    path = saved(tmp_path / "a.png", COLOR)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(data), 200, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(PictureError, match="a.png: "):
            read_photo(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_a_truncated_picture_is_named(tmp_path, suffix, share):
    path = saved(tmp_path / f"a.{suffix}", COLOR)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(PictureError, match=f"a.{suffix}: is unreadable or truncated") as error:
        read_photo(path)
    assert error.value.what.startswith("is unreadable or truncated") and error.value.fault == "unreadable"


def test_missing_files_and_folders_are_named(tmp_path):
    for read in (read_header, read_photo, photo_size, read_mask):
        with pytest.raises(FileNotFoundError, match="a.png is missing"):
            read(tmp_path / "a.png")
        with pytest.raises(PictureError, match=f"{tmp_path.name}: is unreadable"):
            read(tmp_path)


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_masks_and_depth_maps_of_other_modes_are_refused_by_name(tmp_path, mode):
    path = saved(tmp_path / "a.tif", Image.fromarray(COLOR).convert("L").convert(mode))
    for read in (read_mask, read_depth, *((read_depth_mask,) if mode != "1" else ())):
        with pytest.raises(PictureError, match=f"a.tif: has PIL mode '{mode}', expected ") as error:
            read(path)
        assert error.value.fault == "mode"


def test_masks_and_depth_masks(tmp_path):
    assert (np.asarray(read_mask(saved(tmp_path / "a.png", GRAY))) == GRAY).all()
    with pytest.raises(PictureError, match="b.png: has PIL mode 'I;16', expected 8-bit gray 'L'"):
        read_mask(saved(tmp_path / "b.png", GRAY.astype(np.uint16)))
    for picture in (GRAY, GRAY.astype(np.uint16), Image.fromarray(GRAY > 0)):
        valid = read_depth_mask(saved(tmp_path / "c.png", picture))
        assert valid.dtype == bool and (valid == (GRAY > 0)).all()


def test_depth_is_the_float16_of_its_bits_times_the_scale_and_0_where_it_is_not_finite(tmp_path):
    depth = np.random.default_rng(0).uniform(0.1, 9, (HEIGHT, WIDTH)).astype(np.float16)
    depth[0, :3] = np.nan, np.inf, -np.inf
    path = saved(tmp_path / "a.png", depth.view(np.uint16))
    expected = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
    assert (read_depth(path) == expected).all() and read_depth(path).dtype == np.float32
    assert (read_depth(path, scale=1.5) == expected * np.float32(1.5)).all()
    assert (read_depth(path, scale=3e38)[expected > 2] == 0).all()


def test_a_picture_error_survives_the_way_from_a_worker():
    import pickle

    error = pickle.loads(pickle.dumps(PictureError("a.png: is truncated", "is truncated", "unreadable")))
    assert isinstance(error, PictureError) and str(error) == "a.png: is truncated"


PACKAGE = Path(__file__).resolve().parents[2] / "co3d_ensemble"
# the second decodes bytes of archives, which are checked there
OPENS_PICTURES = {"base/pictures.py", "challenge/frame_io.py"}


def test_pictures_are_opened_in_one_place():
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "Image.open(" in path.read_text(encoding="utf-8")}
    assert found <= OPENS_PICTURES
