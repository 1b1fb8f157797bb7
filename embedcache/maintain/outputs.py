"""Removing samples from outputs beside a cache, which name them: selections, lists of keys and splits of runs.

Exports are only searched: one that names a sample is to be deleted, and made again.

Each file is replaced by one rename. Of files that belong together, the one that names the samples is replaced last, so
that the same removal finishes one that was killed.
"""

import json
import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.dataset import keytable
from embedcache.errors import CorruptError, PathError, SettingError
from embedcache.files import TEXT_ENCODING, read_file, reading, remove_leftovers, remove_partials, replacing
from embedcache.interop.parquet import GET_AGAIN
from embedcache.provenance import DIGEST, digest_file, read_record, write_json, write_record
from embedcache.store.layout import CacheInfo
from embedcache.store.tables import RESTORE_TABLE, open_table, read_table, write_table

_MANIFESTS = ("config.json", "study.json")
_STARTED = "removing.json"
"""In a run while samples are removed from it: its files were compared with their digests, and may be new."""
_KEPT_KEY = "kept_key"
"""Column of the samples that dedup removed: the key of the sample that each duplicates."""


def remove_from(path: Path, keys: Collection[str]) -> int:
    """Remove samples from a selection or a list of keys; return how many entries were removed.

    Args:
        path: a Parquet file with a column `key`, or a text file with one key per line.
        keys: keys of the samples.

    Raises:
        PathError: the path does not exist, is none of these, or is a link.
        CorruptError: it is damaged.
    """
    return _remover(path)(path, keys)


def check_removable(path: Path) -> None:
    """Check that a path is of a kind that `remove_from` takes, or raise its errors; the content is not read."""
    _remover(path)


def _remover(path: Path) -> Callable[[Path, Collection[str]], int]:
    """Return the function that removes samples from a path of this kind."""
    _check_no_link(path)
    if not path.is_file():
        raise PathError(f"{path}: expected a selection, got {'a folder' if path.is_dir() else 'nothing'}")
    if path.suffix == ".parquet":
        if "kind" not in keytable.read_header(path, "selection"):
            raise PathError(
                f"{path}: expected a selection, got a table that embedcache did not write; remove the samples from it "
                "by yourself"
            )
        return _remove_from_table
    if path.suffix == ".npy":
        return _remove_from_uids
    if path.suffix in (".json", ".html"):
        raise PathError(f"{path}: expected a selection, got a report; delete it, and make it again")
    return _remove_from_list


def _check_no_link(path: Path) -> None:
    """Check that a path is no link: the file behind it would keep the samples."""
    if path.is_symlink():
        raise PathError(f"{path}: expected a file or a folder, got a link to {path.resolve()}; name that one")


def remove_from_run(folder: Path, keys: Collection[str], info: CacheInfo) -> int:
    """Remove samples from the files of a finished run or study that name them; return how many entries were removed.

    The digests of the files in the manifest are written again.

    Args:
        folder: folder of the run or study.
        keys: keys of the samples.
        info: manifest of their cache; equal keys of other caches of the run are kept.

    Raises:
        PathError: the folder is no finished run or study.
        SettingError: the run was not trained on the cache.
        CorruptError: its manifest, split or selection has changed since it was written; nothing is changed.
    """
    manifest, record = check_run(folder, info)
    remove_partials(folder)
    del record[DIGEST]
    count = 0
    split = folder / "split.parquet"
    write_json(folder / _STARTED, {})
    if split.is_file():
        count += _remove_from_table(split, keys, info)
        if isinstance(record.get("split_digest"), str):
            record["split_digest"] = digest_file(split)
    for selection in sorted(folder.glob("selection.*")):  # a copy of what the user gave, which may be any table of keys
        remove = _remove_from_table if selection.suffix == ".parquet" else _remover(selection)
        count += remove(selection, keys)
        given = record.get("file_digests")
        if isinstance(given, dict) and "selection" in given:
            given["selection"] = digest_file(selection)
    write_record(manifest, record)
    (folder / _STARTED).unlink()
    return count


def check_run(folder: Path, info: CacheInfo) -> tuple[Path, dict[str, Any]]:
    """Return the manifest of a finished run or study on a cache, and its content; the errors of `remove_from_run`."""
    manifest = next((folder / name for name in _MANIFESTS if (folder / name).is_file()), None)
    if manifest is None:
        raise PathError(f"{folder}: expected a finished run or study, got none; finish it, or delete it")
    record = read_record(manifest, next_step="restore the file")
    if not any(map(info.has_rows_of, str(record.get("index_digest", "")).split("+"))):
        raise SettingError(f"run: expected one that was trained on this cache, got {folder}")
    if not (folder / _STARTED).is_file():
        _check_digests(folder, record)
    return manifest, record


def _check_digests(folder: Path, record: dict[str, Any]) -> None:
    """Compare the files of a run that are to be written again, and signed anew, with their digests in its manifest."""
    given = record.get("file_digests")
    selection = given.get("selection") if isinstance(given, dict) else None
    written = dict.fromkeys(folder.glob("selection.*"), selection)
    written[folder / "split.parquet"] = record.get("split_digest")
    for path, expected in written.items():
        if isinstance(expected, str) and expected and path.is_file() and digest_file(path) != expected:
            raise CorruptError(
                f"{path}: expected the file that the run was made with, got another one; restore it, or delete the run"
            )


