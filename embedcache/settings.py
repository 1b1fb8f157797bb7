"""Settings declared once: a field carries its type, default, bounds, help and effect on results.

    >>> class SearchSettings(Settings):
    ...     k: int = setting(10, "Results per query.", ge=1)
    >>> SearchSettings(k=3).k
    3
    >>> SearchSettings(k=0)
    Traceback (most recent call last):
    embedcache.errors.SettingError: k: expected a number greater than or equal to 1, got 0

A settings class is a pydantic model whose fields are made by `setting`. From that one declaration come

- validation: type, bounds, finite numbers (`Settings`);
- flat names for the command line, TOML files and sweeps (`flat_settings`, `from_flat`, `to_flat`);
- the JSON record on disk (`Settings.to_json`);
- the options of a command (`embedcache.cli.commands`) and the tables of the reference documentation.

A field that is itself a settings class is a group. Its fields join the fields of the outer class.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Le, Lt
from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from embedcache.errors import EmbedcacheError, SettingError
from embedcache.modalities import MODALITIES, split_modality
from embedcache.registry import unknown_name

S = TypeVar("S", bound="Settings")
M = TypeVar("M", bound=BaseModel)

_INT32 = 2**31


def setting(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    affects_result: bool = True,
    **declared: Any,
) -> Any:
    """Return a field of a settings class.

    Args:
        default: the default.
        help: one full sentence, as printed by `--help` and in the reference.
        ge: smallest allowed number.
        gt: the number must be above this.
        le: largest allowed number.
        lt: the number must be below this.
        affects_result: whether the value changes the result. Only such values are recorded and compared.
        declared: more fields of `FlatSetting`; or `flat_name`, the name on the command line and in TOML if the field's
            own name is ambiguous outside its class.
    """
    return Field(
        default, description=help, ge=ge, gt=gt, le=le, lt=lt, exclude=not affects_result, json_schema_extra=declared
    )


def group(kind: type[S]) -> S:
    """Return a field that contains a group of settings."""
    settings: S = Field(default_factory=kind)
    return settings


class Settings(BaseModel):
    """Base of all settings classes. Values are checked when an object is made.

    A setting of several values accepts one value or any sequence. A setting of a path accepts an object that has a
    path, and a number any type of number, such as NumPy's. A setting by modality accepts a mapping, or strings
    `MODALITY=VALUE`, or one number for all modalities. Modalities without a value keep their defaults. Whole numbers
    must fit 32 bits, unless they have another upper bound or are parsed, as sizes in bytes are.

    Raises:
        SettingError: a value of another type, out of its bounds, not finite, or of too many bits.
        UnknownNameError: there is no setting of that name.

    Example:
        >>> class SplitSettings(Settings):
        ...     fractions: tuple[float, ...] = setting((0.8, 0.2), "Parts of the data.", ge=0)
        ...     seed: int = setting(0, "Random seed.", flat_name="split_seed")
        >>> SplitSettings(seed=7)
        SplitSettings(fractions=(0.8, 0.2), seed=7)
        >>> from_flat(SplitSettings, {"split_seed": 7}).to_json()
        {'fractions': [0.8, 0.2], 'seed': 7}
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    def __init__(self, **values: Any) -> None:
        fields = type(self).model_fields
        converted = {}
        for name, value in values.items():
            if name not in fields:
                raise unknown_name("setting", name, fields)
            converted[name] = _convert_setting(name, value, fields[name])

        # Messages have the names that users know from the command line.
        try:
            super().__init__(**converted)
        except ValidationError as error:
            raise explain(error, {name: _flat_name(name, item) for name, item in fields.items()}) from None

    def to_json(self) -> dict[str, Any]:
        """Return the values that affect results as nested JSON values."""
        return self.model_dump(mode="json")


