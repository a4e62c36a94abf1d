"""Picture files of any mode, opened in this one place: read right, or refused by name.

Pillow decodes more than it converts: ``convert("RGB")`` cuts 16-bit values at 255, so that a photograph becomes white, and floats as
well; a damaged PNG gives other pixels in silence, and of a JPEG whose end is missing the rest is invented. Sizes here are
(height, width). Everything that a header tells, its size before all, is checked before any pixel is decoded.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from co3d_ensemble.base.png import SIGNATURE, verify_png

Size = tuple[int, int]  # height, width

# what Pillow raises on damaged files, beside OSError: bad chunks (SyntaxError), short headers (struct.error), odd values
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, OverflowError, EOFError, IndexError, struct.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
MAX_PIXELS = 89_478_485  # a quarter of a gigabyte as RGB: what Pillow opens without warning of a decompression bomb
GRAY_16 = ("I;16", "I;16B", "I;16L", "I;16N")  # as the versions of Pillow name it; "I" in a PNG is the same
PHOTO_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
MAX_BYTE, WORD_PER_BYTE = 255, 257  # 65535 = 255 * 257
JPEG_END = b"\xff\xd9"
UPRIGHT = 1  # EXIF's orientation that needs no turn
TURNS = {  # the others
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FIRST_SWAPPED = 5  # 5 to 8 swap the sides

UNREADABLE, WRONG_SIZE, WRONG_MODE, TURNED = "unreadable", "size", "mode", "turned"


class PictureError(ValueError):
    """A file that is no such picture as it should be; the message begins with its path.

    Attributes:
        what: the message without the path, a predicate of the picture.
        fault: ``unreadable`` | ``size`` | ``mode`` | ``turned``.
    """

    def __init__(self, message: str, what: str = "", fault: str = UNREADABLE) -> None:
        super().__init__(message)
        self.what, self.fault = what or message, fault


@dataclass(frozen=True)
class Expected:
    """The sizes that a picture may have, as the camera that belongs to it says.

    Attributes:
        fits: of height and width.
        told: what an error says of them behind the size that the picture has.
    """

    fits: Callable[[int, int], bool]
    told: str


def exactly(size: Size, source: str = "expected") -> Expected:
    """The one size; ``source`` is the verb in front of it in errors, such as "annotated as"."""
    return Expected(lambda height, width: (height, width) == tuple(size), f"{source} {shown_size(size)}")


@dataclass(frozen=True)
class Header:
    """What a picture file says of itself before its pixels are decoded.

    Attributes:
        height, width: as stored, before EXIF's orientation.
        mode: Pillow's name of the pixels' layout.
        format: Pillow's name, such as ``JPEG``.
        orientation: EXIF's, 1 to 8; 1 is upright.
        has_alpha: some pixels may be transparent.
        focal_35mm: EXIF's focal length in millimetres on 35 mm film, if it has one.
    """

    height: int
    width: int
    mode: str
    format: str
    orientation: int
    has_alpha: bool
    focal_35mm: float | None = None

    @property
    def size(self) -> Size:
        return self.height, self.width

    @property
    def turned_size(self) -> Size:
        return self.size if self.orientation < FIRST_SWAPPED else (self.width, self.height)

    @property
    def is_16_bit_gray(self) -> bool:
        return self.mode in GRAY_16 or (self.mode == "I" and self.format == "PNG")


def shown_size(size: Size) -> str:
    """As all messages show it."""
    return f"{size[1]}x{size[0]} (width x height)"


def read_header(path: Path) -> Header:
    """The header alone.

    Raises:
        PictureError: no picture, or one of more pixels than are ever decoded.
        FileNotFoundError: naming the file.
    """
    with _opened(path, path) as picture:
        return _header(picture)


def photo_size(path: Path, expected: Expected | None = None, *, upright: bool = False, decode: bool = False) -> Size:
    """The size that :func:`read_photo` gives, from the header, or with ``decode`` after reading all of it; errors as there."""
    if decode:
        photo = read_photo(path, expected, upright=upright)
        return photo.height, photo.width
    with _opened(path, path) as picture:
        header = _header(picture)
        return header.size if _checked_photo(header, expected, upright) == UPRIGHT else header.turned_size


def read_photo(path: Path, expected: Expected | None = None, *, upright: bool = False, background: float | None = None) -> Image.Image:
    """A photograph as 8-bit RGB; 16-bit gray is scaled.

    Args:
        expected: the sizes that its camera belongs to. A picture that EXIF turns is turned, or left, so that it has one of them.
        upright: there is no camera: the picture is turned as EXIF says.
        background: gray value in [0, 1] behind transparent pixels; None: colours are as stored, whatever their alpha.

    Raises:
        PictureError: damaged or cut short, of a mode whose range nobody knows (float, 32 bits, Lab), too large, of another size, or turned
            by EXIF where nothing tells whether its camera is meant before or after.
        FileNotFoundError: naming the file.
    """
    turns = []
    with _decoded(path, lambda header: turns.append(_checked_photo(header, expected, upright))) as picture:
        photo = _to_rgb(picture, background)
    return photo.transpose(TURNS[turns[0]]) if turns[0] in TURNS else photo


def read_mask(path: Path, expected: Expected | None = None) -> Image.Image:
    """A mask of foreground probability * 255, 8-bit gray. Errors as :func:`read_photo`; other modes are refused."""
    with _decoded(path, lambda header: check_mask(header, expected)) as picture:
        return picture.copy()


def read_depth(path: Path, expected: Expected | None = None, *, scale: float = 1.0) -> np.ndarray:
    """A CO3D depth map, the bits of float16 numbers in 16-bit gray, times ``scale``: float32, (H, W), 0 where it is not finite.

    Errors as :func:`read_photo`; other modes are refused.
    """
    with _decoded(path, lambda header: check_depth(header, expected)) as picture:
        bits = np.asarray(picture).astype(np.uint16)
    with np.errstate(over="ignore"):
        depth = bits.view(np.float16).astype(np.float32) * np.float32(scale)
    depth[~np.isfinite(depth)] = 0
    return depth


def read_depth_mask(path: Path, expected: Expected | None = None) -> np.ndarray:
    """Where a depth map is valid: bool, (H, W), of gray with any number of bits. Errors as :func:`read_photo`; other modes are refused."""
    with _decoded(path, lambda header: check_depth_mask(header, expected)) as picture:
        return np.asarray(picture) > 0


def read_rgba(path: Path, expected: Expected) -> np.ndarray:
    """The pixels of an RGBA file, uint8, (H, W, 4). Errors as :func:`read_photo`; other modes are refused."""
    with _decoded(path, lambda header: _check(header, expected, header.mode == "RGBA", "expected RGBA")) as picture:
        return np.array(picture)


def check_photo(header: Header, expected: Expected | None = None) -> None:
    """PictureError, its path left to the caller, where :func:`read_photo` refuses such a file; the others for their readers."""
    _checked_photo(header, expected, upright=False)


def check_mask(header: Header, expected: Expected | None = None) -> None:
    _check(header, expected, header.mode == "L", "expected 8-bit gray 'L'")


def check_depth(header: Header, expected: Expected | None = None) -> None:
    _check(header, expected, header.is_16_bit_gray, "expected a 16-bit PNG")


def check_depth_mask(header: Header, expected: Expected | None = None) -> None:
    _check(header, expected, header.mode in ("1", "L") or header.is_16_bit_gray, "expected gray")


def _check(header: Header, expected: Expected | None, right_mode: bool, told: str) -> None:
    if expected is not None and not expected.fits(*header.size):
        raise _fault(f"is {shown_size(header.size)}, {expected.told}", WRONG_SIZE)
    if not right_mode:
        raise _fault(f"has PIL mode {header.mode!r}, {told}", WRONG_MODE)


def _checked_photo(header: Header, expected: Expected | None, upright: bool) -> int:
    """The orientation by which the picture has to be turned, or ``UPRIGHT``."""
    if header.mode not in PHOTO_MODES and not header.is_16_bit_gray:
        raise _fault(f"has PIL mode {header.mode!r} ({header.format}), whose range is unknown: save it with 8 bits per channel", WRONG_MODE)
    turned_by_pillow = header.format == "TIFF"  # its size as well
    if upright:
        return UPRIGHT if turned_by_pillow else header.orientation
    stored = expected is None or expected.fits(*header.size)
    turned = header.orientation != UPRIGHT and (expected is None or turned_by_pillow or expected.fits(*header.turned_size))
    if not stored and not turned:
        raise _fault(f"is {shown_size(header.size)}, {expected.told}", WRONG_SIZE)  # type: ignore[union-attr]
    if stored and turned:
        raise _fault(
            f"is turned by EXIF (orientation {header.orientation}), and nothing tells whether its camera is that of the picture "
            "before or after: save it without the tag",
            TURNED,
        )
    return header.orientation if turned else UPRIGHT


def _fault(what: str, fault: str) -> PictureError:
    return PictureError(what, what, fault)


def _unreadable(path: Path, why: str) -> PictureError:
    what = f"is unreadable or truncated: {why}"
    return PictureError(f"{path}: {what}", what)


@contextmanager
def _opened(path: Path, source: Path | io.BytesIO) -> Iterator[Image.Image]:
    """The picture, not decoded; all errors of the body name ``path``."""
    try:
        with Image.open(source) as picture:
            n_pixels = picture.width * picture.height
            if n_pixels > MAX_PIXELS:
                raise _fault(f"has {shown_size((picture.height, picture.width))} pixels, more than {MAX_PIXELS:,}: reduce it", WRONG_SIZE)
            yield picture
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except PictureError as error:
        raise PictureError(f"{path}: {error.what}", error.what, error.fault) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = f"has more than {MAX_PIXELS:,} pixels: reduce it ({error})"
        raise PictureError(f"{path}: {what}", what, WRONG_SIZE) from error
    except UnidentifiedImageError as error:  # whose own text has the path again, or an address
        raise _unreadable(path, "no picture of a known format") from error
    except DECODE_ERRORS as error:
        raise _unreadable(path, _in_a_line(error)) from error


@contextmanager
def _decoded(path: Path, check: Callable[[Header], object]) -> Iterator[Image.Image]:
    """The picture, decoded after ``check`` has seen its header."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except OSError as error:
        raise _unreadable(path, str(error)) from error
    if data.startswith(SIGNATURE):
        try:
            verify_png(data)
        except ValueError as error:
            raise _unreadable(path, f"the PNG {error}") from error
    with _opened(path, io.BytesIO(data)) as picture:
        check(_header(picture))
        picture.load()
        # libjpeg invents the rest of a picture whose tail is missing or zero: without its end marker it is cut short
        if picture.format in ("JPEG", "MPO") and JPEG_END not in data:
            raise OSError("JPEG without end marker")
        yield picture