def _remove_from_table(path: Path, keys: Collection[str], info: CacheInfo | None = None) -> int:
    """Write a keyed table again without some keys; of several caches, without those of the cache of `info` only."""
    about = keytable.read_header(path, "selection")  # what has changed would be signed anew
    with keytable.reading_table(path, "selection"):
        table = read_table(path)
    wanted = pa.array(sorted(keys), pa.string())
    is_named = pc.is_in(table["key"].cast(pa.string()), value_set=wanted)
    if info is not None and "cache" in table.column_names:
        same = [number for number, digest in enumerate(about["index_digests"]) if info.has_rows_of(digest)]
        is_named = pc.and_(is_named, pc.is_in(table["cache"], value_set=pa.array(same, pa.int16())))
    rest = table.filter(pc.invert(is_named))
    if _KEPT_KEY in rest.column_names:
        is_kept = pc.is_in(rest[_KEPT_KEY], value_set=wanted)
        names = pc.if_else(is_kept, None, rest[_KEPT_KEY])
        rest = rest.set_column(rest.column_names.index(_KEPT_KEY), rest.schema.field(_KEPT_KEY), names)
    with _rewriting(path) as temporary:
        write_table(temporary, rest)
    return len(table) - len(rest)


@contextmanager
def _rewriting(path: Path) -> Iterator[Path]:
    """Create a temporary path whose file replaces `path`; what a killed process left of one is removed."""
    _check_no_link(path)
    remove_leftovers(path)
    with replacing(path) as temporary:
        yield temporary


def _remove_from_list(path: Path, keys: Collection[str]) -> int:
    try:
        lines = read_file(path).decode(TEXT_ENCODING).split("\n")
    except UnicodeDecodeError:
        raise PathError(f"{path}: expected a selection, got a file of another kind") from None
    kept = [line for line in lines if line.removesuffix("\r") not in keys]
    if len(kept) < len(lines):
        with _rewriting(path) as temporary:
            temporary.write_bytes("\n".join(kept).encode())
    return len(lines) - len(kept)


def _remove_from_uids(path: Path, keys: Collection[str]) -> int:
    with reading(path, GET_AGAIN):
        uids = np.load(path, allow_pickle=False)
    if uids.dtype != np.dtype("u8,u8"):
        raise PathError(f"{path}: expected uids, got an array of {uids.dtype}; check the path")
    is_named = _are_named(uids, keys)

    with _rewriting(path) as temporary, temporary.open("wb") as file:
        np.save(file, uids[~is_named])
    return int(is_named.sum())


def _are_named(uids: np.ndarray, keys: Collection[str]) -> np.ndarray:
    """Return which of DataComp's uids, (N,) pairs of 64-bit integers, are the keys, which are hexadecimal."""
    lower = {key.lower() for key in keys}
    return np.array([f"{high:016x}{low:016x}" in lower for high, low in uids.tolist()], bool)


def find_named(path: Path, keys: Collection[str]) -> int:
    """Count how often an export names samples: by Parquet tables with a column `key`, tars, or DataComp's uids.

    Raises:
        PathError: the path does not exist, or is no export.
        CorruptError: a file is damaged.
    """
    files = [file for suffix in _COUNTERS for file in sorted(path.rglob(f"*{suffix}"))] if path.is_dir() else [path]
    named = [file for file in files if file.suffix in _COUNTERS]
    if not named or not all(file.is_file() for file in named):
        raise PathError(f"{path}: expected an export: a table with a column key, tars, or uids; check the path")
    return sum(_COUNTERS[file.suffix](file, keys) for file in named)


def _count_in_parquet(path: Path, keys: Collection[str]) -> int:
    wanted, count = pa.array(sorted(keys), pa.string()), 0
    with reading(path, RESTORE_TABLE), open_table(path) as file:
        if "key" in file.schema_arrow.names:
            for batch in file.iter_batches(columns=["key"], use_threads=False):
                count += pc.sum(pc.is_in(batch["key"].cast(pa.string()), value_set=wanted)).as_py() or 0
    return count


def _count_in_uids(path: Path, keys: Collection[str]) -> int:
    with reading(path, GET_AGAIN):
        uids = np.load(path, mmap_mode="r", allow_pickle=False)
    return int(_are_named(uids, keys).sum()) if uids.dtype.names else 0


def _count_in_tar(path: Path, keys: Collection[str]) -> int:
    """Count the samples of a shard, whose `.json` holds the key."""
    try:
        with tarfile.open(path, "r:") as tar:
            texts = [tar.extractfile(member) for member in tar if member.name.endswith(".json")]
            return sum(json.load(text)["key"] in keys for text in texts if text is not None)
    except (tarfile.TarError, ValueError, TypeError, KeyError) as error:
        raise CorruptError(f"{path}: expected a tar that embedcache exported, got {error}; check the path") from error


_COUNTERS = {".parquet": _count_in_parquet, ".npy": _count_in_uids, ".tar": _count_in_tar}