def explain(error: ValidationError, names: Mapping[str, str] | None = None) -> EmbedcacheError:
    """Return the first error of a validation in one line, with the field, the expected value and the value.

    Args:
        error: error of pydantic.
        names: name of a field -> its name in the message.
    """
    problem = error.errors(include_url=False)[0]

    # An error that a validator of ours raised already has its message.
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, EmbedcacheError):
        return cause

    # pydantic marks an error of a mapping's key by `[key]`.
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    if names and location:
        location = [names[location[0]]]
    name = f"{'.'.join(location)}: " if location else ""
    expected = problem["msg"].removeprefix("Input should be ")
    if expected.startswith(("greater", "less")):
        expected = f"a number {expected}"

    if cause is not None:
        return SettingError(f"{name}{cause}")
    if problem["type"] == "missing":
        return SettingError(f"{name}expected a value, got none")
    if problem["type"] == "extra_forbidden":
        return SettingError(f"{name}unknown field")
    return SettingError(f"{name}expected {expected}, got {problem['input']!r:.200}")


def _convert_setting(name: str, value: Any, item: FieldInfo) -> Any:
    """Return a value converted to the type of its field, if `Settings` accepts its type."""
    declared = _declared(item)
    if declared is None:
        return value
    name = _flat_name(name, item)

    if get_origin(item.annotation) is Mapping:
        return _by_modality(name, value, item)
    if "parse" in declared and isinstance(value, str):
        try:
            return declared["parse"](value)
        except SettingError as error:
            raise SettingError(f"{name}: {error}") from error

    has_limit = "parse" in declared or any(isinstance(bound, Le | Lt) for bound in item.metadata)
    converted = _convert(value, item.annotation)
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, int) and not has_limit and not -_INT32 <= number < _INT32:
            raise SettingError(f"{name}: expected a number that fits 32 bits, got {number}")
    return converted


def _convert(value: Any, hint: Any) -> Any:
    """Return a value as the type hint requires: a tuple, a path, a string or a plain number."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is tuple and value is not None:
            element_hint = get_args(kind)[0]
            return tuple(_convert(element, element_hint) for element in _several(value))

    # A setting that accepts both a string and a path keeps the type that it is given.
    if isinstance(value, str | os.PathLike):
        if str in kinds and not (Path in kinds and isinstance(value, Path)):
            return os.fspath(value)
        return Path(value) if Path in kinds else value
    return _plain_number(value)


def _several(value: Any) -> Iterable[Any]:
    is_one = isinstance(value, str | os.PathLike) or not isinstance(value, Iterable)
    return [value] if is_one else value


def _plain_number(value: Any) -> Any:
    """Return a number of another library, such as NumPy's, as a number of Python. Other values stay as they are."""
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, Integral) else value


def _by_modality(name: str, value: Any, item: FieldInfo) -> dict[str, Any]:
    """Return modality -> value, given as a mapping, as `MODALITY=VALUE`, or as one number for all modalities."""
    values_by_modality: dict[str, Any] = {}
    shared_values: dict[str, Any] = {}
    for modality, part in _modality_pairs(value):
        # A string that is not a number is rejected below, unless the setting accepts strings.
        if isinstance(part, str) and str not in get_args(item.annotation)[1:]:
            with suppress(ValueError):
                part = float(part)

        if modality in values_by_modality:
            raise SettingError(f"{name}: expected each modality once, got {modality} twice")
        if modality not in (*MODALITIES, None) or (modality is None and isinstance(part, str)):
            form = (_declared(item) or {})["metavar"]
            raise SettingError(
                f"{name}: expected {form} with a modality of {', '.join(MODALITIES)}, got {modality or part}"
            )

        if modality is None and isinstance(part, Real):
            shared_values = dict.fromkeys(MODALITIES, _plain_number(part))
        else:
            values_by_modality[modality] = _plain_number(part)
    return {**item.get_default(), **shared_values, **values_by_modality}


def _modality_pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    """Iterate over pairs of a modality, None if there is none, and its value."""
    if isinstance(value, Mapping):
        yield from value.items()
        return
    for word in _several(value):
        yield split_modality(word) if isinstance(word, str) else (None, word)


