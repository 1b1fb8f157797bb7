"""Images below a folder, with captions in `.txt` or `.json` files beside them."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from embedcache.errors import ItemError, PathError
from embedcache.files import is_remote, open_path
from embedcache.sources.base import ImageItem, Sample
from embedcache.sources.captions import SIDECAR_SUFFIXES, read_sidecar
from embedcache.sources.files import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    TAR_SUFFIXES,
    has_suffix,
    is_folder,
    read_bytes,
    read_file,
    reading,
    split_of,
    walk_files,
)
from embedcache.sources.settings import SourceSettings

_AT_ONCE = 32  # captions asked of a server at the same time: each takes tens of milliseconds


class FolderSource:
    """One sample an image, sorted by relative path, which without its suffix is the key.

    The column `folder` is the path of the image's folder and `label` that folder's name, as of a folder of class
    folders; images in the top folder have none. Below a top folder named `train`, `val`, `valid`, `validation` or
    `test`, in either case, the column `split` is that name. A `label` or `split` in the `.json` beside an image comes
    first; an image right in `train` has no label. An image with no file beside it has no captions. Hidden files are
    left out.

    Args:
        location: the top folder, a path or a URL.
        settings: none of them is used.

    Raises:
        PathError: there is no such folder.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.allow_only("folder")
        self._root = open_path(location).absolute()
        if not is_folder(self._root, TABLE_SUFFIXES | TAR_SUFFIXES):
            raise PathError(f"no such folder: {self._root}")

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        return {"type": "folder", "path": str(self._root), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Go through the images. Memory holds the names of one folder and of those above it."""
        found = (
            (PurePosixPath(path), siblings)
            for path, siblings in walk_files(self._root)
            if has_suffix(path, IMAGE_SUFFIXES)
        )
        if not is_remote(self._root):
            yield from (self._sample(path, siblings) for path, siblings in found)
            return
        with ThreadPoolExecutor(_AT_ONCE) as executor:
            while batch := list(islice(found, 8 * _AT_ONCE)):
                yield from executor.map(lambda image: self._sample(*image), batch)

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of one image file."""
        return read_file(self._root / item.path)

    def _sample(self, path: PurePosixPath, siblings: Mapping[str, int]) -> Sample:
        key = path.with_suffix("")
        place = {"folder": str(path.parent)} if len(path.parts) > 1 else {}
        sidecar = read_sidecar(self._beside(key, siblings), str(key))
        return Sample(
            key=str(key),
            images=(ImageItem(path=str(path), length=self._size(path, siblings)),),
            texts=sidecar.texts,
            columns={**_class_columns(path), **sidecar.columns, **place},
        )

    def _beside(self, key: PurePosixPath, siblings: Mapping[str, int]) -> dict[str, bytes | ItemError]:
        """Read the caption files of an image: suffix in lower case -> content."""
        spellings = (s for suffix in SIDECAR_SUFFIXES for s in (suffix, suffix.upper()))
        return {
            spelling.lower(): self._caption_file(f"{key}{spelling}")
            for spelling in spellings
            if f"{key.name}{spelling}" in siblings
        }

    def _caption_file(self, name: str) -> bytes | ItemError:
        path = self._root / name
        with reading(path):
            try:
                return read_bytes(path)
            except (FileNotFoundError, PermissionError) as error:
                if is_remote(self._root):  # a service says so of expired credentials, too
                    raise
                return ItemError(f"cannot read {name}: {error.strerror}")

    def _size(self, path: PurePosixPath, siblings: Mapping[str, int]) -> int:
        """Give the size of an image; 0 of a link to nothing, which is reported once it is read, or where none says."""
        if is_remote(self._root):
            return max(siblings[path.name], 0)
        try:
            return (self._root / path).stat().st_size
        except OSError:
            return 0


def _class_columns(path: PurePosixPath) -> dict[str, str]:
    """Give the split and the label that the folders of an image say; they are named from the top one down."""
    folders = path.parts[:-1]
    split = split_of(str(path))
    label = {"label": folders[-1]} if len(folders) > bool(split) else {}
    return {"split": split, **label} if split else label
