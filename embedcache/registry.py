"""Names to objects, imported on first use, so that no heavy library loads before it is asked for."""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from embedcache.errors import MissingExtraError, UnknownNameError


@dataclass(frozen=True)
class Registry:
    """A table of plug-ins of one kind: a short name for each `module:attribute`.

    Args:
        kind: what the names stand for, in the singular; used in error messages.
        paths: short name -> `module:attribute`.
    """

    kind: str
    paths: Mapping[str, str]

    def load(self, name: str) -> Any:
        """Get the object that `name` stands for: a name in the table, or a `module:attribute` of the user's own.

        Raises:
            UnknownNameError: the name is in no table and is no importable path.
        """
        path = self.paths.get(name, name)
        module_name, _, attribute = path.partition(":")
        if not attribute:
            raise unknown_name(self.kind, name, self.paths)
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ModuleNotFoundError, AttributeError) as error:
            if name in self.paths:
                raise
            hint = f"{error}; a plug-in of your own is named module:attribute"
            raise unknown_name(self.kind, name, self.paths, hint=hint) from error


def unknown_name(kind: str, name: str, known: Iterable[str], *, hint: str = "") -> UnknownNameError:
    """Make the error for a name that stands for nothing: it lists what exists and the near miss."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    parts = [f"unknown {kind} {name!r}"]
    if near:
        parts.append(f"did you mean {near[0]!r}?")
    parts.append(f"known: {', '.join(names)}" if names else f"there is no {kind} here")
    if hint:
        parts.append(hint)
    return UnknownNameError("; ".join(parts))


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: the name to import.
        extra: the extra of this package that installs it.

    Raises:
        MissingExtraError: it is not installed; the message holds the pip line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(
            f"the package {error.name!r} is not installed; run: python -m pip install 'embedcache[{extra}]'"
        ) from error
