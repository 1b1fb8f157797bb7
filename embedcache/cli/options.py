"""Options of commands: those generated from settings classes, and those that commands share.

    @with_settings(settings=TrainSettings)
    def train(caches: ..., run: ..., *, settings: TrainSettings) -> None: ...

Each parameter that `with_settings` names is replaced by one option per setting of its class; a group of settings
becomes a panel of `--help`. A parameter of the type `ReportOptions` is replaced by the options of reports with a page.
An option that several commands declare by hand is an alias here, with one meaning in all.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

import typer

from embedcache.cli.config_files import use_config
from embedcache.dataset.settings import SELECTION_FORMAT
from embedcache.devices import DEVICE_HELP
from embedcache.errors import SettingError
from embedcache.modalities import MODALITIES, split_modality
from embedcache.settings import FlatSetting, flat_settings, from_flat, to_words

OUTPUT_PANEL = "Output options"
"""Panel of `--help`."""
OUTPUT_NAMES = ("as_json", "output", "html")
"""Parameters that come last in the help."""
OVERWRITE = "overwrite"
"""Parameter of all commands that write an output."""


def check_new_file(context: typer.Context, path: Path | None) -> Path | None:
    """Check, before the work, that an output can be written to a path; `--overwrite` is parsed before all outputs.

    Raises:
        PathError: the path is a folder, a link or, without `--overwrite`, an existing file.
    """
    from embedcache.outputs import check_output, replacing_files

    if path is None:
        return None
    with replacing_files(context.params[OVERWRITE]):
        check_output(path)
    return path


def output_argument(help: str) -> Any:
    """Return the declaration of OUT, a new file that a command writes."""
    return typer.Argument(metavar="OUT", help=help, callback=check_new_file)


def output_option(check: Callable[..., Path | None]) -> Any:
    """Return the declaration of `--output`, whose path is checked before the work."""
    text = "Write the report as JSON to this file."
    return typer.Option("--output", metavar="FILE", help=text, rich_help_panel=OUTPUT_PANEL, callback=check)


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
Json: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--json", metavar="", help="Print the report as JSON on standard output.", rich_help_panel=OUTPUT_PANEL
    ),
]
Output: TypeAlias = Annotated[Path | None, output_option(check_new_file)]
Html: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Write the report as an HTML page.",
        rich_help_panel=OUTPUT_PANEL,
        callback=check_new_file,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where a command publishes its report: on standard output, as JSON in a file, and as a page with images."""

    as_json: Json = False
    output: Output = None
    html: Html = None

    def publish(
        self,
        show: Callable[[], None],
        record: Callable[[], Any],
        write_page: Callable[[Path], None],
        *,
        write_output: Callable[[Path], None] | None = None,
    ) -> None:
        """Publish a report; arguments are those of `embedcache.cli.console.publish`."""
        from embedcache.cli.console import publish

        publish(
            show,
            record,
            as_json=self.as_json,
            output=self.output,
            write_output=write_output,
            html=self.html,
            write_page=write_page,
        )


_CONFIG_HELP = "Read options from this TOML file; the command line takes precedence."
_WIDEST_CHOICES = 24
_LISTS = (tuple, Mapping)
"""Types of settings whose option may be repeated."""
_COMMA = re.compile(",")
_COMMA_BETWEEN_SPECS = re.compile(r",(?!\s*\w+=)")
_METAVARS: Mapping[Any, str] = {int: "N", float: "FLOAT", str: "NAME", Path: "FILE"}


def with_settings(
    *,
    skip: Sequence[str] = (),
    build: Mapping[str, Callable[[Mapping[str, Any]], Any]] | None = None,
    config_help: str = _CONFIG_HELP,
    output: Any = Output,
    **kinds: type[Any],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces parameters of a command by one option per setting, and adds `--config`.

    Args:
        skip: flat names that get no option.
        build: parameter -> function that builds its settings from flat values; `from_flat` if not given.
        config_help: help of `--config`.
        output: declaration of the option `--output` of `ReportOptions`.
        kinds: parameter -> settings class.
    """
    items = {key: [item for item in flat_settings(kind) if item.name not in skip] for key, kind in kinds.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        """Return a function with the options as its signature, which builds the settings and calls the command."""

        @functools.wraps(command)
        def run(*, context: typer.Context, config: Path | None, **values: Any) -> None:  # noqa: ARG001
            for key, kind in kinds.items():
                flat = _pop_given(values, items[key], context)
                values[key] = build[key](flat) if build and key in build else from_flat(kind, flat)
            for key in reports:
                values[key] = ReportOptions(**{name: values.pop(name) for name in report_options})
            command(**values)

        own = inspect.signature(command, eval_str=True).parameters
        reports = [name for name, parameter in own.items() if parameter.annotation is ReportOptions]
        report_options = _report_parameters(output) if reports else {}
        generated = [_option(item) for key in kinds for item in items[key]]
        config = Annotated[
            Path | None,
            typer.Option("--config", metavar="FILE", help=config_help, is_eager=True, callback=use_config),
        ]
        set_parameters(
            run,
            [
                inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
                *(parameter for name, parameter in own.items() if name not in (*kinds, *reports, *OUTPUT_NAMES)),
                *generated,
                keyword("config", config, None),
                *(parameter for name, parameter in own.items() if name in OUTPUT_NAMES),
                *report_options.values(),
            ],
        )
        return run

    return decorate


def _pop_given(values: dict[str, Any], items: Sequence[FlatSetting], context: typer.Context) -> dict[str, Any]:
    """Remove the options of settings from `values`; return the flat values of those that the user gave."""
    popped = {item.name: values.pop(item.name) for item in items}
    return {item.name: _setting_value(item, popped[item.name]) for item in items if _is_given(context, item.name)}


def _report_parameters(output: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of `ReportOptions` that a command gets, with its declaration of `--output`."""
    parameters = dict(inspect.signature(ReportOptions).parameters)
    return {**parameters, "output": parameters["output"].replace(annotation=output)}


def set_parameters(function: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> None:
    """Set the signature that typer reads."""
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """Return a parameter that is passed by name."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _option(item: FlatSetting) -> inspect.Parameter:
    """Return the parameter of one setting, as typer reads it: a flag, or texts, which the settings class checks."""
    kind = _plain_type(item)
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    metavar, help = item.metavar, item.help
    if kind is bool:
        metavar = ""
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
    return keyword(item.name, Annotated[annotation, option], default)


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
