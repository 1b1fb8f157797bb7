"""Options of commands: those that commands share, those of settings classes, and `--config`, which sets them.

An option that several commands declare by hand is an alias here, with one meaning in all. A settings class gives one
option per setting; a group of settings becomes a panel of `--help`. A config is TOML, with options at the top or in
`[fixed]` as in the space of a sweep, or the `run.json` of a run.
"""

import inspect
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

import typer

from embedcache.dataset.settings import SELECTION_FORMAT
from embedcache.errors import PathError, SettingError
from embedcache.modalities import MODALITIES, split_modality
from embedcache.processes import DEVICE_HELP
from embedcache.registry import mark_as_read, unknown_name
from embedcache.settings import FlatSetting, Settings, flat_settings, to_flat, to_words, with_underscores

OUTPUT_PANEL = "Output options"
"""Panel of `--help`."""


def check_new_file(context: typer.Context, path: Path | None) -> Path | None:
    """Check, before the work, that an output can be written to a path; `--overwrite` is parsed before all outputs.

    Raises:
        PathError: the path is a folder, a link or, without `--overwrite`, an existing file.
    """
    from embedcache.provenance import check_output, replacing_files

    if path is None:
        return None
    with replacing_files(context.params["overwrite"]):
        check_output(path)
    return path


def output_argument(help: str) -> Any:
    """Return the declaration of OUT, a new file that a command writes."""
    return typer.Argument(metavar="OUT", help=help, callback=check_new_file)


CacheArgument: TypeAlias = Annotated[str, typer.Argument(metavar="CACHE", help="Cache: a folder or a URL.")]
RunArgument: TypeAlias = Annotated[Path, typer.Argument(metavar="RUN", help="Run: a folder written by train.")]
IndexArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="INDEX", help="Index: a folder written by curate index.")
]
SelectionArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="SELECTION", help=f"Selection: {SELECTION_FORMAT}.")
]
SelectionOutput: TypeAlias = Annotated[Path, output_argument("Selection to write: a new .parquet file.")]
SCORES_OUT = output_argument("Table of the scores: a new .parquet file.")
"""Declaration of OUT where it is a table of scores, which a command may require or not."""
Concepts: TypeAlias = Annotated[
    str | None, typer.Option("--concepts", metavar="CACHE", help="Cache of prompts, one sample per concept.")
]
Features: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--feature",
        metavar="[MODALITY=]NAME",
        help="Feature, as encoder/feature; after its modality if several have that name, as text=encoder/feature. May "
        "be repeated.",
        show_default="the only one of each modality",
    ),
]

Device: TypeAlias = Annotated[str, typer.Option("--device", metavar="DEVICE", help=DEVICE_HELP)]


def _output(*flags: str, help: str, **declared: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=OUTPUT_PANEL, **declared)


def _new_file(flag: str, help: str) -> Any:
    return _output(flag, help=help, metavar="FILE", callback=check_new_file)


Json: TypeAlias = Annotated[bool, _output("--json", help="Print the report as JSON on standard output.")]
Output: TypeAlias = Annotated[Path | None, _new_file("--output", "Write the report as JSON to this file.")]
Html: TypeAlias = Annotated[Path | None, _new_file("--html", "Write the report as an HTML page.")]
Overwrite: TypeAlias = Annotated[
    bool,
    _output("--overwrite", help="Replace the files that are named as outputs, if they exist.", is_eager=True),
]
Quiet: TypeAlias = Annotated[bool, _output("--quiet", "-q", help="Hide progress.")]
Verbose: TypeAlias = Annotated[bool, _output("--verbose", "-v", help="Print log messages, run time and peak memory.")]
TRUST: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run code that the opened files name as module:attribute; only for files whose authors you trust.",
    ),
]
IMAGE_FOLDER: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--image-folder",
        metavar="FOLDER",
        help="Folder or URL below which items may be read, besides the folder of a source that you extract or have "
        "extracted on this machine. May be repeated.",
    ),
]


CONFIG_HELP = "Read options from this TOML file; the command line takes precedence."
_WIDEST_CHOICES = 24
_LISTS = (tuple, Mapping)
"""Types of settings whose option may be repeated."""
_COMMA = re.compile(",")
_COMMA_BETWEEN_SPECS = re.compile(r",(?!\s*\w+=)")
_METAVARS: Mapping[Any, str] = {int: "N", float: "FLOAT", str: "NAME", Path: "FILE"}


