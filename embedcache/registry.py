"""Plug-ins by name, imported on first use, so that no heavy library loads before it is needed.

A name `module:attribute` runs code, as importing a module executes it. So `Registry.load` asks where it comes from:

- from the user (an option, a TOML file of theirs, an argument in Python): it is imported, and from then on files may
  name it too, such as the run that is being written and read again;
- from a file that a stranger may have written (a cache, run, index or study): it is imported only if it is built in or
  an entry point of an installed package, if the user gave the same name, if `trust_code` was called for it or
  its package, or within `trust_files`, which `--trust` enters.

Code that loads a name from a file must mark it, by `names_from` around the call, or by `mark_as_read` when the name
first becomes a setting. Any other name counts as the user's. `names_from` and `trust_files` apply to the thread that
enters them, all else to the process. `embedcache.processes` passes both on to its worker processes and Ray tasks
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
    """Code that a process may import in addition to built-in and installed plug-ins.

    Args:
        accepted: names `module:attribute` that the user gave, and packages whose modules any file may name, see
            `trust_code`.
        read: names that settings were filled with from a file -> the file, see `mark_as_read`.
        folders: folders in which plug-ins that the user gives or trusts are found, besides those of `sys.path`.
        all_files: whether any file may name any code. Only `current_trust` sets it, as `trust_files` is per thread.
    """

    accepted: set[str] = field(default_factory=set)
    read: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    all_files: bool = False


_TRUST = Trust()  # of this process
_TRUSTS_FILES: ContextVar[bool] = ContextVar("trusts_files", default=False)
_FILE: ContextVar[str | None] = ContextVar("file", default=None)  # the file that names are read from
_USED_PLUGINS: set[str] = set()


@contextmanager
def trust_files(is_trusted: bool = True) -> Iterator[None]:  # noqa: FBT001, FBT002
    """Trust the authors of caches, runs, indexes and studies: import any code that they name in this context."""
    token = _TRUSTS_FILES.set(is_trusted or _TRUSTS_FILES.get())
    try:
        yield
    finally:
        _TRUSTS_FILES.reset(token)


def has_trust() -> bool:
    """Return whether this thread is within `trust_files`.

    Example:
        >>> with trust_files():
        ...     has_trust()
        True
    """
    return _TRUSTS_FILES.get()


def trust_code(name: str) -> None:
    """Allow files to name a plug-in `module:attribute`, or all plug-ins of a package, such as a pipeline's."""
    _TRUST.accepted.add(name)


def search_plugins_in(folder: str) -> None:
    """Add a folder in which only plug-ins are found that the user names or trusts."""
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
    """Treat some names as read from a file wherever they are loaded. A setting does not say where it comes from."""
    for name in filter(None, names):
        _TRUST.read[plugin_name(name)] = str(file)


def plugin_name(text: str) -> str:
    """Return the name of a plug-in without the parameters that may follow it.

    Example:
        >>> plugin_name("mlp:hidden=1024"), plugin_name("my_package.heads:Wide")
        ('mlp', 'my_package.heads:Wide')
    """
    return re.split(r":(?=\s*\w+\s*=)", text, maxsplit=1)[0]


def _naming_file(name: str) -> str | None:
    """Return the file that a name was read from. It is None if the user gave the name."""
    return _FILE.get() or _TRUST.read.get(name)


def current_trust() -> Trust:
    """Return the trust of this process and thread, for `adopt_trust` in another process."""
    return replace(_TRUST, all_files=has_trust())


def adopt_trust(trust: Trust) -> None:
    """Trust the same code as the process that started this one."""
    _TRUST.accepted.update(trust.accepted)
    _TRUST.read.update(trust.read)
    _TRUST.folders[:] = trust.folders
    _TRUSTS_FILES.set(trust.all_files)


def used_plugins() -> frozenset[str]:
    """Return the top-level packages of the plug-ins that this process has loaded, without built-in ones."""
    return frozenset(_USED_PLUGINS)


