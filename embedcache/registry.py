"""Plug-ins by name, imported on first use, so that no heavy library loads before it is needed.

A name `module:attribute` that the user gives is imported, wherever it is. One that is read from a file, such as the
source of a cache or the projector of a run, is imported only if its author can be trusted: see `names_from`.
"""

import importlib
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from embedcache.errors import MissingExtraError, SettingError, UnknownNameError

_FILE: ContextVar[str | None] = ContextVar("file", default=None)
_TRUSTS_FILES: ContextVar[bool] = ContextVar("trusts_files", default=False)


@dataclass(frozen=True)
class Trust:
    """What this process may import besides built-in and installed plug-ins; worker processes get a copy.

    Args:
        given: `module:attribute` that the user gave, each after its kind.
        read: names, such as `module:attribute`, that settings were filled with from a file -> the file.
        packages: packages whose own objects any file may name.
        folders: folders in which plug-ins that the user gives or trusts are found, besides those of `sys.path`.
    """

    given: set[str]
    read: dict[str, str]
    packages: set[str]
    folders: list[str]


_TRUST = Trust(set(), {}, set(), [])
_USED_PLUGINS: set[str] = set()


@contextmanager
def names_from(file: object) -> Iterator[None]:
    """Treat all names that are loaded in this context as read from a file, which a stranger may have written.

    `Registry.load` then imports built-in plug-ins, those of installed packages, those whose name the user has given to
    this process, and those that a package of `trust_package` defines; within `trust_files` it imports any.
    """
    token = _FILE.set(str(file))
    try:
        yield
    finally:
        _FILE.reset(token)


@contextmanager
def trust_files(is_trusted: bool = True) -> Iterator[None]:  # noqa: FBT001, FBT002
    """Import any code that caches, runs, indexes and studies name while this context lasts: trust their authors."""
    token = _TRUSTS_FILES.set(is_trusted or _TRUSTS_FILES.get())
    try:
        yield
    finally:
        _TRUSTS_FILES.reset(token)


def has_trust() -> bool:
    """Return whether this is within `trust_files`."""
    return _TRUSTS_FILES.get()


def trust_package(package: str) -> None:
    """Allow files to name the classes and functions that a package defines: for pipelines that write such files."""
    _TRUST.packages.add(package)


def search_plugins_in(folder: str) -> None:
    """Find plug-ins that the user names or trusts in one more folder, and nothing else."""
    _TRUST.folders[:] = [folder]


def mark_as_read(file: object, names: Iterable[str]) -> None:
    """Treat some names as read from a file wherever they are loaded, as settings do not say where they come from."""
    _TRUST.read.update({name: str(file) for name in names if name})


def current_trust() -> tuple[Trust, bool]:
    """Return what another process needs to import the same; see `adopt_trust`."""
    return _TRUST, _TRUSTS_FILES.get()


def adopt_trust(trust: tuple[Trust, bool]) -> None:
    """Import what the process that started this one may import."""
    parent, trusts_files = trust
    _TRUST.given.update(parent.given)
    _TRUST.read.update(parent.read)
    _TRUST.packages.update(parent.packages)
    _TRUST.folders[:] = parent.folders
    _TRUSTS_FILES.set(trusts_files)


def used_plugins() -> frozenset[str]:
    """Return the top-level packages of the plug-ins that this process has loaded, besides built-in ones."""
    return frozenset(_USED_PLUGINS)