def setting_options(kind: type[Settings], skip: Sequence[str] = ()) -> list[inspect.Parameter]:
    """Return one parameter per setting of a class and of its groups, as typer reads it.

    Args:
        kind: settings class.
        skip: flat names that get no option.
    """
    return [_option(item) for item in flat_settings(kind) if item.name not in skip]


def given_settings(
    context: typer.Context, values: dict[str, Any], kind: type[Settings], skip: Sequence[str]
) -> dict[str, Any]:
    """Remove the options of a settings class from `values`; return the flat values of those that the user gave."""
    flat = {}
    for item in flat_settings(kind):
        if item.name in skip:
            continue
        value = values.pop(item.name)
        source = context.get_parameter_source(item.name)
        if source is not None and source.name != "DEFAULT":
            flat[item.name] = _setting_value(item, value)
    return flat


def _option(item: FlatSetting) -> inspect.Parameter:
    """Return the parameter of one setting, as typer reads it: a flag, or texts, which the settings class checks."""
    kind = _plain_type(item)
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    metavar, help = item.metavar, item.help
    if kind is bool:
        help = f"Do not {help[0].lower()}{help[1:]}" if item.default is True else help
    elif choices and len("|".join(choices)) <= _WIDEST_CHOICES:
        metavar = metavar or "|".join(choices)
    elif choices:
        help = f"{help} One of: {', '.join(choices)}."
    is_list = get_origin(kind) in _LISTS
    element = get_args(kind)[0] if is_list else kind
    title = item.panel or (item.path[0] if len(item.path) > 1 else "")
    option = typer.Option(
        _flags(item, kind),
        help=help,
        metavar=_METAVARS.get(element, "NAME") if metavar is None else metavar,
        show_default=item.default_text or not (item.default in (None, (), {}) or kind is bool),
        rich_help_panel=f"{title.capitalize()} options" if title else None,
    )

    word = Path if element is Path else str
    default = item.default
    annotation: Any = word | None
    if is_list:
        annotation = list[word] | None  # type: ignore[valid-type]
        default = to_words(default or ()) or None
    elif kind is bool:
        annotation = bool if default is not None else bool | None
        default = None if default is None else False
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )


def _flags(item: FlatSetting, kind: Any) -> str:
    """Return the option's name on the command line; a flag that is true by default is switched off by `--no-NAME`."""
    name = item.name.replace("_", "-")
    if len(name) == 1:
        return f"-{name}"
    if kind is bool and item.default is True:
        return f"--no-{name}"
    return f"--{name}/--no-{name}" if kind is bool and item.default is None else f"--{name}"


def _plain_type(item: FlatSetting) -> Any:
    """Return the type of a setting without None; text if it is parsed."""
    kinds = [kind for kind in get_args(item.type) if kind is not type(None)]
    is_optional = len(kinds) < len(get_args(item.type))
    return str if item.parse is not None else kinds[0] if is_optional else item.type


def _setting_value(item: FlatSetting, value: Any) -> Any:
    """Return an option's value as the setting holds it: elements of a list may be separated by commas."""
    kind = _plain_type(item)
    if kind is bool:
        return not value if item.default is True else value
    if get_origin(kind) not in _LISTS:
        return _number(value, (kind,))

    element = get_args(kind)[0]
    if element is Path or item.commas == "keep":
        return tuple(value)
    comma = _COMMA_BETWEEN_SPECS if item.commas == "split specs" else _COMMA
    return tuple(_number(word, (element, *get_args(element))) for word in split_at_commas(value, comma))


def _number(word: Any, kinds: Sequence[Any]) -> Any:
    """Return a text as a number of one of these types, or as it is: the settings class refuses other texts."""
    for kind in (int, float):
        if kind in kinds:
            with suppress(ValueError):
                return kind(word)
    return word


def by_modality(
    option: str, words: Sequence[str] | None, example: str, *, metavar: str = "VALUE", known: Iterable[str] = MODALITIES
) -> dict[str, list[str]]:
    """Return modality -> values of an option `MODALITY=VALUE` that may be repeated, for some known modalities.

    Raises:
        SettingError: a word of another form, or another modality.
    """
    values: dict[str, list[str]] = {}
    for word in words or ():
        modality, value = split_modality(word)
        if modality is None or modality not in known or not value:
            raise SettingError(
                f"{option}: expected MODALITY={metavar} with a modality of {', '.join(known)}, such as {example}, "
                f"got {word!r}"
            )
        values.setdefault(modality, []).append(value)
    return values


