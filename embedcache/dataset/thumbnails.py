"""Small images of a cache, read again from its source.

A cache may be a stranger's, and says where its images are: they are read only below folders that the user names, or
below the folder of the source, unless that holds more than images.
"""

import base64
import io
import pwd
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import PathError
from embedcache.registry import has_trust
from embedcache.sources.base import FileItem
from embedcache.sources.files import SHARD_SEPARATOR
from embedcache.sources.images import decode_image
from embedcache.sources.merged import MERGED, merged_parts
from embedcache.sources.open import IMPORTED_SOURCE, SOURCES, base_source, reopen_source, source_credit
from embedcache.sources.restricted_reads import restrict_reads
from embedcache.sources.webdataset import shard_root
from embedcache.store.cache import Cache
from embedcache.store.rows import RowReader
from embedcache.store.tables import ITEM_SCHEMAS

_SIZE_PX = 88
_FIRST_PERSON = 1000  # users with smaller numbers are services
NOT_SHOWN = "images are not shown: "
_MOVED = "; if they have moved, run the same extract on their new place: it encodes nothing and records the place"
_NAME = "; name a folder of images with --image-folder, or use --trust if you trust the cache"


def credit(cache: Cache) -> str:
    """Return the attribution that must be shown with the images of a cache; empty if none is required."""
    return source_credit(cache.info.source)


def allowed_folders(cache: Cache, folders: Sequence[Path] = ()) -> Sequence[Path] | None:
    """Return the folders below which files of a cache may be read; None: anywhere, within `trust_files`.

    Args:
        cache: the cache.
        folders: folders that the user names; empty: those of `source_folders`, with its errors.
    """
    return None if has_trust() else folders or source_folders(cache)


def restricted(folders: Sequence[Path] | None) -> AbstractContextManager[None]:
    """Restrict reads of this thread to files in some folders, after following links; None: not."""
    return nullcontext() if folders is None else restrict_reads(folders)


class Thumbnails:
    """Small images, read again from the source of a cache, only from files in some folders, after following links.

    Within `trust_files`, images are read wherever the cache says that they are.

    Args:
        cache: the cache.
        folders: folders that the user allows; empty: the folder of the cache's source, see `source_folders`.

    Raises:
        PathError: the source's files no longer exist; or it is remote, a custom class or too large a folder, and the
            cache is not trusted.
    """

    def __init__(self, cache: Cache, folders: Sequence[Path] = ()) -> None:
        self.folders = allowed_folders(cache, folders)
        try:
            with restricted(self.folders):
                self._source = reopen_source(cache.info.source)
        except PathError as error:
            raise PathError(f"{NOT_SHOWN}{error}{_MOVED}") from None
        self._items = RowReader(cache, "image", [name for name in ITEM_SCHEMAS["image"].names if name != "sample"])
        self._urls: dict[int, str] = {}

    def data_url(self, row: int) -> str:
        """Return a thumbnail of the image in a row as a `data:` URL; raise an ItemError with the reason if it fails."""
        if row not in self._urls:
            data = self.webp(row, _SIZE_PX)
            self._urls[row] = "data:image/webp;base64," + base64.b64encode(data).decode()
        return self._urls[row]

    def webp(self, row: int, size_px: int) -> bytes:
        """Return the image in a row as a WebP file that fits into a square of `size_px`. Thread-safe."""
        image = decode_image(self.read(row))
        image.thumbnail((size_px, size_px))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        return buffer.getvalue()

    def read(self, row: int) -> bytes:
        """Read the bytes of the image in a row; raise an ItemError with the reason if it fails. Thread-safe."""
        item = FileItem(**self._items.take(np.array([row])).to_pylist()[0])
        with restricted(self.folders):
            return self._source.read(item)


def source_folders(cache: Cache) -> list[Path]:
    """Return the folders that hold the files of a cache's source; empty if it has no files.

    The cache says where they are, so a folder that holds more than images is rejected: the root, a home or a folder
    above it, and one that holds the cache.
    """
    folders = _recorded_folders(cache.info.source)
    for folder in folders:
        held = _held_by(folder.resolve(), cache)
        if held is not None:
            raise PathError(f"{NOT_SHOWN}the cache says that they are in {folder}, which holds {held}{_NAME}")
    return folders


def _held_by(folder: Path, cache: Cache) -> str | None:
    """Return what a folder holds besides images, if anything."""
    if folder == Path(folder.anchor):
        return "all files of this machine"
    if any(home.is_relative_to(folder) for home in (Path.home().resolve(), *_homes())):
        return "a home"
    return "the cache" if cache.path.resolve().is_relative_to(folder) else None


def _homes() -> Iterator[Path]:
    """Iterate over the homes of people, and of the administrator; those of services are folders of the system."""
    return (Path(user.pw_dir) for user in pwd.getpwall() if user.pw_uid == 0 or user.pw_uid >= _FIRST_PERSON)


def _recorded_folders(source: Mapping[str, Any]) -> list[Path]:
    if source.get("type") == MERGED:
        return [folder for part in merged_parts(source) for folder in _recorded_folders(part)]
    kind, location = base_source(source)
    if kind not in SOURCES.paths and kind != IMPORTED_SOURCE:
        raise PathError(
            f"{NOT_SHOWN}the cache names the source class {kind!r}, which is custom code; if you trust the "
            "cache, use --trust"
        )
    if kind == "openmoji":
        return []
    if "://" in location:
        raise PathError(f"{NOT_SHOWN}the cache says that they are at {location}{_NAME}")
    if kind in {"folder", "huggingface"} and not Path(location).exists():
        next_step = _MOVED if kind == "folder" else _NAME  # else it may be a name on the Hub
        raise PathError(f"{NOT_SHOWN}{location} is not a folder of this machine{next_step}")
    if kind == "webdataset":
        return [shard_root(shard) for shard in location.split(SHARD_SEPARATOR)]
    path, root = Path(location), source.get("settings", {}).get("root")
    folders = [] if kind == "coco" else [path if path.is_dir() else path.parent]
    if root and "://" in root:
        raise PathError(f"{NOT_SHOWN}the cache says that they are at {root}{_NAME}")
    return [*folders, *([Path(root)] if root else [])]
