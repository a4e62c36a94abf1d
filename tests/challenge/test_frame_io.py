import io

import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.base.png import encode_png, png_chunk
from co3d_ensemble.challenge import frame_io
from co3d_ensemble.challenge.frame_io import (
    decode_depth,
    decode_image,
    decode_mask,
    decode_view,
    encode_depth,
    encode_image,
    encode_mask,
    encode_view,
    max_png_bytes,
)
from co3d_ensemble.functional.types import RenderedView

SIZE = (6, 9)


def png(array, mode=None):
    buffer = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_8_bit_colour_survives_the_round_trip():
    rgb = torch.arange(256).repeat(3, 1).view(3, 16, 16) / 255
    assert torch.equal(decode_image(encode_image(rgb), "a", (16, 16)), rgb)


def test_colours_round_to_the_nearest_value_and_clamp():
    rgb = torch.tensor([-0.3, 0.49, 0.51, 99.6, 254.4, 254.6, 300.0, 2550.0]).view(1, 1, 8).repeat(3, 1, 1) / 255
    decoded = decode_image(encode_image(rgb), "a", (1, 8))[0, 0] * 255
    assert decoded.round().tolist() == [0, 0, 1, 100, 254, 255, 255, 255]


def test_channels_keep_their_order():
    rgb = torch.zeros(3, *SIZE)
    rgb[0] = 1
    assert torch.equal(decode_image(encode_image(rgb), "a", SIZE), rgb)


def test_mask_is_cut_at_one_half_inclusive():
    mask = torch.tensor([[[0.0, 0.499, 0.5, 0.501, 1.0, 3.0]]])
    assert decode_mask(encode_mask(mask), "a", (1, 6)).flatten().tolist() == [0, 0, 1, 1, 1, 1]


def test_every_finite_float16_depth_survives_the_round_trip_bit_for_bit():
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    depth = torch.from_numpy(bits.view(np.float16).astype(np.float32)).view(1, 4, -1)
    decoded = decode_depth(encode_depth(depth), "a", tuple(depth.shape[1:]))
    assert torch.equal(decoded.view(torch.int32), depth.view(torch.int32))  # -0 too


def test_depth_beyond_float16_is_clamped_rather_than_infinite():
    depth = torch.tensor([[[1e9, -1e9, 65520.0]]])
    assert decode_depth(encode_depth(depth), "a", (1, 3)).flatten().tolist() == [65504, -65504, 65504]


