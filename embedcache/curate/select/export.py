"""Export of selections: DataComp's uids, a list of keys, or new WebDataset shards."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Ints, blocks
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, ItemError, PathError
from embedcache.files import building
from embedcache.outputs import check_output, new_output
from embedcache.progress import NullProgress, Progress
from embedcache.sources.base import FileItem, Source
from embedcache.sources.open import reopen_source
from embedcache.store.cache import Cache
from embedcache.store.checksums import BLOCK

Format: TypeAlias = Literal["datacomp", "keys", "webdataset"]

_UID = "^[0-9a-fA-F]{32}$"


def export_selection(
    cache_path: Path | str, selection: Path, out_path: Path, format_name: Format, *, progress: Progress | None = None
) -> int:
    """Write a selection in another tool's format, and return the number of samples.

    `datacomp` is a `.npy` file of dtype `u8,u8`, the halves of DataComp's uids, sorted; `keys` is a text file with one
    key per line, in the order of the cache; `webdataset` is a folder of tars, see `write_shards`. Writes are atomic.

    Raises:
        DataError: a key is not in the cache, or, for `datacomp`, not a uid.
        PathError: the selection does not exist, the file or, for `webdataset`, the folder exists, or the source does
            not.
    """
    if format_name != "webdataset":
        check_output(out_path)
    cache = Cache(cache_path)
    rows = read_selection(selection, [cache])
    if format_name == "webdataset":
        write_shards(cache, rows, out_path, progress=progress)
        return len(rows)
    is_selected_S = np.zeros(cache.info.num_samples, bool)
    is_selected_S[rows] = True
    keys = cache.column("key").filter(pa.array(is_selected_S))
    if format_name == "keys":
        broken = keys.filter(pc.match_substring(keys, "\n"))
        if len(broken):
            raise DataError(
                f"expected keys without line breaks, got {len(broken):,} with one, first {broken[0].as_py()!r}"
            )
        with new_output(out_path) as temporary, temporary.open("wb") as file:
            for block in blocks(len(keys), BLOCK):
                file.write("".join(f"{key}\n" for key in keys[block].to_pylist()).encode())
    else:
        uids = to_uids(keys)
        uids = uids[np.lexsort((uids["f1"], uids["f0"]))]
        with new_output(out_path) as temporary, temporary.open("wb") as file:
            np.save(file, uids)
    return len(rows)


def to_uids(keys: pa.ChunkedArray) -> Array:
    """Convert keys of 32 hexadecimal digits, else `DataError`, to DataComp's uids, in order: (M,) of dtype `u8,u8`."""
    others = keys.filter(pc.invert(pc.match_substring_regex(keys, _UID)))
    if len(others):
        raise DataError(
            f"expected DataComp's uids of 32 hexadecimal digits, got {len(others):,} other keys of {len(keys):,}, "
            f"first {others[0].as_py()!r}; use --format keys, or extract with --key-column uid"
        )
    uids = np.empty(len(keys), np.dtype("u8,u8"))
    for block in blocks(len(keys), BLOCK):
        halves_B2 = np.frombuffer(bytes.fromhex("".join(keys[block].to_pylist())), ">u8").reshape(-1, 2)
        uids["f0"][block], uids["f1"][block] = halves_B2.T
    return uids


_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tif"),
    (b"MM\x00*", "tif"),
)


def write_shards(
    cache: Cache, rows: Ints, folder: Path, *, size: int = 10_000, progress: Progress | None = None
) -> None:
    """Write samples as `00000.tar` … into a new folder, in the order of the cache.

    A sample's files are named by its row, in nine digits, as keys may contain dots and slashes. Its `.json` holds the
    `key`, the `captions` and the columns, which `embedcache extract` reads again, and its `.txt` the first caption, for
    other readers. Languages of captions are lost. The bytes of images are those of the source. The same selection gives
    the same bytes, and the folder appears when it is complete. Memory: one image, and the items of those samples.

    Raises:
        PathError: the source does not exist, or the folder is not empty.
        DataError: an image cannot be read any more, or a sample has several images.
    """
    progress = progress or NullProgress()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        got = "a file" if folder.is_file() else "a folder that is not empty"
        raise PathError(f"{folder}: expected a new or empty folder, got {got}; give the path of a new one")
    source = reopen_source(cache.info.source)
    samples = _Samples(cache, rows)
    with building(folder) as temporary:
        progress.start("writing shards", len(rows), "samples")
        for number, part in enumerate(blocks(len(rows), size)):
            _write_shard(temporary / f"{number:05d}.tar", samples, range(part.start, part.stop), source)
            progress.advance(part.stop - part.start)
        progress.finish()


class _Samples:
    """Tables of some samples and their items."""

    def __init__(self, cache: Cache, rows: Ints) -> None:
        self.rows = rows
        self._columns = cache.samples.take(pa.array(rows))
        self._images = _by_sample(cache, "image", rows)
        self._texts = _by_sample(cache, "text", rows)
        several = [row for row, items in self._images.items() if len(items) > 1]
        if several:
            key = cache.column("key")[several[0]].as_py()
            raise DataError(
                f"expected one image per sample of WebDataset, got several in {len(several):,} of {len(rows):,} "
                f"samples, first {key!r}; use --format keys"
            )

    def files(self, position: int, source: Source) -> Iterator[tuple[str, bytes]]:
        """Iterate over the files of one sample: suffix and content."""
        row = int(self.rows[position])
        columns = {name: self._columns[name][position].as_py() for name in self._columns.column_names}
        captions = [item["text"] for item in self._texts.get(row, [])]
        for item in self._images.get(row, []):
            try:
                data = source.read(FileItem(**{name: item[name] for name in ("path", "offset", "length")}))
            except ItemError as error:
                raise DataError(f"the image of {columns['key']!r} cannot be read any more: {error}") from error
            yield _suffix(data), data
        if captions:
            yield "txt", captions[0].encode()
        yield "json", json.dumps({**columns, "captions": captions}, ensure_ascii=False).encode()


def _by_sample(cache: Cache, modality: str, rows: Ints) -> dict[int, list[dict[str, Any]]]:
    if modality not in cache.info.num_items:
        return {}
    items = cache.items(modality)
    by_sample: dict[int, list[dict[str, Any]]] = {}
    for item in items.filter(pc.is_in(items["sample"], pa.array(rows))).to_pylist():
        by_sample.setdefault(item["sample"], []).append(item)
    return by_sample


def _write_shard(path: Path, samples: _Samples, positions: range, source: Source) -> None:
    with tarfile.open(path, "w") as tar:
        for position in positions:
            for suffix, data in samples.files(position, source):
                member = tarfile.TarInfo(f"{samples.rows[position]:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _suffix(data: bytes) -> str:
    """Return an image's file extension by its first bytes, as fonts and tables have no file names."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), "jpg")
