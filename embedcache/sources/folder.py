"""Images, recordings, videos and point clouds below a folder, with captions in `.txt` or `.json` files beside them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import is_remote, open_path, reading
from embedcache.modalities import FileItem, Sample, noun
from embedcache.sources.files import (
    MEDIA_SUFFIXES,
    SIDECAR_SUFFIXES,
    TABLE_SUFFIXES,
    TAR_SUFFIXES,
    add_sound,
    file_size,
    is_folder,
    read_bytes,
    read_item_file,
    read_sidecar,
    split_from_path,
    walk_groups,
)
from embedcache.sources.open import SourceSettings

_SUFFIXES = {suffix: modality for modality, suffixes in MEDIA_SUFFIXES.items() for suffix in suffixes}
"""Suffix -> modality."""
_CONCURRENT_READS = 32  # of caption files on a server, which take tens of milliseconds each


class FolderSource:
    """One sample per name of files, sorted by key, which is the relative path without its suffix.

    Files of one folder that differ in their suffix only, such as `a.jpg`, `a.wav` and `a.npz`, are items of one sample,
    at most one of each modality. A video is a recording too, unless there is one of that name; the sound of a silent
    video is an item that fails.

    The column `folder` is the path of the file's folder and `label` the name of that folder, as in a folder of class
    folders; files in the top folder have neither. Below a top folder named `train`, `val`, `valid`, `validation` or
    `test`, in any case, the column `split` is that name; a file directly in `train` has no label. A `label` or
    `split` in the `.json` beside a file takes precedence. A file without sidecar files has no captions. Hidden
    files are skipped, and so are files of other kinds, which `skipped` counts by suffix. The location is the top
    folder, a path or a URL.
    """

    items_are_files = True

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("folder")
        self._settings = settings
        self._root = open_path(location).absolute()
        if not is_folder(self._root, TABLE_SUFFIXES | TAR_SUFFIXES):
            state = "does not exist" if file_size(self._root) is None else "is a file"
            raise PathError(f"expected a folder of images, got {self._root}, which {state}; check the path")
        self.skipped: Counter[str] = Counter()

    def describe(self) -> Mapping[str, Any]:
        return {"type": "folder", "path": str(self._root), "settings": self._settings.to_json()}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the samples. Memory holds the names of one folder and of those above it."""
        self.skipped.clear()
        groups = filter(self._has_items, walk_groups(self._root))
        if not is_remote(self._root):
            yield from map(self._sample, groups)
            return
        with ThreadPoolExecutor(_CONCURRENT_READS) as executor:
            while batch := list(islice(groups, 8 * _CONCURRENT_READS)):
                yield from executor.map(self._sample, batch)

    def read(self, item: FileItem) -> bytes:
        return read_item_file(self._root / item.path)

    def _has_items(self, group: tuple[str, Mapping[str, int]]) -> bool:
        """Return whether files of one name are a sample; count those of other kinds."""
        key, files = group
        suffixes = [path[len(key) :].lower() for path in files]
        for suffix in suffixes:
            if suffix not in _SUFFIXES and suffix not in SIDECAR_SUFFIXES:
                self.skipped[suffix or "files without a suffix"] += 1
        return any(suffix in _SUFFIXES for suffix in suffixes)

    def _sample(self, group: tuple[str, Mapping[str, int]]) -> Sample:
        key, files = group
        items: dict[str, tuple[FileItem, ...]] = {}
        sidecar_files = {}
        for path, size in files.items():
            suffix = path[len(key) :].lower()
            modality = _SUFFIXES.get(suffix)
            if suffix in SIDECAR_SUFFIXES:
                sidecar_files[suffix] = self._read_sidecar_file(path)
            elif modality in items:
                both = f"{self._root / items[modality][0].path} and {PurePosixPath(path).name}"
                raise SourceError(f"{both} are both {noun(modality)} of one sample; rename one of them")
            elif modality is not None:
                items[modality] = (FileItem(path=path, length=self._size(path, size)),)

        folder = key.rpartition("/")[0]
        sidecar = read_sidecar(sidecar_files, key)
        return Sample(
            key=key,
            images=items.get("image", ()),
            texts=sidecar.texts,
            columns={**_class_columns(key, folder), **sidecar.columns, **({"folder": folder} if folder else {})},
            files=add_sound(items),
        )

    def _read_sidecar_file(self, name: str) -> bytes | ItemError:
        path = self._root / name
        with reading(path):
            try:
                return read_bytes(path)
            except ItemError as error:
                return ItemError(f"cannot read {name}: {error}")
            except (FileNotFoundError, PermissionError) as error:
                if is_remote(self._root):  # expired credentials look the same
                    raise
                return ItemError(f"cannot read {name}: {error.strerror}")

    def _size(self, path: str, listed: int) -> int:
        """Return the size of a file; 0 if unknown, and for a broken link, which is reported when it is read."""
        if is_remote(self._root):
            return max(listed, 0)
        try:
            return (self._root / path).stat().st_size
        except OSError:
            return 0


def _class_columns(key: str, folder: str) -> dict[str, str]:
    """Return the columns `split` and `label` that follow from the folders of a file."""
    split = split_from_path(key)
    label = {} if folder in ("", split) else {"label": folder.rpartition("/")[2]}
    return {"split": split, **label} if split else label