@pytest.mark.parametrize(("encode", "channels"), [(encode_image, 3), (encode_mask, 1), (encode_depth, 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_not_written(encode, channels, value):
    values = torch.zeros(channels, *SIZE)
    values[0, 2, 3] = value
    with pytest.raises(ValueError, match="1 non-finite"):
        encode(values)


def test_a_view_round_trips_and_planes_of_different_size_are_refused():
    view = RenderedView(torch.ones(3, *SIZE), torch.full((1, *SIZE), 1.5), torch.ones(1, *SIZE))
    names = {kind: kind for kind in ("image", "mask", "depth")}
    decoded = decode_view(encode_view(view), names, SIZE)
    assert all(torch.equal(getattr(decoded, plane), getattr(view, plane)) for plane in ("rgb", "depth", "mask"))
    with pytest.raises(ValueError, match="differ in size"):
        encode_view(RenderedView(view.rgb, view.depth[:, :3], view.mask))


GREY, GREY16, COLOR = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint16), np.zeros((*SIZE, 3), np.uint8)


@pytest.mark.parametrize(
    ("decode", "data", "message"),
    [
        (decode_image, png(GREY), "expected 8-bit RGB"),
        (decode_image, png(COLOR, "P"), "expected 8-bit RGB"),
        (decode_image, png(COLOR, "RGBA"), "expected 8-bit RGB"),
        (decode_mask, png(COLOR), "expected 8-bit grey"),
        (decode_mask, png(GREY, "1"), "expected 8-bit grey"),
        (decode_mask, png(GREY16), "expected 8-bit grey"),
        (decode_depth, png(GREY), "expected 16-bit grey"),
        (decode_image, png(COLOR.transpose(1, 0, 2)), "expected 6 x 9 .* has 9 x 6"),
        (decode_mask, png(np.full(SIZE, 128, np.uint8)), "54 pixels differ, e.g. 128"),
        (decode_depth, png(np.full(SIZE, 0x7C00, np.uint16)), "54 non-finite"),
        (decode_image, b"", "no PNG file"),
        (decode_image, b"\xff\xd8\xff\xe0" * 20, "no PNG file"),
        (decode_image, png(COLOR)[:-5], "truncated"),
        (decode_image, png(COLOR)[:40], "truncated"),
        (decode_image, png(COLOR) + b"more", "followed by other data"),
    ],
)
def test_a_wrong_file_is_refused_by_name(decode, data, message):
    with pytest.raises(ValueError, match=rf"^cape/x_image\.png: .*{message}"):
        decode(data, "cape/x_image.png", SIZE)


def test_a_png_whose_middle_is_missing_is_refused_by_name():
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    data = png(noise)
    with pytest.raises(ValueError, match="^some.png: (is truncated|has a damaged chunk)"):
        decode_image(data[:60] + data[-12:], "some.png", SIZE)


def with_chunk(data, name, content, *, at=33):
    """A PNG with a further, sound chunk; at 33 behind its header."""
    return data[:at] + png_chunk(name, content) + data[at:]


HEADER = (9).to_bytes(4, "big") + (6).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_chunk(encode_png(COLOR), b"IHDR", HEADER[4:] + HEADER[:4] + b"\x08\x02\0\0\0"), "more than one header"),
        (with_chunk(encode_png(COLOR), b"IHDR", HEADER + b"\x10\x00\0\0\0"), "more than one header"),
        (with_chunk(encode_png(COLOR), b"tRNS", bytes(6)), "chunk b'tRNS', which can change what is seen"),
        (with_chunk(encode_png(COLOR), b"acTL", b"\0\0\0\2\0\0\0\0"), "chunk b'acTL'"),
        (with_chunk(encode_png(COLOR), b"ABCD", b""), "chunk b'ABCD'"),
    ],
)
def test_a_png_of_sound_chunks_that_could_be_seen_otherwise_is_refused_by_name(data, message):
    with pytest.raises(ValueError, match=rf"^cape/x_image\.png: .*{message}"):
        decode_image(data, "cape/x_image.png", SIZE)


def test_a_png_decoded_to_another_shape_or_type_is_refused(monkeypatch):
    for wrong in (np.zeros((9, 6, 3), np.uint8), np.zeros((*SIZE, 4), np.uint8), np.zeros((*SIZE, 3), np.float32)):
        monkeypatch.setattr(frame_io, "_decoded", lambda data, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=r"^x: the PNG was decoded to \("):
            decode_image(encode_png(COLOR), "x", SIZE)


@pytest.mark.parametrize(("decode", "pixels"), [(decode_image, COLOR), (decode_mask, GREY), (decode_depth, GREY16)])
def test_every_flipped_bit_of_a_picture_is_found(decode, pixels):
    whole = encode_png(pixels)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(ValueError, match="^x.png: "):
            decode(bytes(damaged), "x.png", SIZE)


def test_no_sound_png_is_larger_than_the_limit():
    random = np.random.default_rng(0)
    for size in ((1, 1), (1, 3000), (400, 400)):
        noise = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        assert max(len(encode_png(noise)), len(png(noise))) < max_png_bytes(size)


def test_colours_round_as_exact_arithmetic_does():
    rgb = torch.rand(3, 300, 300, generator=torch.Generator().manual_seed(0))
    decoded = decode_image(encode_image(rgb), "a", (300, 300)) * 255
    assert torch.equal(decoded.round().double(), (rgb.double() * 255).round())
