"""Captions of images in `.txt` and `.json` sidecar files, and checks of captions shared with tables."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import groupby
from typing import Any

from embedcache.errors import ItemError, SourceError
from embedcache.files import decode_text, split_lines
from embedcache.sources.base import Sample, Scalar, TextItem

SIDECAR_SUFFIXES = frozenset({".json", ".txt"})
CAPTION_ERROR = "caption_error"

_SCALARS = (str, int, float, bool, type(None))
_CAPTION_FIELDS = ("caption", "captions", "text", "texts")
_EXPORTED = "embedcache"
_RESERVED = frozenset({*_CAPTION_FIELDS, "key", "language", _EXPORTED})
"""Fields of a `.json` that are not columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """Content of the files beside one image.

    Args:
        key: key of the sample, if a file names it.
        texts: captions.
        columns: other fields, and `caption_error` if a file is invalid.
        is_exported: whether it is a `.json` of `to_sidecar`, which a `.txt` beside it adds nothing to.
    """

    key: str | None = None
    texts: tuple[TextItem, ...] = ()
    columns: Mapping[str, Scalar] = field(default_factory=dict)
    is_exported: bool = False


def to_sidecar(key: str, texts: Sequence[TextItem], columns: Mapping[str, Scalar]) -> bytes:
    """Return the content of a `.json` from which `read_sidecar` reads the same key, captions, languages and columns.

    For other readers, `captions` and columns are fields of their own. The object `embedcache` has what these cannot
    express: the language of each caption, and the columns whose names are those of fields with another meaning.
    """
    exported = {
        "languages": [text.language for text in texts],
        "columns": {name: value for name, value in columns.items() if name in _RESERVED},
    }
    others = {name: value for name, value in columns.items() if name not in _RESERVED}
    fields = {"key": key, **others, "captions": [text.text for text in texts], _EXPORTED: exported}
    return json.dumps(fields, ensure_ascii=False).encode()


def read_sidecar(files: Mapping[str, bytes | ItemError], name: str) -> Sidecar:
    """Merge the sidecar files of one image; a caption in both counts once. A `.json` of `to_sidecar` is read alone.

    An invalid file yields only the reason, in the column `caption_error`: one among millions must not stop the rest.

    Args:
        files: suffix (`.json` or `.txt`) -> content of the file, or why it cannot be read.
        name: name of the files in the source, without the suffix.
    """
    sidecars = [_read_file(files[suffix], name + suffix) for suffix in (".json", ".txt") if suffix in files]
    if len(sidecars) == 1 or any(sidecar.is_exported for sidecar in sidecars):
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


def join_captions(rows: Iterable[tuple[str, Sample]]) -> Iterator[Sample]:
    """Join adjacent samples of one key, which differ in their captions only, into one with all captions, in order.

    Args:
        rows: place of each sample, for errors, and the sample.

    Raises:
        SourceError: two of them name other items or have other columns.
    """
    for key, group in groupby(rows, key=lambda row: row[1].key):
        (place, first), *others = group
        for other_place, other in others:
            if replace(other, texts=first.texts) != first:
                raise SourceError(
                    f"{place} and {other_place}: expected rows of one key to differ in their captions only, got other "
                    f"{_difference(first, other)} for {key!r}; correct or remove it, or name another --key-column"
                )
        texts = tuple(text for _, sample in ((place, first), *others) for text in sample.texts)
        yield replace(first, texts=texts) if others else first


def _difference(one: Sample, other: Sample) -> str:
    """Return what two samples differ in, beside their captions."""
    if one.images != other.images:
        return "images"
    modality = next((name for name in (*one.files, *other.files) if one.files.get(name) != other.files.get(name)), None)
    names = (name for name in (*one.columns, *other.columns) if one.columns.get(name) != other.columns.get(name))
    return f"items of {modality}" if modality else f"values in column {next(names, None)!r}"


def to_scalar_columns(fields: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return the fields that fit a column of the sample table; lists, objects and bytes are dropped.

    Dates, times, durations and decimals become text: of a date and a time in the form of ISO 8601.
    """
    columns = ((name, _to_scalar(value)) for name, value in fields.items())
    return {name: value for name, value in columns if isinstance(value, _SCALARS)}


def _to_scalar(value: Any) -> Any:
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | timedelta) else value


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
        lines = [line for line in split_lines(decode_text(content, name, SourceError)) if line.strip()]
        return Sidecar(texts=to_text_items(lines or [""], None))
    except (ItemError, SourceError) as error:
        return Sidecar(columns={CAPTION_ERROR: str(error)})


def _read_json(content: bytes, name: str) -> Sidecar:
    fields = parse_json_object(decode_text(content, name, SourceError), name)
    _check_unicode(fields, name)
    if isinstance(fields.get(_EXPORTED), dict):
        return _read_exported(fields, name)
    language, key = _string(fields, "language", name), _string(fields, "key", name)
    captions = [
        caption
        for caption_field in _CAPTION_FIELDS
        for caption in parse_captions(fields.pop(caption_field, None), f"{name}: {caption_field}")
    ]
    return Sidecar(key=key, texts=to_text_items(captions, language), columns=to_scalar_columns(fields))


def _read_exported(fields: dict[str, Any], name: str) -> Sidecar:
    """Return the content of a `.json` of `to_sidecar`."""
    exported, key = fields.pop(_EXPORTED), _string(fields, "key", name)
    captions = parse_captions(fields.pop("captions", None), f"{name}: captions")
    languages, columns = exported.get("languages"), exported.get("columns")
    are_languages = isinstance(languages, list) and all(isinstance(of, str | None) for of in languages)
    if not (are_languages and len(languages) == len(captions) and isinstance(columns, dict)):
        raise SourceError(
            f"{name}: expected columns and one language per caption in {_EXPORTED}, got {exported!r:.60}; export the "
            f"samples again, or remove {_EXPORTED}"
        )
    texts = tuple(TextItem(text=text, language=of) for text, of in zip(captions, languages, strict=True))
    return Sidecar(key=key, texts=texts, columns=to_scalar_columns({**fields, **columns}), is_exported=True)


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
