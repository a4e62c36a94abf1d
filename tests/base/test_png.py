import io
import zlib

import numpy as np
import pytest
from PIL import Image

from co3d_ensemble.base.png import SIGNATURE, encode_png, png_chunk, verify_png

RANDOM = np.random.default_rng(0)
PICTURES = [
    RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8),
    RANDOM.integers(0, 256, (5, 7), dtype=np.uint8),
    RANDOM.integers(0, 2**16, (5, 7), dtype=np.uint16),
    np.full((1, 1, 3), 255, np.uint8),
    np.zeros((300, 1), np.uint8),
]


def by_pil(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def chunks_of(pixels):
    """A file's chunks as bytes, to be put together otherwise."""
    data, at, found = encode_png(pixels), len(SIGNATURE), []
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        found.append(data[at:end])
        at = end
    return found


@pytest.mark.parametrize("pixels", PICTURES, ids=lambda pixels: f"{pixels.shape}-{pixels.dtype}")
def test_pil_reads_what_is_written_and_what_pil_writes_is_verified(pixels):
    data = encode_png(pixels)
    with Image.open(io.BytesIO(data)) as picture:
        assert np.array_equal(np.array(picture), pixels)
    for written in (data, by_pil(pixels)):
        header = verify_png(written)
        assert (header.height, header.width) == pixels.shape[:2] and header.bits == 8 * pixels.itemsize
        assert header.color_type == (2 if pixels.ndim == 3 else 0) and header.n_bytes == len(written) and not header.interlaced


def test_a_view_that_is_not_contiguous_is_written_as_it_looks():
    pixels = PICTURES[0].transpose(1, 0, 2)[::-1]
    with Image.open(io.BytesIO(encode_png(pixels))) as picture:
        assert np.array_equal(np.array(picture), pixels)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3, 4), "uint8"), ((2, 3), "float32"), ((2, 3, 3), "uint16"), ((0, 3), "uint8")])
def test_other_arrays_are_refused(shape, dtype):
    with pytest.raises(ValueError, match="no PNG is made of"):
        encode_png(np.zeros(shape, dtype))


@pytest.mark.parametrize("make", [encode_png, by_pil])
def test_every_flipped_bit_is_found(make):
    whole = make(PICTURES[0])
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(ValueError, match="^(is|has|begins) "):
            verify_png(bytes(damaged))


def test_every_truncation_is_found_and_what_follows_is_told_by_the_length():
    whole = encode_png(PICTURES[1])
    for n_bytes in range(len(whole)):
        with pytest.raises(ValueError, match="^is (truncated|no PNG)"):
            verify_png(whole[:n_bytes])
    assert verify_png(whole + b"more").n_bytes == len(whole)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("HHDE", "more than one header"),
        ("HDHE", "more than one header"),
        ("DHE", "begins with a chunk b'IDAT'"),
        ("HE", "ends without pixels"),
        ("HDTDE", "pixels in two places"),
        ("HD", "is truncated"),
    ],
)
def test_chunks_in_another_order_are_refused(order, message):
    header, pixels, end = chunks_of(PICTURES[1])
    parts = {"H": header, "D": pixels, "E": end, "T": png_chunk(b"tEXt", b"a\0b")}
    with pytest.raises(ValueError, match=message):
        verify_png(SIGNATURE + b"".join(parts[part] for part in order))


def test_a_header_of_another_length_is_refused():
    _, pixels, end = chunks_of(PICTURES[1])
    with pytest.raises(ValueError, match="header of 4 bytes"):
        verify_png(SIGNATURE + png_chunk(b"IHDR", b"1234") + pixels + end)


def test_the_pixels_are_not_unpacked():
    bomb = zlib.compress(bytes(1 << 20))
    header, _, end = chunks_of(PICTURES[1])
    assert verify_png(SIGNATURE + header + png_chunk(b"IDAT", bomb) + end).width == 7
