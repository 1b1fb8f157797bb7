"""What a sweep tries, as TOML says it: settings that are fixed, and ranges or choices of others."""

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin

from embedcache.encoders.backends import torch_device
from embedcache.errors import EmbedcacheError, PathError, SettingError
from embedcache.projectors.base import PROJECTORS, split_names
from embedcache.registry import unknown_name
from embedcache.settings import flat_settings
from embedcache.train.losses import LOSSES
from embedcache.train.settings import TrainSettings, train_settings

Number: TypeAlias = int | float
Value: TypeAlias = str | int | float | bool

_TYPES = {item.name: item.type for item in flat_settings(TrainSettings)}
_EXAMPLE = "learning_rate = {low = 1e-4, high = 1e-2, log = true}, or projector = ['linear', 'mlp']"
_COMPARED_BY = (
    "split",
    "val_share",
    "test_share",
    "image_cosine",
    "text_cosine",
    "split_seed",
    "language",
    "shuffle_pairs",
)
_ONLY_HOW = ("threads", "memory_gb", "checkpoint_s", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where both are whole.

    Args:
        low: the lowest.
        high: the highest.
        log: drawn evenly by their logarithm.
        step: between neighbors; None: 1 of whole numbers, else none.
    """

    low: Number
    high: Number
    log: bool = False
    step: Number | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it holds whole numbers only."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 0))

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise SettingError(f"low is {self.low} and high is {self.high}; low must be at most high")
        if self.log and self.low <= 0:
            raise SettingError(f"low is {self.low} with log; it must be above 0")
        if self.log and self.step is not None:
            raise SettingError(f"step is {self.step} with log; give one of both")
        if self.step is not None:
            self._check_step(self.step)

    def _check_step(self, step: Number) -> None:
        if step <= 0:
            raise SettingError(f"step is {step}; it must be above 0")
        num_steps = (self.high - self.low) / step
        if not math.isclose(num_steps, round(num_steps), abs_tol=1e-9):
            raise SettingError(
                f"high is {self.high}; it must lie a number of steps of {step} above low {self.low}, "
                f"such as {self.low + step * math.floor(num_steps)}"
            )


@dataclass(frozen=True, kw_only=True)
class Space:
    """All settings of all trials.

    Args:
        fixed: setting -> its value in every trial.
        ranges: setting -> what it may be.
    """

    fixed: Mapping[str, Value]
    ranges: Mapping[str, Range | tuple[Value, ...]]

    def settings(self, params: Mapping[str, Value]) -> TrainSettings:
        """Make a trial's settings of what was drawn for it.

        Raises:
            SettingError: they contradict each other.
        """
        return train_settings({**self.fixed, **params})

    def most_epochs(self) -> int:
        """Get the most epochs that a trial can have."""
        over = self.ranges.get("epochs", (self.settings({}).optimizer.epochs,))
        return int(over.high) if isinstance(over, Range) else max(int(value) for value in over)

    def to_json(self) -> Mapping[str, Any]:
        """Give what decides the trials as JSON values."""
        return {
            "fixed": {name: value for name, value in self.fixed.items() if name not in _ONLY_HOW},
            "space": {
                name: asdict(over) if isinstance(over, Range) else list(over) for name, over in self.ranges.items()
            },
        }


def read_space(path: Path) -> Space:
    """Read a space: `[fixed]` with values, `[space]` with ranges and choices. The split's seed is 0 unless fixed.

    Raises:
        PathError: there is no such file.
        SettingError: it is no TOML, or a value, a range or a choice of it is none that the setting can take.
        UnknownNameError: there is no setting, projector or loss of that name.
    """
    tables = _read_tables(path)
    fixed, given = tables.get("fixed", {}), tables.get("space", {})
    for name in {**fixed, **given}:
        if name not in _TYPES:
            raise unknown_name("training setting", name, _TYPES, hint=f"named in {path}")
    for name in given:
        _check_place(path, name, fixed)
    ranges = {name: _over(path, name, value) for name, value in given.items()}
    space = Space(fixed={"split_seed": 0, **fixed}, ranges=ranges)
    for name, value in _all_values(space):
        _check_value(path, space, name, value)
    return space


def _read_tables(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise PathError(f"{path} is no file; give a TOML file with a table [space]") from error
    except ValueError as error:  # of the TOML, or of its letters
        raise SettingError(f"{path} is no TOML: {error}") from error
    for name, table in tables.items():
        if name not in ("fixed", "space") or not isinstance(table, dict):
            raise SettingError(f"{path} holds {name!r} at its top; it may hold the tables [fixed] and [space]")
    if not tables.get("space"):
        raise SettingError(f"{path} has nothing in a table [space]; name there what to try: {_EXAMPLE}")
    return tables


def _check_place(path: Path, name: str, fixed: Mapping[str, Any]) -> None:
    if name in fixed:
        raise SettingError(f"{path} has {name} in [fixed] and in [space]; leave it in one of them")
    if name in _COMPARED_BY:
        raise SettingError(
            f"{path} has {name} in [space]; trials are compared on one validation part: put it into [fixed]"
        )
    if name == "seed":
        raise SettingError(
            f"{path} has seed in [space]; the best seed says nothing: put one into [fixed], "
            "and the best configurations are trained with --seeds of them"
        )
    if name in (*_ONLY_HOW, "device"):
        raise SettingError(f"{path} has {name} in [space]; it makes no trial better: put it into [fixed]")


def _over(path: Path, name: str, value: Any) -> Range | tuple[Value, ...]:
    if isinstance(value, list) and value:
        return tuple(value)
    if not isinstance(value, dict):
        raise SettingError(f"{path}: {name} in [space] is {value!r}; give a range or choices: {_EXAMPLE}")
    unknown = [word for word in value if word not in ("low", "high", "log", "step")]
    missing = [word for word in ("low", "high") if word not in value]
    if unknown or missing:
        fault = f"has {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise SettingError(f"{path}: {name} in [space] {fault}; a range has low, high, and may have log and step")
    for word, bound in value.items():
        if not isinstance(bound, bool) if word == "log" else not _is_of(float, bound):
            allowed = "true or false" if word == "log" else "a number"
            raise SettingError(f"{path}: {word} of {name} in [space] is {bound!r}; it must be {allowed}")
    try:
        return Range(**value)
    except SettingError as error:
        raise SettingError(f"{path}: {name} in [space]: {error}") from error


def _all_values(space: Space) -> Iterator[tuple[str, Any]]:
    """Give every value that can be tested alone: fixed ones, choices, and the ends of ranges."""
    yield from space.fixed.items()
    for name, over in space.ranges.items():
        for value in _ends(over) if isinstance(over, Range) else over:
            yield name, value


def _ends(over: Range) -> tuple[Number, Number]:
    return (over.low, over.high) if over.is_whole else (float(over.low), float(over.high))


def _check_value(path: Path, space: Space, name: str, value: Any) -> None:
    hint = _TYPES[name]
    if not _is_of(hint, value):
        raise SettingError(f"{path}: {name} is {value!r}; it must be {_allowed(hint)}")
    try:
        settings = space.settings({name: value})
        for projector in split_names(settings.model.projector):
            PROJECTORS.load(projector)
        LOSSES.load(settings.loss.name)
        torch_device(settings.machine.device)
    except EmbedcacheError as error:
        raise type(error)(f"{path}: {name} = {value!r}: {error}") from error


def _is_of(hint: Any, value: Any) -> bool:
    """Say whether a TOML value is of a setting's type; a whole number is a number too."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):  # a union
        return any(_is_of(kind, value) for kind in get_args(hint))
    if isinstance(value, bool) or hint is bool:
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, hint)


def _allowed(hint: Any) -> str:
    kinds = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if get_origin(hint) is Literal:
        return ", ".join(map(repr, get_args(hint)))
    if get_args(hint):
        return " or ".join(_allowed(kind) for kind in get_args(hint) if kind is not type(None))
    return kinds[hint]
