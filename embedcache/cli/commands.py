"""Commands: each is a function from settings to a report, declared with the options that all have.

    @command(app, "coverage", settings=CoverageSettings, has_page=True)
    def coverage(cache: CacheArgument, concepts: str, *, settings: CoverageSettings) -> Presentation: ...

The decorator adds one option per setting, `--config`, `--trust`, and where and how the report is written. The error of
a setting names its option, `--batch-size` for `batch_size`, or the file that it was read from.

An option that several commands declare by hand is an alias here, with one meaning in all. A settings class gives one
option per setting; a group of settings becomes a panel of `--help`. A config is TOML, with options at the top or in
`[fixed]` as in the space of a sweep, or the `run.json` of a run.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeAlias, TypeVar, get_args, get_origin

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from embedcache.dataset.settings import SELECTION_FORMAT
from embedcache.errors import AmbiguousNameError, EmbedcacheError, PathError, SettingError, pluralize
from embedcache.files import one_or_many
from embedcache.modalities import MODALITIES, split_modality
from embedcache.processes import DEVICE_HELP
from embedcache.registry import installed_plugins, mark_as_read, trust_files, unknown_name
from embedcache.settings import FlatSetting, Settings, flat_settings, from_flat, to_flat, to_words, with_underscores

OUTPUT_PANEL = "Output options"
"""Panel of `--help`."""

F = TypeVar("F", bound=Callable[..., Any])

_URL = re.compile(r"((?:.*::)?(?:s3|s3a|gs|gcs|az|abfss?|adl|https?|hf|file|memory|s?ftp|hdfs|github)):/+(.*)")
"""A URL as a path. A folder of such a name can be given by its absolute path."""

_ALIASES = {"--learning-rate": "--lr", "--wd": "--weight-decay", "--top-k": "-k"}
_HELP_ALL = "help_all"
"""Parameter of commands whose `--help` does not show all options."""


def check_new_file(context: typer.Context, path: Path | None) -> Path | None:
    """Check that an output can be written to a path, before the work begins.

    Raises:
        PathError: the path is a folder, a link or, without `--overwrite`, an existing file.
    """
    from embedcache.provenance import check_output, replacing_files

    if path is None:
        return None

    # `--overwrite` is eager, so it has been parsed before all outputs.
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
    str | None,
    typer.Option("--concepts", metavar="CACHE|FILE", help="A .txt with one name per line, or a cache of prompts."),
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
    """Remove the options of a settings class from `values`. Return the flat values of options that the user gave."""
    flat = {}
    for item in flat_settings(kind):
        if item.name in skip:
            continue
        value = values.pop(item.name)

        # A default is left to the settings class, which may compute it from other values.
        source = context.get_parameter_source(item.name)
        if source is not None and source.name != "DEFAULT":
            flat[item.name] = _setting_value(item, value)
    return flat


def _option(item: FlatSetting) -> inspect.Parameter:
    """Return the parameter of one setting, as typer reads it: a flag, or texts, which the settings class checks."""
    kind = _plain_type(item)
    choices = list(map(str, get_args(kind))) if get_origin(kind) is Literal else []
    metavar = item.metavar
    help = item.help
    if kind is bool:
        help = f"Do not {help[0].lower()}{help[1:]}" if item.default is True else help
    elif choices and len("|".join(choices)) <= _WIDEST_CHOICES:
        metavar = metavar or "|".join(choices)
    elif choices:
        # A wide column of metavars would leave no room for the help.
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

    # typer converts nothing but paths: values from a config and from the command line are then checked alike.
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
    """Return the option's name on the command line. A flag that is true by default is switched off by `--no-NAME`."""
    name = item.name.replace("_", "-")
    if len(name) == 1:
        return f"-{name}"
    if kind is bool and item.default is True:
        return f"--no-{name}"
    return f"--{name}/--no-{name}" if kind is bool and item.default is None else f"--{name}"


def _plain_type(item: FlatSetting) -> Any:
    """Return the type of a setting without None. A setting that is parsed is a text."""
    if item.parse is not None:
        return str
    alternatives = get_args(item.type)
    kinds = [kind for kind in alternatives if kind is not type(None)]
    return kinds[0] if len(kinds) < len(alternatives) else item.type


def _setting_value(item: FlatSetting, value: Any) -> Any:
    """Return an option's value as the setting stores it. Elements of a list may be separated by commas."""
    kind = _plain_type(item)
    if kind is bool:
        return not value if item.default is True else value
    if get_origin(kind) not in _LISTS:
        return _number(value, (kind,))

    # The names of files, and some other texts, may contain commas.
    element = get_args(kind)[0]
    if element is Path or item.commas == "keep":
        return tuple(value)
    comma = _COMMA_BETWEEN_SPECS if item.commas == "split specs" else _COMMA
    return tuple(_number(word, (element, *get_args(element))) for word in split_at_commas(value, comma))


