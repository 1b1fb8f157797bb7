"""Settings declared once: a dataclass field carries its type, default, bounds, help and effect on results.

A settings class is a frozen, keyword-only dataclass whose fields are made by `setting` and whose `__post_init__` calls
`check_settings`. From that one declaration come

- validation: type, bounds, finite numbers, integers that fit 32 bits, or 64 bits if they are parsed, as sizes in bytes
  are, or have a bound above (`check_settings`);
- flat names for the command line, TOML files and sweeps (`flat_settings`, `from_flat`, `to_flat`);
- the JSON record on disk (`to_json`);
- the options of a command (`embedcache.cli.options`) and the tables of the reference documentation.

A field that is itself a settings class is a group; its fields join those of the outer class.
"""

import math
import operator
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from embedcache.errors import SettingError
from embedcache.modalities import MODALITIES, split_modality
from embedcache.registry import unknown_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

_METADATA = "embedcache.setting"
_DEFAULTS = "embedcache.group_defaults"
_INT64 = 2**63
_INT32 = 2**31


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """Everything that a settings field declares beside its type and default.

    Args:
        help: one full sentence, as printed by `--help` and in the reference.
        ge: smallest allowed number.
        gt: the number must be above this.
        le: largest allowed number.
        lt: the number must be below this.
        affects_result: whether the value changes what is computed; only those values are recorded and compared.
        flat_name: name on the command line and in TOML, where the field's own name is ambiguous outside its class.
        default_text: what `--help` shows as the default where the value is chosen at run time.
        metavar: placeholder of the value in `--help`; None: chosen from the type.
        panel: panel of `--help`; None: that of the group, such as `optimizer`.
        parse: converts text from the command line or a TOML file, such as `4GB`; see `embedcache.units`.
        commas: what becomes of commas in a text on the command line, or in a file of its options, of a setting of
            several values. `split`: they separate values. `split specs`: those before `name=` belong to a value, such
            as `mine:noise:5,tape=a.wav`; all others separate. `keep`: they belong to the value, as they do in paths.
    """

    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    affects_result: bool = True
    flat_name: str | None = None
    default_text: str | None = None
    metavar: str | None = None
    panel: str | None = None
    parse: Callable[[str], Any] | None = None
    commas: Literal["split", "split specs", "keep"] = "split"


def setting(default: Any, help: str, **declared: Any) -> Any:
    """Return a dataclass field with a declaration; `declared` are the other fields of `Declaration`."""
    metadata = {_METADATA: Declaration(help=help, **declared)}
    if isinstance(default, Mapping):  # which no dataclass accepts as a default
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def group(kind: type[S], **defaults: Any) -> S:
    """Return a dataclass field that holds a group of settings, with defaults that differ from those of its class."""
    made: S = field(default_factory=lambda: kind(**defaults), metadata={_DEFAULTS: defaults})
    return made


@dataclass(frozen=True, kw_only=True)
class FlatSetting:
    """One setting of a class or of its groups.

    Args:
        name: flat name, unique within the outer class, such as `split_seed`.
        path: names of the groups that lead to the field, then the field's own name.
    """

    name: str
    path: tuple[str, ...]
    type: Any
    default: Any = field(hash=False)
    declared: Declaration


def flat_settings(kind: type[Any]) -> tuple[FlatSetting, ...]:
    """Return all settings of a class and its groups, in order of declaration."""
    return tuple(_flatten(kind, (), {}))


def _flatten(kind: type[Any], above: tuple[str, ...], defaults: Mapping[str, Any]) -> Iterator[FlatSetting]:
    hints = _type_hints(kind)
    for item in fields(kind):
        path = (*above, item.name)
        declared = item.metadata.get(_METADATA)
        if declared is not None:
            default = defaults[item.name] if item.name in defaults else _default(item)
            name = declared.flat_name or item.name
            yield FlatSetting(name=name, path=path, type=hints[item.name], default=default, declared=declared)
        elif is_dataclass(hints[item.name]):
            yield from _flatten(hints[item.name], path, item.metadata.get(_DEFAULTS, {}))


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


_evaluated_hints = cache(get_type_hints)


def _type_hints(kind: type[Any]) -> Mapping[str, Any]:
    """Return the types of the fields of a dataclass. They are evaluated once: that takes longer than the checks."""
    return _evaluated_hints(kind)  # type: ignore[arg-type]  # mypy takes no type[Any] for hashable