def plugin_of(error: BaseException) -> str | None:
    """Return the top-level package of the loaded plug-in that an error was raised in, or in what it called.

    A worker process sends the package as the attribute `plugin` of its error, as tracebacks stay behind.
    """
    found, step = getattr(error, "plugin", None), error.__traceback__
    while step is not None:
        package = _package_of(str(step.tb_frame.f_globals.get("__name__", "")))
        found = package if package in _USED_PLUGINS - {"embedcache"} else found
        step = step.tb_next
    return found


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

    def path(self, name: str) -> str:
        """Return the `module:attribute` of a plug-in, or the name itself if there is no such plug-in."""
        if name in self.paths:
            return self.paths[name]
        return name if ":" in name else self._declared().get(name, name)

    def load(self, name: str) -> Any:
        """Import a plug-in by its name, or any object by its `module:attribute`.

        Raises:
            UnknownNameError: there is no such name, module or attribute.
            SettingError: the name was read from a file whose author is not trusted, see `names_from`; or the object
                cannot be called as a plug-in of this kind.
            MissingExtraError: the module of the plug-in imports a package that is not installed.
        """
        if not isinstance(name, str):
            raise unknown_name(self.kind, name, [*self.names, *self.presets])
        module, _, attribute = self.path(name).partition(":")
        if name in self.paths:
            return getattr(importlib.import_module(module), attribute)
        if not all(part and "/" not in part for part in (*module.split("."), attribute)):
            raise unknown_name(self.kind, name, [*self.names, *self.presets], hint=missing_plugin_hint(name))
        package = self._package_to_trust(name) if ":" in name else None
        _USED_PLUGINS.add(_package_of(module))  # before it is imported, which may raise
        try:
            imported = _import_plugin(name, module)
        except ModuleNotFoundError as error:
            raise self._not_found(name, error) from error
        try:
            plugin = getattr(imported, attribute)
        except AttributeError as error:
            raise self._not_found(name, error) from error
        if package is not None and callable(plugin) and _package_of(getattr(plugin, "__module__", "")) != package:
            raise self._is_untrusted(name)
        self._check_call(name, plugin)
        return plugin

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

    def accept(self, name: str) -> None:
        """Count a name among those that the user has given to this process, which files may name too."""
        _TRUST.given.add(f"{self.kind} {name}")

    def _package_to_trust(self, name: str) -> str | None:
        """Return the package that must define an object, or None for any; SettingError if it must not be imported."""
        is_given = f"{self.kind} {name}" in _TRUST.given
        file = _FILE.get() or _TRUST.read.get(name)
        if file is not None and not _TRUSTS_FILES.get() and not is_given:
            if name in self.paths.values() or name in self._declared().values():
                return None
            if _package_of(name) in _TRUST.packages:
                return _package_of(name)
            raise self._is_untrusted(name)
        if file is None:
            self.accept(name)
        sys.path.extend(folder for folder in _TRUST.folders if folder not in sys.path)
        return None

    def _is_untrusted(self, name: str) -> SettingError:
        file = _FILE.get() or _TRUST.read.get(name)
        return SettingError(
            f"{file} names the {self.kind} {name!r}, which is custom code; if you trust its author, use --trust, or "
            "embedcache.registry.trust_files() in Python"
        )

    def _not_found(self, name: str, error: Exception) -> UnknownNameError:
        next_step = missing_plugin_hint(name) or "name a plug-in of yours as module:attribute"
        return unknown_name(self.kind, name, self.names, hint=f"{error}; {next_step}")

    def _declared(self) -> Mapping[str, str]:
        return {} if self.group is None else _installed(self.group)


def installed_plugins(kind: str) -> list[str]:
    """Return the names that installed packages declare in the group `embedcache.KIND`, sorted; nothing is imported."""
    return sorted(_installed(f"embedcache.{kind}"))


def _installed(group: str) -> Mapping[str, str]:
    return _entry_points(tuple(path for path in sys.path if path and path not in _TRUST.folders)).get(group, {})


@cache
def _entry_points(search_path: tuple[str, ...]) -> Mapping[str, Mapping[str, str]]:
    """Return group -> name -> `module:attribute` of all entry points of installed packages.

    Of two packages that declare one name, that which comes first on `sys.path` counts, as for modules.
    """
    from importlib.metadata import distributions

    found: dict[str, dict[str, str]] = {}
    for package in distributions(path=list(search_path)):
        for point in package.entry_points:
            found.setdefault(point.group, {}).setdefault(point.name, point.value.partition("[")[0].strip())
    return found


def _package_of(module: str) -> str:
    return module.partition(":")[0].partition(".")[0]


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


def missing_plugin_hint(name: str) -> str:
    """Return which file names an unknown plug-in, and what to do; empty if the user named it."""
    file = _FILE.get() or _TRUST.read.get(name)
    return "" if file is None else f"{file} names it: if it is a plug-in, install its package, which is missing here"


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str = "", hint: str = "") -> UnknownNameError:
    """Create the error for an unknown name, with the known names and the closest match.

    Args:
        kind: what it is the name of, such as `column`.
        name: the unknown name.
        known: all names that there are.
        where: what has these names, with a preposition, such as `of cache/`.
        hint: the next step.
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5) if isinstance(name, str) else []
    parts = [f"unknown {kind} {name!r} {where}".rstrip()]
    if close:
        parts.append(f"did you mean {close[0]!r}?")
    parts.append(f"known: {', '.join(names)}" if names else f"there is no {kind} {where or 'here'}")
    if hint:
        parts.append(hint)
    return UnknownNameError("; ".join(parts))


def is_installed(package: str) -> bool:
    """Return whether a top-level package can be imported, without importing it.

    An uninstalled package may leave a folder behind, such as that of its compiled code, which Python imports as an
    empty package.
    """
    try:
        spec = find_spec(package)
    except ValueError:  # it has been imported by other means, and has no spec
        return True
    return spec is not None and spec.origin is not None


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package; if it is missing, MissingExtraError has the pip command for our `extra`."""
    package = module.partition(".")[0]
    if not is_installed(package):
        raise _missing(package, extra)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or package != error.name.partition(".")[0]:
            raise
        raise _missing(error.name, extra) from error


def _missing(package: str, extra: str) -> MissingExtraError:
    return MissingExtraError(
        f"the package {package!r} is not installed; run: python -m pip install 'embedcache[{extra}]'"
    )