def _number(word: Any, kinds: Sequence[Any]) -> Any:
    """Return a text as a number of one of these types, or unchanged. The settings class refuses other texts."""
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
    """Split the values of an option that may be repeated, each of which may be several names with commas between."""
    words: list[str] = []
    for value in values or ():
        words += map(str.strip, comma.split(str(value)))
    return tuple(filter(None, words))


def config_option(help: str) -> Any:
    """Return the option `--config`, which is parsed before the options whose values it gives."""
    return Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help=help, is_eager=True, callback=use_config)
    ]


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Read the options that are not on the command line from a file.

    Raises:
        UnknownNameError: the command has no option of that name.
        SettingError: an option occurs twice, or has a value of another type.
    """
    if path is None:
        return None

    # Name in the file -> option, and whether it is the name that switches a flag off.
    options: dict[str, tuple[Any, bool]] = {}
    suggested = []
    for option in context.command.params:
        if option.name == "config":
            continue
        for flag in (*option.opts, *option.secondary_opts):
            name = flag.lstrip("-").replace("-", "_")
            options[name] = (option, flag in option.secondary_opts)

            # The letter of an option that also has a word is accepted, but not suggested.
            if len(name) > 1 or len(option.opts) == 1:
                suggested.append(name)

    words: dict[str, Any] = {}
    for name, value in read_config(path).items():
        if name not in options:
            raise unknown_name("option", name, suggested, where=f"in {path}")
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
    is_list = getattr(option, "multiple", False) or option.nargs != 1
    if isinstance(value, dict) and is_list:
        value = to_words(value)

    # `lr = true` would otherwise become the text "True".
    elements = value if isinstance(value, list | tuple) and is_list else [value]
    if any(isinstance(each, list | dict) or isinstance(each, bool) is not is_flag for each in elements):
        expected = "true or false" if is_flag else "a text or a number"
        got = str(value).lower() if isinstance(value, bool) else value
        raise SettingError(f"{name}: expected {expected}{' or a list of them' if is_list else ''}, got {got}")

    if is_flag:
        return value is not is_off
    words = list(map(str, elements))
    return words if is_list else words[0]


def read_config(path: Path) -> dict[str, Any]:
    """Read option values from a TOML file, or from the `run.json` of a run.

    In TOML, `lr` and `max-grad-norm` are written as on the command line, without the dashes in front, at the top or in
    a table `[fixed]`.

    Raises:
        PathError: the file cannot be read.
        SettingError: it is not TOML, or not JSON of a run, or has ranges of settings in a table `[space]`.
    """
    from embedcache.provenance import read_toml

    if path.suffix == ".json":
        return _read_run(path)

    # The file of a sweep is also accepted if it fixes all values.
    values = read_toml(path, "a TOML file or the run.json of a run")
    if ranges := values.pop("space", None):
        raise SettingError(
            f"{path}: expected one value per option, got ranges and choices in [space]: {', '.join(ranges)}; name one "
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

    # Code that the file names is run only with --trust, unlike code that the user types.
    mark_as_read(path, [*split_names(str(settings.get("projector", ""))), str(settings.get("loss", ""))])
    return {name: value for name, value in settings.items() if value not in (None, ())}


def command(
    app: typer.Typer,
    name: str,
    *,
    has_report: bool = True,
    has_page: bool = False,
    runs_named_code: bool = True,
    reads_items: bool = False,
    plugins: tuple[str, ...] = (),
    common: tuple[str, ...] = (),
    skip: Sequence[str] = (),
    build: Mapping[str, Callable[[Mapping[str, Any]], Any]] | None = None,
    config_help: str = CONFIG_HELP,
    **settings: type[Settings],
) -> Callable[[F], F]:
    """Return a decorator that adds a function as a command, whose help is its docstring, and returns the function.

    Args:
        app: application or group.
        name: name of the command.
        has_report: whether the function returns a report: a `Presentation`, or what `present` takes.
        has_page: whether the report can be a page, so that the command has `--html`.
        runs_named_code: whether files that the command opens may name code, so that it has `--trust`.
        reads_items: whether it reads items again from the source of a cache, so that it has `--image-folder`.
        plugins: kinds of plug-ins that it takes by name, such as `encoders`; `--help` lists the installed ones.
        common: parameters of the options that `--help` shows if a command has many; `--help-all` shows all.
        skip: flat names of settings that get no option.
        build: parameter -> function that builds its settings from flat values; `from_flat` if not given.
        config_help: help of `--config`.
        settings: parameter -> settings class, which is replaced by one option per setting.
    """
    shared = {
        "image_folder": (IMAGE_FOLDER, None) if reads_items else None,
        "trust": (TRUST, False) if runs_named_code else None,
        "config": (config_option(config_help), None) if settings else None,
        _HELP_ALL: (_HELP_ALL_OPTION, False) if common else None,
        "as_json": (Json, False) if has_report else None,
        "output": (Output, None) if has_report else None,
        "html": (Html, None) if has_page else None,
    }

    def declare(function: F) -> F:
        # `--help` lists the function's own options, then its settings, then the options that all commands have.
        parameters = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.name not in settings:
                parameters.append(parameter)
        for settings_class in settings.values():
            parameters += setting_options(settings_class, skip)
        for key, declared in shared.items():
            if declared:
                parameters.append(keyword(key, *declared))
        if any(map(_is_new_file, parameters)):
            parameters.append(keyword("overwrite", Overwrite, False))
        parameters += [keyword("quiet", Quiet, False), keyword("verbose", Verbose, False)]

        @functools.wraps(function)
        def run(*, context: typer.Context, **values: Any) -> None:
            options = {key: values.pop(key, None) for key in (*shared, "overwrite", "quiet", "verbose")}
            for key, kind in settings.items():
                flat = given_settings(context, values, kind, skip)
                values[key] = build[key](flat) if build else from_flat(kind, flat)
            _run(functools.partial(function, **values), options)

        # typer reads parameters and classes, so each command gets its own signature and its own class.
        _set_signature(run, [keyword("context", typer.Context), *parameters])
        kind = type("DeclaredCommand", (Command,), {"plugins": plugins, "common": common and (*common, _HELP_ALL)})
        help = _help_text(function)
        app.command(name=name, help=help, short_help=help.partition("\n\n")[0], cls=kind)(run)
        return function

    return declare


def _run(function: Callable[[], Any], options: Mapping[str, Any]) -> None:
    """Call the function of a command, and publish its report. Options that the command lacks are None."""
    from embedcache.cli.console import publish, verbosity
    from embedcache.provenance import replacing_files

    with ExitStack() as stack:
        stack.enter_context(verbosity(quiet=options["quiet"], verbose=options["verbose"]))

        # A command without the option has no outputs that it could replace by mistake.
        stack.enter_context(replacing_files(options["overwrite"] is not False))
        stack.enter_context(trust_files(bool(options["trust"])))
        if options["image_folder"]:
            from embedcache.sources.open import read_below

            stack.enter_context(read_below(*options["image_folder"]))

        report = function()
        if report is not None:
            publish(report, as_json=options["as_json"], output=options["output"], html=options["html"])


def exit_with_findings() -> NoReturn:
    """End a command with exit code 1 after its report was published, since the report names the faults."""
    raise typer.Exit(1)


def new_group(help: str = "") -> typer.Typer:
    """Return an empty group of commands."""
    return typer.Typer(help=help, short_help=help, cls=CommandGroup, no_args_is_help=True)


def keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """Return a parameter that is passed by name."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _set_signature(function: Callable[..., None], parameters: Iterable[inspect.Parameter]) -> None:
    """Set the signature that typer reads."""
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _help_text(function: Callable[..., Any]) -> str:
    """Return the docstring with every paragraph on one line, except examples."""
    paragraphs = []
    for text in (inspect.getdoc(function) or "").split("\n\n"):
        paragraphs.append(text if text.startswith("Example") else " ".join(text.split()))
    return "\n\n".join(paragraphs)


