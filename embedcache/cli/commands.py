"""Commands and groups of commands: their help, the options that all have, and errors that name options as typed.

    add_command(app, "train", train)

The error of a setting names its option, `--batch-size` for `batch_size`, or the file that it was read from.
"""

import functools
import inspect
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from embedcache.cli.config_files import is_from_file
from embedcache.cli.failures import end_interrupted
from embedcache.cli.options import OUTPUT_NAMES, OUTPUT_PANEL, OVERWRITE, check_new_file, keyword, set_parameters
from embedcache.errors import AmbiguousNameError, EmbedcacheError, PathError, SettingError, pluralize
from embedcache.files import one_or_many
from embedcache.registry import installed_plugins, trust_files

_URL = re.compile(r"((?:.*::)?(?:s3|s3a|gs|gcs|az|abfss?|adl|https?|hf|file|memory|s?ftp|hdfs|github)):/+(.*)")
"""A URL as a path; a folder of such a name can be given by its absolute path."""


_HELP_ALL = "help_all"
"""Parameter of commands whose `--help` does not show all options."""


_ALIASES = {"--learning-rate": "--lr", "--wd": "--weight-decay", "--top-k": "-k"}


class Command(TyperCommand):
    """A command whose help shows plain metavars and installed plug-ins, and whose errors name options as typed."""

    plugins: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    """Parameters whose options `--help` shows; empty: all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; the error of missing arguments names the first one."""
        words = self._without_aliases(args)
        try:
            return super().parse_args(ctx, [*words])  # parsing takes them off the list
        except typer.BadParameter as error:
            if isinstance(error.param, TyperArgument) and error.param.nargs < 0:  # a list without a value
                error.param = self._first_missing(ctx, words) or error.param
            raise

    def _without_aliases(self, args: list[str]) -> list[str]:
        """Return the words of the command line with options that other tools name otherwise by our names."""
        known = {flag for option in self.params for flag in option.opts}
        words: list[str] = []
        for word in args:
            alias, separator, value = word.partition("=")
            option = _ALIASES.get(alias)
            if option in known:
                words += [option, value] if separator else [option]
            else:
                words.append(word)
        return words

    def _first_missing(self, ctx: Any, words: list[str]) -> Any:
        """Return the first argument that has no value: the parser gives the last values to those behind a list."""
        values, _, _ = self.make_parser(ctx).parse_args(words)
        arguments = [each for each in self.params if isinstance(each, TyperArgument)]
        given = [values.get(str(each.name)) for each in arguments]
        num_given = sum(len(value) if isinstance(value, tuple | list) else isinstance(value, str) for value in given)
        return arguments[num_given] if num_given < len(arguments) else None

    def invoke(self, ctx: Any) -> Any:
        """Run the command; the error of a setting names its option, and so does that of a feature to choose."""
        _check_local_paths(ctx)
        try:
            _check_own_outputs(ctx)
            return super().invoke(ctx)
        except KeyboardInterrupt:  # which click would print as "Aborted."
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

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option `--help`, without a metavar."""
        return _without_metavar(super().get_help_option(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, without Python types beside the arguments, and with the plug-ins of installed packages."""
        for parameter in self.params:
            if isinstance(parameter, TyperArgument):
                parameter.display_type_rich = lambda ctx: None  # type: ignore[method-assign]  # noqa: ARG005
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


_WRITTEN = ("out", "output", "html")
"""Parameters that are paths of what a command writes."""


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


def _check_own_outputs(context: typer.Context) -> None:
    """Check that no other parameter names the file of an output; arguments that may be URLs are texts."""
    arguments = {each.name for each in context.command.params if each.param_type_name == "argument"}
    for output in _WRITTEN:
        path = context.params.get(output)
        for name, value in context.params.items():
            is_place = isinstance(value, Path) or (isinstance(value, str) and name in arguments)
            if isinstance(path, Path) and is_place and name != output and Path(value).absolute() == path.absolute():
                raise SettingError(f"{output}: expected a file of its own, got {path}, which {name} names too")


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


