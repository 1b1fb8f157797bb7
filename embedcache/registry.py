"""Plug-ins by name, imported on first use, so that no heavy library loads before it is needed.

A name `module:attribute` runs code: importing a module executes it. So `Registry.load` asks where the name comes from:

- from the user (an option, a TOML file of theirs, an argument in Python): it is imported, and from then on files may
  name it too, such as the run that is being written and read again;
- from a file that a stranger may have written (a cache, run, index or study): it is imported only if it is built in or
  an entry point of an installed package, if the user gave the same name, if `trust_code` was called for it or
  its package, or within `trust_files`, which is what `--trust` is.

Code that loads a name that it read from a file says so: by `names_from` around the call, or by `mark_as_read` where the
name first becomes a setting. Any other name counts as the user's. `names_from` and `trust_files` hold for the thread
that enters them, all else for the process; `embedcache.processes` passes both on to its worker processes and Ray tasks
(`current_trust`, `adopt_trust`).

A name may have parameters, such as `mlp:hidden=1024` or `metaclip:head=100,threshold=0.3`. A parameter is a keyword
argument of the plug-in's function or class, whose signature says its type and its default. Options of encoders, such as
`st:all-MiniLM-L6-v2,prompt=query: `, have the same grammar.
"""

import importlib
import inspect
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache, partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from embedcache.errors import MissingExtraError, SettingError, UnknownNameError

_PART = re.compile(r'(?:^|,)([^,=]*=\s*"(?:\\.|[^"\\])*"\s*(?=,|$)|[^,]*)')


@dataclass(frozen=True)
class Trust:
    """What the user of a process lets it import besides built-in and installed plug-ins.

    Args:
        accepted: names `module:attribute` that the user gave, and packages whose modules any file may name, see
            `trust_code`.
        read: names that settings were filled with from a file -> the file, see `mark_as_read`.
        folders: folders in which plug-ins that the user gives or trusts are found, besides those of `sys.path`.
        all_files: whether any file may name any code. Only `current_trust` sets it: `trust_files` holds for one thread.
    """

    accepted: set[str] = field(default_factory=set)
    read: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    all_files: bool = False


_TRUST = Trust()  # of this process
_TRUSTS_FILES: ContextVar[bool] = ContextVar("trusts_files", default=False)
_FILE: ContextVar[str | None] = ContextVar("file", default=None)  # that names are read from
_USED_PLUGINS: set[str] = set()


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


def trust_code(name: str) -> None:
    """Allow files to name a plug-in `module:attribute`, or all in the modules of a package, such as a pipeline's."""
    _TRUST.accepted.add(name)


def search_plugins_in(folder: str) -> None:
    """Find plug-ins that the user names or trusts in one more folder, and nothing else."""
    _TRUST.folders[:] = [folder]


@contextmanager
def names_from(file: object) -> Iterator[None]:
    """Treat all names that are loaded in this context as read from a file, which a stranger may have written."""
    token = _FILE.set(str(file))
    try:
        yield
    finally:
        _FILE.reset(token)


def mark_as_read(file: object, names: Iterable[str]) -> None:
    """Treat some names as read from a file wherever they are loaded, as settings do not say where they come from."""
    _TRUST.read.update({plugin_name(name): str(file) for name in names if name})


def plugin_name(text: str) -> str:
    """Return the name of a plug-in in a text that may name parameters too: `mlp` of `mlp:hidden=1024`."""
    return re.split(r":(?=\s*\w+\s*=)", text, maxsplit=1)[0]


def _naming_file(name: str) -> str | None:
    """Return the file that a name was read from; None if the user gave it."""
    return _FILE.get() or _TRUST.read.get(name)


def current_trust() -> Trust:
    """Return what another process needs to import the same; see `adopt_trust`."""
    return replace(_TRUST, all_files=has_trust())


def adopt_trust(trust: Trust) -> None:
    """Import what the process that started this one may import."""
    _TRUST.accepted.update(trust.accepted)
    _TRUST.read.update(trust.read)
    _TRUST.folders[:] = trust.folders
    _TRUSTS_FILES.set(trust.all_files)


