"""Options from a file: TOML, or the `config.json` of a run."""

import functools
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from embedcache.errors import EmbedcacheError, PathError, SettingError
from embedcache.registry import mark_as_read, unknown_name
from embedcache.settings import FlatSetting, flat_settings


def use_config(context: typer.Context, path: Path | None) -> Path | None:
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
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingError(f"{path}: expected TOML such as `lr = 0.001`, got an error: {error}") from error
    return {name.replace("-", "_"): value for name, value in values.items()}


def _read_run_config(path: Path, text: str) -> dict[str, Any]:
    """Return the settings and features of a run by option name."""
    from embedcache.projectors.saved import CHANGED_CONFIG
    from embedcache.provenance import check_record
    from embedcache.train.settings import TrainSettings

    try:
        record = json.loads(text)
        check_record(path, record, next_step=CHANGED_CONFIG)
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
        if isinstance(error, EmbedcacheError):
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
