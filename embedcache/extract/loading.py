"""Items as the inputs of models: read, hashed, decoded and prepared for each feature writer, or the reason why not."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from PIL.Image import Image

from embedcache.arrays import Array
from embedcache.errors import FingerprintError, ItemError
from embedcache.extract.feature_writer import FeatureWriter
from embedcache.modalities import MODALITIES
from embedcache.sources.base import FileItem, Source
from embedcache.store.commits import hash_item
from embedcache.store.tables import to_file_item


@dataclass(frozen=True, kw_only=True)
class LoadedItem:
    """One item as one array per feature writer.

    Args:
        hash: hash of its content; None if it was not read.
        failures: for each writer why it failed, or None.
        inputs: for each writer the model's input; None for a failed item.
        num_bytes: number of bytes of its file; None if it was not read, and of a text.
        is_blank: whether it is an image of a single color.
    """

    hash: bytes | None
    failures: Sequence[str | None]
    inputs: list[Array | None] = field(default_factory=list)
    num_bytes: int | None = None
    is_blank: bool = False


def load_items(
    source: Source, table: pa.Table, writers: Sequence[FeatureWriter], executor: Executor
) -> list[LoadedItem]:
    """Load rows of an item table, all of the writers' modality, for every writer; files on several threads."""
    modality = MODALITIES[writers[0].group.modality]
    if modality.kind == "texts":
        return load_texts(table, writers)
    decode = modality.load_decoder()
    items = [to_file_item(row) for row in table.to_pylist()]
    return list(executor.map(lambda item: load_file(source, item, decode, writers), items))


def load_file(
    source: Source, item: FileItem, decode: Callable[..., Any], writers: Sequence[FeatureWriter]
) -> LoadedItem:
    """Read and decode one item, and prepare it for every writer; an image once per background color.

    What raises an `ItemError` is returned as an item with a reason.
    """
    content_hash = num_bytes = None
    interval = (item.start_s, item.stop_s)
    try:
        data = source.read(item)
        num_bytes = len(data)
        content_hash = hash_item(data, interval=interval)
        writers[0].gate.wait()
        colors = [writer.background for writer in writers]
        raws = {color: _decode(decode, data, interval, color) for color in dict.fromkeys(colors)}
        del data  # an hour of sound is 115 MB
    except ItemError as error:
        return replace(not_encoded(len(writers), str(error), hash=content_hash), num_bytes=num_bytes)
    inputs, failures = list[Array | None](), list[str | None]()
    for writer, color in zip(writers, colors, strict=True):
        prepared, failure = _prepare(writer, raws[color])
        inputs.append(prepared)
        failures.append(failure)
    raw = raws[colors[0]]
    is_blank = isinstance(raw, Image) and raw.getcolors(1) is not None  # stops at the second color
    return LoadedItem(hash=content_hash, failures=failures, inputs=inputs, num_bytes=num_bytes, is_blank=is_blank)


def _decode(decode: Callable[..., Any], data: bytes, interval: tuple[float | None, float | None], color: str) -> Any:
    """Decode an item; an image onto a color."""
    if color != "white":
        return decode(data, background=color)
    return decode(data) if interval == (None, None) else decode(data, *interval)


def _prepare(writer: FeatureWriter, raw: Any) -> tuple[Array | None, str | None]:
    """Return the model's input for one raw item, or why the model cannot take it."""
    try:
        return writer.prepare([raw])[0], None
    except ItemError as error:
        return None, str(error)


def load_texts(table: pa.Table, writers: Sequence[FeatureWriter]) -> list[LoadedItem]:
    """Tokenize texts for every writer; equal texts share their inputs."""
    texts = table["text"].to_pylist()
    distinct = [text for text in dict.fromkeys(texts) if text.strip()]
    prepared = [writer.prepare(distinct) for writer in writers]
    inputs: dict[str, list[Array | None]] = {
        text: list(arrays) for text, *arrays in zip(distinct, *prepared, strict=True)
    }
    return [
        LoadedItem(
            hash=hash_item(text.encode()),
            failures=[None if text in inputs else "empty caption"] * len(writers),
            inputs=inputs.get(text, [None] * len(writers)),
        )
        for text in texts
    ]


def not_encoded(num_writers: int, reason: str, *, hash: bytes | None) -> LoadedItem:
    """Return an item without inputs and with one reason for all writers: it failed, was removed, or is stored."""
    return LoadedItem(hash=hash, failures=[reason] * num_writers, inputs=[None] * num_writers)


def check_length(item: FileItem, loaded: LoadedItem, modality: str) -> None:
    """Check that a file is as long as when it was indexed, or raise a `FingerprintError` that names it."""
    if item.length and loaded.num_bytes not in (None, item.length):
        raise FingerprintError(
            f"{modality} {item.path}: expected {item.length:,} bytes, as when the source was indexed, got "
            f"{loaded.num_bytes:,}; put the old file back, or extract into a new folder"
        )
