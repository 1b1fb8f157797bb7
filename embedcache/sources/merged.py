"""The items of a cache that was merged from others: each is read from the source of the cache that it came from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from embedcache.errors import ItemError, SourceError
from embedcache.sources.base import FileItem, Sample, Source

MERGED = "merged"
"""Source type recorded by a cache that was merged from caches of several sources; nothing can be extracted from it."""

_PARTS = "parts"


def merged_description(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the description of the sources of several caches."""
    path = " + ".join(str(part.get("path", "")) for part in parts)
    return {"type": MERGED, "path": path, "settings": {}, _PARTS: [dict(part) for part in parts]}


def merged_parts(description: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the descriptions that a merged description was made of, or the description itself."""
    return list(description[_PARTS]) if description.get("type") == MERGED else [description]


def merged_path(number: int, path: str) -> str:
    """Return the path of an item of one of the sources, counted from 0."""
    return f"{number}/{path}"


class MergedSource:
    """Several sources of which each has some of the items, by the number at the beginning of their path."""

    def __init__(self, sources: Sequence[Source], description: Mapping[str, Any]) -> None:
        self._sources, self._description = sources, description

    def describe(self) -> Mapping[str, Any]:
        """Return what is needed to open the sources again."""
        return self._description

    def samples(self) -> Iterator[Sample]:
        """Raise a SourceError, because a cache of another source would be extended with these samples."""
        raise SourceError(
            f"{self._description['path']} are the sources of a merged cache; extract from each of them, and merge again"
        )

    def read(self, item: FileItem) -> bytes:
        """Return the bytes of an item; the errors are those of its source."""
        number, _, path = item.path.partition("/")
        values = {each.name: getattr(item, each.name) for each in fields(item)}
        if not number.isdecimal() or int(number) >= len(self._sources):
            raise ItemError(f"{item.path}: expected the number of one of {len(self._sources)} sources, and a path")
        return self._sources[int(number)].read(FileItem(**{**values, "path": path}))