def split_at_commas(values: Sequence[Any] | None, comma: re.Pattern[str] = _COMMA) -> tuple[str, ...]:
    """Split the values of an option that may be repeated and may hold several names with commas between them."""
    return tuple(word.strip() for value in values or () for word in comma.split(str(value)) if word.strip())


def config_option(help: str) -> Any:
    """Return the option `--config`, which is parsed before those whose values it gives."""
    return Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help=help, is_eager=True, callback=use_config)
    ]


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Read the options that are not on the command line from a file.

    Raises:
        UnknownNameError: the command has no option of that name.
        SettingError: an option occurs twice, or has a value of another type.
    """
    if path is not None:
        options = {
            flag.lstrip("-").replace("-", "_"): (option, flag in option.secondary_opts)
            for option in context.command.params
            for flag in (*option.opts, *option.secondary_opts)
            if option.name != "config"
        }
        words: dict[str, Any] = {}
        for name, value in read_config(path).items():
            if name not in options:
                known = [each for each, (option, _) in options.items() if len(each) > 1 or len(option.opts) == 1]
                raise unknown_name("option", name, known, where=f"in {path}")
            option, is_off = options[name]
            if option.name in words:
                raise SettingError(f"{path}: {name}: expected one value, got another of the same option; remove one")
            words[str(option.name)] = _as_words(f"{path}: {name}", value, option, is_off=is_off)
        context.default_map = words
    return path


def is_from_file(context: typer.Context, name: str) -> bool:
    """Return whether the value of an option was read from a file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"


def _as_words(name: str, value: Any, option: Any, *, is_off: bool) -> Any:
    """Return a value as the parser of the command line expects it, or raise a `SettingError` that names it."""
    is_flag = getattr(option, "is_flag", False)
    takes_many = getattr(option, "multiple", False) or option.nargs != 1
    if isinstance(value, dict) and takes_many:
        value = to_words(value)
    elements = value if isinstance(value, list | tuple) and takes_many else [value]
    if any(isinstance(each, list | dict) or isinstance(each, bool) is not is_flag for each in elements):
        expected = "true or false" if is_flag else "a text or a number"
        got = str(value).lower() if isinstance(value, bool) else value
        raise SettingError(f"{name}: expected {expected}{' or a list of them' if takes_many else ''}, got {got}")
    if is_flag:
        return value is not is_off
    words = [str(element) for element in elements]
    return words if takes_many else words[0]


def read_config(path: Path) -> dict[str, Any]:
    """Read option values from a TOML file, or from the `run.json` of a run.

    In TOML, `lr` and `max-grad-norm` are written as on the command line, without the dashes in front, at the top or in
    a table `[fixed]`.

    Raises:
        PathError: the file cannot be read.
        SettingError: it is not TOML, or not JSON of a run, or has ranges of settings in a table `[space]`.
    """
    from embedcache.files import io_reason, read_text

    try:
        text = read_text(path, SettingError)
    except OSError as error:
        raise PathError(
            f"cannot read {path}: {io_reason(error)}; pass a TOML file or a run's run.json to --config"
        ) from error
    if path.suffix == ".json":
        return _read_run(path)
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingError(f"{path}: expected TOML such as `lr = 0.001`, got an error: {error}") from error
    if swept := values.pop("space", None):
        raise SettingError(
            f"{path}: expected one value per option, got ranges and choices in [space]: {', '.join(swept)}; name one "
            "value of each in [fixed], or search them with embedcache sweep"
        )
    fixed = values.pop("fixed", {})
    if not isinstance(fixed, dict) or (fixed and values):
        raise SettingError(
            f"{path}: expected all options at the top or all in a table [fixed], got both: "
            f"{', '.join(values) or 'fixed'}; move them into one"
        )
    return with_underscores(path, fixed or values)


def _read_run(path: Path) -> dict[str, Any]:
    """Return the settings and features of a pair by option name."""
    from embedcache.projectors.base import split_names
    from embedcache.provenance import construct
    from embedcache.runs import MANIFEST, PAIR, Run
    from embedcache.train.settings import TrainSettings

    if path.name != MANIFEST:
        raise SettingError(f"{path}: expected a TOML file or the {MANIFEST} of a run, got another file")
    run = Run.open(path.parent, kind=PAIR)
    settings = construct(path, lambda: to_flat(TrainSettings(**run.info.settings)))
    settings["feature"] = {modality: side.feature for modality, side in run.info.inputs.items()}
    mark_as_read(path, [*split_names(str(settings.get("projector", ""))), str(settings.get("loss", ""))])
    return {name: value for name, value in settings.items() if value not in (None, ())}
