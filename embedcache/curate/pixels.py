"""Copies of images by their pixels: resized, re-compressed or in another format."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from embedcache.arrays import Array, Ints, blocks
from embedcache.dataset.thumbnails import Thumbnails, not_shown
from embedcache.errors import EmbedcacheError
from embedcache.neighbors.pairs import scratch_matrix
from embedcache.processes import num_cores
from embedcache.progress import Progress, watch
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache

NO_DISTANCE = 256  # above 255, the largest hash distance
SAME_PICTURE = 24  # largest hash distance of an image to its copies, docs/about/results.md

_HASH_PX = 24
_BLOCK = 512
_log = logging.getLogger(__name__)


def open_images(cache: Cache) -> Thumbnails | None:
    """Open the images of a cache to read them again. Return None, with a warning, if its source cannot be opened."""
    try:
        return Thumbnails(cache)
    except EmbedcacheError as error:
        _log.warning("pixels are not compared: %s", str(error).removeprefix(not_shown("image")))
        return None


def hash_image(data: bytes) -> Array:
    """Return the perceptual hash of an image file, (1728,) uint8. Raise `ItemError` if it cannot be decoded."""
    image = decode_image(data).resize((_HASH_PX, _HASH_PX), Image.Resampling.LANCZOS)
    return np.asarray(image).ravel()


def hash_distances(
    images: Thumbnails, rows_C: Ints, left: Ints, right: Ints, scratch: Path | str | None, progress: Progress
) -> Array:
    """Compute the hash distances of pairs of contents, (A,) int16. It is `NO_DISTANCE` if an image cannot be read.

    Each image is read and decoded once, on all cores. A warning says how many could not be read, and why. Scratch
    space: 1,728 bytes per image, in the folder `scratch` or the system's. Memory: 9 bytes per content, 20 per pair and
    the images in work. The result is deterministic.

    Args:
        images: reader of the images.
        rows_C: row of each content.
        left: (A,) one content of each pair.
        right: (A,) the other content of each pair.
        scratch: folder of the scratch file. If None, use the system's.
        progress: progress in images.

    Raises:
        DiskFullError: the scratch file does not fit.
    """
    # An image is hashed once, however many pairs it is in.
    is_paired_C = np.zeros(len(rows_C), bool)
    is_paired_C[left] = True
    is_paired_C[right] = True
    position_C = np.cumsum(is_paired_C) - 1
    rows = rows_C[is_paired_C]

    is_read = np.zeros(len(rows), bool)
    distances = np.empty(len(left), np.int16)
    reason = None

    def read_hash(row: int) -> tuple[Array | int, str | None]:
        try:
            return hash_image(images.read(row)), None
        except EmbedcacheError as error:
            return 0, str(error)

    shape = (len(rows), 3 * _HASH_PX**2)
    with scratch_matrix(scratch, shape, np.uint8) as hashes, ThreadPoolExecutor(num_cores()) as pool:
        for block in watch(blocks(len(rows), _BLOCK), progress, "reading similar images", len(rows), "images"):
            for position, (value, failure) in enumerate(pool.map(read_hash, rows[block].tolist()), block.start):
                hashes[position] = value
                is_read[position] = failure is None
                reason = reason or failure

        # Hashes are uint8: the larger less the smaller cannot wrap around.
        for block in blocks(len(distances), _BLOCK):
            first = position_C[left[block]]
            second = position_C[right[block]]
            difference = np.maximum(hashes[first], hashes[second]) - np.minimum(hashes[first], hashes[second])
            is_known = is_read[first] & is_read[second]
            distances[block] = np.where(is_known, difference.max(axis=1), np.int16(NO_DISTANCE))

    if reason is not None:
        _log.warning("pixels of %s images are not compared: %s", f"{(~is_read).sum():,}", reason)
    return distances
