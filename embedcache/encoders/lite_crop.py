"""The square that EfficientNet-Lite sees of a picture."""

import numpy as np
import numpy.typing as npt
from PIL.Image import Image, Resampling

CROP_PADDING_PX = 32


def crop(image: Image, size_px: int) -> npt.NDArray[np.uint8]:
    """Turn an RGB picture into (3, size_px, size_px) uint8."""
    width, height = image.size
    side = max(1, int(min(width, height) * size_px / (size_px + CROP_PADDING_PX)))
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    box = (left, top, left + side, top + side)
    square = image.resize((size_px, size_px), Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
