"""Removing samples from files that name them beside a cache: selections, lists of keys, splits of runs, exports.

Each file is replaced by one rename. Of files that belong together, the one that names the samples is replaced last, so
that the same removal finishes one that was killed.
"""

import io
import json
import tarfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Bools
from embedcache.errors import CorruptError, DataError, PathError, SettingError
from embedcache.files import remove_leftovers, remove_partials, replacing
from embedcache.interop.npy import open_npy, report_damage, write_array
from embedcache.progress import NullProgress
from embedcache.provenance import DIGEST, digest_file, read_record, write_json, write_record
from embedcache.store.layout import CacheInfo
from embedcache.store.tables import open_table, table_errors

_BLOCK = 8192
_TARS = "*.tar"
_MANIFESTS = ("config.json", "study.json")
_KEPT_KEY = "kept_key"
"""Column of the samples that dedup removed: the key of the sample that each duplicates."""


def remove_from(path: Path, keys: Collection[str]) -> int:
    """Remove samples from a selection, a list of keys or an export; return how many entries were removed.

    Args:
        path: a Parquet file with a column `key`, a text file with one key per line, a `.npy` of DataComp's uids, or a
            folder that `export npy`, `export clip-retrieval` or `curate export --format webdataset` wrote.
        keys: keys of the samples.

    Raises:
        PathError: the path does not exist, or is none of these.
        DataError: the file holds positions of other rows, so that it must be exported again.
    """
    if path.is_dir():
        return _remove_from_folder(path, keys)
    if not path.is_file():
        raise PathError(f"{path} does not exist; expected a selection or an export")
    if path.suffix == ".parquet":
        return _remove_from_parquet(path, keys)
    if path.suffix == ".npy":
        return _remove_from_uids(path, keys)
    if path.suffix in (".json", ".html", ".htm"):
        raise PathError(f"{path}: expected a selection or an export, got a report; delete it, and make it again")
    return _remove_from_list(path, keys)


def remove_from_run(folder: Path, keys: Collection[str], info: CacheInfo) -> int:
    """Remove samples from the files of a finished run or study that name them; return how many entries were removed.

    A sample that is gone keeps its row in the split, with no key: rows of the cache are the rows of the split. The
    digests of the files in the manifest are written again.

    Args:
        folder: folder of the run or study.
        keys: keys of the samples.
        info: manifest of their cache; equal keys of other caches of the run are kept.

    Raises:
        PathError: the folder is no finished run or study.
        SettingError: the run was not trained on the cache.
        CorruptError: its manifest has changed since it was written.
    """
    remove_partials(folder)
    manifest = next((folder / name for name in _MANIFESTS if (folder / name).is_file()), None)
    if manifest is None:
        raise PathError(f"{folder}: expected a finished run or study, got none; finish it, or delete it")
    record = read_record(manifest, next_step="restore the file")
    if not any(map(info.has_rows_of, str(record.get("spine", "")).split("+"))):
        raise SettingError(f"run: expected one that was trained on this cache, got {folder}")
    had_digest = record.pop(DIGEST, None) is not None
    count = 0
    split = folder / "split.parquet"
    if split.is_file():
        count += _remove_from_parquet(split, keys, rows_of=info)
        if isinstance(record.get("split"), str):
            record["split"] = digest_file(split)
    for selection in sorted(folder.glob("selection.*")):
        count += remove_from(selection, keys)
        given = record.get("given")
        if isinstance(given, dict) and "selection" in given:
            given["selection"] = digest_file(selection)
    _write_manifest(manifest, record, has_digest=had_digest)
    return count


def _write_manifest(path: Path, record: dict[str, Any], *, has_digest: bool) -> None:
    if has_digest:
        write_record(path, record)
    else:
        write_json(path, record)


def _remove_from_parquet(path: Path, keys: Collection[str], *, rows_of: CacheInfo | None = None) -> int:
    """Write a table again without the rows of some keys, a row group at a time, and keep its metadata.

    `rows_of` is the cache of a split, whose rows stay, with no key.
    """
    wanted, count = pa.array(sorted(keys), pa.string()), 0
    with table_errors(path), open_table(path) as file:
        schema = file.schema_arrow
        if "key" not in schema.names:
            raise PathError(f"{path}: expected a column key, got {', '.join(schema.names)}; name a selection or export")
        if "neighbors" in schema.names:
            raise DataError(f"{path} names neighbors by their position; delete it, and export it again")
        with _rewriting(path) as temporary, pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, use_threads=False)
                is_named = pc.is_in(table["key"].cast(pa.string()), value_set=wanted)
                if rows_of is not None and "spine" in schema.names:
                    others = [name for name in pc.unique(table["spine"]).to_pylist() if not rows_of.has_rows_of(name)]
                    is_other = pc.is_in(table["spine"], value_set=pa.array(others, pa.string()))
                    is_named = pc.and_(is_named, pc.invert(is_other))
                count += pc.sum(is_named).as_py() or 0
                if rows_of is not None:
                    table = _set(table, "key", pc.if_else(is_named, "", table["key"]))
                else:
                    table = table.filter(pc.invert(is_named))
                if _KEPT_KEY in schema.names:
                    is_kept = pc.is_in(table[_KEPT_KEY], value_set=wanted)
                    table = _set(table, _KEPT_KEY, pc.if_else(is_kept, "", table[_KEPT_KEY]))
                writer.write_table(table.cast(schema))
    return count