def check_settings(settings: Any) -> None:
    """Check every value of a settings instance against its declaration; call it in `__post_init__`.

    A setting of several values takes one value or any sequence of them, a setting of a path an object that has one, a
    number any type of number, such as NumPy's. A setting by modality takes a mapping, or texts `MODALITY=VALUE`, or one
    number for all modalities; modalities without a value keep their defaults.

    Raises:
        SettingError: a value of another type, out of its bounds, not finite, or of too many bits.
    """
    hints = _type_hints(type(settings))
    for item in fields(settings):
        declared = item.metadata.get(_METADATA)
        if declared is not None:
            name, hint = declared.flat_name or item.name, hints[item.name]
            value = getattr(settings, item.name)
            if get_origin(hint) is Mapping:
                converted = {**_default(item), **_by_modality(name, value, hint, declared)}
            else:
                converted = _convert(value, hint)
            if value is not converted:
                object.__setattr__(settings, item.name, converted)
            check_value(name, converted, hint, declared)


def _convert(value: Any, hint: Any) -> Any:
    """Return one value or a sequence as a tuple where the type is one; paths and numbers of other types as those."""
    if _has_type(value, hint):  # such as a text where the type is a text or several
        return value
    kinds = _alternatives(hint)
    elements = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), None)
    if elements is not None and value is not None:
        is_one = isinstance(value, str | os.PathLike) or not isinstance(value, Iterable)
        return tuple(_convert(element, elements) for element in ([value] if is_one else value))
    if isinstance(value, Integral) and not isinstance(value, bool) and {int, float} & {*kinds}:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and float in kinds:
        return float(value)
    if isinstance(value, str | os.PathLike):
        return os.fspath(value) if str in kinds else Path(value) if Path in kinds else value
    return value


def _by_modality(name: str, value: Any, hint: Any, declared: Declaration) -> dict[str, Any]:
    """Return modality -> value, given as a mapping, as `MODALITY=VALUE`, or as one number for all modalities."""
    if isinstance(value, Mapping):
        pairs = [*value.items()]
    else:
        words = _convert(value, tuple[Any, ...])
        pairs = [split_modality(word) if isinstance(word, str) else (None, word) for word in words]

    kind = get_args(hint)[1]
    named: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for modality, given in pairs:
        try:
            part = float(given) if kind is float and isinstance(given, str) else _convert(given, kind)
        except ValueError:
            part = None
        if modality in named:
            raise SettingError(f"{name}: expected each modality once, got {modality} twice")
        if modality in MODALITIES and part is not None:
            named[modality] = part
        elif modality is None and kind is float and part is not None:
            others = dict.fromkeys(MODALITIES, part)
        else:
            got = given if modality is None else f"{modality}={given}"
            known = ", ".join(MODALITIES)
            raise SettingError(f"{name}: expected {declared.metavar} with a modality of {known}, got {got}")
    return {**others, **named}


def check_value(name: str, value: Any, hint: Any, declared: Declaration) -> None:
    """Check one value against its type and declaration; SettingError names it and what was expected."""
    if isinstance(value, Mapping) and get_origin(hint) is Mapping:
        for element in value.values():
            check_value(name, element, get_args(hint)[1], declared)
        return
    if not _has_type(value, hint):
        raise SettingError(f"{name}: expected {_expectation(hint, declared)}, got {value!r}")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not isinstance(number, bool):
            _check_number(name, number, hint, declared)


def _check_number(name: str, value: float, hint: Any, declared: Declaration) -> None:
    is_large = declared.parse is not None or declared.le is not None or declared.lt is not None
    limit, bits = (_INT64, 64) if is_large else (_INT32, 32)
    if isinstance(value, int) and not -limit <= value < limit:
        raise SettingError(f"{name}: expected {_expectation(hint, declared)} that fits {bits} bits, got {value}")
    if not math.isfinite(value) or not all(compare(value, bound) for compare, _, bound in _bounds(declared)):
        raise SettingError(f"{name}: expected {_expectation(hint, declared)}, got {value}")


def _expectation(hint: Any, declared: Declaration) -> str:
    """Describe the values that a setting takes, such as `a number of at least 0 and below 1`."""
    kinds = _alternatives(hint)
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return f"one of {', '.join(choices)}"
    noun = _noun(hint)
    if declared.ge is not None and declared.le is not None:
        return f"{noun} from {_short(declared.ge)} to {_short(declared.le)}"
    bounds = [f"{words} {_short(bound)}" for _, words, bound in _bounds(declared)]
    return f"{noun} {' and '.join(bounds)}" if bounds else noun


def _noun(hint: Any) -> str:
    kinds = [get_origin(kind) or kind for kind in _alternatives(hint)]
    return next((text for kind, text in _NOUNS.items() if kind in kinds), "a value")


_NOUNS: dict[object, str] = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
    Sequence: "a list",
    Mapping: "an object",
    dict: "an object",
}


def _bounds(declared: Declaration) -> list[tuple[Callable[[float, float], bool], str, float]]:
    """Return the bounds that are declared: how a value compares with each, in code and in words."""
    bounds = (
        (operator.ge, "of at least", declared.ge),
        (operator.gt, "above", declared.gt),
        (operator.le, "of at most", declared.le),
        (operator.lt, "below", declared.lt),
    )
    return [(compare, words, bound) for compare, words, bound in bounds if bound is not None]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _has_type(value: Any, hint: Any) -> bool:
    return any(_is_instance(value, kind) for kind in _alternatives(hint))


