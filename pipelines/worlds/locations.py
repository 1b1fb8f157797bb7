"""Locations of generated sources: `name=value,…`, all optional."""

from collections.abc import Mapping
from typing import Any

from embedcache.errors import SourceError


def parse_location(source: str, location: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each name, of the type of its default.

    Args:
        source: name of the source, for errors.
        location: `name=value` joined by commas; other names have their default.
        defaults: name -> default: a string, a float, or a whole number that is not negative.

    Raises:
        SourceError: a name is unknown, or a value is not a number.
    """
    values = dict(defaults)
    for word in filter(None, location.split(",")):
        name, separator, text = word.partition("=")
        if name not in values or not separator:
            raise SourceError(f"{source}: expected {', '.join(f'{name}=…' for name in values)}, got {word!r}")

        # `int` would also accept signs, spaces and underscores.
        kind = type(values[name])
        if kind is int and not text.isdecimal():
            raise SourceError(f"{source}: expected a whole number for {name}, got {text!r}")
        try:
            values[name] = kind(text)
        except ValueError:
            raise SourceError(f"{source}: expected a number for {name}, got {text!r}") from None
    return values
