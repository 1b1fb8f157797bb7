"""Export selections as DataComp's uids, as a list of keys, or as new WebDataset shards."""

import io
import logging
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Ints, blocks, distinct
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, ItemError, pluralize
from embedcache.files import building
from embedcache.modalities import FILE_MODALITIES, MODALITIES, FileItem, Source, TextItem, one_noun
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import check_output, new_output
from embedcache.sources.files import MEDIA_SUFFIXES, to_sidecar
from embedcache.sources.open import reopen_source
from embedcache.sources.table import INTERVAL_NAMES
from embedcache.store.cache import Cache, Keys
from embedcache.store.commits import has_failed
from embedcache.store.tables import BLOCK

Format: TypeAlias = Literal["datacomp", "keys", "webdataset"]

_log = logging.getLogger(__name__)

_UID = "^[0-9a-fA-F]{32}$"


def export_selection(
    cache_path: Path | str, selection: Path, out_path: Path, format_name: Format, *, progress: Progress | None = None
) -> int:
    """Write a selection in another tool's format, and return the number of samples.

    `datacomp` is a `.npy` file of dtype `u8,u8`, the sorted halves of DataComp's uids. `keys` is a text file with one
    key per line, in the order of the cache. `webdataset` is a folder of tars, see `write_shards`. Writes are atomic.

    Raises:
        DataError: a key is not in the cache or, for `datacomp`, not a uid. `webdataset` raises it as `write_shards`.
        PathError: the selection or, for `webdataset`, the source does not exist, or the output exists.
    """
    if format_name != "webdataset":
        check_output(out_path)

    cache = Cache(cache_path)
    rows = read_selection(selection, [cache])
    if format_name == "webdataset":
        return write_shards(cache, rows, out_path, progress=progress)

    keys = Keys([cache], rows).array
    if format_name == "keys":
        # A line break would make two keys of one.
        broken = keys.filter(pc.match_substring(keys, "\n"))
        if len(broken):
            raise DataError(f"expected keys without line breaks, got {len(broken):,}, first {broken[0].as_py()!r}")

        with new_output(out_path) as temporary, temporary.open("wb") as file:
            for block in blocks(len(keys), BLOCK):
                file.write("".join(f"{key}\n" for key in keys[block].to_pylist()).encode())
    else:
        # DataComp's loader expects sorted uids.
        uids = to_uids(keys)
        uids = uids[np.lexsort((uids["f1"], uids["f0"]))]
        with new_output(out_path) as temporary, temporary.open("wb") as file:
            np.save(file, uids)
    return len(rows)


def to_uids(keys: pa.ChunkedArray) -> Array:
    """Convert keys to DataComp's uids, in order: (M,) of dtype `u8,u8`.

    Raises `DataError` if a key is not a number of 32 hexadecimal digits.
    """
    invalid = keys.filter(pc.invert(pc.match_substring_regex(keys, _UID)))
    if len(invalid):
        raise DataError(
            f"expected keys of 32 hexadecimal digits, got {len(invalid):,} others, first {invalid[0].as_py()!r}"
        )
    uids = np.empty(len(keys), np.dtype("u8,u8"))
    for block in blocks(len(keys), BLOCK):
        halves_B2 = np.frombuffer(bytes.fromhex("".join(keys[block].to_pylist())), ">u8").reshape(-1, 2)
        uids["f0"][block] = halves_B2[:, 0]
        uids["f1"][block] = halves_B2[:, 1]
    return uids


_SUFFIXES = {"image": "jpg", "audio": "wav", "video": "mp4", "points": "npz"}
"""Modality -> suffix of items without a separate file, such as rows of a table. Readers look at the bytes."""