@contextmanager
def _rewriting(path: Path) -> Iterator[Path]:
    """Create a temporary path whose file replaces `path`; what a killed process left of one is removed."""
    remove_leftovers(path)
    with replacing(path) as temporary:
        yield temporary


def _set(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)


def _remove_from_list(path: Path, keys: Collection[str]) -> int:
    try:
        lines = path.read_text().split("\n")
    except UnicodeDecodeError:
        raise PathError(f"{path}: expected a selection or an export, got a file of another kind") from None
    kept = [line for line in lines if line not in keys]
    if len(kept) < len(lines):
        with _rewriting(path) as temporary:
            temporary.write_text("\n".join(kept))
    return len(lines) - len(kept)


def _remove_from_uids(path: Path, keys: Collection[str]) -> int:
    with report_damage(path):
        uids = np.load(path, allow_pickle=False)
    if uids.dtype != np.dtype("u8,u8"):
        raise PathError(f"{path}: expected DataComp's uids, got an array of {uids.dtype}; name the folder of an export")
    lower = {key.lower() for key in keys}
    is_kept = np.array([f"{high:016x}{low:016x}" not in lower for high, low in uids.tolist()], bool)
    with _rewriting(path) as temporary, temporary.open("wb") as file:
        np.save(file, uids[is_kept])
    return int((~is_kept).sum())


def _remove_from_folder(folder: Path, keys: Collection[str]) -> int:
    if (folder / "rows.parquet").is_file():
        return _remove_from_arrays(folder / "rows.parquet", sorted(folder.glob("*.npy")), keys)
    tables = sorted(folder.glob("metadata/metadata_*.parquet"))
    if tables:
        numbers = {table: table.stem.removeprefix("metadata_") for table in tables}
        arrays = {table: sorted(folder.glob(f"*_emb/*_{number}.npy")) for table, number in numbers.items()}
        return sum(_remove_from_arrays(table, arrays[table], keys) for table in tables)
    tars = sorted(folder.glob(_TARS))
    if tars:
        return sum(_remove_from_tar(tar, keys) for tar in tars)
    raise PathError(
        f"{folder}: expected an export (rows.parquet with .npy files, metadata/ of clip-retrieval, or tars), got "
        "another folder; indexes are named with --index, runs with --run"
    )


def _remove_from_arrays(table_path: Path, arrays: list[Path], keys: Collection[str]) -> int:
    """Write arrays again without the rows of some keys, then the table that names the keys."""
    with table_errors(table_path), open_table(table_path) as file:
        if "key" not in file.schema_arrow.names:
            raise PathError(f"{table_path}: expected a column key, got none; delete the folder, and export it again")
        named = file.read(columns=["key"], use_threads=False)["key"]
    is_kept = ~pc.is_in(named, value_set=pa.array(sorted(keys), pa.string())).to_numpy()
    if is_kept.all():
        return 0
    for path in arrays:
        rows = open_npy(path)
        if rows.num_rows == int(is_kept.sum()):
            continue  # written before a kill
        if rows.num_rows != len(is_kept):
            raise CorruptError(f"{path}: expected {len(is_kept):,} rows as in {table_path}, got {rows.num_rows:,}")
        shape = (int(is_kept.sum()), rows.width)
        with _rewriting(path) as temporary:
            write_array(temporary, _kept_rows(path, is_kept), shape, rows.dtype, NullProgress())
    return _remove_from_parquet(table_path, keys)


def _kept_rows(path: Path, is_kept: Bools) -> Iterator[Any]:
    first = 0
    for block in open_npy(path).blocks(0, _BLOCK):
        yield block[is_kept[first : first + len(block)]]
        first += len(block)


def _remove_from_tar(path: Path, keys: Collection[str]) -> int:
    """Write a shard again without samples, whose `.json` holds the key; the files of a sample share their stem."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        removed = {
            _stem(member)
            for member in members
            if member.name.endswith(".json") and json.loads(_content(tar, member)).get("key") in keys
        }
        if not removed:
            return 0
        with _rewriting(path) as temporary, tarfile.open(temporary, "w") as out:
            for member in members:
                if _stem(member) not in removed:
                    out.addfile(member, io.BytesIO(_content(tar, member)))
    return len(removed)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _stem(member: tarfile.TarInfo) -> str:
    return member.name.partition(".")[0]
