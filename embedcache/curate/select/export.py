"""Selections for other tools: DataComp's uids, a list of keys, or new WebDataset shards.

New WebDataset shards of some samples: the images' own bytes, captions and columns.
"""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Ints, blocks
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, ItemError, PathError
from embedcache.files import disk_errors, partial_path, replacing, write_atomic
from embedcache.progress import NullProgress, Progress
from embedcache.sources.base import ImageItem, Source
from embedcache.sources.open import reopen_source
from embedcache.store.cache import Cache

Format: TypeAlias = Literal["datacomp", "keys", "webdataset"]

_UID = re.compile(r"[0-9a-fA-F]{32}")


def export(
    cache_path: Path | str, selection: Path, out_path: Path, form: Format, *, progress: Progress | None = None
) -> int:
    """Write a selection in another tool's format.

    `datacomp` is a `.npy` of dtype `u8,u8`, the halves of DataComp's uids, sorted; `keys` is a text with a key a line,
    in the order of the cache; `webdataset` is a folder of tars, see `write_shards`. A file is whole or absent.

    Args:
        cache_path: the cache that the selection is of.
        selection: Parquet, or a text with a key a line.
        out_path: a file; for `webdataset` a folder.
        form: the format.
        progress: told about samples.

    Returns:
        How many samples were written.

    Raises:
        DataError: keys that are no uids, for `datacomp`; or the selection names a key that the cache has not.
        PathError: there is no such selection; for `webdataset`, the folder is there already, or the source is gone.
    """
    cache = Cache(cache_path)
    rows = read_selection(selection, [cache])
    if form == "webdataset":
        write_shards(cache, rows, out_path, progress=progress)
        return len(rows)
    if out_path.is_dir():
        raise PathError(f"{out_path} is a folder; give the path of a file for --format {form}")
    all_keys = cache.samples["key"].to_pylist()
    keys = [all_keys[row] for row in rows.tolist()]
    if form == "keys":
        _refuse_breaks(keys)
        write_atomic(out_path, "".join(f"{key}\n" for key in keys).encode())
    else:
        uids = to_uids(keys)
        with replacing(out_path) as temporary, temporary.open("wb") as file:
            np.save(file, uids)
    return len(rows)


def to_uids(keys: Sequence[str]) -> Array:
    """Make DataComp's uids of keys of 32 hexadecimal digits: (M,) of dtype `u8,u8`, sorted.

    Raises:
        DataError: a key is no such number.
    """
    others = [key for key in keys if not _UID.fullmatch(key)]
    if others:
        raise DataError(
            f"{len(others):,} of {len(keys):,} keys are no uids of DataComp, which are 32 hexadecimal digits, first "
            f"{others[0]!r}; take --format keys, or extract with --key-column uid"
        )
    return np.array(sorted((int(key[:16], 16), int(key[16:], 16)) for key in keys), np.dtype("u8,u8"))


def _refuse_breaks(keys: Sequence[str]) -> None:
    broken = [key for key in keys if "\n" in key]
    if broken:
        raise DataError(f"{len(broken):,} keys hold a line break, first {broken[0]!r}; a list has a key a line")


SAMPLES_A_SHARD = 10_000

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tif"),
    (b"MM\x00*", "tif"),
)


def write_shards(
    cache: Cache, rows: Ints, folder: Path, *, size: int = SAMPLES_A_SHARD, progress: Progress | None = None
) -> None:
    """Write samples as `00000.tar` … into a new folder, in the order of the cache.

    A sample's files are named by its row, in nine digits, as keys may hold dots and slashes; its `.json` holds the
    `key`, the `captions` and the columns, which `embedcache extract` reads again, and its `.txt` the first caption, for
    other readers. Languages of captions are not kept. The images' bytes are the source's. The same selection gives the
    same bytes, and the folder is whole or absent. Memory: one image, and the items of those samples.

    Args:
        cache: whose source is still there.
        rows: samples, ascending.
        folder: there must be none, or an empty one.
        size: samples a shard.
        progress: told about samples.

    Raises:
        PathError: the source is gone, or the folder is not empty.
        DataError: an image cannot be read any more, or a sample has several images: a tar has one file of a suffix.
    """
    progress = progress or NullProgress()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise PathError(f"{folder} is not empty, or no folder; give the path of a new one")
    source = reopen_source(cache.info.source)
    samples = _Samples(cache, rows)
    temporary = partial_path(folder)
    temporary.mkdir(parents=True)
    try:
        with disk_errors(folder):
            progress.start("writing shards", len(rows), "samples")
            for number, part in enumerate(blocks(len(rows), size)):
                _write_shard(temporary / f"{number:05d}.tar", samples, range(part.start, part.stop), source)
                progress.advance(part.stop - part.start)
            progress.finish()
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Samples:
    """The tables of some samples, and who has which items."""

    def __init__(self, cache: Cache, rows: Ints) -> None:
        self.rows = rows
        self._columns = cache.samples.take(pa.array(rows))
        self._images = _by_sample(cache, "image", rows)
        self._texts = _by_sample(cache, "text", rows)
        several = [row for row, items in self._images.items() if len(items) > 1]
        if several:
            key = cache.samples["key"][several[0]].as_py()
            raise DataError(
                f"{len(several):,} of {len(rows):,} samples have several images, first {key!r}; a sample of WebDataset "
                "has one: take --format keys"
            )

    def said(self, position: int) -> dict[str, Any]:
        """Give the key, the captions and the columns of one sample."""
        columns = {name: self._columns[name][position].as_py() for name in self._columns.column_names}
        captions = [item["text"] for item in self._texts.get(int(self.rows[position]), [])]
        return {**columns, "captions": captions}

    def image(self, position: int) -> ImageItem | None:
        """Say where the bytes of one sample's image are."""
        items = self._images.get(int(self.rows[position]), [])
        return ImageItem(**{name: items[0][name] for name in ("path", "offset", "length")}) if items else None


def _by_sample(cache: Cache, modality: str, rows: Ints) -> dict[int, list[dict[str, Any]]]:
    if modality not in cache.info.num_items:
        return {}
    items = cache.items(modality)
    found: dict[int, list[dict[str, Any]]] = {}
    for item in items.filter(pc.is_in(items["sample"], pa.array(rows))).to_pylist():
        found.setdefault(item["sample"], []).append(item)
    return found


def _write_shard(path: Path, samples: _Samples, positions: range, source: Source) -> None:
    with tarfile.open(path, "w") as tar:
        for position in positions:
            for suffix, data in _files(samples, position, source):
                member = tarfile.TarInfo(f"{samples.rows[position]:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _files(samples: _Samples, position: int, source: Source) -> Iterator[tuple[str, bytes]]:
    said, image = samples.said(position), samples.image(position)
    if image is not None:
        try:
            data = source.read(image)
        except ItemError as error:
            raise DataError(f"the image of {said['key']!r} cannot be read any more: {error}") from error
        yield _suffix(data), data
    if said["captions"]:
        yield "txt", said["captions"][0].encode()
    yield "json", json.dumps(said, ensure_ascii=False).encode()


def _suffix(data: bytes) -> str:
    """Name the format of an image by its first bytes: a font or a table has no file names."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), "jpg")
