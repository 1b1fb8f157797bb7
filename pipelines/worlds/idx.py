"""IDX files, the format of MNIST: a gzipped file of all images of a set, and one of their labels."""

import gzip
import io
import math
import struct
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from embedcache.arrays import Array
from embedcache.errors import SourceError

_UNSIGNED_BYTES = 8  # data type code of the format
_MAX_BYTES = 2**30  # of a file, uncompressed


@cache
def read_idx(path: Path) -> Array:
    """Read all values of a file: (N,) labels or (N, H, W) images, uint8. They stay in memory, 47 MB for 60,000 images.

    Raises:
        SourceError: it is not an IDX file of unsigned bytes.
    """
    with gzip.open(path) as file:
        magic = file.read(4)
        shape = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
        num_values = math.prod(shape)
        # A byte more than announced tells that the file is another; a bomb is not decoded further.
        values = np.frombuffer(file.read(min(num_values, _MAX_BYTES) + 1), np.uint8)

    if magic[:3] != bytes([0, 0, _UNSIGNED_BYTES]) or len(values) != num_values:
        raise SourceError(f"{path}: expected a whole IDX file of unsigned bytes, got another; copy it again")
    return values.reshape(shape)


def encode_png(image_HW: Array) -> bytes:
    """Return a gray image as an uncompressed PNG, whose bytes are the same on every machine."""
    out = io.BytesIO()
    Image.fromarray(image_HW).save(out, "PNG", compress_level=0)
    return out.getvalue()
