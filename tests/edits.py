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
from embedcache.store.layout import read_info, table_name
from embedcache.store.tables import describe_file

_UNCHECKED = {
    "cache.json": ("source",),
    "card.json": ("cache", "run"),
    "record.json": ("settings",),
    "run.json": ("caches",),
}
"""Keys that digests leave out."""


def edit_record(path: Path, replace: dict[str, str] | None = None, **values: Any) -> None:
    """Change keys of a JSON object, then texts anywhere in it, and sign it anew, as a stranger may."""
    record = {**{name: value for name, value in read_json(path).items() if name != DIGEST}, **values}
    text = json.dumps(record)
    for old, new in (replace or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    write_record(path, json.loads(text), unchecked=_UNCHECKED.get(path.name, ()))


def table_file(cache: Path, name: str) -> Path:
    """Return the path of the only file of a table, `samples` or that of a modality."""
    (file,) = read_info(cache).files(name)
    return cache / file.name


def read_rows(cache: Path, name: str) -> pa.Table:
    """Read the only file of a table."""
    return pq.read_table(table_file(cache, name))


def write_rows(path: Path, table: pa.Table, **options: Any) -> None:
    """Write a table in place of one of a cache, but not its checksum in `cache.json`."""
    pq.write_table(table, path, **options)


def write_tables(cache: Path, *, row_group_size: int | None = None, **tables: pa.Table) -> None:
    """Write tables in place of those of a cache of one part, and sign them anew, as a stranger may."""
    record = read_json(cache / "cache.json")
    (part,) = record["parts"]
    for name, table in tables.items():
        file = part["tables"].setdefault(name, {"name": table_name(name, 0)})
        path = cache / file["name"]
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path, row_group_size=row_group_size)
        part["tables"][name] = describe_file(cache, file["name"]).to_json()
    edit_record(cache / "cache.json", parts=[part])


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
