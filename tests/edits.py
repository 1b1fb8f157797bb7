"""Changes by hand to files that embedcache has written, and limits of the system."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.provenance import DIGEST, read_json, write_record
from embedcache.store.layout import table_path
from embedcache.store.tables import TableDigest, add_footer_checksum

_UNCHECKED = {"cache.json": ("source",), "card.json": ("cache", "run"), "record.json": ("settings",)}
"""Keys that digests leave out."""


def edit_record(path: Path, replace: dict[str, str] | None = None, **values: Any) -> None:
    """Change keys of a JSON object, then texts anywhere in it, and sign it anew, as a stranger may."""
    record = {**{name: value for name, value in read_json(path).items() if name != DIGEST}, **values}
    text = json.dumps(record)
    for old, new in (replace or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    write_record(path, json.loads(text), unchecked=_UNCHECKED.get(path.name, ()))


def write_rows(path: Path, table: pa.Table, **options: Any) -> None:
    """Write a table in place of one of a cache, with a checksum of its footer but not in `cache.json`."""
    pq.write_table(table, path, **options)
    add_footer_checksum(path)


def write_tables(cache: Path, **tables: pa.Table) -> None:
    """Write tables of a cache that is made by hand, with their digests in `cache.json`."""
    digests = dict(read_json(cache / "cache.json")["table_digests"])
    for name, table in tables.items():
        write_rows(table_path(cache, name), table)
        digest = TableDigest()
        digest.update(table)
        digests[name] = digest.hexdigest()
    edit_record(cache / "cache.json", table_digests=digests)


def damage_column(path: Path, column: str) -> None:
    """Change a byte of a column of a table, so that reading the column is an error and reading the others is none."""
    data, group = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(0)
    (found,) = [each for each in map(group.column, range(group.num_columns)) if each.path_in_schema == column]
    start = found.dictionary_page_offset or found.data_page_offset
    data[start + found.total_compressed_size // 2] ^= 1
    path.write_bytes(data)


def flip(path: Path, position: int) -> None:
    """Flip the lowest bit of a byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def exchange(path: Path, data: bytes | bytearray) -> None:
    """Put another file in place of one, which threads of FAISS that read ahead may still have mapped."""
    other = path.with_suffix(".other")
    other.write_bytes(data)
    other.replace(path)


@contextmanager
def no_more_files() -> Iterator[None]:
    """Let this process open no further file."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