def _is_new_file(parameter: inspect.Parameter) -> bool:
    declared = getattr(parameter.annotation, "__metadata__", ())
    return any(getattr(option, "callback", None) is check_new_file for option in declared)


def _show_all_options(context: typer.Context, is_asked: bool) -> None:
    if is_asked:
        context.params[_HELP_ALL] = True
        print(context.get_help())
        raise typer.Exit


_HELP_ALL_OPTION = Annotated[
    bool,
    typer.Option("--help-all", help="Show all options and exit.", is_eager=True, callback=_show_all_options),
]


class Command(TyperCommand):
    """A command whose help shows no Python types and lists plug-ins, and whose errors name options as typed."""

    plugins: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    """Parameters whose options `--help` shows (all if empty)."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line. Options by their names in other tools are replaced by ours."""
        flags: set[str] = set()
        for option in self.params:
            flags.update(option.opts)

        words = []
        for word in args:
            name, separator, value = word.partition("=")
            if _ALIASES.get(name) not in flags:
                words.append(word)
                continue

            # A value after the equals sign becomes a word, because a short option accepts no equals sign.
            words.append(_ALIASES[name])
            if separator:
                words.append(value)
        return super().parse_args(ctx, words)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. The error of a setting names its option, and so does the error of a feature to choose."""
        _check_local_paths(ctx)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            from embedcache.cli.console import end_interrupted

            # click would print it as "Aborted."
            end_interrupted()
        except AmbiguousNameError as error:
            error.args = (f"{error}{_feature_option(ctx, error.modality)}",)
            raise
        except EmbedcacheError as error:
            error.args = (_name_option(ctx, str(error)),)
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line, without braces around required arguments."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def get_params(self, ctx: Any) -> list[Any]:
        """Return all parameters, of which flags and arguments are shown without a Python type."""
        return _without_types(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the plug-ins of installed packages, and how to see options that it does not show."""
        notes = []
        is_short = bool(self.common) and not ctx.params.get(_HELP_ALL)
        num_hidden = 0
        for option in self.params:
            if isinstance(option, TyperOption):
                option.hidden = is_short and option.name not in self.common
                num_hidden += option.hidden
        if is_short:
            notes.append(f"{pluralize(num_hidden, 'more option')}: {ctx.command_path} --help-all")

        plugins = []
        for kind in self.plugins:
            if names := installed_plugins(kind):
                plugins.append(f"{kind} {', '.join(names)}")
        if plugins:
            notes.append(f"Plug-ins of installed packages: {'; '.join(plugins)}.")
        self.epilog = "\n\n".join(notes)
        super().format_help(ctx, formatter)


