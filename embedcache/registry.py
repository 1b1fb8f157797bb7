"""Plug-ins by name, imported on first use, so that no heavy library loads before it is needed."""

import importlib
import inspect
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import Any

from embedcache.errors import MissingExtraError, SettingError, UnknownNameError


@dataclass(frozen=True)
class Registry:
    """The plug-ins of one kind: built-in ones, and those of installed packages that declare an entry point.

    Args:
        kind: what a name stands for, in the singular, for error messages.
        paths: name of each built-in plug-in -> `module:attribute`.
        group: entry-point group in which other packages declare plug-ins; None: built-in ones only.
        presets: names of combinations of plug-ins, to list in error messages.
        arguments: number of positional arguments that a plug-in is called with; None: not checked.
        options: names of the keyword arguments that it is called with.
    """

    kind: str
    paths: Mapping[str, str]
    group: str | None = None
    presets: Collection[str] = ()
    arguments: int | None = None
    options: Sequence[str] = ()

    def __contains__(self, name: str) -> bool:
        """Return whether a name is built in or declared by an installed package."""
        return name in self.paths or name in self._declared()

    @property
    def names(self) -> list[str]:
        """All names, sorted; reads the metadata of installed packages."""
        return sorted({*self.paths, *self._declared()})

    def load(self, name: str) -> Any:
        """Import a plug-in by its name, or any object by its `module:attribute`.

        Raises:
            UnknownNameError: there is no such name, module or attribute.
            SettingError: the object cannot be called as a plug-in of this kind.
            MissingExtraError: the module of the plug-in imports a package that is not installed.
        """
        if name in self.paths:
            module, _, attribute = self.paths[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        module, _, attribute = (name if ":" in name else self._declared().get(name, name)).partition(":")
        if not all(part and "/" not in part for part in (*module.split("."), attribute)):
            raise unknown_name(self.kind, name, [*self.names, *self.presets])
        try:
            plugin = _import_plugin(name, module)
        except ModuleNotFoundError as error:
            raise self._not_found(name, error) from error
        try:
            found = getattr(plugin, attribute)
        except AttributeError as error:
            raise self._not_found(name, error) from error
        self._check_call(name, found)
        return found

    def _check_call(self, name: str, plugin: Any) -> None:
        """Check that an object takes the arguments that plug-ins of this kind are called with."""
        if self.arguments is None:
            return
        try:
            if not callable(plugin) or inspect.isbuiltin(plugin):
                raise TypeError(f"it is a {type(plugin).__name__}")
            inspect.signature(plugin).bind(*[None] * self.arguments, **dict.fromkeys(self.options))
        except (TypeError, ValueError) as error:  # ValueError: a class of C has no signature
            takes = [f"{self.arguments} positional arguments", *self.options]
            raise SettingError(
                f"{name!r} is no {self.kind}: expected a class or function that takes {', '.join(takes)}, got one that "
                f"does not: {error}"
            ) from None

    def _not_found(self, name: str, error: Exception) -> UnknownNameError:
        return unknown_name(self.kind, name, self.names, hint=f"{error}; name a plug-in of yours as module:attribute")

    def _declared(self) -> Mapping[str, str]:
        return {} if self.group is None else _entry_points(self.group, tuple(sys.path))


@cache
def _entry_points(group: str, search_path: tuple[str, ...]) -> Mapping[str, str]:
    """Return name -> `module:attribute` of the entry points of installed packages; a change of `sys.path` rereads."""
    from importlib.metadata import distributions

    declared = (point for package in distributions(path=list(search_path)) for point in package.entry_points)
    return {point.name: point.value for point in declared if point.group == group}


def _import_plugin(name: str, module: str) -> ModuleType:
    """Import the module of a plug-in; MissingExtraError if it exists and imports a package that is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if f"{module}.".startswith(f"{missing}."):
            raise
        raise MissingExtraError(
            f"the plug-in {name!r} imports {missing!r}, which is not installed; install it, such as with: "
            f"python -m pip install {missing.partition('.')[0]}"
        ) from error


def unknown_name(kind: str, name: str, known: Iterable[str], *, hint: str = "") -> UnknownNameError:
    """Create the error for an unknown name, with the known names and the closest match."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    parts = [f"unknown {kind} {name!r}"]
    if close:
        parts.append(f"did you mean {close[0]!r}?")
    parts.append(f"known: {', '.join(names)}" if names else f"there is no {kind} here")
    if hint:
        parts.append(hint)
    return UnknownNameError("; ".join(parts))


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package; if it is missing, MissingExtraError has the pip command for our `extra`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(
            f"the package {error.name!r} is not installed; run: python -m pip install 'embedcache[{extra}]'"
        ) from error