def check_types(values: Any) -> None:
    """Check that the fields of a dataclass, whose values were read from JSON, have their types; else a `TypeError`."""
    if wrong := _wrong_field(values):
        raise TypeError(wrong)


def _wrong_field(values: Any) -> str | None:
    hints = _type_hints(type(values))
    for item in fields(values):
        value, hint = getattr(values, item.name), hints[item.name]
        if not _has_type(value, hint):
            return f"{item.name}: expected {_noun(hint)}, got {value!r:.60}"
    return None


def _is_instance(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if kind is Any:
        return True
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float)
    if origin is tuple:
        return isinstance(value, tuple) and all(_has_type(element, get_args(kind)[0]) for element in value)
    if origin in (Mapping, dict):
        keys, values = get_args(kind)
        return isinstance(value, Mapping) and all(_has_type(k, keys) and _has_type(v, values) for k, v in value.items())
    if origin is Sequence:
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
        return is_sequence and all(_has_type(element, get_args(kind)[0]) for element in value)
    return isinstance(value, origin or kind) and not (is_dataclass(kind) and _wrong_field(value))


def _short(bound: float) -> str:
    exponent = round(math.log2(bound)) if bound >= 2**31 else 0
    if exponent and bound == 2**exponent:
        return f"2^{exponent}"
    return f"{bound:.0f}" if bound == int(bound) else f"{bound:g}"


def from_flat(kind: type[S], values: Mapping[str, Any]) -> S:
    """Build settings from flat names; a name that is left out, or None, keeps its default.

    Raises:
        UnknownNameError: there is no setting of that name.
        SettingError: a value does not fit its declaration.
    """
    descriptions = {item.name: item.declared.help for item in flat_settings(kind)}
    for name in values:
        if name not in descriptions:
            raise unknown_name("setting", name, descriptions, descriptions=descriptions)
    nested: dict[str, Any] = {}
    for item in flat_settings(kind):
        if values.get(item.name) is not None:
            target = nested
            for key in item.path[:-1]:
                target = target.setdefault(key, {})
            value, parse = values[item.name], item.declared.parse
            if parse is not None and isinstance(value, str):
                try:
                    value = parse(value)
                except SettingError as error:
                    raise SettingError(f"{item.name}: {error}") from error
            target[item.path[-1]] = value
    return _build(kind, nested)


def with_underscores(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table of a TOML file with `max_grad_norm` for `max-grad-norm`; SettingError if it has both."""
    values: dict[str, Any] = {}
    for name, value in table.items():
        if (flat := name.replace("-", "_")) in values:
            raise SettingError(f"{path}: {name}: expected one value, got two, as names may have - or _; remove one")
        values[flat] = value
    return values


def _build(kind: type[S], nested: Mapping[str, Any]) -> S:
    hints = _type_hints(kind)
    made = dict(nested)
    for item in fields(kind):
        value = nested.get(item.name)
        if is_dataclass(hints[item.name]) and isinstance(value, Mapping):
            made[item.name] = _build(hints[item.name], {**item.metadata.get(_DEFAULTS, {}), **value})
    return kind(**made)


def replace_flat(settings: S, values: Mapping[str, Any]) -> S:
    """Return settings with some values replaced by flat name; None stands for the default. Errors: `from_flat`."""
    return from_flat(type(settings), {**to_flat(settings), **values}) if values else settings


def merge_settings(kind: type[S], settings: S | None, options: Mapping[str, Any]) -> S:
    """Return the settings of a function that takes an object of theirs, options by flat name, or both.

    Raises:
        SettingError: the object is of another class; and the errors of `from_flat`.
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


def to_flat(settings: Any) -> dict[str, Any]:
    """Return every value that differs from its default, by flat name."""
    values = {item: get_setting(settings, item) for item in flat_settings(type(settings))}
    return {item.name: value for item, value in values.items() if value != item.default}


def to_json(settings: Any) -> dict[str, Any]:
    """Return the values that affect results as nested JSON values."""
    record: dict[str, Any] = {}
    for item in flat_settings(type(settings)):
        value = get_setting(settings, item)
        if item.declared.affects_result:
            target = record
            for key in item.path[:-1]:
                target = target.setdefault(key, {})
            target[item.path[-1]] = _json_value(value)
    return record


def to_words(value: Any) -> list[str]:
    """Return the words of the command line that give a setting a value: one, or one of each element or modality."""
    if isinstance(value, Mapping):
        return [f"{modality}={part}" for modality, part in value.items()]
    return [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json_value(element) for element in value]
    return str(value) if isinstance(value, Path) else value