@dataclass(frozen=True, kw_only=True)
class FlatSetting:
    """One setting of a class or of its groups.

    Args:
        name: flat name, unique within the outer class, such as `split_seed`.
        path: names of the groups that lead to the field, then the field's own name.
        help: one full sentence, as printed by `--help` and in the reference.
        affects_result: whether the value changes the result.
        default_text: default that `--help` shows if the value is chosen at run time.
        metavar: placeholder of the value in `--help`. If None, it follows from the type.
        panel: panel of `--help`. If None, the panel of the group, such as `optimizer`.
        parse: function that converts text from the command line or a TOML file, such as `4GB`.
        commas: meaning of commas in a setting of several values, on the command line or in a file of its options.
            `split` separates values at all commas. `split specs` separates values at commas that no `name=` follows,
            as in `mine:noise:5,tape=a.wav`. `keep` leaves commas in the value, as for paths.
    """

    name: str
    path: tuple[str, ...]
    type: Any
    default: Any = field(hash=False)
    help: str
    affects_result: bool
    default_text: str | None = None
    metavar: str | None = None
    panel: str | None = None
    parse: Callable[[str], Any] | None = None
    commas: Literal["split", "split specs", "keep"] = "split"


def flat_settings(kind: type[Settings]) -> tuple[FlatSetting, ...]:
    """Return all settings of a class and its groups, in order of declaration."""
    return tuple(_flatten(kind, ()))


def _flatten(kind: type[Settings], groups: tuple[str, ...]) -> Iterator[FlatSetting]:
    for name, item in kind.model_fields.items():
        path = (*groups, name)
        declared = dict(_declared(item) or {})
        declared.pop("flat_name", None)
        if _declared(item) is not None:
            yield FlatSetting(
                name=_flat_name(name, item),
                path=path,
                type=item.annotation,
                default=item.get_default(),
                help=item.description or "",
                affects_result=not item.exclude,
                **declared,
            )
        elif (inner := _group(item)) is not None:
            yield from _flatten(inner, path)


def _declared(item: FieldInfo) -> dict[str, Any] | None:
    """Return the arguments `declared` of `setting`. They are None for a group or another field."""
    return item.json_schema_extra if isinstance(item.json_schema_extra, dict) else None


def _group(item: FieldInfo) -> type[Settings] | None:
    """Return the class of a group of settings. It is None for any other field."""
    kind = item.default_factory
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _flat_name(name: str, item: FieldInfo) -> str:
    return str((_declared(item) or {}).get("flat_name", name))


def from_flat(kind: type[S], values: Mapping[str, Any]) -> S:
    """Build settings from flat names. A name that is left out, or None, keeps its default.

    Raises:
        UnknownNameError: there is no setting of that name.
        SettingError: a value does not fit its declaration.
    """
    names = [item.name for item in flat_settings(kind)]
    for name in values:
        if name not in names:
            raise unknown_name("setting", name, names)
    return _build(kind, values)


def _build(kind: type[S], values: Mapping[str, Any]) -> S:
    """Build settings from flat names. Names of other classes are ignored."""
    fields: dict[str, Any] = {}
    for name, item in kind.model_fields.items():
        value = None if _declared(item) is None else values.get(_flat_name(name, item))

        # A group without values stays unset, so that it is not recorded as chosen.
        inner = _group(item)
        if inner is not None:
            settings = _build(inner, values)
            value = settings if settings.model_fields_set else None
        if value is not None:
            fields[name] = value
    return kind(**fields)


