"""Building of commands: options from settings classes, options shared by commands, configuration files, help.

    @with_settings(settings=TrainSettings)
    def train(caches: ..., run: ..., *, settings: TrainSettings) -> None: ...

    add_command(app, "train", train)

Each parameter that `with_settings` names is replaced by one option per setting of its class; a group of settings
becomes a panel of `--help`. An option that several commands declare by hand is an alias here, with one meaning in all.
The error of a setting that was not read from a file names its option: `--batch-size` for `batch_size`.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from embedcache.errors import EmbedcacheError, PathError, SettingError
from embedcache.modalities import MODALITIES
from embedcache.registry import mark_as_read, trust_files, unknown_name
from embedcache.settings import FlatSetting, flat_settings, from_flat

_OUTPUT = "Output options"
_OUTPUT_NAMES = ("as_json", "output", "html", "srt", "vtt")
_OVERWRITE = "overwrite"


def check_new_file(context: typer.Context, option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Check, before the work, that an output can be written to a path; `--overwrite` is parsed before all outputs.

    Raises:
        PathError: the path is a folder or an existing file; with `--overwrite`, a file that embedcache did not write.
        SettingError: another parameter names the same path.
    """
    from embedcache.outputs import check_output

    if path is None:
        return None
    check_output(path, overwrite=context.params[_OVERWRITE])
    for name, other in context.params.items():
        if name != option.name and isinstance(other, Path) and other.absolute() == path.absolute():
            raise SettingError(f"{option.opts[0]}: expected a file of its own, got {path}, which {name} names too")
    return path


CacheArgument: TypeAlias = Annotated[str, typer.Argument(metavar="CACHE", help="Cache: a folder or a URL.")]
RunArgument: TypeAlias = Annotated[Path, typer.Argument(metavar="RUN", help="Run: a folder written by train.")]
IndexArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="INDEX", help="Index: a folder written by curate index.")
]
SelectionArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="SELECTION", help="Selection: Parquet, or a text file with one key per line.")
]
SelectionOutput: TypeAlias = Annotated[
    Path, typer.Argument(metavar="OUT", help="Selection to write: a new .parquet file.", callback=check_new_file)
]
MovedRun: TypeAlias = Annotated[
    Path | None, typer.Option("--run", metavar="RUN", help="Where the run of the index is, if it has moved.")
]
Cache: TypeAlias = Annotated[
    str | None, typer.Option("--cache", metavar="CACHE", help="Where the cache of the index is, if it has moved.")
]
Concepts: TypeAlias = Annotated[
    str | None, typer.Option("--concepts", metavar="CACHE", help="Cache of prompts, one sample per concept.")
]
ImageFeature: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--image-feature",
        metavar="NAME",
        help="Image feature, as encoder/feature.",
        show_default="the only one in the cache",
    ),
]
TextFeature: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--text-feature",
        metavar="NAME",
        help="Text feature, as encoder/feature.",
        show_default="the only one in the cache",
    ),
]
Features: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--feature",
        metavar="MODALITY=NAME",
        help="Feature of one of two modalities, such as audio=encoder/feature; instead of --image-feature and "
        "--text-feature. Name two.",
    ),
]

Seed: TypeAlias = Annotated[int, typer.Option("--seed", metavar="N", help="Random seed.", min=0, max=2**32 - 1)]
Device: TypeAlias = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="Torch device, such as cpu, cuda or cuda:1.")
]
Json: TypeAlias = Annotated[
    bool,
    typer.Option("--json", metavar="", help="Print the report as JSON on standard output.", rich_help_panel=_OUTPUT),
]
Output: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE",
        help="Write the report as JSON to this file.",
        rich_help_panel=_OUTPUT,
        callback=check_new_file,
    ),
]
Html: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Write the report as an HTML page.",
        rich_help_panel=_OUTPUT,
        callback=check_new_file,
    ),
]
Srt: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--srt",
        metavar="FILE",
        help="Write subtitles of the format SubRip.",
        rich_help_panel=_OUTPUT,
        callback=check_new_file,
    ),
]
Vtt: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--vtt",
        metavar="FILE",
        help="Write subtitles of the format WebVTT.",
        rich_help_panel=_OUTPUT,
        callback=check_new_file,
    ),
]

