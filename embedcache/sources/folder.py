"""Images below a folder, with captions in `.txt` or `.json` files beside them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from embedcache.errors import PathError
from embedcache.sources.contract import ImageItem, Sample
from embedcache.sources.files import (
    IMAGE_SUFFIXES,
    has_suffix,
    read_beside,
    read_file,
    walk_files,
)
from embedcache.sources.settings import SourceSettings
from embedcache.sources.sidecar import SIDECAR_SUFFIXES, read_sidecar

SPLIT_FOLDERS = frozenset({"train", "val", "valid", "validation", "test"})


class FolderSource:
    """One sample an image, sorted by relative path, which without its suffix is the key.

    The column `folder` is the path of the image's folder and `label` that folder's name, as of a folder of class
    folders; images in the top folder have none. Below a top folder named `train`, `val`, `valid`, `validation` or
    `test`, in either case, the column `split` is that name. A `label` or `split` in the `.json` beside an image comes
    first; an image right in `train` has no label. An image with no file beside it has no captions. Hidden files are
    left out.

    Args:
        location: the top folder.
        settings: none of them is used.

    Raises:
        PathError: there is no such folder.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.allow_only("folder")
        self._root = Path(location).absolute()
        if not self._root.is_dir():
            raise PathError(f"no such folder: {self._root}")

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        return {"type": "folder", "path": self._root.as_posix(), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Go through the images. Memory holds the names of one folder and of those above it."""
        for path, siblings in walk_files(self._root):
            if has_suffix(path, IMAGE_SUFFIXES):
                yield self._sample(PurePosixPath(path), siblings)

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of one image file."""
        return read_file(self._root / item.path)

    def _sample(self, path: PurePosixPath, siblings: frozenset[str]) -> Sample:
        key = path.with_suffix("")
        folders = path.parts[:-1]
        place = {"folder": str(path.parent)} if folders else {}
        sidecar = read_sidecar(self._beside(key, siblings), str(self._root / key))
        return Sample(
            key=str(key),
            images=(ImageItem(path=str(path), length=_size(self._root / path)),),
            texts=sidecar.texts,
            columns={**_class_columns(folders), **sidecar.columns, **place},
        )

    def _beside(self, key: PurePosixPath, siblings: frozenset[str]) -> dict[str, bytes]:
        """Read the caption files of an image: suffix in lower case -> content."""
        spellings = (s for suffix in SIDECAR_SUFFIXES for s in (suffix, suffix.upper()))
        return {
            spelling.lower(): read_beside(self._root / f"{key}{spelling}")
            for spelling in spellings
            if f"{key.name}{spelling}" in siblings
        }


def _class_columns(folders: Sequence[str]) -> dict[str, str]:
    """Give the split and the label that the folders of an image say; they are named from the top one down."""
    has_split = bool(folders) and folders[0].lower() in SPLIT_FOLDERS
    split = {"split": folders[0]} if has_split else {}
    label = {"label": folders[-1]} if len(folders) > has_split else {}
    return split | label


def _size(path: Path) -> int:
    """Give the size of a file; 0 of a link to nothing, which is reported once it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