def with_underscores(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table of a TOML file with `max_grad_norm` for `max-grad-norm`. SettingError if it has both.

    Example:
        >>> with_underscores(Path("space.toml"), {"max-grad-norm": 1.0})
        {'max_grad_norm': 1.0}
    """
    values: dict[str, Any] = {}
    for name, value in table.items():
        if (flat := name.replace("-", "_")) in values:
            raise SettingError(f"{path}: {name}: expected one value, got two, as names may have - or _; remove one")
        values[flat] = value
    return values


def replace_fields(model: M, /, **values: Any) -> M:
    """Return settings or another model with some fields replaced. It raises the errors of the class."""
    unchanged = {name: getattr(model, name) for name in model.model_fields_set}
    return type(model)(**{**unchanged, **values})


def replace_flat(settings: S, values: Mapping[str, Any]) -> S:
    """Return settings with some values replaced by flat name. None means the default. Errors are as in `from_flat`."""
    return from_flat(type(settings), {**to_flat(settings), **values}) if values else settings


def merge_settings(kind: type[S], settings: S | None, options: Mapping[str, Any]) -> S:
    """Return the settings of a function that accepts a settings object, options by flat name, or both.

    Raises:
        SettingError: the object is of another class, or `from_flat` raises it.
        UnknownNameError: there is no option of that name.
    """
    if settings is not None and not isinstance(settings, kind):
        raise SettingError(
            f"settings: expected {kind.__name__}, got {type(settings).__name__}; give options by name, such as "
            f"{flat_settings(kind)[0].name}=…"
        )
    return from_flat(kind, options) if settings is None else replace_flat(settings, options)


def get_setting(settings: Any, item: FlatSetting) -> Any:
    """Return the value of one setting."""
    for name in item.path:
        settings = getattr(settings, name)
    return settings


def to_flat(settings: Settings) -> dict[str, Any]:
    """Return the values that the caller set or that differ from their defaults, by flat name."""
    chosen_names = _chosen_names(settings)
    values = {}
    for item in flat_settings(type(settings)):
        value = get_setting(settings, item)
        if item.name in chosen_names or value != item.default:
            values[item.name] = value
    return values


def _chosen_names(settings: Settings) -> set[str]:
    """Return the flat names of the settings that the caller set."""
    names: set[str] = set()
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        is_group = isinstance(value, Settings)
        names |= _chosen_names(value) if is_group else {_flat_name(name, type(settings).model_fields[name])}
    return names


def to_words(value: Any) -> list[str]:
    """Return the words that set a value on the command line: one word, or one per element or modality.

    Example:
        >>> to_words(0.5), to_words(("key", "label")), to_words({"image": 0.9})
        (['0.5'], ['key', 'label'], ['image=0.9'])
    """
    if isinstance(value, Mapping):
        return [f"{modality}={part}" for modality, part in value.items()]
    return list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]


_SIZE = TypeAdapter(ByteSize)


def parse_size(text: str) -> int:
    """Parse a number of bytes. 1 GB is 1000³ bytes, 1 GiB is 1024³.

    Example:
        >>> parse_size("4GB"), parse_size("500M"), parse_size("4096")
        (4000000000, 500000000, 4096)
    """
    try:
        size = int(_SIZE.validate_python(text))
    except (ValidationError, OverflowError):
        size = 0
    if not 0 < size < 2**63:
        raise SettingError(f"invalid size {text!r}: expected a number of bytes such as 500MB, 4GB or 4096")
    return size


def format_bytes(count: float) -> str:
    """Format a number of bytes in GB, or in MB below 1 GB.

    Example:
        >>> format_bytes(1_500_000_000), format_bytes(2_000_000)
        ('1.50 GB', '2.00 MB')
    """
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def parse_fraction(text: str) -> float:
    """Parse a fraction of a whole.

    Example:
        >>> parse_fraction("50%"), parse_fraction("0.001")
        (0.5, 0.001)
    """
    try:
        fraction = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 1:
        raise SettingError(f"invalid fraction {text!r}: expected a number between 0 and 1 or a percentage such as 0.1%")
    return fraction


def _parse_count(text: str) -> int:
    """Parse a whole number of at least 1, such as `1000` or `20,000`."""
    try:
        count = int(text.replace(",", ""))
    except ValueError:
        count = 0
    if count < 1:
        raise SettingError(f"invalid count {text!r}: expected a whole number of at least 1 such as 1000")
    return count


def parse_count_or_fraction(text: str) -> int | float:
    """Parse a number of things, or a percentage of them, which becomes a fraction.

    Example:
        >>> parse_count_or_fraction("20,000"), parse_count_or_fraction("10%")
        (20000, 0.1)
    """
    return parse_fraction(text) if text.endswith("%") else _parse_count(text)
