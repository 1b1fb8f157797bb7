"""Command-line options generated from settings classes, and a TOML file as their source.

    @app.command()
    @with_settings(TrainSettings)
    def train(caches: ..., run: ..., settings: TrainSettings) -> None: ...

The parameter `settings` is replaced by one option per setting; a group of settings becomes a panel in `--help`.
"""

import functools
import inspect
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer

from embedcache.errors import PathError, SettingError
from embedcache.settings import FlatSetting, flat_settings, from_flat

Command = TypeVar("Command", bound=Callable[..., None])

_CONFIG_HELP = "TOML file with values for these options, such as lr = 0.001; options on the command line win."


def with_settings(
    kind: type[Any], *, skip: tuple[str, ...] = (), build: Callable[[Mapping[str, Any]], Any] | None = None
) -> Callable[[Command], Callable[..., None]]:
    """Return a decorator that turns a command's parameter `settings` into one option per setting.

    Args:
        kind: settings class.
        skip: flat names that get no option.
        build: makes the settings from flat values; None: `from_flat`.
    """
    items = [item for item in flat_settings(kind) if item.name not in skip]

    def decorate(command: Command) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: Any, config: Path | None = None, **values: Any) -> None:
            given = {item.name: values.pop(item.name) for item in items}
            given = {name: _as_tuple(value) for name, value in given.items() if value is not None}
            flat = {**(read_config(config) if config is not None else {}), **given}
            settings = build(flat) if build is not None else from_flat(kind, flat)
            command(*args, settings=settings, **values)

        own = inspect.signature(command, eval_str=True).parameters
        parameters = [parameter for name, parameter in own.items() if name != "settings"]
        config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help=_CONFIG_HELP)]
        parameters += [_option(item.name, _annotation(item)) for item in items]
        parameters.append(_option("config", config))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def read_config(path: Path) -> dict[str, Any]:
    """Read option values from a TOML file; `lr` and `max-grad-norm` are written as on the command line.

    Raises:
        PathError: the file cannot be read.
        SettingError: it is not TOML.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PathError(f"cannot read {path}: {error.strerror}; give the path of a TOML file to --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path}: expected TOML such as `lr = 0.001`, got an error: {error}") from error
    return {name.replace("-", "_"): _as_tuple(value) for name, value in values.items()}


def _option(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _annotation(item: FlatSetting) -> Any:
    """Return the annotation that typer reads: the type or None, and the option's help."""
    kind = item.type
    declared = item.declared
    if declared.parse is not None:
        kind = str
    elif get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
    is_flag = item.type is bool
    option = typer.Option(
        f"--{item.name.replace('_', '-')}",
        help=declared.help,
        metavar=declared.metavar,
        show_default=declared.default_text or (False if is_flag or item.default in (None, ()) else str(item.default)),
        rich_help_panel=f"{item.path[0].capitalize()} options" if len(item.path) > 1 else None,
    )
    return Annotated[kind | None, option]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