@dataclass(frozen=True)
class Registry:
    """The plug-ins of one kind: built-in ones, and plug-ins of installed packages that declare an entry point.

    Args:
        kind: singular noun for error messages, such as `projector`.
        paths: name of each built-in plug-in -> `module:attribute`.
        group: entry-point group in which other packages declare plug-ins. If None, there are only built-in ones.
        presets: names of combinations of plug-ins, to list in error messages.
        arguments: number of positional arguments that a plug-in is called with.
        has_parameters: whether its other arguments are parameters that users name, see `bind`.
        has_objects: whether its plug-ins are objects rather than classes and functions.

    Example:
        >>> shapes = Registry(kind="shape", paths={"fraction": "fractions:Fraction"})
        >>> shapes.load("fraction")(1, 2)
        Fraction(1, 2)
        >>> "circle" in shapes
        False
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
        """All names, sorted. This reads the metadata of installed packages."""
        return sorted({*self.paths, *self._declared()})

    def path(self, name: str) -> str:
        """Return the `module:attribute` of a plug-in, or the name itself if there is no such plug-in."""
        if name in self.paths:
            return self.paths[name]
        return name if ":" in name else self._declared().get(name, name)

    def load(self, name: str) -> Any:
        """Import a plug-in by its name, or any object by its `module:attribute`. Parameters after it are ignored.

        Raises:
            UnknownNameError: there is no such name, module or attribute.
            SettingError: the name was read from a file whose author is not trusted, see `names_from`. Or the object is
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

        # A path or an empty part is a wrong name, and not a module to import.
        parts = [*module.split("."), attribute]
        if "/" in self.path(name) or not all(parts):
            raise unknown_name(self.kind, name, [*self.names, *self.presets], hint=missing_plugin_hint(name))

        if ":" in name:
            if not self._is_trusted(name):
                raise SettingError(
                    f"{_naming_file(name)} names the {self.kind} {name!r}, which is custom code; if you trust its "
                    "author, use --trust, or embedcache.registry.trust_files() in Python"
                )

            # Other modules are not searched in these folders before code in them is trusted.
            for folder in _TRUST.folders:
                if folder not in sys.path:
                    sys.path.append(folder)

        plugin = self._import(name, module, attribute)
        if not (self.has_objects or callable(plugin)):
            raise SettingError(f"{name!r} is not a {self.kind}: expected a class or function, got {plugin!r:.60}")
        return plugin

    def _is_trusted(self, name: str) -> bool:
        """Return whether a `module:attribute` may be imported, by the rules at the top of this module."""
        # A name that the user gave may be read from files from now on.
        if _naming_file(name) is None:
            trust_code(name)
        is_installed = name in self.paths.values() or name in self._declared().values()
        is_accepted = not _TRUST.accepted.isdisjoint((name, _package_of(name)))
        return is_installed or is_accepted or has_trust()

    def _import(self, name: str, module: str, attribute: str) -> Any:
        """Import an object. UnknownNameError if there is no such module or attribute."""
        # It counts as used before it is imported, as a failed import has run its code too.
        _USED_PLUGINS.add(_package_of(module))
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
    """Return the names that installed packages declare in the group `embedcache.KIND`, sorted. Nothing is imported."""
    return sorted(_installed(f"embedcache.{kind}"))


def _installed(group: str) -> Mapping[str, str]:
    # A folder of plug-ins is not an installed package, or its entry points would be trusted.
    search_path = tuple(path for path in sys.path if path and path not in _TRUST.folders)
    return _entry_points(search_path).get(group, {})


@cache
def _entry_points(search_path: tuple[str, ...]) -> Mapping[str, Mapping[str, str]]:
    """Return group -> name -> `module:attribute` of all entry points of installed packages.

    If two packages declare one name, the first on `sys.path` counts, as for modules.
    """
    from importlib.metadata import distributions

    groups: dict[str, dict[str, str]] = {}
    for package in distributions(path=list(search_path)):
        for point in package.entry_points:
            groups.setdefault(point.group, {}).setdefault(point.name, point.value.partition("[")[0].strip())
    return groups


def _package_of(module: str) -> str:
    return module.partition(":")[0].partition(".")[0]


