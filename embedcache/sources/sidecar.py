"""Captions beside an image, in a `.txt` or a `.json` file of the same name; for folders and shards.

The checks of captions and columns are those of tables, too.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from embedcache.errors import SourceError
from embedcache.sources.contract import TextItem

SIDECAR_SUFFIXES = frozenset({".json", ".txt"})

Scalar: TypeAlias = str | int | float | bool | None

_CAPTION_FIELDS = ("caption", "captions", "text", "texts")


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What the files beside one image say of it.

    Args:
        key: the sample's key, where a `.json` has one.
        texts: captions, those of the `.json` first.
        columns: all other fields of the `.json` that are JSON scalars.
    """

    key: str | None = None
    texts: tuple[TextItem, ...] = ()
    columns: Mapping[str, Scalar] = field(default_factory=dict)


def read_sidecar(beside: Mapping[str, bytes], place: str) -> Sidecar:
    """Join what the files beside one image say.

    Args:
        beside: suffix, `.json` or `.txt`, -> content of the file.
        place: the files' common name as the user knows it, without the suffix.

    Raises:
        SourceError: a file is not UTF-8, or not a JSON object of captions; the message names it.
    """
    said = _read_json(beside[".json"], f"{place}.json") if ".json" in beside else Sidecar()
    lines = _read_lines(beside[".txt"], f"{place}.txt") if ".txt" in beside else ()
    return Sidecar(key=said.key, texts=said.texts + lines, columns=said.columns)


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
    return {
        name: value for name, value in fields.items() if value is None or isinstance(value, str | int | float | bool)
    }


def _read_lines(content: bytes, name: str) -> tuple[TextItem, ...]:
    """Make each line that is not blank a caption; a file without one is one empty caption."""
    lines = [line for line in _decode(content, name).splitlines() if line.strip()]
    return text_items(lines or [""], None)


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
