"""The search space of a sweep, read from TOML: fixed training settings, and ranges or choices of others."""

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ConfigDict, ValidationError

from embedcache.dataset.settings import SplitSettings
from embedcache.devices import torch_device
from embedcache.errors import EmbedcacheError, PathError, SettingError
from embedcache.files import read_text
from embedcache.projectors.base import bind_projector, split_names
from embedcache.provenance import Manifest
from embedcache.registry import unknown_name
from embedcache.settings import explain, flat_settings, with_underscores
from embedcache.train.losses import check_loss
from embedcache.train.settings import TrainSettings, train_settings
from embedcache.train.trackers import check_trackers

Number: TypeAlias = int | float
Value: TypeAlias = str | int | float | bool
"""A value of a setting, as Optuna stores it; a list is text there, such as `4,8`."""

_SETTINGS = {item.name: item for item in flat_settings(TrainSettings)}
_EXAMPLE = "lr = {low = 1e-4, high = 1e-2, log = true}, or projector = ['linear', 'mlp']"
_COMPARED_BY = (*(item.name for item in flat_settings(SplitSettings)), "language", "shuffle_pairs")
"""Settings that would give trials different validation samples."""


class Range(Manifest):
    """Numbers from `low` to `high`, both inclusive; integers if the bounds and the step are.

    Args:
        log: whether values are sampled evenly on a logarithmic scale.
        step: distance between neighboring values; None: 1 for integers, any value otherwise.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    low: Number
    high: Number
    log: bool = False
    step: Number | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it contains only integers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 0))

    def model_post_init(self, _context: object) -> None:
        if not self.low <= self.high:
            raise SettingError(f"low: expected at most high, {self.high}, got {self.low}")
        if self.log and self.low <= 0:
            raise SettingError(f"low: expected a number above 0 with log, got {self.low}")
        if self.step is None:
            return
        if self.log:
            raise SettingError(f"step: expected none with log, got {self.step}; omit one of the two")
        if self.step <= 0:
            raise SettingError(f"step: expected a number above 0, got {self.step}")
        num_steps = (self.high - self.low) / self.step
        if not math.isclose(num_steps, round(num_steps), abs_tol=1e-9):
            nearest = self.low + self.step * math.floor(num_steps)
            raise SettingError(
                f"high: expected low {self.low} plus a multiple of step {self.step}, such as {nearest}, got {self.high}"
            )


@dataclass(frozen=True, kw_only=True)
class Space:
    """The settings of all trials by flat name: fixed values, and ranges or choices.

    Args:
        lists: choices that are lists: name of the setting -> the choice, such as `4,8` -> the list.
    """

    fixed: Mapping[str, Value]
    ranges: Mapping[str, Range | tuple[Value, ...]]
    lists: Mapping[str, Mapping[str, list[Any]]] = field(default_factory=dict)

    def settings(self, values: Mapping[str, Value]) -> TrainSettings:
        """Return the training settings with values of the swept settings; contradictions raise a `SettingError`."""
        swept = {
            name: self.lists.get(name, {}).get(value, value) if isinstance(value, str) else value
            for name, value in values.items()
        }
        return train_settings({**self.fixed, **swept})

    def max_epochs(self) -> int:
        """Return the largest number of epochs that a trial can have."""
        epochs = self.ranges.get("epochs", (self.settings({}).optimizer.epochs,))
        return int(epochs.high) if isinstance(epochs, Range) else max(int(value) for value in epochs)

    def to_json(self) -> Mapping[str, Any]:
        """Return everything that decides the trials as JSON values."""
        fixed = {name: value for name, value in self.fixed.items() if _SETTINGS[name].affects_result}
        ranges = {
            name: values.to_json() if isinstance(values, Range) else list(values)
            for name, values in self.ranges.items()
        }
        return {"fixed": fixed, "space": ranges}


def read_space(path: Path) -> Space:
    """Read a space: the table `[fixed]` with values, `[space]` with ranges and choices; `split_seed` defaults to 0.

    Raises:
        PathError: the file does not exist.
        SettingError: it is not TOML, or holds a value, range or choice that the setting cannot have.
        UnknownNameError: there is no setting, projector or loss of that name.
    """
    tables = _read_tables(path)
    fixed, swept = tables.get("fixed", {}), tables.get("space", {})
    for name in {**fixed, **swept}:
        if name == "feature":
            raise SettingError(
                f"{path}: expected settings of training, got the feature, which all trials share; remove it, and give "
                "--feature to sweep"
            )
        if name not in _SETTINGS:
            table = "fixed" if name in fixed else "space"
            raise unknown_name("training setting", name, _SETTINGS, where=f"in [{table}] of {path}")
    for name in swept:
        _check_can_be_swept(path, name, fixed)
    space = Space(
        fixed={"split_seed": 0, **fixed},
        ranges={name: _parse_range(path, name, value) for name, value in swept.items()},
        lists={
            name: {str(_choice(choice)): choice for choice in value if isinstance(choice, list)}
            for name, value in swept.items()
            if isinstance(value, list)
        },
    )
    for name, value in _testable_values(space):
        _check_value(path, space, name, value)
    return space


def _read_tables(path: Path) -> dict[str, dict[str, Any]]:
    try:
        text = read_text(path, SettingError)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise PathError(f"expected a TOML file with a table [space], got {path}, which is not a file") from error
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # invalid TOML, or a number of thousands of digits
        raise SettingError(f"{path}: expected TOML, got an error: {error}") from error
    for name, table in tables.items():
        if name not in ("fixed", "space") or not isinstance(table, dict):
            raise SettingError(f"{path}: expected only the tables [fixed] and [space] at the top, got {name!r}")
    if not tables.get("space"):
        raise SettingError(f"{path}: expected settings to try in a table [space], got none; for example {_EXAMPLE}")
    return {name: with_underscores(path, table) for name, table in tables.items()}


def _check_can_be_swept(path: Path, name: str, fixed: Mapping[str, Any]) -> None:
    if name in fixed:
        raise SettingError(f"{path} has {name} both in [fixed] and in [space]; remove one of them")
    reason = None
    if name in _COMPARED_BY:
        reason = "all trials are compared on the same validation samples"
    elif name == "seed":
        reason = "the best seed means nothing, and --seeds-per-config retrains the best configurations"
    elif name == "recipe":
        reason = "it chooses the settings of all trials that the file does not name"
    elif name == "device" or not _SETTINGS[name].affects_result:
        reason = "it cannot improve a trial"
    if reason is not None:
        raise SettingError(f"{path} has {name} in [space], but {reason}; move it to [fixed]")


def _parse_range(path: Path, name: str, value: Any) -> Range | tuple[Value, ...]:
    location = f"{path}: {name} in [space]"
    if isinstance(value, list) and value:
        choices = tuple(_choice(choice) for choice in value)
        for position, choice in enumerate(choices):
            if choice in choices[:position]:
                raise SettingError(f"{location}: expected different choices, got {choice!r} twice; remove one of them")
        return choices
    if not isinstance(value, dict):
        raise SettingError(f"{location}: expected a range or choices, such as {_EXAMPLE}, got {value!r}")
    try:
        return Range.model_validate(value)
    except ValidationError as error:
        raise SettingError(f"{location}: {explain(error)}; expected low and high, and optionally log or step") from None


def _choice(value: Any) -> Value:
    """Return a choice as Optuna stores it, a list as on the command line."""
    choice: Value = ",".join(map(str, value)) if isinstance(value, list) else value
    return choice


def _testable_values(space: Space) -> Iterator[tuple[str, Any]]:
    """Iterate over the values that can be checked one at a time: fixed ones, choices, and the ends of ranges."""
    yield from space.fixed.items()
    for name, values in space.ranges.items():
        if isinstance(values, Range):
            values = (values.low, values.high) if values.is_whole else (float(values.low), float(values.high))
        for value in values:
            yield name, value


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
