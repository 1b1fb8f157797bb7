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
from embedcache.samples import Sample, Scalar, TextItem

SIDECAR_SUFFIXES = frozenset({".json", ".txt"})
CAPTION_ERROR = "caption_error"

_SCALARS = (str, int, float, bool, type(None))
_CAPTION_FIELDS = ("caption", "captions", "text", "texts")
_RESERVED = frozenset({*_CAPTION_FIELDS, "key", "language"})
"""Fields of a `.json` that are not columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """Content of the files beside one image.

    Args:
        key: key of the sample, if a file names it.
        texts: captions.
        columns: other fields, and `caption_error` if a file is invalid.
    """

    key: str | None = None
    texts: tuple[TextItem, ...] = ()
    columns: Mapping[str, Scalar] = field(default_factory=dict)


def to_sidecar(key: str, texts: Sequence[TextItem], columns: Mapping[str, Scalar]) -> bytes:
    """Return the content of a `.json` from which `read_sidecar` reads the same key, captions, languages and columns.

    Columns with a name that has another meaning there, such as `text` or `language`, are left out.
    """
    fields: dict[str, Any] = {name: value for name, value in columns.items() if name not in _RESERVED}
    fields |= {"key": key, "captions": [text.text for text in texts], "language": [text.language for text in texts]}
    return json.dumps(fields, ensure_ascii=False).encode()


def read_sidecar(files: Mapping[str, bytes | ItemError], name: str) -> Sidecar:
    """Read the sidecar files of one image; a caption in both, whatever its spaces, counts once.

    An invalid file yields only the reason, in the column `caption_error`: one among millions must not stop the rest.

    Args:
        files: suffix (`.json` or `.txt`) -> content of the file, or why it cannot be read.
        name: name of the files in the source, without the suffix.
    """
    of_json = _read_file(files[".json"], name + ".json") if ".json" in files else Sidecar()
    of_txt = _read_file(files[".txt"], name + ".txt") if ".txt" in files else Sidecar()
    captions = [text.text.split() for text in of_json.texts]
    more_texts = [text for text in of_txt.texts if text.text.split() not in captions]
    columns = dict(of_json.columns)
    errors = [sidecar.columns.get(CAPTION_ERROR) for sidecar in (of_json, of_txt)]
    if any(errors):
        columns[CAPTION_ERROR] = "; ".join(str(error) for error in errors if error)
    return Sidecar(key=of_json.key, texts=(*of_json.texts, *more_texts), columns=columns)


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
    """Return the items or the column that two samples differ in, beside their captions."""
    first, second = ({"images": sample.images, **sample.files, **sample.columns} for sample in (one, other))
    return next((name for name in (*first, *second) if first.get(name) != second.get(name)), "columns")


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
    key = fields.pop("key", None)
    language = fields.pop("language", None)
    if not isinstance(key, str | None):
        raise SourceError(f"{name}: key is {key!r:.60}; expected a string")

    captions = []
    for caption_field in _CAPTION_FIELDS:
        captions += parse_captions(fields.pop(caption_field, None), f"{name}: {caption_field}")
    languages = language if isinstance(language, list) else [language] * len(captions)
    if len(languages) != len(captions) or not all(isinstance(each, str | None) for each in languages):
        raise SourceError(f"{name}: language is {language!r:.60}; expected a string, or one for each caption")
    texts = tuple(to_text_items([caption], of)[0] for caption, of in zip(captions, languages, strict=True))
    return Sidecar(key=key or None, texts=texts, columns=to_scalar_columns(fields))


def _check_unicode(fields: Mapping[str, Any], name: str) -> None:
    """Check that no text holds half of a character, which JSON can write and no table can hold."""
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{name} holds {error.object[error.start]!r}, which is no character; repair it") from None
