"""The input of the index digest: samples as lines of canonical JSON, from a source or from tables."""

from collections.abc import Sequence
from json import JSONEncoder

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.errors import SourceError
from embedcache.modalities import MODALITIES
from embedcache.sources.base import FileItem, Sample
from embedcache.store.sample_tables import SampleTables

_JSON = JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_input(batch: Sequence[Sample]) -> bytes:
    """Return samples as lines of canonical JSON, the input of the index digest.

    A line has a fifth element only if the sample has items of other modalities than image and text, and an item only
    has five elements if it is an interval.

    Raises:
        SourceError: text that is not Unicode.
    """
    lines = []
    for sample in batch:
        images = [[item.path, item.offset, item.length] for item in sample.images]
        texts = [[item.text, item.language] for item in sample.texts]
        others = {name: [_location(item) for item in items] for name, items in sample.files.items() if items}
        line = _JSON.encode([sample.key, images, texts, dict(sample.columns), *([others] if others else [])])
        try:
            lines.append(f"{line}\n".encode())
        except UnicodeEncodeError as error:
            raise SourceError(
                f"sample {sample.key!r} holds text that is not valid Unicode: {error.reason}; correct the source"
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
    columns = [_member(name, _values(samples[name])) for name in sorted(samples.column_names) if name != "key"]
    lists = {name: _lists(name, of_modality, len(samples)) for name, of_modality in items.items()}
    own = [_concat(",[", pc.fill_null(lists[name], ""), "]") if name in lists else ",[]" for name in _OWN]
    others = [_member(name, _concat("[", lists[name], "]")) for name in sorted(lists.keys() - set(_OWN))]
    end = ["]\n"]
    if others:
        has_none = pc.equal(_concat(*others), "")
        end = [pc.if_else(has_none, "", _concat(",", _object(others))), *end]
    lines = _concat("[", _quote(samples["key"]), *own, ",", _object(columns), *end)
    return b"".join(buffer.to_pybytes() for buffer in lines.buffers()[2:] if buffer is not None)


_OWN = ("image", "text")
"""Modalities that each line has a list of; those of all others are members of an object."""
_TEXT = pa.large_string()  # the lines of a block may exceed 2 GiB


def _concat(*parts: "pa.Array | str") -> pa.Array:
    """Concatenate texts of each row; null where a part is null."""
    texts = [pa.scalar(part, _TEXT) if isinstance(part, str) else part for part in (*parts, "")]
    return pc.binary_join_element_wise(*texts)  # the last one separates


def _object(members: Sequence[pa.Array]) -> "pa.Array | str":
    """Return an object of members, each of which is empty or begins with a comma."""
    return _concat("{", pc.utf8_slice_codeunits(_concat(*members), 1), "}") if members else "{}"


def _member(name: str, values: pa.Array) -> pa.Array:
    """Return a comma, a name and a value, or nothing where that is null."""
    return pc.fill_null(_concat(f",{_JSON.encode(name)}:", values), "")


def _lists(modality: str, items: pa.Table, count: int) -> pa.Array:
    """Return the items of each sample, separated by commas; null if it has none."""
    columns = {name: _values(items[name]) for name in items.column_names if name != "sample"}
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


def _values(column: pa.ChunkedArray) -> pa.Array:
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
