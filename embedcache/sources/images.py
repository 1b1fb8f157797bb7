"""Decode image files to 8-bit RGB, upright and on a plain background, white as the published encoders expect."""

import io
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from embedcache.arrays import Array, to_numbers
from embedcache.errors import DataError, ItemError, PathError
from embedcache.modeling.images import DAMAGE, PixelError, rgb_image

_MAX_ASPECT_RATIO = 100
MAX_PIXELS = 89_478_485
"""Limit checked in the header: Pillow's own, 256 MiB as RGB."""

_IMAGE_AXES, _RGB = 3, 3
_EXPECTED = "the path of a file, an open PIL image, a tensor or an array"

WHITE = "white"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class HasArray(Protocol):
    """An array of NumPy, or a tensor of PyTorch."""

    def __array__(self) -> Array: ...


ImageLike: TypeAlias = str | Path | Image.Image | HasArray
"""An image: the path of a file; an open `PIL.Image.Image` of any mode; a tensor (3, H, W); or an array (H, W, 3).

Tensors and arrays are RGB, uint8 from 0 to 255 or floating-point from 0 to 1."""


def list_images(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    """Return a sequence of images, given one image or several; a tensor or array of four axes holds several.

    Raises:
        DataError: it is neither an image nor several.
    """
    if isinstance(images, str | Path | Image.Image) or getattr(images, "ndim", None) == _IMAGE_AXES:
        return [images]  # type: ignore[list-item]
    if isinstance(images, bytes) or not isinstance(images, Iterable):
        raise DataError(f"images: expected {_EXPECTED}, or several of them, got {images!r:.80}")
    return images if isinstance(images, Sequence) or hasattr(images, "ndim") else list(images)


def load_image(image: ImageLike, background: str = WHITE) -> Image.Image:
    """Return an image as `decode_image` does.

    Raises:
        PathError: a file does not exist.
        DataError: an image cannot be decoded, or an array is no RGB image; the message names it.
    """
    if not isinstance(image, str | Path | Image.Image) and not hasattr(image, "__array__"):
        raise DataError(f"image: expected {_EXPECTED}, got {image!r:.80}")
    if isinstance(image, str | Path) and not Path(image).is_file():
        state = "is a folder" if Path(image).is_dir() else "does not exist"
        raise PathError(f"image {image} {state}: expected {_EXPECTED}; check the path")
    try:
        if isinstance(image, str | Path):
            return decode_image(Path(image).read_bytes(), background=background)
        return rgb_image(image, background) if isinstance(image, Image.Image) else _array_image(image)
    except (ItemError, PixelError) as error:
        raise DataError(f"image {image}: {error}") from error


def _array_image(image: HasArray) -> Image.Image:
    values = to_numbers(image, "image")
    is_tensor = not isinstance(image, np.ndarray)  # the channels are first
    if is_tensor and values.ndim == _IMAGE_AXES:
        values = np.moveaxis(values, 0, -1)
    if values.ndim != _IMAGE_AXES or values.shape[-1] != _RGB or not values.size:
        axes = "(3, H, W)" if is_tensor else "(H, W, 3)"
        raise DataError(f"image: expected RGB pixels of shape {axes}, got {tuple(np.shape(image))}")
    if values.dtype.kind == "f":
        if not (values.min() >= 0 and values.max() <= 1):
            raise DataError("image: expected floating-point values from 0 to 1, got others; do not normalize it")
        values = np.round(values * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise DataError(f"image: expected uint8 or floating-point values, got {values.dtype}")
    return Image.fromarray(np.ascontiguousarray(values))


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, background: str = WHITE) -> Image.Image:
    """Decode an image file to an RGB image with 8 bits per channel. Thread-safe.

    Applies the EXIF orientation, composites transparent pixels onto the background, converts gray and CMYK, scales
    16-bit gray, and takes the first frame of an animation. An unreadable EXIF block is ignored. Images with more than
    `max_pixels` are rejected from the header, before memory is allocated.

    Args:
        background: name of a color, or `#rrggbb`.

    Raises:
        ItemError: the file cannot be decoded; the message is a short reason.
    """
    if not data:
        raise ItemError("empty file")
    _set_up_pillow()
    try:
        return rgb_image(_load(data, max_pixels), background)
    except ItemError:
        raise
    except PixelError as error:
        raise ItemError(str(error)) from None
    except UnidentifiedImageError:
        raise ItemError(f"not an image ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ItemError(f"too many pixels: more than {max_pixels:,}") from None
    except DAMAGE as error:
        raise ItemError(_reason(error)) from None


@cache
def _set_up_pillow() -> None:
    """Ignore Pillow's warnings about files, as rows have reasons, and reuse four blocks of 16 MiB.

    From 6 megapixels on, decoding into such blocks takes 20 to 35% less time.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.core.set_blocks_max(4)  # type: ignore[attr-defined]


def _load(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header, then the pixels."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):  # resizing the short side would exhaust memory
        raise ItemError(f"too narrow: {width} x {height} pixels, more than {_MAX_ASPECT_RATIO} to 1")
    if width * height > max_pixels:
        raise ItemError(f"too many pixels: {width} x {height}, more than {max_pixels:,}")
    image.load()
    return image


def _reason(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return f"truncated image: {text}" if text else "truncated image"
    return f"damaged image: {text or type(error).__name__}"