class CommandGroup(TyperGroup):
    """A group of commands whose help shows plain metavars, and which finds a command of its groups by its last word."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is named; the error of one that is in a group names it."""
        for name, group in self.commands.items():
            is_in_group = isinstance(group, TyperGroup) and args[0] in group.commands
            if is_in_group and args[0] not in self.commands:
                ctx.fail(f"No such command '{args[0]}'. Did you mean '{name} {args[0]}'?")
        return super().resolve_command(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options, flags without a metavar: typer's own, `--help` and shell completion, have one."""
        options = super().get_params(ctx)
        return [_without_metavar(each) if getattr(each, "is_flag", False) else each for each in options]


def _without_metavar(option: Any) -> Any:
    if option is not None:
        option.metavar = ""
    return option


def new_group(help: str, **options: Any) -> typer.Typer:
    """Return an empty group of commands; `options` are those of `typer.Typer`."""
    return typer.Typer(help=help, short_help=help, cls=CommandGroup, no_args_is_help=True, **options)


def add_command(
    app: typer.Typer,
    name: str,
    command: Callable[..., None],
    *,
    runs_named_code: bool = True,
    reads_items: bool = False,
    plugins: tuple[str, ...] = (),
    common: tuple[str, ...] = (),
    **options: Any,
) -> None:
    """Add a command with the options that all have; its help is its docstring.

    Args:
        app: application or group.
        name: name of the command.
        command: function with typer's annotations.
        runs_named_code: whether files that the command opens may name code, so that it has the option `--trust`.
        reads_items: whether it reads items again from the source of a cache, so that it has `--image-folder`.
        plugins: kinds of plug-ins that it takes by name, such as `encoders`; `--help` lists the installed ones.
        common: parameters of the options that `--help` shows, of a command that has many; `--help-all` shows all.
        options: further arguments of `typer.Typer.command`.
    """
    help = _help_text(command)
    summary = help.partition("\n\n")[0]
    kind = type("DeclaredCommand", (Command,), {"plugins": plugins, "common": common and (*common, _HELP_ALL)})
    if common:
        command = _with_help_all(command)
    app.command(name=name, help=help, short_help=summary, cls=kind, **options)(
        _with_verbosity(_with_trust(command, reads_items=reads_items) if runs_named_code else command)
    )


def _help_text(command: Callable[..., None]) -> str:
    """Return the docstring with every paragraph on one line, but for examples."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(text if text.startswith("Example") else " ".join(text.split()) for text in paragraphs)


def _with_help_all(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*, help_all: bool, **values: Any) -> None:  # noqa: ARG001
        command(**values)

    option = typer.Option(
        "--help-all", metavar="", help="Show all options and exit.", is_eager=True, callback=_show_all_options
    )
    own = inspect.signature(command, eval_str=True).parameters.values()
    set_parameters(run, [*own, keyword(_HELP_ALL, Annotated[bool, option], False)])
    return run


def _show_all_options(context: typer.Context, is_asked: bool) -> None:
    if is_asked:
        context.params[_HELP_ALL] = True
        print(context.get_help())
        raise typer.Exit


def _with_trust(command: Callable[..., None], *, reads_items: bool) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*, trust: bool, image_folder: list[str] | None = None, **values: Any) -> None:
        with trust_files(trust), ExitStack() as stack:
            if image_folder:
                from embedcache.sources.open import read_below

                stack.enter_context(read_below(*image_folder))
            command(**values)

    trust = Annotated[
        bool,
        typer.Option(
            "--trust",
            metavar="",
            help="Run code that the opened files name as module:attribute; only for files whose authors you trust.",
        ),
    ]
    folders = Annotated[
        list[str] | None,
        typer.Option(
            "--image-folder",
            metavar="FOLDER",
            help="Folder or URL below which items may be read, besides the folder of a source that you extract or have "
            "extracted on this machine. May be repeated.",
        ),
    ]
    access = [keyword("image_folder", folders, None)] if reads_items else []
    access.append(keyword("trust", trust, False))
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    position = next((place for place, each in enumerate(own) if each.name in (*OUTPUT_NAMES, "config")), len(own))
    set_parameters(run, [*own[:position], *access, *own[position:]])
    return run


def _with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*, quiet: bool, verbose: bool, **values: Any) -> None:
        from embedcache.cli.console import verbosity
        from embedcache.outputs import replacing_files

        with verbosity(quiet=quiet, verbose=verbose), replacing_files(values.pop(OVERWRITE, True)):
            command(**values)

    quiet = Annotated[
        bool, typer.Option("--quiet", "-q", metavar="", help="Hide progress.", rich_help_panel=OUTPUT_PANEL)
    ]
    verbose = Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            metavar="",
            help="Print log messages, run time and peak memory.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ]
    own = sorted(inspect.signature(command, eval_str=True).parameters.values(), key=_place_in_help)
    overwrite = [keyword(OVERWRITE, _Overwrite, False)] if any(map(_is_new_file, own)) else []
    set_parameters(run, [*own, *overwrite, keyword("quiet", quiet, False), keyword("verbose", verbose, False)])
    return run


def _place_in_help(parameter: inspect.Parameter) -> int:
    """Return the place of an option among those without a panel: the ones that many commands share come last."""
    has_panel = any(
        getattr(option, "rich_help_panel", None) for option in getattr(parameter.annotation, "__metadata__", ())
    )
    return _LAST.index(parameter.name) if parameter.name in _LAST and not has_panel else -1


_LAST = ("engine", "address", "device", "image_folder", "trust", "config", _HELP_ALL)


_Overwrite: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        metavar="",
        help="Replace the files that are named as outputs, if they exist.",
        rich_help_panel=OUTPUT_PANEL,
        is_eager=True,
    ),
]


def _is_new_file(parameter: inspect.Parameter) -> bool:
    declared = getattr(parameter.annotation, "__metadata__", ())
    return any(getattr(option, "callback", None) is check_new_file for option in declared)