class CommandGroup(TyperGroup):
    """A group of commands which finds a command of its groups by its last word."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the named command. If it is in a group, the error names the group."""
        for name, group in self.commands.items():
            is_in_group = isinstance(group, TyperGroup) and args[0] in group.commands
            if is_in_group and args[0] not in self.commands:
                ctx.fail(f"No such command '{args[0]}'. Did you mean '{name} {args[0]}'?")
        return super().resolve_command(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return all parameters, of which flags are shown without a Python type."""
        return _without_types(super().get_params(ctx))


def _without_types(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if isinstance(parameter, TyperArgument) or getattr(parameter, "is_flag", False):
            parameter.display_type_rich = lambda ctx: None  # noqa: ARG005
    return parameters


def _check_local_paths(context: typer.Context) -> None:
    """Check that no parameter that is a path on this machine is a URL, and that no output is named twice."""
    for option in context.command.params:
        value = context.params.get(str(option.name))
        for path in value if isinstance(value, list | tuple) else [value]:
            # `Path` joins the slashes of a URL, so it would name a folder here.
            match = _URL.match(str(path)) if isinstance(path, Path) else None
            if match:
                name = option.opts[0] if option.param_type_name == "option" else option.metavar or option.name
                raise PathError(
                    f"{name}: expected a path on this machine, got the URL {match[1]}://{match[2]}; name a local path, "
                    "and copy what is there"
                )

    output = context.params.get("output")
    if output is not None and output == context.params.get("html"):
        raise SettingError(f"--output, --html: expected two files, got {output} twice; name another file")


def _name_option(context: typer.Context, message: str) -> str:
    """Replace the name of a setting at the start of a message by its option, or by the file that set it and its key."""
    name, separator, rest = message.partition(": ")

    # A folder that an argument names may have the name of a setting, such as `cache`.
    for parameter in context.command.params:
        if parameter.param_type_name == "argument":
            paths = one_or_many(context.params.get(str(parameter.name)) or [])
            if Path(name) in map(Path, map(str, paths)):
                return message

    for option in context.command.params:
        if option.param_type_name == "option" and name in (option.name, option.opts[0]):
            if is_from_file(context, str(option.name)):
                return f"{context.params['config']}: {option.name}{separator}{rest}"
            return f"{option.opts[0]}{separator}{rest}"
    return message


def _feature_option(context: typer.Context, modality: str) -> str:
    """Return the option that names a feature of a modality, to follow the names. Empty without such an option."""
    for option in context.command.params:
        if option.param_type_name == "option" and option.name == "feature":
            metavar = str(option.metavar).replace("[MODALITY=]", f"{modality}=").replace("MODALITY", modality)
            return f"; with --feature {metavar}"
    return ""
