"""Raw items that a user passes, such as the path of a recording, decoded and prepared for encoders."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL.Image import Image

from embedcache.arrays import Array
from embedcache.encoders.base import Encoder, background_of
from embedcache.encoders.views import FeatureEncoder
from embedcache.errors import DataError, ItemError, PathError
from embedcache.modalities import MODALITIES
from embedcache.modeling.images import PixelError, rgb_image
from embedcache.sources.media import Video, check_audio

ItemLike: TypeAlias = str | Path | bytes | Image | Array | Video | Mapping[str, Array]
"""An item: the path or the bytes of a file, or decoded: an open PIL image, (n,) float32 mono samples in [-1, 1] at 16
kHz, a `Video`, or arrays of points by name."""

_ONE = (str, Path, bytes, Image, np.ndarray, Video, Mapping)


def list_items(items: ItemLike | Sequence[ItemLike]) -> list[ItemLike]:
    """Return a list of items, given one or several, or raise a `DataError` if they are not items."""
    if not isinstance(items, (*_ONE, Iterable)):
        raise DataError(f"items: expected an item, several, or a cache, got {items!r}; pass a path or an open item")
    return [items] if isinstance(items, _ONE) else list(items)


def item_name(item: ItemLike, modality: str, number: int) -> str:
    """Return what an item is called in messages: its path, or its modality and number."""
    return str(item) if isinstance(item, str | Path) else f"{modality} {number}"


def prepare_item(item: ItemLike, name: str, encoder: FeatureEncoder) -> Array:
    """Decode an item, and return the encoder's input.

    Raises:
        PathError: a file does not exist.
        DataError: the item cannot be decoded, is none of the modality, or none that the encoder takes; names it.
    """
    modality = encoder.encoder.modality
    if isinstance(item, str | Path) and not Path(item).is_file():
        state = "is not a file" if Path(item).exists() else "does not exist"
        raise PathError(f"{modality} {name} {state}: expected the path or bytes of a file, or an open item")

    try:
        if isinstance(item, str | Path):
            item = Path(item).read_bytes()
        return encoder.prepare([_decode(item, encoder.encoder, name)])[0]
    except (DataError, ItemError, PixelError) as error:
        # A decoder may have named the item already.
        if str(error).startswith(f"{name}: "):
            raise
        raise DataError(f"{name}: {error}") from error


def _decode(item: Any, encoder: Encoder, name: str) -> Any:
    color = background_of(encoder.fingerprint.preprocessing)
    modality = encoder.modality

    if isinstance(item, bytes):
        decode = MODALITIES[modality].load_decoder()
        return decode(item, background=color) if modality == "image" else decode(item)

    if modality == "image":
        if not isinstance(item, Image):
            raise DataError(f"{name}: expected a path, bytes or an open PIL image, got {type(item).__name__}")
        return rgb_image(item, color)

    if modality == "audio":
        return check_audio(item, name)

    if modality == "video" and not isinstance(item, Video):
        raise DataError(f"{name}: expected a path, or a Video of frames and their rate, got {type(item).__name__}")
    if modality == "points" and not (isinstance(item, Mapping) and "xyz" in item):
        raise DataError(f"{name}: expected arrays of points by name, with xyz, got {type(item).__name__}")

    return item
