"""Options from a file: TOML, at the top or in `[fixed]` as in the space of a sweep; or the `run.json` of a run."""

import tomllib
from pathlib import Path
from typing import Any

import typer

from embedcache.errors import PathError, SettingError
from embedcache.registry import mark_as_read, unknown_name
from embedcache.settings import to_flat, to_words, with_underscores


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
