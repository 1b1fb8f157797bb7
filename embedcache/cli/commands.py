"""Commands: each is a function from settings to a report, declared with the options that all have.

    @command(app, "coverage", settings=CoverageSettings, has_page=True)
    def coverage(cache: CacheArgument, concepts: str, *, settings: CoverageSettings) -> Presentation: ...

The decorator adds one option per setting, `--config`, `--trust`, and where and how the report is written. The error of
a setting names its option, `--batch-size` for `batch_size`, or the file that it was read from.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from embedcache.cli.options import (
    CONFIG_HELP,
    IMAGE_FOLDER,
    TRUST,
    Html,
    Json,
    Output,
    Overwrite,
    Quiet,
    Verbose,
    check_new_file,
    config_option,
    given_settings,
    is_from_file,
    setting_options,
)
from embedcache.errors import AmbiguousNameError, EmbedcacheError, PathError, SettingError, pluralize
from embedcache.files import one_or_many
from embedcache.registry import installed_plugins, trust_files
from embedcache.settings import Settings, from_flat

F = TypeVar("F", bound=Callable[..., Any])

_URL = re.compile(r"((?:.*::)?(?:s3|s3a|gs|gcs|az|abfss?|adl|https?|hf|file|memory|s?ftp|hdfs|github)):/+(.*)")
"""A URL as a path; a folder of such a name can be given by its absolute path."""
_ALIASES = {"--learning-rate": "--lr", "--wd": "--weight-decay", "--top-k": "-k"}
_HELP_ALL = "help_all"
"""Parameter of commands whose `--help` does not show all options."""


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
        common: parameters of the options that `--help` shows, of a command that has many; `--help-all` shows all.
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
        own = inspect.signature(function, eval_str=True).parameters.values()
        parameters = [each for each in own if each.name not in settings]
        parameters += [option for kind in settings.values() for option in setting_options(kind, skip)]
        parameters += [keyword(key, *declared) for key, declared in shared.items() if declared]
        parameters += [keyword("overwrite", Overwrite, False)] if any(map(_is_new_file, parameters)) else []
        parameters += [keyword("quiet", Quiet, False), keyword("verbose", Verbose, False)]

        @functools.wraps(function)
        def run(*, context: typer.Context, **values: Any) -> None:
            options = {key: values.pop(key, None) for key in (*shared, "overwrite", "quiet", "verbose")}
            for key, kind in settings.items():
                flat = given_settings(context, values, kind, skip)
                values[key] = build[key](flat) if build else from_flat(kind, flat)
            _run(functools.partial(function, **values), options)

        _set_signature(run, [keyword("context", typer.Context), *parameters])
        kind = type("DeclaredCommand", (Command,), {"plugins": plugins, "common": common and (*common, _HELP_ALL)})
        help = _help_text(function)
        app.command(name=name, help=help, short_help=help.partition("\n\n")[0], cls=kind)(run)
        return function

    return declare


def _run(function: Callable[[], Any], options: Mapping[str, Any]) -> None:
    """Call the function of a command, and publish its report; options that the command lacks are None."""
    from embedcache.cli.console import publish, verbosity
    from embedcache.provenance import replacing_files

    with ExitStack() as stack:
        stack.enter_context(verbosity(quiet=options["quiet"], verbose=options["verbose"]))
        stack.enter_context(replacing_files(options["overwrite"] is not False))
        stack.enter_context(trust_files(bool(options["trust"])))
        if options["image_folder"]:
            from embedcache.sources.open import read_below

            stack.enter_context(read_below(*options["image_folder"]))
        report = function()
        if report is not None:
            publish(report, as_json=options["as_json"], output=options["output"], html=options["html"])


def exit_with_findings() -> NoReturn:
    """End a command with exit code 1 after its report was published, since it names what is wrong."""
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
    """Return the docstring with every paragraph on one line, but for examples."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(text if text.startswith("Example") else " ".join(text.split()) for text in paragraphs)


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
    """Parameters whose options `--help` shows; empty: all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line, with options that other tools name otherwise by our names."""
        known = {flag for option in self.params for flag in option.opts}
        words = []
        for word in args:
            name, separator, value = word.partition("=")
            is_alias = _ALIASES.get(name) in known
            words += [_ALIASES[name], *([value] if separator else [])] if is_alias else [word]
        return super().parse_args(ctx, words)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; the error of a setting names its option, and so does that of a feature to choose."""
        _check_local_paths(ctx)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # which click would print as "Aborted."
            from embedcache.cli.console import end_interrupted

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
        options = [each for each in self.params if isinstance(each, TyperOption)]
        for option in options:
            option.hidden = is_short and option.name not in self.common
        if is_short:
            num_hidden = sum(option.hidden for option in options)
            notes.append(f"{pluralize(num_hidden, 'more option')}: {ctx.command_path} --help-all")

        found = {kind: installed_plugins(kind) for kind in self.plugins}
        lists = [f"{kind} {', '.join(names)}" for kind, names in found.items() if names]
        if lists:
            notes.append(f"Plug-ins of installed packages: {'; '.join(lists)}.")
        self.epilog = "\n\n".join(notes)
        super().format_help(ctx, formatter)


class CommandGroup(TyperGroup):
    """A group of commands which finds a command of its groups by its last word."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is named; the error of one that is in a group names it."""
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
    """Check that no parameter that is a path on this machine is a URL, of which `Path` joins the slashes."""
    for option in context.command.params:
        value = context.params.get(str(option.name))
        for path in value if isinstance(value, list | tuple) else [value]:
            match = _URL.match(str(path)) if isinstance(path, Path) else None
            if match:
                name = option.opts[0] if option.param_type_name == "option" else option.metavar or option.name
                raise PathError(
                    f"{name}: expected a path on this machine, got the URL {match[1]}://{match[2]}; name a local path, "
                    "and copy what is there"
                )
    output, page = context.params.get("output"), context.params.get("html")
    if output is not None and output == page:
        raise SettingError(f"--output, --html: expected two files, got {output} twice; name another file")


def _name_option(context: typer.Context, message: str) -> str:
    """Replace the name of a setting at the start of a message by its option, or by the file that set it and its key.

    A folder that an argument names may have the name of a setting, such as `cache`.
    """
    name, separator, rest = message.partition(": ")
    given = [
        context.params.get(str(each.name)) for each in context.command.params if each.param_type_name == "argument"
    ]
    if Path(name) in (Path(str(value)) for values in given for value in one_or_many(values or [])):
        return message
    for option in context.command.params:
        if option.param_type_name == "option" and name in (option.name, option.opts[0]):
            if is_from_file(context, str(option.name)):
                return f"{context.params['config']}: {option.name}{separator}{rest}"
            return f"{option.opts[0]}{separator}{rest}"
    return message


def _feature_option(context: typer.Context, modality: str) -> str:
    """Return which option names a feature of a modality, to follow the names; empty without such an option."""
    options = {option.name: option for option in context.command.params if option.param_type_name == "option"}
    if "feature" not in options:
        return ""
    metavar = str(options["feature"].metavar).replace("[MODALITY=]", f"{modality}=").replace("MODALITY", modality)
    return f"; with --feature {metavar}"
