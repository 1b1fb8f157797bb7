"""Samples as tables, of Python objects that a source yields or joined from caches, and as input of the index digest.

The digest is that of lines of canonical JSON, one per sample, which are the same from objects and from tables.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from json import JSONEncoder
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.errors import SourceError
from embedcache.modalities import FILE_MODALITIES, MODALITIES
from embedcache.sources.base import FileItem, Sample
from embedcache.store.tables import ITEM_SCHEMAS

ALWAYS = ("image", "text")
"""Modalities that always have an item table, and a list in each line of JSON; others have them if there are items."""

_OTHERS = tuple(modality.name for modality in FILE_MODALITIES if modality.name not in ALWAYS)

_INFERRED = {pa.int64(), pa.float64(), pa.bool_(), pa.string()}
"""Types of columns whose Python values Arrow gives the same type."""

_JSON = JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_TEXT = pa.large_string()  # the lines of a block may exceed 2 GiB


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


def digest_input(batch: Sequence[Sample]) -> bytes:
    """Return samples as lines of canonical JSON, the input of the index digest.

    A line has a fifth element only if the sample has items of other modalities than image and text, and an item only
    has five elements if it is an interval.

    Raises:
        SourceError: text that is not Unicode, or a value of a column or an item that JSON does not have.
    """
    lines = []
    for sample in batch:
        images = [[item.path, item.offset, item.length] for item in sample.images]
        texts = [[item.text, item.language] for item in sample.texts]
        others = {name: [_location(item) for item in items] for name, items in sample.files.items() if items}
        try:
            line = _JSON.encode([sample.key, images, texts, dict(sample.columns), *([others] if others else [])])
            lines.append(f"{line}\n".encode())
        except UnicodeEncodeError as error:
            raise SourceError(
                f"sample {sample.key!r} holds text that is not valid Unicode: {error.reason}; correct the source"
            ) from error
        except TypeError as error:
            raise SourceError(
                f"sample {sample.key!r}: expected texts, numbers, booleans and None in its items and columns: {error}; "
                "correct the source"
            ) from error
    return b"".join(lines)


def _location(item: FileItem) -> list[str | int | float | None]:
    interval = [item.start_s, item.stop_s]
    return [item.path, item.offset, item.length, *(interval if interval != [None, None] else [])]


def digest_tables_input(tables: SampleTables) -> bytes:
    """Return the samples of tables as `digest_input` does; a column where a sample is null is none of its columns.

    It cannot replace `digest_input`: a source may yield 1 and 2.5, or None, in a column, of which a table holds 1.0 or
    nothing. Nor can that one replace it, which would take a Python object per sample.
    """
    samples, items = tables
    columns = [_member(name, _to_json(samples[name])) for name in sorted(samples.column_names) if name != "key"]
    lists = {name: _json_lists(name, of_modality, len(samples)) for name, of_modality in items.items()}
    own = [_concat(",[", pc.fill_null(lists[name], ""), "]") if name in lists else ",[]" for name in ALWAYS]
    others = [_member(name, _concat("[", lists[name], "]")) for name in sorted(lists.keys() - set(ALWAYS))]
    end = ["]\n"]
    if others:
        has_none = pc.equal(_concat(*others), "")
        end = [pc.if_else(has_none, "", _concat(",", _object(others))), *end]
    lines = _concat("[", _quote(samples["key"]), *own, ",", _object(columns), *end)
    return b"".join(buffer.to_pybytes() for buffer in lines.buffers()[2:] if buffer is not None)


def _json_lists(modality: str, items: pa.Table, count: int) -> pa.Array:
    """Return the items of each sample, separated by commas; null if it has none."""
    columns = {name: _to_json(items[name]) for name in items.column_names if name != "sample"}
    if MODALITIES[modality].kind == "texts":
        values = _concat("[", columns["text"], ",", pc.fill_null(columns["language"], "null"), "]")
    else:
        interval: list[pa.Array | str] = []
        if MODALITIES[modality].has_interval:
            bounds = [pc.fill_null(columns[name], "null") for name in ("start_s", "stop_s")]
            is_whole = pc.and_(*(items[name].combine_chunks().is_null() for name in ("start_s", "stop_s")))
            interval = [pc.if_else(is_whole, "", _concat(",", bounds[0], ",", bounds[1]))]
        values = _concat("[", columns["path"], ",", columns["offset"], ",", columns["length"], *interval, "]")
    counts_S = np.bincount(items["sample"].to_numpy(), minlength=count)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts_S)]))
    joined = pc.binary_join(pa.LargeListArray.from_arrays(offsets, values), pa.scalar(",", _TEXT))
    return pc.if_else(pa.array(counts_S > 0), joined, None)


def _to_json(column: pa.ChunkedArray) -> pa.Array:
    """Return the JSON of each value; null where that is null."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _quote(column)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return column.combine_chunks().cast(_TEXT)
    return pa.array([None if value is None else _JSON.encode(value) for value in column.to_pylist()], _TEXT)


def _quote(column: pa.ChunkedArray) -> pa.Array:
    """Return each text as JSON; the few that need it are escaped one by one."""
    texts = column.cast(_TEXT).combine_chunks()
    is_special = pc.fill_null(pc.match_substring_regex(texts, r'[\x00-\x1f"\\]'), False)  # noqa: FBT003
    if pc.any(is_special).as_py():
        escaped = [_JSON.encode(text)[1:-1] for text in texts.filter(is_special).to_pylist()]
        texts = pc.replace_with_mask(texts, is_special, pa.array(escaped, _TEXT))
    return _concat('"', texts, '"')


def _member(name: str, values: pa.Array) -> pa.Array:
    """Return a comma, a name and a value, or nothing where that is null."""
    return pc.fill_null(_concat(f",{_JSON.encode(name)}:", values), "")


def _object(members: Sequence[pa.Array]) -> "pa.Array | str":
    """Return an object of members, each of which is empty or begins with a comma."""
    return _concat("{", pc.utf8_slice_codeunits(_concat(*members), 1), "}") if members else "{}"


def _concat(*parts: "pa.Array | str") -> pa.Array:
    """Concatenate texts of each row; null where a part is null."""
    texts = [pa.scalar(part, _TEXT) if isinstance(part, str) else part for part in (*parts, "")]
    return pc.binary_join_element_wise(*texts)  # the last one separates
