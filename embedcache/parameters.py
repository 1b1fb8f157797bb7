"""Parameters of plug-ins by name, such as `mlp:hidden=1024` or `metaclip:head=100,threshold=0.3`.

A parameter is a keyword argument of the plug-in's function or class, whose signature says its type and its default.
Options of encoders, such as `st:all-MiniLM-L6-v2,prompt=query: `, have the same grammar.
"""

import inspect
import json
import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from embedcache.errors import SettingError
from embedcache.registry import Registry, plugin_name, unknown_name

_PART = re.compile(r'(?:^|,)([^,=]*=\s*"(?:\\.|[^"\\])*"\s*(?=,|$)|[^,]*)')


def bind(registry: Registry, text: str, *, given: Collection[str] = ()) -> partial[Any]:
    """Load a plug-in and bind the parameters that its text names.

    Args:
        registry: plug-ins of one kind.
        text: `name`, or `name:parameter=value,parameter=value`.
        given: keyword arguments that the caller passes, which are no parameters.

    Raises:
        UnknownNameError: there is no such plug-in, or it has no such parameter.
        SettingError: a value is of another type, or a parameter without a default is missing.
    """
    plugin = registry.load(text)
    name = plugin_name(text)
    texts = parse_options(text, split_options(text[len(name) + 1 :]) if len(text) > len(name) else ())

    known = find_parameters(registry, plugin, given=given)
    for option in texts:
        if option not in known:
            raise unknown_name("parameter", option, known, where=f"of the {registry.kind} {name!r}")
    missing = [option for option, item in known.items() if item.default is item.empty and option not in texts]
    if missing:
        raise SettingError(f"{name}: expected the parameter {missing[0]}, got none; use {name}:{missing[0]}=VALUE")

    hints = _type_hints(plugin) if texts else {}
    values = {
        option: _convert(f"{name}: {option}", value, hints.get(option), known[option])
        for option, value in texts.items()
    }
    return partial(plugin, **values)


def find_parameters(registry: Registry, plugin: Any, *, given: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """Return the parameters of a plug-in by name: its arguments but for those that the caller passes."""
    arguments = list(inspect.signature(plugin).parameters.values())[registry.arguments :]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {item.name: item for item in arguments if item.kind in kinds and item.name not in given}


def _type_hints(plugin: Any) -> Mapping[str, Any]:
    return get_type_hints(plugin.__init__ if inspect.isclass(plugin) else plugin, include_extras=True)


def _convert(name: str, text: str, hint: Any, item: inspect.Parameter) -> Any:
    """Return the value of a parameter: by its type hint, or the type of its default; a tuple is `VALUE+VALUE`."""
    if hint is None:
        hint = str if item.default in (None, item.empty) else type(item.default)
    is_tuple = any(get_origin(kind) is tuple for kind in (hint, *get_args(hint)))
    try:
        return TypeAdapter(hint).validate_python(text.split("+") if is_tuple else text)
    except ValidationError as error:
        expected = error.errors(include_url=False)[0]["msg"].removeprefix("Input should be ")
        raise SettingError(f"{name}: expected {expected.partition(',')[0]}, got {text!r}") from None


def split_options(text: str) -> list[str]:
    """Return the parts of a text between commas, except for commas in a value in quotes."""
    return _PART.findall(text)


def parse_options(text: str, parts: Iterable[str], *, unstripped: Collection[str] = ()) -> dict[str, str]:
    """Parse `name=value` in each of the parts of a text.

    Args:
        text: the text, for error messages.
        parts: its parts, see `split_options`.
        unstripped: names of options whose values keep the spaces around them.
    """
    options: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        name = name.strip()
        value = _unquoted(value if name in unstripped else value.strip())
        if not (name and equals and value):
            raise SettingError(
                f"invalid option {part!r} in {text!r}: expected name=value after a comma; put a value with a comma in "
                'quotes, such as prompt="query, short: "'
            )
        if name in options:
            raise SettingError(f"option {name} in {text!r}: expected it once, got it twice; remove one")
        options[name] = value
    return options


def quote_option(value: str) -> str:
    """Return a value as `parse_options` reads it back."""
    is_plain = value == value.strip() and value.isprintable() and "," not in value and not value.startswith('"')
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    """Return the text of a value in quotes; empty if its quotes are not those of a JSON string."""
    if not value.lstrip().startswith('"'):
        return value
    try:
        return str(json.loads(value, strict=False))
    except ValueError:
        return ""