_CONFIG_HELP = "Read options from this TOML file; the command line takes precedence."
_WIDEST_CHOICES = 24
_WITH_COMMAS = ("FILE", "SPEC", "URL", "VALUE", "PART=RUN", "MODALITY=VIEW:WEIGHT,…")
"""Values that may contain a comma, so that a repeated option is not split at commas."""
_COMMA = re.compile(r",(?!\s*\w+=)")
"""A comma between two values of an option; one before `name=` belongs to a value, as in `noise:5,tape=babble.wav`."""
_METAVARS: Mapping[Any, str] = {int: "N", float: "FLOAT", str: "NAME", Path: "FILE"}


class Command(TyperCommand):
    """A command whose help shows plain metavars, and whose errors name options as they are typed."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; the error of a setting names its option."""
        try:
            return super().invoke(ctx)
        except EmbedcacheError as error:
            error.args = (_name_option(ctx, str(error)),)
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line, without braces around required arguments."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option `--help`, without a metavar."""
        return _without_metavar(super().get_help_option(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, without Python types beside the arguments."""
        for parameter in self.params:
            if isinstance(parameter, TyperArgument):
                parameter.display_type_rich = lambda ctx: None  # type: ignore[method-assign]  # noqa: ARG005
        super().format_help(ctx, formatter)


def _name_option(context: typer.Context, message: str) -> str:
    """Replace the name of a setting at the start of a message by its option, unless a file set it."""
    name, separator, rest = message.partition(": ")
    for option in context.command.params:
        if option.name == name and option.param_type_name == "option" and not _is_from_file(context, name):
            return f"{option.opts[0]}{separator}{rest}"
    return message


def _is_from_file(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"


class CommandGroup(TyperGroup):
    """A group of commands whose help shows plain metavars."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option `--help`, without a metavar."""
        return _without_metavar(super().get_help_option(ctx))


def _without_metavar(option: Any) -> Any:
    if option is not None:
        option.metavar = ""
    return option


def new_group(help: str, **options: Any) -> typer.Typer:
    """Return an empty group of commands; `options` are those of `typer.Typer`."""
    return typer.Typer(help=help, short_help=help, cls=CommandGroup, no_args_is_help=True, **options)


def add_command(
    app: typer.Typer, name: str, command: Callable[..., None], *, runs_named_code: bool = True, **options: Any
) -> None:
    """Add a command with the options that all have; its help is its docstring.

    Args:
        app: application or group.
        name: name of the command.
        command: function with typer's annotations.
        runs_named_code: whether files that the command opens may name code, so that it has the option `--trust`.
        options: further arguments of `typer.Typer.command`.
    """
    help = _help_text(command)
    summary = help.partition("\n\n")[0]
    app.command(name=name, help=help, short_help=summary, cls=Command, **options)(
        _with_verbosity(_with_trust(command) if runs_named_code else command)
    )


def _help_text(command: Callable[..., None]) -> str:
    """Return the docstring with every paragraph on one line, but for examples."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(text if text.startswith("Example") else " ".join(text.split()) for text in paragraphs)


def _with_trust(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*, trust: bool, **values: Any) -> None:
        with trust_files(trust):
            command(**values)

    trust = Annotated[
        bool,
        typer.Option(
            "--trust", metavar="", help="Run code that the files opened name as module:attribute: trust their authors."
        ),
    ]
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    position = next((place for place, each in enumerate(own) if each.name in (*_OUTPUT_NAMES, "config")), len(own))
    _set_parameters(run, [*own[:position], _keyword("trust", trust, False), *own[position:]])
    return run


def _with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*, quiet: bool, verbose: bool, **values: Any) -> None:
        from embedcache.cli.console import verbosity

        values.pop(_OVERWRITE, None)
        with verbosity(quiet=quiet, verbose=verbose):
            command(**values)

    quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Hide progress.", rich_help_panel=_OUTPUT)]
    verbose = Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", metavar="", help="Print log messages, run time and peak memory.", rich_help_panel=_OUTPUT
        ),
    ]
    own = inspect.signature(command, eval_str=True).parameters.values()
    overwrite = [_keyword(_OVERWRITE, _Overwrite, False)] if any(map(_is_new_file, own)) else []
    _set_parameters(run, [*own, *overwrite, _keyword("quiet", quiet, False), _keyword("verbose", verbose, False)])
    return run


_Overwrite: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        metavar="",
        help="Replace files of earlier commands; files that embedcache did not write are kept.",
        rich_help_panel=_OUTPUT,
        is_eager=True,
    ),
]


def _is_new_file(parameter: inspect.Parameter) -> bool:
    declared = getattr(parameter.annotation, "__metadata__", ())
    return any(getattr(option, "callback", None) is check_new_file for option in declared)


def with_settings(
    *,
    skip: Sequence[str] = (),
    build: Mapping[str, Callable[[Mapping[str, Any]], Any]] | None = None,
    config_help: str = _CONFIG_HELP,
    **kinds: type[Any],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces parameters of a command by one option per setting, and adds `--config`.

    Args:
        skip: flat names that get no option.
        build: parameter -> function that builds its settings from flat values; `from_flat` if not given.
        config_help: help of `--config`.
        kinds: parameter -> settings class.
    """
    items = {key: [item for item in flat_settings(kind) if item.name not in skip] for key, kind in kinds.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*, context: typer.Context, config: Path | None, **values: Any) -> None:  # noqa: ARG001
            for key, kind in kinds.items():
                given = {item.name: values.pop(item.name) for item in items[key]}
                flat = {
                    item.name: _setting_value(item, given[item.name])
                    for item in items[key]
                    if _is_given(context, item.name)
                }
                values[key] = build[key](flat) if build and key in build else from_flat(kind, flat)
            command(**values)

        own = inspect.signature(command, eval_str=True).parameters
        generated = [_option(item, key if len(kinds) > 1 else None) for key in kinds for item in items[key]]
        config = Annotated[
            Path | None,
            typer.Option("--config", metavar="FILE", help=config_help, is_eager=True, callback=_use_config),
        ]
        _set_parameters(
            run,
            [
                inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
                *(parameter for name, parameter in own.items() if name not in (*kinds, *_OUTPUT_NAMES)),
                *generated,
                _keyword("config", config, None),
                *(parameter for name, parameter in own.items() if name in _OUTPUT_NAMES),
            ],
        )
        return run

    return decorate


def _set_parameters(function: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> None:
    """Set the signature that typer reads."""
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _option(item: FlatSetting, panel: str | None) -> inspect.Parameter:
    """Return the parameter of one setting, as typer reads it."""
    declared = item.declared
    kind = _plain_type(item.type) if declared.parse is None else str
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    metavar, help = declared.metavar, declared.help
    if kind is bool:
        metavar = ""
        help = f"Do not {help[0].lower()}{help[1:]}" if item.default is True else help
    elif choices and len("|".join(choices)) <= _WIDEST_CHOICES:
        metavar = metavar or "|".join(choices)
    elif choices:
        help = f"{help} One of: {', '.join(choices)}."
    is_list = get_origin(kind) is tuple
    element = get_args(kind)[0] if is_list else kind
    title = item.path[0] if len(item.path) > 1 else (panel or "").removesuffix("settings").strip("_")
    option = typer.Option(
        _flags(item, kind),
        help=help,
        metavar=_METAVARS.get(element, "NAME") if metavar is None else metavar,
        show_default=declared.default_text or not (item.default is None or item.default == () or kind is bool),
        rich_help_panel=f"{title.capitalize()} options" if title else None,
    )
    if is_list:
        element = Path if element is Path else str
        return _keyword(item.name, Annotated[list[element] | None, option], list(item.default or ()) or None)  # type: ignore[valid-type]
    if kind is bool:
        default = None if item.default is None else False
        return _keyword(item.name, Annotated[bool | None if default is None else bool, option], default)
    return _keyword(item.name, Annotated[kind | None, option], item.default)


def _flags(item: FlatSetting, kind: Any) -> str:
    """Return the option's name on the command line; a flag that is true by default is switched off by `--no-NAME`."""
    name = item.name.replace("_", "-")
    if len(name) == 1:
        return f"-{name}"
    if kind is bool and item.default is True:
        return f"--no-{name}"
    return f"--{name}/--no-{name}" if kind is bool and item.default is None else f"--{name}"


def _plain_type(kind: Any) -> Any:
    """Return a type without None."""
    arguments = get_args(kind)
    return next(part for part in arguments if part is not type(None)) if type(None) in arguments else kind


def _setting_value(item: FlatSetting, value: Any) -> Any:
    """Return an option's value as the setting holds it: elements of a list may be separated by commas."""
    kind = _plain_type(item.type) if item.declared.parse is None else str
    if kind is bool and item.default is True:
        return not value
    if get_origin(kind) is not tuple:
        return value
    element = get_args(kind)[0]
    if element is Path or item.declared.metavar in _WITH_COMMAS:
        return tuple(value)
    if item.declared.metavar == "VIEW":
        return tuple(name.strip() for word in value for name in _COMMA.split(word) if name.strip())
    return tuple(_elements(item.name, element, value))


def _elements(name: str, kind: Any, values: Sequence[Any]) -> Iterator[Any]:
    for word in split_names(values):
        try:
            yield kind(word) if kind in (int, float) else word
        except ValueError:
            raise SettingError(f"--{name.replace('_', '-')}: expected numbers such as 1,2,4, got {word!r}") from None


def by_modality(option: str, words: Sequence[str] | None, example: str) -> dict[str, list[str]] | None:
    """Return modality -> values of an option `MODALITY=VALUE` that may be repeated; None without any.

    Raises:
        SettingError: a word of another form, or an unknown modality.
    """
    values: dict[str, list[str]] = {}
    for word in words or ():
        modality, _, value = word.partition("=")
        if modality not in MODALITIES or not value:
            raise SettingError(
                f"{option}: expected MODALITY=VALUE with a modality of {', '.join(MODALITIES)}, such as {example}, got "
                f"{word!r}"
            )
        values.setdefault(modality, []).append(value)
    return values or None


def split_names(values: Sequence[Any] | None) -> tuple[str, ...]:
    """Split the values of an option that may be repeated and may hold several names with commas between them."""
    return tuple(name.strip() for value in values or () for name in str(value).split(",") if name.strip())


def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Read the options that are not on the command line from a file.

    Raises:
        UnknownNameError: the command has no option of that name.
    """
    if path is not None:
        names = {
            flag.lstrip("-").replace("-", "_"): option.name
            for option in context.command.params
            for flag in (*option.opts, *option.secondary_opts)
        }
        values = read_config(path)
        for name in values:
            if name not in names or name == "config":
                raise unknown_name("option", name, sorted(names))
        context.default_map = {str(names[name]): _as_words(value) for name, value in values.items()}
    return path


def _as_words(value: Any) -> Any:
    """Return a value as the parser of the command line expects it."""
    if isinstance(value, list):
        return [str(element) for element in value]
    return value if isinstance(value, bool) else str(value)


def read_config(path: Path) -> dict[str, Any]:
    """Read option values from a TOML file, or from the `config.json` of a run.

    In TOML, `lr` and `max-grad-norm` are written as on the command line, without the dashes in front.

    Raises:
        PathError: the file cannot be read.
        SettingError: it is not TOML, or not JSON of a run.
    """
    from embedcache.files import io_reason, read_limited

    try:
        text = read_limited(path).decode("utf-8")
    except OSError as error:
        raise PathError(
            f"cannot read {path}: {io_reason(error)}; pass a TOML file or a run's config.json to --config"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingError(f"{path}: expected UTF-8 text, got other bytes: {error}") from error
    if path.suffix == ".json":
        return _read_run_config(path, text)
    import tomllib

    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingError(f"{path}: expected TOML such as `lr = 0.001`, got an error: {error}") from error
    return {name.replace("-", "_"): value for name, value in values.items()}


def _read_run_config(path: Path, text: str) -> dict[str, Any]:
    """Return the settings and features of a run by option name."""
    import json

    from embedcache.train.settings import TrainSettings

    try:
        record = json.loads(text)
        if record.get("kind", "pair") != "pair":
            raise SettingError(
                f"{path}: expected the config.json of a pair of projectors, got that of a run of the kind "
                f"{record['kind']}; name its options one by one"
            )
        settings = {
            item.name: _recorded_value(record["training"], item)
            for item in flat_settings(TrainSettings)
            if item.declared.affects_result
        }
        if record.get("kind") == "pair":
            settings["feature"] = [f"{modality}={side['feature']}" for modality, side in record["sides"].items()]
        else:
            settings |= {f"{modality}_feature": record[modality]["feature"] for modality in ("image", "text")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{path}: expected the config.json of a run, got other content: {error!r}") from error
    mark_as_read(path, [*str(settings.get("projector", "")).split("+"), str(settings.get("loss", ""))])
    return {name: value for name, value in settings.items() if value is not None}


def _recorded_value(record: Mapping[str, Any], item: FlatSetting) -> Any:
    """Return the value of a setting in the record of a run; None for one that is recorded only if it is set."""
    try:
        return functools.reduce(lambda values, key: values[key], item.stored_path, record)
    except KeyError:
        if item.declared.recorded_by_default:
            raise
        return None
