"""Images below a folder, with captions in `.txt` or `.json` files beside them."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from embedcache.errors import ItemError, PathError
from embedcache.files import is_remote, open_path
from embedcache.sources.base import FileItem, Sample
from embedcache.sources.captions import SIDECAR_SUFFIXES, read_sidecar
from embedcache.sources.files import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    TAR_SUFFIXES,
    has_suffix,
    is_folder,
    read_bytes,
    read_item_file,
    split_from_path,
    walk_files,
    wrap_io_errors,
)
from embedcache.sources.settings import SourceSettings

_CONCURRENT_READS = 32  # of caption files on a server, which take tens of milliseconds each


class FolderSource:
    """One sample per image, sorted by relative path; the path without its suffix is the key.

    The column `folder` is the path of the image's folder and `label` the name of that folder, as in a folder of class
    folders; images in the top folder have neither. Below a top folder named `train`, `val`, `valid`, `validation` or
    `test`, in any case, the column `split` is that name; an image directly in `train` has no label. A `label` or
    `split` in the `.json` beside an image takes precedence. An image without sidecar files has no captions. Hidden
    files are skipped. The location is the top folder, a path or a URL.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("folder")
        self._root = open_path(location).absolute()
        if not is_folder(self._root, TABLE_SUFFIXES | TAR_SUFFIXES):
            raise PathError(f"expected a folder of images, got {self._root}, which does not exist; check the path")

    def describe(self) -> Mapping[str, Any]:
        return {"type": "folder", "path": str(self._root), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the images. Memory holds the names of one folder and of those above it."""
        images = (image for image in walk_files(self._root) if has_suffix(image[0], IMAGE_SUFFIXES))
        if not is_remote(self._root):
            yield from (self._sample(*image) for image in images)
            return
        with ThreadPoolExecutor(_CONCURRENT_READS) as executor:
            while batch := list(islice(images, 8 * _CONCURRENT_READS)):
                yield from executor.map(lambda image: self._sample(*image), batch)

    def read(self, item: FileItem) -> bytes:
        return read_item_file(self._root / item.path)

    def _sample(self, name: str, siblings: Mapping[str, int]) -> Sample:
        path = PurePosixPath(name)
        key = path.with_suffix("")
        folder = {"folder": str(path.parent)} if len(path.parts) > 1 else {}
        sidecar = read_sidecar(self._sidecar_files(key, siblings), str(key))
        return Sample(
            key=str(key),
            images=(FileItem(path=str(path), length=self._size(path, siblings)),),
            texts=sidecar.texts,
            columns={**_class_columns(path), **sidecar.columns, **folder},
        )

    def _sidecar_files(self, key: PurePosixPath, siblings: Mapping[str, int]) -> dict[str, bytes | ItemError]:
        """Read the sidecar files of an image: suffix in lower case -> content."""
        spellings = (s for suffix in SIDECAR_SUFFIXES for s in (suffix, suffix.upper()))
        return {
            spelling.lower(): self._read_sidecar_file(f"{key}{spelling}")
            for spelling in spellings
            if f"{key.name}{spelling}" in siblings
        }

    def _read_sidecar_file(self, name: str) -> bytes | ItemError:
        path = self._root / name
        with wrap_io_errors(path):
            try:
                return read_bytes(path)
            except (FileNotFoundError, PermissionError) as error:
                if is_remote(self._root):  # expired credentials look the same
                    raise
                return ItemError(f"cannot read {name}: {error.strerror}")

    def _size(self, path: PurePosixPath, siblings: Mapping[str, int]) -> int:
        """Return the size of an image; 0 if unknown, and for a broken link, which is reported when it is read."""
        if is_remote(self._root):
            return max(siblings[path.name], 0)
        try:
            return (self._root / path).stat().st_size
        except OSError:
            return 0


def _class_columns(path: PurePosixPath) -> dict[str, str]:
    """Return the columns `split` and `label` that follow from the folders of an image."""
    folders = path.parts[:-1]
    split = split_from_path(str(path))
    label = {"label": folders[-1]} if len(folders) > bool(split) else {}
    return {"split": split, **label} if split else label