def _import_plugin(name: str, module: str) -> ModuleType:
    """Import the module of a plug-in. MissingExtraError if it exists and imports a package that is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = error.name or ""

        # The module itself, or a package above it, does not exist.
        if f"{module}.".startswith(f"{package}."):
            raise
        raise MissingExtraError(
            f"the plug-in {name!r} imports {package!r}, which is not installed; install it, such as with: "
            f"python -m pip install {package.partition('.')[0]}"
        ) from error


def missing_plugin_hint(name: str) -> str:
    """Return which file names an unknown plug-in, with the next step. It is empty if the user named it."""
    file = _naming_file(name)
    return "" if file is None else f"{file} names it: if it is a plug-in, install its package, which is missing here"


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str = "", hint: str = "") -> UnknownNameError:
    """Create the error for an unknown name, with the known names and the closest match.

    Args:
        kind: kind of the named thing, such as `column`.
        name: the unknown name.
        known: all names that there are.
        where: owner of the names, with a preposition, such as `of cache/`.
        hint: the next step.

    Example:
        >>> print(unknown_name("column", "lable", ["label", "split"], where="of photos-cache"))
        unknown column 'lable' of photos-cache; did you mean 'label'?; known: label, split
    """
    names = sorted(known)
    parts = [f"unknown {kind} {name!r} {where}".rstrip()]

    # A name from Python may be of any type.
    similar_names = get_close_matches(name, names, n=1, cutoff=0.5) if isinstance(name, str) else []
    if similar_names:
        parts.append(f"did you mean {similar_names[0]!r}?")
    parts.append(f"known: {', '.join(names)}" if names else f"there is no {kind} {where or 'here'}")
    if hint:
        parts.append(hint)
    return UnknownNameError("; ".join(parts))


def is_installed(package: str) -> bool:
    """Return whether a top-level package can be imported, without importing it.

    Example:
        >>> is_installed("numpy"), is_installed("no_such_package")
        (True, False)
    """
    try:
        spec = find_spec(package)
    except ValueError:  # it has been imported by other means, and has no spec
        return True

    # An uninstalled package may leave a folder behind, which Python imports as an empty package without an origin.
    return spec is not None and spec.origin is not None


def require(module: str, *, extra: str | None = None, package: str | None = None) -> ModuleType:
    """Import an optional module.

    Args:
        module: full name of the module.
        extra: extra of embedcache that installs it.
        package: package that installs it, if no extra does.

    Raises:
        MissingExtraError: the module is not installed. The message has the pip command.

    Example:
        >>> require("json").dumps([1])
        '[1]'
    """
    requirement = f"'embedcache[{extra}]'" if package is None else package
    root = module.partition(".")[0]
    if not is_installed(root):
        raise _missing(root, requirement)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # An error about another package is a bug of the module.
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
        given: keyword arguments that the caller passes. They are not parameters.

    Raises:
        UnknownNameError: there is no such plug-in, or it has no such parameter.
        SettingError: a value is of another type, or a parameter without a default is missing.

    Example:
        >>> folds = Registry(kind="fold", paths={"wrap": "textwrap:fill"}, arguments=1, has_parameters=True)
        >>> print(bind(folds, "wrap:width=7")("a red box"))
        a red
        box
    """
    plugin = registry.load(text)
    name = plugin_name(text)
    texts = parse_options(text, split_options(text[len(name) + 1 :]) if len(text) > len(name) else ())

    parameters = find_parameters(registry, plugin, given=given)
    for option in texts:
        if option not in parameters:
            raise unknown_name("parameter", option, parameters, where=f"of the {registry.kind} {name!r}")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in texts:
            raise SettingError(f"{name}: expected the parameter {option}, got none; use {name}:{option}=VALUE")

    # Hints of types may be costly to resolve, so this happens only if there are values to convert.
    hints = _type_hints(plugin) if texts else {}
    values = {}
    for option, value in texts.items():
        values[option] = _convert(f"{name}: {option}", value, hints.get(option), parameters[option])
    return partial(plugin, **values)


def find_parameters(registry: Registry, plugin: Any, *, given: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """Return the parameters of a plug-in by name. Arguments that the caller passes are left out."""
    arguments = list(inspect.signature(plugin).parameters.values())[registry.arguments :]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {item.name: item for item in arguments if item.kind in kinds and item.name not in given}


def _type_hints(plugin: Any) -> Mapping[str, Any]:
    return get_type_hints(plugin.__init__ if inspect.isclass(plugin) else plugin, include_extras=True)


def _convert(name: str, text: str, hint: Any, item: inspect.Parameter) -> Any:
    """Return the value of a parameter, converted by its type hint or by the type of its default."""
    if hint is None:
        hint = str if item.default in (None, item.empty) else type(item.default)

    # Values of a tuple, or of an optional one, are joined by a plus, as a comma begins the next parameter.
    is_tuple = any(get_origin(kind) is tuple for kind in (hint, *get_args(hint)))
    try:
        return TypeAdapter(hint).validate_python(text.split("+") if is_tuple else text)
    except ValidationError as error:
        expected = error.errors(include_url=False)[0]["msg"].removeprefix("Input should be ")
        raise SettingError(f"{name}: expected {expected.partition(',')[0]}, got {text!r}") from None


def split_options(text: str) -> list[str]:
    """Return the parts of a text between commas. Commas in a value in quotes do not count.

    Example:
        >>> split_options('head=100,prompt="query, short: "')
        ['head=100', 'prompt="query, short: "']
    """
    return _PART.findall(text)


def parse_options(text: str, parts: Iterable[str], *, unstripped: Collection[str] = ()) -> dict[str, str]:
    """Parse `name=value` in each of the parts of a text.

    Args:
        text: the text, for error messages.
        parts: its parts, see `split_options`.
        unstripped: names of options whose values keep the spaces around them.

    Example:
        >>> parse_options("metaclip:head=100", ["head=100"])
        {'head': '100'}
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
    """Return a value in the form that `parse_options` reads back.

    Example:
        >>> quote_option("100"), quote_option("query, short: ")
        ('100', '"query, short: "')
    """
    is_plain = value == value.strip() and value.isprintable() and "," not in value and not value.startswith('"')
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    """Return a value without its quotes. It is empty, which is an error, if a quoted value is not a JSON string."""
    if not value.lstrip().startswith('"'):
        return value
    try:
        return str(json.loads(value, strict=False))
    except ValueError:
        return ""
