"""Convert images to 8-bit RGB, as the frozen encoders expect them."""

import struct
import zlib

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

LITE_CROP_PADDING_PX = 32
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError, MemoryError),
    *(struct.error, zlib.error),
)
"""Errors that Pillow raises on damaged bytes: those of 340,000 mutated files, and those that `Image.open` handles."""


class PixelError(ValueError):
    """Pixels of no standard range."""


def rgb_image(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert an open image: upright, on a background, 16-bit gray scaled.

    Raises:
        PixelError: pixels are floating-point or exceed 16 bits.
    """
    image.load()  # a PNG may store its orientation after the pixels
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bit(image).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a damaged block is ignored, as other readers do: the pixels are intact.

    Not `ImageOps.exif_transpose`: it also rewrites the block, which fails if any other tag is damaged.
    """
    try:
        method = _TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:
        return image
    return image if method is None else image.transpose(method)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8-bit gray: 0..65535 -> 0..255, rounded; other values have no standard range."""
    if image.mode == "F":
        raise PixelError("floating-point pixels; save as 8 or 16 bit")
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise PixelError(f"pixels out of range: {values.min()} to {values.max()}; save as 8 or 16 bit")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def lite_crop(image: Image.Image, size_px: int) -> npt.NDArray[np.uint8]:
    """Crop and resize an RGB image as EfficientNet-Lite does: (3, size_px, size_px) uint8.

    The center square of size / (size + 32) of the shorter side is resized with Pillow's bicubic filter.
    """
    width, height = image.size
    side = max(1, int(min(width, height) * size_px / (size_px + LITE_CROP_PADDING_PX)))
    left = (width - side + 1) // 2
    top = (height - side + 1) // 2
    box = (left, top, left + side, top + side)
    square = image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
