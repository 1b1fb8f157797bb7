"""The table that img2dataset writes beside each tar: `00000.parquet` beside `00000.tar`.

It has a row for every URL of the shard. The files in the tar are named after a row's `key`; a row whose picture could
not be had (its `status` says so) has none and is no sample.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from embedcache.sources.reading import file_size
from embedcache.sources.sidecar import Scalar, Sidecar, caption_list, scalar_columns, text_items
from embedcache.sources.table_files import Row, open_table_file

_MARKS = frozenset({"key", "status"})
_NOT_COLUMNS = frozenset({"key", "status", "error_message", "caption"})


def read_beside_shard(shard: Path) -> Mapping[str, Sidecar]:
    """Get what the table beside a shard says of its samples, by key; nothing where there is no such table.

    Memory: the rows of one shard.

    Raises:
        SourceError: the table is damaged.
        PathError: it cannot be read.
    """
    path = shard.with_suffix(".parquet")
    if file_size(path, forbidden_is_missing=True) is None:
        return {}
    file = open_table_file(path)
    if not set(file.columns) >= _MARKS:
        return {}
    return dict(_said(file.rows(file.plain), str(path)))


def _said(rows: Iterator[Row], place: str) -> Iterator[tuple[str, Sidecar]]:
    for row in rows:
        columns: dict[str, Scalar] = scalar_columns({n: row[n] for n in row if n not in _NOT_COLUMNS})
        texts = text_items(caption_list(row.get("caption"), f"{place}: caption"), None)
        yield row["key"], Sidecar(texts=texts, columns=columns)
