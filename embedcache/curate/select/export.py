"""Export of selections: DataComp's uids, a list of keys, or new WebDataset shards."""

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
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
from embedcache.sources.base import FileItem, Source, TextItem
from embedcache.sources.captions import to_sidecar
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
        DataError: a key is not in the cache, or, for `datacomp`, not a uid; or, for `webdataset`, as `write_shards`.
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
    key, the captions with their languages and the columns, which `embedcache extract` reads again (`to_sidecar`), and
    its `.txt` the first caption, for other readers. The bytes of images are those of the source. The same selection
    gives the same bytes, and the folder appears when it is complete. Memory: one image, the tables of those samples
    and of their items, and the samples of one shard.

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
            _write_shard(temporary / f"{number:05d}.tar", samples, part, source)
            progress.advance(part.stop - part.start)
        progress.finish()


class _Samples:
    """Tables of some samples, (M,) ascending rows of a cache, and of their items."""

    def __init__(self, cache: Cache, rows: Ints) -> None:
        self._rows = rows
        self._columns = cache.samples.take(pa.array(rows))
        self._items = {name: _Items(cache, name, rows) for name in ("image", "text") if name in cache.info.num_items}
        self._check_single("image")

    def _check_single(self, modality: str) -> None:
        """Check that no sample has several files of a modality: their members would have the same name."""
        num_items_M = self._items[modality].num_items_M if modality in self._items else np.zeros(1, int)
        several = np.flatnonzero(num_items_M > 1)
        if len(several):
            key = self._columns["key"][int(several[0])].as_py()
            raise DataError(
                f"expected one image per sample of WebDataset, got several in {len(several):,} of {len(self._rows):,} "
                f"samples, first {key!r}; use --format keys"
            )

    def files(self, part: slice, source: Source) -> Iterator[tuple[str, bytes]]:
        """Iterate over the files of some samples, given by their positions: name and content."""
        columns = self._columns.slice(part.start, part.stop - part.start).to_pylist()
        items = {name: of.lists(part) for name, of in self._items.items()}
        for position, row in enumerate(self._rows[part].tolist()):
            of_sample = {name: lists[position] for name, lists in items.items()}
            for suffix, data in _sample_files(columns[position], of_sample, source):
                yield f"{row:09d}.{suffix}", data


class _Items:
    """The items of some samples of one modality: those of sample i are `num_items_M[i]` rows of a table."""

    def __init__(self, cache: Cache, modality: str, rows: Ints) -> None:
        items = cache.items(modality)
        self._items = items.filter(pc.is_in(items["sample"], pa.array(rows)))
        samples_N = self._items["sample"].to_numpy()
        self._starts_M, self._stops_M = (np.searchsorted(samples_N, rows, side) for side in ("left", "right"))
        self.num_items_M: Ints = self._stops_M - self._starts_M

    def lists(self, part: slice) -> list[list[dict[str, Any]]]:
        """Return the items of each of some samples, given by their positions."""
        starts, stops = self._starts_M[part], self._stops_M[part]
        first = int(starts[0])
        items = self._items.slice(first, int(stops[-1]) - first).to_pylist()
        return [items[start:stop] for start, stop in zip(starts - first, stops - first, strict=True)]


def _sample_files(
    columns: Mapping[str, Any], items: Mapping[str, Sequence[Mapping[str, Any]]], source: Source
) -> Iterator[tuple[str, bytes]]:
    """Iterate over the files of one sample: suffix and content."""
    for item in items.get("image", ()):
        try:
            data = source.read(FileItem(**{name: item[name] for name in ("path", "offset", "length")}))
        except ItemError as error:
            raise DataError(f"the image of {columns['key']!r} cannot be read any more: {error}") from error
        yield _suffix(data), data
    texts = [TextItem(text=item["text"], language=item["language"]) for item in items.get("text", ())]
    if texts:
        yield "txt", texts[0].text.encode()
    yield "json", to_sidecar(columns["key"], texts, {name: columns[name] for name in columns if name != "key"})


def _write_shard(path: Path, samples: _Samples, part: slice, source: Source) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in samples.files(part, source):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _suffix(data: bytes) -> str:
    """Return an image's file extension by its first bytes, as fonts and tables have no file names."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), "jpg")
