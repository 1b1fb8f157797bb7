"""Removing samples from outputs beside a cache, which name them: selections, lists of keys, splits of runs, exports.

Each file is replaced by one rename. Of files that belong together, the one that names the samples is replaced last, so
that the same removal finishes one that was killed.
"""

import io
import json
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Bools
from embedcache.errors import CorruptError, DataError, PathError, SettingError, one_line
from embedcache.files import TEXT_ENCODING, check_regular, read_file, remove_leftovers, remove_partials, replacing
from embedcache.interop.npy import open_npy, report_damage, write_array
from embedcache.outputs import read_metadata
from embedcache.progress import NullProgress
from embedcache.provenance import DIGEST, digest_file, read_record, write_json, write_record
from embedcache.store.layout import CacheInfo
from embedcache.store.tables import add_footer_checksum, open_table, table_errors

_BLOCK = 8192
_ROWS = "rows.parquet"
_METADATA = "metadata/metadata_*.parquet"
_TARS = "*.tar"
_MANIFESTS = ("config.json", "study.json")
_STARTED = "removing.json"
"""In a run while samples are removed from it: its files were compared with their digests, and may be new."""
_KEPT_KEY = "kept_key"
"""Column of the samples that dedup removed: the key of the sample that each duplicates."""


def remove_from(path: Path, keys: Collection[str]) -> int:
    """Remove samples from a selection, a list of keys or an export; return how many entries were removed.

    Args:
        path: a Parquet file with a column `key`, a text file with one key per line, a `.npy` of DataComp's uids, or a
            folder that `export npy`, `export clip-retrieval` or `curate export --format webdataset` wrote.
        keys: keys of the samples.

    Raises:
        PathError: the path does not exist, is none of these, or is a link.
        DataError: the file holds positions of other rows, so that it must be exported again.
        CorruptError: it is damaged.
    """
    return _remover(path)(path, keys)


def check_removable(path: Path) -> None:
    """Check that a path is of a kind that `remove_from` takes, or raise its errors; the content is not read."""
    _remover(path)


def _remover(path: Path) -> Callable[[Path, Collection[str]], int]:
    """Return the function that removes samples from a path of this kind."""
    _check_no_link(path)
    if path.is_dir():
        return _folder_remover(path)
    if not path.is_file():
        raise PathError(f"{path} does not exist; expected a selection or an export")
    if path.suffix == ".parquet":
        with table_errors(path), open_table(path) as file:
            _check_columns(path, file.schema_arrow.names)
            if "cache" not in read_metadata(path, file.schema_arrow):
                raise PathError(
                    f"{path}: expected a selection or an export, got a table that embedcache did not write; remove the "
                    "samples from it by yourself"
                )
        return _remove_from_parquet
    if path.suffix == ".npy":
        return _remove_from_uids
    if path.suffix in (".json", ".html", ".htm"):
        raise PathError(f"{path}: expected a selection or an export, got a report; delete it, and make it again")
    return _remove_from_list