def used_plugins() -> frozenset[str]:
    """Return the top-level packages of the plug-ins that this process has loaded, besides built-in ones."""
    return frozenset(_USED_PLUGINS)


@dataclass(frozen=True)
class Registry:
    """The plug-ins of one kind: built-in ones, and those of installed packages that declare an entry point.

    Args:
        kind: what a name stands for, in the singular, for error messages.
        paths: name of each built-in plug-in -> `module:attribute`.
        group: entry-point group in which other packages declare plug-ins; None: built-in ones only.
        presets: names of combinations of plug-ins, to list in error messages.
        arguments: number of positional arguments that a plug-in is called with.
        has_parameters: whether its other arguments are parameters that users name, see `bind`.
        has_objects: whether its plug-ins are objects rather than classes and functions.
    """

    kind: str
    paths: Mapping[str, str]
    group: str | None = None
    presets: Collection[str] = ()
    arguments: int = 0
    has_parameters: bool = False
    has_objects: bool = False

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
        """Import a plug-in by its name, or any object by its `module:attribute`, without parameters that follow it.

        Raises:
            UnknownNameError: there is no such name, module or attribute.
            SettingError: the name was read from a file whose author is not trusted, see `names_from`; or the object is
                neither a class nor a function.
            MissingExtraError: the module of the plug-in imports a package that is not installed.
        """
        if not isinstance(name, str):
            raise unknown_name(self.kind, name, [*self.names, *self.presets])
        if self.has_parameters:
            name = plugin_name(name)
        module, _, attribute = self.path(name).partition(":")
        if name in self.paths:
            return getattr(importlib.import_module(module), attribute)
        if not all(part and "/" not in part for part in (*module.split("."), attribute)):
            raise unknown_name(self.kind, name, [*self.names, *self.presets], hint=missing_plugin_hint(name))
        if ":" in name:
            if not self._is_trusted(name):
                raise SettingError(
                    f"{_naming_file(name)} names the {self.kind} {name!r}, which is custom code; if you trust its "
                    "author, use --trust, or embedcache.registry.trust_files() in Python"
                )
            sys.path.extend(folder for folder in _TRUST.folders if folder not in sys.path)
        plugin = self._import(name, module, attribute)
        if not (self.has_objects or callable(plugin)):
            raise SettingError(f"{name!r} is not a {self.kind}: expected a class or function, got {plugin!r:.60}")
        return plugin

    def _is_trusted(self, name: str) -> bool:
        """Return whether a `module:attribute` may be imported, as the top of this module says."""
        if _naming_file(name) is None:
            trust_code(name)
        is_installed = name in self.paths.values() or name in self._declared().values()
        is_accepted = not _TRUST.accepted.isdisjoint((name, _package_of(name)))
        return is_installed or is_accepted or has_trust()

    def _import(self, name: str, module: str, attribute: str) -> Any:
        """Import an object; UnknownNameError if there is no such module or attribute."""
        _USED_PLUGINS.add(_package_of(module))  # before it is imported, which may raise
        try:
            plugin = getattr(_import_plugin(name, module), attribute, None)
            reason = f"module {module!r} has no attribute {attribute!r}"
        except ModuleNotFoundError as error:
            plugin = None
            reason = str(error)
        if plugin is None:
            next_step = missing_plugin_hint(name) or "name a plug-in of yours as module:attribute"
            raise unknown_name(self.kind, name, self.names, hint=f"{reason}; {next_step}")
        return plugin

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
    file = _naming_file(name)
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


def require(module: str, *, extra: str | None = None, package: str | None = None) -> ModuleType:
    """Import an optional module; if it is missing, MissingExtraError has the pip command.

    Args:
        module: full name of the module.
        extra: extra of embedcache that installs it.
        package: package that installs it, which is in no extra.
    """
    requirement = f"'embedcache[{extra}]'" if package is None else package
    root = module.partition(".")[0]
    if not is_installed(root):
        raise _missing(root, requirement)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or root != error.name.partition(".")[0]:
            raise
        raise _missing(error.name, requirement) from error


def _missing(module: str, requirement: str) -> MissingExtraError:
    return MissingExtraError(f"the package {module!r} is not installed; run: python -m pip install {requirement}")


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
