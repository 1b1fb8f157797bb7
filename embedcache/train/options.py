"""Training settings by the flat names of the command line and of a sweep's space: `learning_rate`, `split` …"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from embedcache.cache.split_settings import SplitSettings
from embedcache.registry import unknown_name
from embedcache.train.settings import (
    LossSettings,
    MachineSettings,
    ModelSettings,
    OptimizerSettings,
    TrainSettings,
)

_GROUPS = {
    "model": ModelSettings,
    "loss": LossSettings,
    "optimizer": OptimizerSettings,
    "split": SplitSettings,
    "machine": MachineSettings,
}
_RENAMED = {("loss", "name"): "loss", ("split", "kind"): "split", ("split", "seed"): "split_seed"}


def option_names() -> list[str]:
    """Name all settings."""
    return [name for name, _, _ in _places()]


def option_types() -> dict[str, Any]:
    """Give each setting's type, as it is written beside its field."""
    hints = {"": get_type_hints(TrainSettings), **{group: get_type_hints(kind) for group, kind in _GROUPS.items()}}
    return {name: hints[group][field] for name, group, field in _places()}


def settings_of(options: Mapping[str, Any]) -> TrainSettings:
    """Make settings from flat names; what is left out, or None, has its default. The split's seed defaults to the seed.

    Raises:
        UnknownNameError: there is no setting of that name.
        SettingError: a value out of its range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in option_names():
            raise unknown_name("training setting", name, option_names())
    given.setdefault("split_seed", given.get("seed", TrainSettings.seed))
    values: dict[str, dict[str, Any]] = {group: {} for group in ("", *_GROUPS)}
    for name, group, field in _places():
        if name in given:
            values[group][field] = given[name]
    groups = {group: kind(**values[group]) for group, kind in _GROUPS.items()}
    return TrainSettings(**groups, **values[""])


def options_of(settings: TrainSettings) -> list[str]:
    """Give the words of the command line that ask for some settings: those that differ from their defaults."""
    words, defaults = [], settings_of({"seed": settings.seed})
    for name, group, field in _places():
        value = getattr(getattr(settings, group) if group else settings, field)
        default = getattr(getattr(defaults, group) if group else defaults, field)
        if name == "seed" or value != default:
            option = f"--{name.replace('_', '-')}"
            words += [option] if value is True else [option, str(value)]
    return words


def _places() -> Iterator[tuple[str, str, str]]:
    """Give each setting's flat name, its group (`` for none) and its field."""
    for field in fields(TrainSettings):
        if field.name not in _GROUPS:
            yield field.name, "", field.name
    for group, kind in _GROUPS.items():
        assert is_dataclass(kind)
        for field in fields(kind):
            yield _RENAMED.get((group, field.name), field.name), group, field.name
