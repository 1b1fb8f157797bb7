"""Captions of images in `.txt` and `.json` sidecar files, and checks of captions shared with tables."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from embedcache.errors import ItemError, SourceError
from embedcache.files import decode_text
from embedcache.sources.base import Scalar, TextItem

SIDECAR_SUFFIXES = frozenset({".json", ".txt"})
CAPTION_ERROR = "caption_error"

_SCALARS = (str, int, float, bool, type(None))
_CAPTION_FIELDS = ("caption", "captions", "text", "texts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """Content of the files beside one image; its columns include `caption_error` if a file is invalid."""

    key: str | None = None
    texts: tuple[TextItem, ...] = ()
    columns: Mapping[str, Scalar] = field(default_factory=dict)


def read_sidecar(files: Mapping[str, bytes | ItemError], name: str) -> Sidecar:
    """Merge the sidecar files of one image; a caption in both counts once.

    An invalid file yields only the reason, in the column `caption_error`: one among millions must not stop the rest.

    Args:
        files: suffix (`.json` or `.txt`) -> content of the file, or why it cannot be read.
        name: name of the files in the source, without the suffix.
    """
    sidecars = [_read_file(files[suffix], name + suffix) for suffix in (".json", ".txt") if suffix in files]
    if len(sidecars) == 1:
        return sidecars[0]
    columns = {name: value for sidecar in sidecars for name, value in sidecar.columns.items()}
    errors = [str(sidecar.columns[CAPTION_ERROR]) for sidecar in sidecars if CAPTION_ERROR in sidecar.columns]
    return Sidecar(
        key=next((sidecar.key for sidecar in sidecars if sidecar.key), None),
        texts=tuple(dict.fromkeys(text for sidecar in sidecars for text in sidecar.texts)),
        columns={**columns, CAPTION_ERROR: "; ".join(errors)} if errors else columns,
    )


def parse_captions(value: Any, location: str) -> list[str]:
    """Return the captions in a string, a list of strings or None; the error for other types starts with `location`."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    for caption in values:
        if not isinstance(caption, str):
            raise SourceError(f"{location} holds {caption!r:.60}; expected a string or a list of strings")
    return values


def to_text_items(captions: Iterable[str], language: str | None) -> tuple[TextItem, ...]:
    """Create the text items of captions in one language; blank captions become "", which extraction reports."""
    return tuple(TextItem(text=caption.strip(), language=language or None) for caption in captions)


def to_scalar_columns(fields: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return the fields that fit a column of the sample table; lists and objects are dropped."""
    return {name: value for name, value in fields.items() if isinstance(value, _SCALARS)}


def parse_json(text: str, location: str) -> Any:
    """Parse JSON in which no name occurs twice in one object; the error for other text starts with `location`."""
    try:
        return json.loads(text, object_pairs_hook=_unique_fields)
    except (ValueError, RecursionError) as error:  # invalid, too deep, or a number of thousands of digits
        raise SourceError(f"{location} is not valid JSON: {error}; repair or remove it") from None


def parse_json_object(text: str, location: str) -> dict[str, Any]:
    """Parse a JSON object as `parse_json` does; the error for other text starts with `location`."""
    fields = parse_json(text, location)
    if not isinstance(fields, dict):
        example = '{"caption": "a dog"}'
        raise SourceError(f"{location} is not a JSON object such as {example}: {fields!r:.60}")
    return fields


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return fields


def _read_file(content: bytes | ItemError, name: str) -> Sidecar:
    try:
        if isinstance(content, ItemError):
            raise content
        if name.endswith(".json"):
            return _read_json(content, name)
        lines = [line for line in decode_text(content, name, SourceError).splitlines() if line.strip()]
        return Sidecar(texts=to_text_items(lines or [""], None))
    except (ItemError, SourceError) as error:
        return Sidecar(columns={CAPTION_ERROR: str(error)})


def _read_json(content: bytes, name: str) -> Sidecar:
    fields = parse_json_object(decode_text(content, name, SourceError), name)
    _check_unicode(fields, name)
    language, key = _string(fields, "language", name), _string(fields, "key", name)
    captions = [
        caption
        for caption_field in _CAPTION_FIELDS
        for caption in parse_captions(fields.pop(caption_field, None), f"{name}: {caption_field}")
    ]
    return Sidecar(key=key, texts=to_text_items(captions, language), columns=to_scalar_columns(fields))


def _check_unicode(fields: Mapping[str, Any], name: str) -> None:
    """Check that no text holds half of a character, which JSON can write and no table can hold."""
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{name} holds {error.object[error.start]!r}, which is no character; repair it") from None


def _string(fields: dict[str, Any], name: str, file_name: str) -> str | None:
    """Remove and return a field that must be a string or missing."""
    value = fields.pop(name, None)
    if value is None or isinstance(value, str):
        return value or None
    raise SourceError(f"{file_name}: {name} is {value!r:.60}; expected a string")
