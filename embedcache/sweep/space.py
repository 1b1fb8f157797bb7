"""The search space of a sweep, read from TOML: fixed training settings, and ranges or choices of others."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from embedcache.dataset.settings import SplitSettings
from embedcache.errors import EmbedcacheError, SettingError
from embedcache.processes import torch_device
from embedcache.projectors.base import bind_projector, split_names
from embedcache.provenance import read_toml
from embedcache.registry import unknown_name
from embedcache.settings import flat_settings, with_underscores
from embedcache.train.losses import check_loss
from embedcache.train.settings import TrainSettings, train_settings
from embedcache.train.trainer import check_trackers

Value: TypeAlias = str | int | float | bool
"""A value of a setting, as Optuna stores it. A list is stored as a string, such as `4,8`."""

_SETTINGS = {item.name: item for item in flat_settings(TrainSettings)}
_EXAMPLE = "lr = {low = 1e-4, high = 1e-2, log = true}, or projector = ['linear', 'mlp']"
_NO_EFFECT = "it cannot improve a trial"
_SPLIT_SETTINGS = list(map(attrgetter("name"), flat_settings(SplitSettings)))
_FIXED_ONLY = {
    **dict.fromkeys(
        (*_SPLIT_SETTINGS, "language", "shuffle_pairs", "shuffle_prototypes"),
        "all trials are compared on the same validation samples",
    ),
    "seed": "the best seed means nothing, and --seeds-per-config retrains the best configurations",
    "device": _NO_EFFECT,
}
"""Setting that is the same in all trials -> reason."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """The settings of all trials by flat name: fixed values, and distributions of others.

    Args:
        fixed: name of a setting -> value.
        ranges: name -> distribution: numbers from `low` to `high`, both inclusive, or choices.
        lists: choices that are lists: name -> the choice as Optuna stores it, such as `4,8` -> the list.
    """

    fixed: Mapping[str, Value]
    ranges: Mapping[str, BaseDistribution]
    lists: Mapping[str, Mapping[str, list[Any]]] = field(default_factory=dict)

    def settings(self, values: Mapping[str, Value]) -> TrainSettings:
        """Return the training settings with values of the swept settings. Contradictions raise a `SettingError`."""
        swept: dict[str, Any] = dict(values)
        for name, lists in self.lists.items():
            if name in swept:
                swept[name] = lists.get(swept[name], swept[name])
        return train_settings({**self.fixed, **swept})

    def max_epochs(self) -> int:
        """Return the largest number of epochs that a trial can have."""
        if "epochs" not in self.ranges:
            return self.settings({}).optimizer.epochs

        return int(max(_ends(self.ranges["epochs"])))

    def to_json(self) -> Mapping[str, Any]:
        """Return everything that decides the trials as JSON values."""
        fixed = {name: value for name, value in self.fixed.items() if _SETTINGS[name].affects_result}
        ranges = {}
        for name, values in self.ranges.items():
            ranges[name] = json.loads(distribution_to_json(values))["attributes"]
        return {"fixed": fixed, "space": ranges}


def read_space(path: Path) -> Space:
    """Read a space: the table `[fixed]` with values, and `[space]` with ranges and choices.

    The default of `split_seed` is 0, so that the split does not depend on the seed of training.

    Raises:
        PathError: the file does not exist.
        SettingError: it is not TOML, or contains a value, range or choice that the setting cannot have.
        UnknownNameError: there is no setting, projector or loss of that name.
    """
    tables = _read_tables(path)
    fixed = tables.get("fixed", {})
    swept = tables["space"]
    for name in {**fixed, **swept}:
        _check_name(path, name, fixed, swept)

    ranges = {}
    for name, value in swept.items():
        ranges[name] = _parse_range(f"{path}: {name} in [space]", value)

    # Optuna stores no lists, so they are restored from their strings.
    lists: dict[str, dict[str, list[Any]]] = {}
    for name, value in swept.items():
        for choice in value if isinstance(value, list) else ():
            if isinstance(choice, list):
                lists.setdefault(name, {})[str(_choice(choice))] = choice
    space = Space(fixed={"split_seed": 0, **fixed}, ranges=ranges, lists=lists)

    # A value that training would reject is reported before the first trial.
    for name, value in space.fixed.items():
        _check_value(path, space, name, value)
    for name, values in space.ranges.items():
        for value in _ends(values):
            _check_value(path, space, name, value)
    return space


def _read_tables(path: Path) -> dict[str, dict[str, Any]]:
    tables = read_toml(path, "a TOML file with a table [space]")
    for name, table in tables.items():
        if name not in ("fixed", "space") or not isinstance(table, dict):
            raise SettingError(f"{path}: expected only the tables [fixed] and [space] at the top, got {name!r}")
    if not tables.get("space"):
        raise SettingError(f"{path}: expected settings to try in a table [space], got none; for example {_EXAMPLE}")

    return {name: with_underscores(path, table) for name, table in tables.items()}


def _check_name(path: Path, name: str, fixed: Mapping[str, Any], swept: Mapping[str, Any]) -> None:
    """Check that a setting exists, and that it can be in its table."""
    if name == "feature":
        raise SettingError(f"{path}: expected settings of training, got the feature; give --feature to sweep instead")
    if name == "recipe":
        raise SettingError(f"{path}: expected settings to compare, got a recipe, which compares others; remove it")

    if name not in _SETTINGS:
        table = "fixed" if name in fixed else "space"
        raise unknown_name("training setting", name, _SETTINGS, where=f"in [{table}] of {path}")
    if name not in swept:
        return

    if name in fixed:
        raise SettingError(f"{path} has {name} both in [fixed] and in [space]; remove one of them")
    reason = _FIXED_ONLY.get(name)
    if reason is None and not _SETTINGS[name].affects_result:
        reason = _NO_EFFECT
    if reason is not None:
        raise SettingError(f"{path} has {name} in [space], but {reason}; move it to [fixed]")


def _parse_range(location: str, value: Any) -> BaseDistribution:
    try:
        # Optuna lowers a `high` that no step reaches, with a warning.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if isinstance(value, dict):
                is_whole = all(isinstance(number, int) for name, number in value.items() if name != "log")
                return IntDistribution(**value) if is_whole else FloatDistribution(**value)
            if isinstance(value, list) and value:
                return CategoricalDistribution(list(map(_choice, value)))
    except (TypeError, ValueError, UserWarning) as error:
        raise SettingError(
            f"{location}: expected low and high with log or step, or a list of choices, got {value}: {error}"
        ) from error

    raise SettingError(f"{location}: expected a range or choices, such as {_EXAMPLE}, got {value!r}")


def _choice(value: Any) -> Value:
    """Return a choice as Optuna stores it. A list is written as on the command line."""
    choice: Value = ",".join(map(str, value)) if isinstance(value, list) else value
    return choice


def _ends(values: BaseDistribution) -> Sequence[Any]:
    """Return the choices, or the ends of a range."""
    if isinstance(values, CategoricalDistribution):
        return values.choices
    assert isinstance(values, IntDistribution | FloatDistribution)
    return values.low, values.high


def _check_value(path: Path, space: Space, name: str, value: Any) -> None:
    try:
        settings = space.settings({name: value})
        for projector in split_names(settings.model.projector):
            bind_projector(projector)
        check_loss(settings.loss.name, settings.captions)
        torch_device(settings.machine.device)
        check_trackers(settings.machine.report_to)
    except EmbedcacheError as error:
        raise type(error)(f"{path}: {name} = {value!r}: {error}") from error