def write_shards(
    cache: Cache, rows: Ints, folder: Path, *, size: int = 10_000, progress: Progress | None = None
) -> int:
    """Write samples, (M,) ascending rows of the cache, as `00000.tar` … into a new folder, and return their number.

    A sample's files are named by its row, in nine digits, as keys may contain dots and slashes. Its `.json` contains
    the key, the captions with their languages and the columns, so that `embedcache extract` can read them again
    (`to_sidecar`). Its `.txt` contains the first caption, for other readers. Images, audio, videos and point clouds are
    the bytes of the source. The audio of a video stays in the video's file.

    A sample with an item that no encoder could encode is left out, with a warning. The same selection gives the same
    bytes, and the folder appears when it is complete. Memory: one file, the tables of the samples and of their items,
    and the samples of one shard.

    Raises:
        PathError: the source does not exist, or the folder is not empty.
        DataError: a file cannot be read any more. Also, before anything is written, if a sample has several files of
            one modality, or only an interval of an audio or video file.
    """
    progress = progress or NullProgress()
    with building(folder) as temporary:
        source = reopen_source(cache.info.source, cache.info.index_digest)

        # Items that cannot be decoded would also stop whoever reads the shards.
        num_selected = len(rows)
        rows = rows[~_have_failed(cache)[rows]]
        if len(rows) < num_selected:
            _log.warning(
                "left out %s with an item that no encoder could encode: embedcache inspect names them",
                pluralize(num_selected - len(rows), "sample"),
            )

        is_selected_S = np.zeros(len(cache), bool)
        is_selected_S[rows] = True
        samples = cache.samples.filter(is_selected_S)
        tables = {}
        for name in MODALITIES:
            if name in cache.info.num_items:
                items = cache.items(name)
                tables[name] = items.filter(is_selected_S[items["sample"].to_numpy()])

        for modality in FILE_MODALITIES:
            if modality.name in tables:
                _check_files(cache, modality.name, tables[modality.name], len(rows))

        progress.start("writing shards", len(rows), "samples")
        for number, part in enumerate(blocks(len(rows), size)):
            shard_items = {name: _items_by_sample(table, rows[part]) for name, table in tables.items()}
            with tarfile.open(temporary / f"{number:05d}.tar", "w") as tar:
                for row, columns in zip(rows[part].tolist(), samples[part].to_pylist(), strict=True):
                    sample_items = {name: by_row[row] for name, by_row in shard_items.items()}
                    for suffix, data in _sample_files(columns, sample_items, source):
                        member = tarfile.TarInfo(f"{row:09d}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            progress.advance(part.stop - part.start)
        progress.finish()
    return len(rows)


def _have_failed(cache: Cache) -> Bools:
    """Return whether each sample has an item that an encoder tried and none could encode: (S,) bool.

    The audio of a video does not count, as both are in the same file.
    """
    have_failed_S = np.zeros(cache.info.num_samples, bool)
    for modality in (each.name for each in FILE_MODALITIES if each.name in cache.info.num_items):
        items = cache.items(modality)
        failed_N, is_valid_N = np.zeros((2, len(items)), bool)

        # An item that one encoder refused may be valid for another.
        for feature in cache.features(modality):
            rows, reasons = feature.failed
            failed_N[rows[[has_failed(reason) for reason in reasons.to_pylist()]]] = True
            is_valid_N |= feature.valid

        failed_N &= ~is_valid_N
        if modality == "audio" and "video" in cache.info.num_items:
            failed_N &= ~pc.is_in(items["path"], cache.items("video")["path"]).to_numpy()
        have_failed_S[items["sample"].to_numpy()[failed_N]] = True
    return have_failed_S


def _check_files(cache: Cache, modality: str, items: pa.Table, num_samples: int) -> None:
    """Check that the files of a modality can be members of a tar: one whole file per sample."""
    samples_N = items["sample"].to_numpy()
    has_interval_N = np.zeros(len(items), bool)
    for name in set(INTERVAL_NAMES) & set(items.column_names):
        has_interval_N |= pc.is_valid(items[name]).to_numpy()
    is_repeated_N = np.diff(samples_N, prepend=-1) == 0

    thing = one_noun(modality)
    for is_refused_N, expected, got in (
        (is_repeated_N, f"one {thing}", "several"),
        (has_interval_N, f"a whole {thing}", "intervals of longer ones"),
    ):
        refused = distinct(samples_N[is_refused_N])
        if len(refused):
            raise DataError(
                f"expected {expected} per sample of WebDataset, got {got} in {len(refused):,} of {num_samples:,} "
                f"samples, first {cache.key(int(refused[0]))!r}; use --format keys"
            )


def _items_by_sample(items: pa.Table, rows: Ints) -> Mapping[int, list[dict[str, Any]]]:
    """Return the items of consecutive samples of a table, which is in the order of its samples."""
    start, stop = np.searchsorted(items["sample"].to_numpy(), [rows[0], rows[-1] + 1])
    by_sample: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for item in items.slice(start, stop - start).to_pylist():
        by_sample[item["sample"]].append(item)
    return by_sample


def _sample_files(
    columns: Mapping[str, Any], items: Mapping[str, Sequence[Mapping[str, Any]]], source: Source
) -> Iterator[tuple[str, bytes]]:
    """Iterate over the files of one sample: suffix and content."""
    files = {}
    for modality in FILE_MODALITIES:
        for item in items.get(modality.name, ()):
            files[modality.name] = FileItem(path=item["path"], offset=item["offset"], length=item["length"])

    for name, file in files.items():
        if name == "audio" and file == files.get("video"):  # the audio of the video
            continue
        try:
            data = source.read(file)
        except ItemError as error:
            raise DataError(f"the {one_noun(name)} of {columns['key']!r} cannot be read any more: {error}") from error
        yield _suffix(name, file.path), data

    texts = [TextItem(text=item["text"], language=item["language"]) for item in items.get("text", ())]
    if texts:
        yield "txt", " ".join(texts[0].text.split()).encode()  # a line is a caption
    yield "json", to_sidecar(columns["key"], texts, {name: columns[name] for name in columns if name != "key"})


def _suffix(modality: str, path: str) -> str:
    """Return the suffix of a file in its source, or the suffix in `_SUFFIXES` for bytes in a tar or table."""
    suffix = Path(path).suffix.lower()
    return suffix[1:] if suffix in MEDIA_SUFFIXES[modality] else _SUFFIXES[modality]
