"""WebDataset: tar shards in which the files of one sample share a name and stand together."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from embedcache.errors import PathError
from embedcache.sources.byte_ranges import ByteRanges
from embedcache.sources.contract import ImageItem, Sample
from embedcache.sources.files import IMAGE_SUFFIXES, place_of, relative_to, split_of
from embedcache.sources.img2dataset import read_beside_shard
from embedcache.sources.reading import file_size, reading
from embedcache.sources.settings import SourceSettings
from embedcache.sources.shards import absolute, find_shards, root_of
from embedcache.sources.sidecar import SIDECAR_SUFFIXES, Scalar, Sidecar, read_sidecar
from embedcache.sources.tar_headers import Member, TarBytes, members

_NOTHING = Sidecar()
_LABEL_SUFFIX = ".cls"
_LABEL = re.compile(rb"\s*-?[0-9]{1,18}\s*")
_MOST_LABEL_BYTES = 32


class WebdatasetSource:
    """The samples of tar shards, shard after shard, in the order they stand in.

    A sample's key is the member name up to the first dot of its last part, or the `key` of its
    `.json`. Where img2dataset left a table beside a shard, its columns are the samples' and its captions
    are those of samples without a file of captions. A `.cls` is the number of the sample's class, in the column
    `label`, unless a `.json` says a label; one that is no whole number is the reason in the column `label_error`.
    Of shards below a folder named `train`, `val`, `valid`, `validation` or `test`, in either case, right in the
    source's folder, that name is the column `split`, and keys begin with it: such shards are numbered from 0 in each
    folder. Going through the samples reads headers, captions and labels, no image.

    Args:
        location: a tar, a folder of tars, a pattern such as `shards/{00000..00009}.tar` or `{train,val}.tar`, or
            several of these with `::` between; paths or URLs.
        settings: none of them is used.

    Raises:
        PathError: a shard is missing.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.allow_only("webdataset")
        self._location = absolute(location)
        self._shards = find_shards(self._location)
        self._root = root_of(self._location)
        self._ranges = ByteRanges()

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        return {"type": "webdataset", "path": self._location, "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Go through all samples. Memory holds one sample at a time, and img2dataset's table of one shard."""
        for shard in self._shards:
            yield from self._samples_of(shard)

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of one image from its shard."""
        return self._ranges.read(place_of(self._root, item.path), item.offset, item.length)

    def _samples_of(self, shard: Path) -> Iterator[Sample]:
        size = file_size(shard)
        if size is None:
            raise PathError(f"no such shard: {shard}")
        tar = TarBytes(str(shard), size, partial(self._fetch, shard))
        path = relative_to(str(self._root), str(shard))
        table = read_beside_shard(shard)
        split = split_of(path)
        for key, group in groupby(_files(members(tar)), key=itemgetter(0)):
            sample = _sample(tar, path, key, group, table.get(key, _NOTHING))
            yield _in_split(sample, split) if split else sample

    def _fetch(self, shard: Path, offset: int, length: int) -> bytes:
        with reading(shard):
            return self._ranges.read(shard, offset, length)


class _File(NamedTuple):
    """One file of a shard: its key and lower-case suffix (`.jpg`), and where its bytes are."""

    key: str
    suffix: str
    offset: int
    length: int


def _files(found: Iterable[Member]) -> Iterator[_File]:
    """Split names into key and suffix; hidden files are left out."""
    for name, offset, length in found:
        plain = PurePosixPath(name).as_posix() if "./" in name or "//" in name else name
        folder, slash, file_name = plain.rpartition("/")
        stem, dot, suffix = file_name.partition(".")
        if stem:
            yield _File(folder + slash + stem, (dot + suffix).lower(), offset, length)


def _sample(tar: TarBytes, path: str, key: str, files: Iterable[_File], row: Sidecar) -> Sample:
    images = []
    beside = {}
    columns = row.columns
    for _, suffix, offset, length in files:
        if suffix in IMAGE_SUFFIXES:
            images.append(ImageItem(path=path, offset=offset, length=length))
        elif suffix in SIDECAR_SUFFIXES:
            beside[suffix] = tar.read(offset, length)
        elif suffix == _LABEL_SUFFIX:
            columns = {**columns, **_label(tar.read(offset, min(length, _MOST_LABEL_BYTES)), key)}
    said = read_sidecar(beside, key) if beside else row
    return Sample(
        key=said.key or key,
        images=tuple(images),
        texts=said.texts or row.texts,
        columns={**columns, **said.columns} if columns else said.columns,
    )


def _label(content: bytes, key: str) -> Mapping[str, Scalar]:
    if _LABEL.fullmatch(content):
        return {"label": int(content)}
    return {"label_error": f"{key}{_LABEL_SUFFIX} holds {content!r}; expected the number of a class"}


def _in_split(sample: Sample, split: str) -> Sample:
    return replace(sample, key=f"{split}/{sample.key}", columns={"split": split, **sample.columns})
