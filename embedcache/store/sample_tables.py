"""Samples as tables: of Python objects that a source yields, or joined from the tables of caches."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from embedcache.modalities import FILE_MODALITIES, MODALITIES
from embedcache.sources.base import Sample
from embedcache.store.tables import ITEM_SCHEMAS

ALWAYS = ("image", "text")
"""Modalities whose item table always exists; those of the others are written if a sample has such items."""
_OTHERS = tuple(modality.name for modality in FILE_MODALITIES if modality.name not in ALWAYS)
_INFERRED = {pa.int64(), pa.float64(), pa.bool_(), pa.string()}
"""Types of columns whose Python values Arrow gives the same type."""


class SampleTables(NamedTuple):
    """Consecutive samples.

    Args:
        samples: `key` and other columns.
        items: modality -> its items, whose column `sample` counts from the first of these samples.
    """

    samples: pa.Table
    items: Mapping[str, pa.Table]


def to_tables(batch: Sequence[Sample]) -> SampleTables:
    """Return samples as tables; a modality of which no sample has an item is left out, except image and text."""
    named = {name for sample in batch for name, items in sample.files.items() if items}
    modalities = (*ALWAYS, *(name for name in _OTHERS if name in named))
    return SampleTables(_sample_table(batch), {name: _item_table(batch, name) for name in modalities})


def join_tables(pieces: Sequence[SampleTables]) -> SampleTables:
    """Join consecutive samples to the tables that `to_tables` makes of them.

    So a column has the type that Arrow infers from its values, and is left out if no sample has one.
    """
    tables, items = [piece.samples for piece in pieces], {}
    starts = list(accumulate(map(len, tables), initial=0))
    names = sorted({name for table in tables for name in table.column_names} - {"key"})
    columns = {name: _join_column(name, tables) for name in names}
    samples = {"key": pa.concat_tables([table.select(["key"]) for table in tables]).combine_chunks()["key"]}
    samples |= {name: column for name, column in columns.items() if column.null_count < len(column)}
    for modality, schema in ITEM_SCHEMAS.items():
        found = [
            count_from(start, piece.items[modality])
            for start, piece in zip(starts, pieces, strict=False)
            if modality in piece.items
        ]
        joined = pa.concat_tables([schema.empty_table(), *found]).combine_chunks()
        if len(joined) or modality in ALWAYS:
            items[modality] = joined
    return SampleTables(pa.table(samples), items)


def _join_column(name: str, tables: Sequence[pa.Table]) -> pa.Array:
    nothing = (pa.chunked_array([pa.nulls(len(table))]) for table in tables)
    parts = [table[name] if name in table.column_names else null for table, null in zip(tables, nothing, strict=True)]
    kinds = {part.type for part in parts if part.null_count < len(part)}
    if len(kinds) == 1 and kinds <= _INFERRED:
        kind = kinds.pop()
        return pa.chunked_array([chunk for part in parts for chunk in part.cast(kind).chunks], kind).combine_chunks()
    return _column([value for part in parts for value in part.to_pylist()])


def count_from(first: int, items: pa.Table) -> pa.Table:
    """Return items with `first` added to their sample numbers."""
    return items.set_column(0, items.schema.field("sample"), pc.add(items["sample"], first))


def _sample_table(batch: Sequence[Sample]) -> pa.Table:
    columns: dict[str, list[Any]] = defaultdict(lambda: [None] * len(batch))
    for row, sample in enumerate(batch):
        for name, value in sample.columns.items():
            columns[name][row] = value
    arrays = {name: _column(values) for name, values in sorted(columns.items()) if name != "key"}
    return pa.table({"key": pa.array([sample.key for sample in batch], pa.string()), **arrays})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # mixed types: keep them as text
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _item_table(batch: Sequence[Sample], modality: str) -> pa.Table:
    schema = ITEM_SCHEMAS[modality]
    is_text = MODALITIES[modality].kind == "texts"
    items: list[Sequence[Any]] = [sample.texts if is_text else sample.items_in_files(modality) for sample in batch]
    rows = [row for row, sample_items in enumerate(items) for _ in sample_items]
    columns = ([getattr(item, name) for group in items for item in group] for name in schema.names[1:])
    return pa.table([rows, *columns], schema=schema)
