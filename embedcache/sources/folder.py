"""Images, recordings, videos and point clouds below a folder, with captions in `.txt` or `.json` files beside them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import is_remote, open_path, reading
from embedcache.modalities import noun
from embedcache.sources.base import FileItem, Sample
from embedcache.sources.captions import SIDECAR_SUFFIXES, read_sidecar
from embedcache.sources.files import (
    MEDIA_SUFFIXES,
    TABLE_SUFFIXES,
    TAR_SUFFIXES,
    add_sound,
    file_size,
    is_folder,
    read_bytes,
    read_item_file,
    split_from_path,
    walk_files,
)
from embedcache.sources.settings import SourceSettings

_SUFFIXES = {suffix: modality for modality, suffixes in MEDIA_SUFFIXES.items() for suffix in sorted(suffixes)}
"""Suffix -> modality; of the files that share a name, the first in this order gives the sample its place."""
_CONCURRENT_READS = 32  # of caption files on a server, which take tens of milliseconds each


class FolderSource:
    """One sample per name of files, sorted by relative path; the path without its suffix is the key.

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
        # The suffixes of files that are looked for beside others, in the order in which they give a sample its place.
        self._spellings = [spelling for suffix in _SUFFIXES for spelling in (suffix, suffix.upper())]
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
        firsts = (entry for entry in walk_files(self._root) if self._is_used(entry[0]) and self._is_first(*entry))
        if not is_remote(self._root):
            yield from (self._sample(*first) for first in firsts)
            return
        with ThreadPoolExecutor(_CONCURRENT_READS) as executor:
            while batch := list(islice(firsts, 8 * _CONCURRENT_READS)):
                yield from executor.map(lambda first: self._sample(*first), batch)

    def read(self, item: FileItem) -> bytes:
        return read_item_file(self._root / item.path)

    def _is_used(self, name: str) -> bool:
        """Return whether a file is of a kind that samples have; count it if not. Text only, as this runs per file."""
        stem, dot, ending = name.rpartition("/")[2].rpartition(".")
        suffix = (dot + ending).lower() if stem else ""
        is_used = suffix in _SUFFIXES or suffix in SIDECAR_SUFFIXES
        if not is_used:
            self.skipped[suffix or "files without a suffix"] += 1
        return is_used

    def _sample(self, name: str, siblings: Mapping[str, int]) -> Sample:
        path = PurePosixPath(name)
        key = path.with_suffix("")
        folder = {"folder": str(path.parent)} if len(path.parts) > 1 else {}
        files = self._files(path, siblings)
        sidecar = read_sidecar(self._sidecar_files(key, siblings), str(key))
        return Sample(
            key=str(key),
            images=files.get("image", ()),
            texts=sidecar.texts,
            columns={**_class_columns(path), **sidecar.columns, **folder},
            files=add_sound(files),
        )

    def _files(self, path: PurePosixPath, siblings: Mapping[str, int]) -> dict[str, tuple[FileItem, ...]]:
        """Return modality -> the file of a sample whose first file is at `path`."""
        files: dict[str, tuple[FileItem, ...]] = {}
        others = [path.with_suffix(suffix) for suffix in self._media_beside(path, siblings)]
        for file in (path, *others):
            modality = _SUFFIXES[file.suffix.lower()]
            if modality in files:
                raise SourceError(
                    f"{self._root / files[modality][0].path} and {file.name} are both {noun(modality)} of one sample; "
                    "rename one of them"
                )
            files[modality] = (FileItem(path=str(file), length=self._size(file, siblings)),)
        return files

    def _sidecar_files(self, key: PurePosixPath, siblings: Mapping[str, int]) -> dict[str, bytes | ItemError]:
        """Read the sidecar files of a sample: suffix in lower case -> content."""
        spellings = (s for suffix in SIDECAR_SUFFIXES for s in (suffix, suffix.upper()))
        return {
            spelling.lower(): self._read_sidecar_file(f"{key}{spelling}")
            for spelling in spellings
            if f"{key.name}{spelling}" in siblings
        }

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

    def _size(self, path: PurePosixPath, siblings: Mapping[str, int]) -> int:
        """Return the size of a file; 0 if unknown, and for a broken link, which is reported when it is read."""
        if is_remote(self._root):
            return max(siblings[path.name], 0)
        try:
            return (self._root / path).stat().st_size
        except OSError:
            return 0

    def _is_first(self, name: str, siblings: Mapping[str, int]) -> bool:
        """Return whether a file is the first of its sample: every image, and files without others before them."""
        file_name = name.rpartition("/")[2]  # text only, as this runs per file
        stem, dot, ending = file_name.rpartition(".")
        suffix = dot + ending
        modality = _SUFFIXES.get(suffix.lower())
        if modality is None or not stem:
            return False
        if modality == "image" or suffix not in self._spellings:  # .Wav is not looked for beside others
            return True
        before = self._spellings[: self._spellings.index(suffix)]
        return not any(stem + other in siblings for other in before)

    def _media_beside(self, path: PurePosixPath, siblings: Mapping[str, int]) -> list[str]:
        """Return the suffixes of other files of a sample but images, in the order of `_SUFFIXES`."""
        media = (suffix for suffix in self._spellings if _SUFFIXES[suffix.lower()] != "image")
        return [other for other in media if path.stem + other in siblings and other != path.suffix]


def _class_columns(path: PurePosixPath) -> dict[str, str]:
    """Return the columns `split` and `label` that follow from the folders of a file."""
    folders = path.parts[:-1]
    split = split_from_path(str(path))
    label = {"label": folders[-1]} if len(folders) > bool(split) else {}
    return {"split": split, **label} if split else label
