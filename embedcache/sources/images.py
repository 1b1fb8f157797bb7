"""Image files to pixels, as the published encoders were fed them: 8-bit RGB, upright, on white.

Silence for warnings of a library, in one thread only.

`warnings.catch_warnings` swaps a list that all threads share (until Python 3.14), so a decoder on one thread
would silence, or un-silence, all others. Here one filter stays in that list and asks, each time, whether the
thread that warns is inside `no_warnings()`.
"""

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from embedcache.errors import ItemError

MAX_ASPECT_RATIO = 100
MAX_PIXELS = 89_478_485
"""More pixels are refused from the header: Pillow's own limit, 256 MiB as RGB."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on damaged bytes, from 340,000 mutated files; and what `Image.open` itself takes for damage.
_DAMAGE = (
    OSError,  # UnidentifiedImageError among them
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the bytes of an image file to an RGB image of 8 bits a channel. Safe from many threads.

    EXIF orientation is applied, transparency laid on white, gray and CMYK converted, 16-bit gray
    scaled, and of an animation the first frame taken. An EXIF block that cannot be read is ignored.

    Args:
        data: the whole file.
        max_pixels: more are refused from the header, before memory is taken for them.

    Raises:
        ItemError: the bytes give no such image; the text is a short reason.
    """
    if not data:
        raise ItemError("empty file")
    _keep_blocks()
    try:
        with no_warnings():
            return rgb_image(_load(data, max_pixels))
    except ItemError:
        raise
    except UnidentifiedImageError:
        raise ItemError(f"not an image ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ItemError(f"too many pixels: more than {max_pixels:,}") from None
    except _DAMAGE as error:
        raise ItemError(_reason(error)) from None


def rgb_image(image: Image.Image) -> Image.Image:
    """Turn an open picture of any mode into what `decode_image` gives of its file.

    Raises:
        ItemError: floating-point pixels, or values beyond 16 bits.
    """
    image.load()  # a PNG may say its orientation behind the pixels
    return _rgb(_upright(image))


@cache
def _keep_blocks() -> None:
    """Let Pillow keep four blocks of 16 MiB rather than ask the system for new ones: 20 to 35 % less time from 6 MP."""
    Image.core.set_blocks_max(4)  # type: ignore[attr-defined]


def _load(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header, then the pixels."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_pixels(image.width, image.height, max_pixels)
    image.load()
    return image


def _check_pixels(width: int, height: int, most: int) -> None:
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):  # resizing by the short side would fill memory
        raise ItemError(f"too narrow: {width} x {height} pixels, more than {MAX_ASPECT_RATIO} to 1")
    if width * height > most:
        raise ItemError(f"too many pixels: {width} x {height}, more than {most:,}")


def _upright(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation; 1, upright, where there is none or it is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGE:  # the pixels are good all the same; other readers ignore it too
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bit(image).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8-bit gray: 0..65535 -> 0..255, rounded.

    Raises:
        ItemError: values beyond 16 bits, or floating point: no range is agreed on for them.
    """
    if image.mode == "F":
        raise ItemError("floating-point pixels; save as 8 or 16 bit")
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ItemError(f"pixels from {values.min()} to {values.max()}; save as 8 or 16 bit")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _reason(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return f"truncated image: {text}" if text else "truncated image"
    return f"damaged image: {text or type(error).__name__}"


class _ThisThread(threading.local):
    depth = 0
    pattern = "(?!)"  # which matches nothing, for scikit-learn, which copies filters to its threads by their pattern

    def match(self, _text: str) -> bool:
        """Stand where the warnings module expects a pattern for the message."""
        return self.depth > 0


_quiet = _ThisThread()
_FILTER: Any = ("ignore", _quiet, Warning, None, 0)


@contextmanager
def no_warnings() -> Iterator[None]:
    """Drop every warning that this thread gives inside the block; other threads keep theirs."""
    _put_first()
    _quiet.depth += 1
    try:
        yield
    finally:
        _quiet.depth -= 1


def _put_first() -> None:
    """See that our filter is asked before all others, those added since the last call included."""
    filters: list[Any] = warnings.filters  # type: ignore[assignment]  # declared as a Sequence; is a list
    if not filters or filters[0] is not _FILTER:
        filters.insert(0, _FILTER)
        for place in reversed([n for n, item in enumerate(filters) if n and item is _FILTER]):
            del filters[place]