def _header(picture: Image.Image) -> Header:
    orientation, focal = _exif(picture)
    return Header(
        picture.height,
        picture.width,
        picture.mode,
        picture.format or "",
        orientation,
        picture.has_transparency_data,
        focal,
    )


def _exif(picture: Image.Image) -> tuple[int, float | None]:
    """Orientation and focal length; damaged EXIF tells neither."""
    if picture.format == "PNG" and "exif" not in picture.info:
        return UPRIGHT, None  # Pillow would decode all of it to look behind the pixels
    try:
        exif = picture.getexif()
        orientation = exif.get(ExifTags.Base.Orientation)
        focal = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.FocalLengthIn35mmFilm)
    except DECODE_ERRORS:
        return UPRIGHT, None
    return orientation if orientation in TURNS else UPRIGHT, float(focal) if isinstance(focal, (int, float)) and focal > 0 else None


def _to_rgb(picture: Image.Image, background: float | None) -> Image.Image:
    if picture.mode in (*GRAY_16, "I"):
        values = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray(((values + WORD_PER_BYTE // 2) // WORD_PER_BYTE).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")  # a palette's alphas have no other way
        if background is not None:
            gray = round(MAX_BYTE * background)
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (gray, gray, gray, MAX_BYTE)), picture)
    return picture.convert("RGB")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())