def _check_no_link(path: Path) -> None:
    """Check that a path is no link: the file behind it would keep the samples."""
    if path.is_symlink():
        raise PathError(f"{path}: expected a file or a folder, got a link to {path.resolve()}; name that one")


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
        CorruptError: its manifest, split or selection has changed since it was written; nothing is changed.
    """
    manifest, record = check_run(folder, info)
    remove_partials(folder)
    had_digest = record.pop(DIGEST, None) is not None
    count = 0
    split = folder / "split.parquet"
    write_json(folder / _STARTED, {})
    if split.is_file():
        count += _remove_from_parquet(split, keys, rows_of=info)
        if isinstance(record.get("split"), str):
            record["split"] = digest_file(split)
    for selection in sorted(folder.glob("selection.*")):  # a copy of what the user gave, which may be any table of keys
        remove = _remove_from_parquet if selection.suffix == ".parquet" else _remover(selection)
        count += remove(selection, keys)
        given = record.get("given")
        if isinstance(given, dict) and "selection" in given:
            given["selection"] = digest_file(selection)
    _write_manifest(manifest, record, has_digest=had_digest)
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
    given = record.get("given")
    selection = given.get("selection") if isinstance(given, dict) else None
    written = dict.fromkeys(folder.glob("selection.*"), selection) | {folder / "split.parquet": record.get("split")}
    for path, expected in written.items():
        if isinstance(expected, str) and expected and path.is_file() and digest_file(path) != expected:
            raise CorruptError(
                f"{path}: expected the file that the run was made with, got another one; restore it, or delete the run"
            )


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
        _check_columns(path, schema.names)
        read_metadata(path, schema)  # what has changed would be signed anew
        with _rewriting(path) as temporary:
            with pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
                for number in range(file.num_row_groups):
                    table = file.read_row_group(number, use_threads=False)
                    is_named = pc.is_in(table["key"].cast(pa.string()), value_set=wanted)
                    if rows_of is not None and "index_digest" in schema.names:
                        digests = pc.unique(table["index_digest"]).to_pylist()
                        same = pa.array(filter(rows_of.has_rows_of, digests), pa.string())
                        is_named = pc.and_(is_named, pc.is_in(table["index_digest"], value_set=same))
                    count += pc.sum(is_named).as_py() or 0
                    if rows_of is not None:
                        table = _set(table, "key", pc.if_else(is_named, "", table["key"]))
                    else:
                        table = table.filter(pc.invert(is_named))
                    if _KEPT_KEY in schema.names:
                        is_kept = pc.is_in(table[_KEPT_KEY], value_set=wanted)
                        table = _set(table, _KEPT_KEY, pc.if_else(is_kept, "", table[_KEPT_KEY]))
                    writer.write_table(table.cast(schema))
            add_footer_checksum(temporary)
    return count


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if "key" not in names:
        raise PathError(f"{path}: expected a column key, got {', '.join(names)}; name a selection or export")
    if "neighbors" in names:
        raise DataError(f"{path} names neighbors by their position; delete it, and export it again")


@contextmanager
def _rewriting(path: Path) -> Iterator[Path]:
    """Create a temporary path whose file replaces `path`; what a killed process left of one is removed."""
    _check_no_link(path)
    remove_leftovers(path)
    with replacing(path) as temporary:
        yield temporary


def _set(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)


def _remove_from_list(path: Path, keys: Collection[str]) -> int:
    try:
        lines = read_file(path).decode(TEXT_ENCODING).split("\n")
    except UnicodeDecodeError:
        raise PathError(f"{path}: expected a selection or an export, got a file of another kind") from None
    kept = [line for line in lines if line.removesuffix("\r") not in keys]
    if len(kept) < len(lines):
        with _rewriting(path) as temporary:
            temporary.write_bytes("\n".join(kept).encode())
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


def _folder_remover(folder: Path) -> Callable[[Path, Collection[str]], int]:
    if (folder / _ROWS).is_file():
        return _remove_from_npy
    if any(folder.glob(_METADATA)):
        return _remove_from_clip_retrieval
    if any(folder.glob(_TARS)):
        return _remove_from_tars
    raise PathError(
        f"{folder}: expected an export (rows.parquet with .npy files, metadata/ of clip-retrieval, or tars), got "
        "another folder; indexes are named with --index, runs with --run"
    )


def _remove_from_npy(folder: Path, keys: Collection[str]) -> int:
    return _remove_from_arrays(folder / _ROWS, sorted(folder.glob("*.npy")), keys)


def _remove_from_clip_retrieval(folder: Path, keys: Collection[str]) -> int:
    numbers = {table: table.stem.removeprefix("metadata_") for table in sorted(folder.glob(_METADATA))}
    arrays = {table: sorted(folder.glob(f"*_emb/*_{number}.npy")) for table, number in numbers.items()}
    return sum(_remove_from_arrays(table, arrays[table], keys) for table in numbers)


def _remove_from_tars(folder: Path, keys: Collection[str]) -> int:
    return sum(_remove_from_tar(tar, keys) for tar in sorted(folder.glob(_TARS)))


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
    with _shard_errors(path), tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        named = ((member, _key_of(tar, member)) for member in members if member.name.endswith(".json"))
        removed = {_stem(member) for member, key in named if key in keys}
        if not removed:
            return 0
        with _rewriting(path) as temporary, tarfile.open(temporary, "w") as out:
            for member in members:
                if _stem(member) not in removed:
                    out.addfile(member, io.BytesIO(_content(tar, member)))
    return len(removed)


@contextmanager
def _shard_errors(path: Path) -> Iterator[None]:
    """Raise errors of a shard as a `CorruptError`."""
    check_regular(path)
    try:
        yield
    except (tarfile.TarError, EOFError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(
            f"{path}: expected a shard that embedcache wrote, got an error: {one_line(error)}; delete the folder, "
            "and export it again"
        ) from error


def _key_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    return str(json.loads(_content(tar, member)).get("key"))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _stem(member: tarfile.TarInfo) -> str:
    return member.name.partition(".")[0]
