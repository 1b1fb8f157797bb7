"""Captions beside an image, in a `.txt` or a `.json` file of the same name; for folders and shards.

The checks of captions and columns are those of tables, too."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from embedcache.errors import ItemError, SourceError
from embedcache.sources.base import TextItem

SIDECAR_SUFFIXES = frozenset({".json", ".txt"})
CAPTION_ERROR = "caption_error"

Scalar: TypeAlias = str | int | float | bool | None
_SCALARS = (str, int, float, bool, type(None))

_CAPTION_FIELDS = ("caption", "captions", "text", "texts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """What the files beside one image say of it.

    Args:
        key: the sample's key, where a `.json` has one.
        texts: captions, those of the `.json` first.
        columns: all other fields of the `.json` that are JSON scalars, and `caption_error` where a file is broken.
    """

    key: str | None = None
    texts: tuple[TextItem, ...] = ()
    columns: Mapping[str, Scalar] = field(default_factory=dict)


def read_sidecar(beside: Mapping[str, bytes | ItemError], name: str) -> Sidecar:
    """Join what the files beside one image say; a caption that both say is one.

    A file that cannot be read, is not UTF-8 or not a JSON object of captions gives nothing but the reason, in the
    column `caption_error`: one of a million must not stop the others.

    Args:
        beside: suffix, `.json` or `.txt`, -> content of the file, or why there is none.
        name: the files' common name in the source, without the suffix.
    """
    said = [_read_one(beside[suffix], name + suffix) for suffix in (".json", ".txt") if suffix in beside]
    return said[0] if len(said) == 1 else _joined(said)


def caption_list(value: Any, place: str) -> list[str]:
    """Give the captions in one field: a string, a list of strings, or nothing.

    Raises:
        SourceError: it is something else; the message holds `place`.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    for one in values:
        if not isinstance(one, str):
            raise SourceError(f"{place} holds {one!r:.60}; expected a string or a list of strings")
    return values


def text_items(captions: Iterable[str], language: str | None) -> tuple[TextItem, ...]:
    """Make captions of one language into items; blank ones become "", which extraction reports."""
    return tuple(TextItem(text=caption.strip(), language=language or None) for caption in captions)


def scalar_columns(fields: Mapping[str, Any]) -> dict[str, Scalar]:
    """Keep what fits a column of a table; lists and objects are left out."""
    return {name: value for name, value in fields.items() if isinstance(value, _SCALARS)}


def _read_one(content: bytes | ItemError, name: str) -> Sidecar:
    try:
        if isinstance(content, ItemError):
            raise content
        return _read_json(content, name) if name.endswith(".json") else _read_lines(content, name)
    except (ItemError, SourceError) as error:
        return Sidecar(columns={CAPTION_ERROR: str(error)})


def _joined(said: Sequence[Sidecar]) -> Sidecar:
    columns = {name: value for one in said for name, value in one.columns.items()}
    errors = [str(one.columns[CAPTION_ERROR]) for one in said if CAPTION_ERROR in one.columns]
    return Sidecar(
        key=next((one.key for one in said if one.key), None),
        texts=tuple(dict.fromkeys(text for one in said for text in one.texts)),
        columns={**columns, CAPTION_ERROR: "; ".join(errors)} if errors else columns,
    )


def _read_lines(content: bytes, name: str) -> Sidecar:
    """Make each line that is not blank a caption; a file without one is one empty caption."""
    lines = [line for line in _decode(content, name).splitlines() if line.strip()]
    return Sidecar(texts=text_items(lines or [""], None))


def _read_json(content: bytes, name: str) -> Sidecar:
    fields = _json_object(content, name)
    language, key = _string(fields, "language", name), _string(fields, "key", name)
    captions = [
        caption
        for caption_field in _CAPTION_FIELDS
        for caption in caption_list(fields.pop(caption_field, None), f"{name}: {caption_field}")
    ]
    return Sidecar(key=key, texts=text_items(captions, language), columns=scalar_columns(fields))


def _json_object(content: bytes, name: str) -> dict[str, Any]:
    try:
        fields = json.loads(_decode(content, name))
    except (json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{name} is not valid JSON: {error}; repair or remove it") from None
    if not isinstance(fields, dict):
        example = '{"caption": "a dog"}'
        raise SourceError(f"{name} is not a JSON object such as {example}: {fields!r:.60}")
    return fields


def _string(fields: dict[str, Any], name: str, file_name: str) -> str | None:
    """Take a field out that is a string or missing."""
    value = fields.pop(name, None)
    if value is None or isinstance(value, str):
        return value or None
    raise SourceError(f"{file_name}: {name} is {value!r:.60}; expected a string")


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is {content[error.start]:#04x}"
        raise SourceError(f"{name} is not UTF-8 ({reason}); save it as UTF-8") from None
