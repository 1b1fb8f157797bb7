"""The class of each sample: a label column of the cache, as numbers into a list of class names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Ints
from embedcache.errors import DataError
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache

Label: TypeAlias = str | int

_MOST_SHOWN = 5
_IS_LABEL = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean)


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The class of each sample.

    Args:
        names: the classes, in the order of their numbers.
        numbers: (M,) int64, the class of each sample.
    """

    names: list[str]
    numbers: Ints


def has_label(cache: Cache, samples: Ints, *, column: str = "label") -> Bools:
    """Say of each of some samples whether it has a label: (M,) bool.

    Raises:
        UnknownNameError: the cache has no such column.
    """
    _require_column(cache, column)
    is_there: Bools = _read(cache, samples, column).is_valid().to_numpy(zero_copy_only=False)
    return is_there


def read_labels(cache: Cache, samples: Ints, *, column: str = "label", classes: Sequence[str] | None = None) -> Labels:
    """Read the label of each of some samples.

    A label is a class's name, or its number. Memory: the table of samples.

    Args:
        cache: the cache.
        samples: (M,) int64, rows of `cache.samples`, in any order.
        column: holds the labels.
        classes: the names of all classes: a label that is text must be one of them, one that is a number counts
            from 0 in them. None: the classes are the labels found, sorted, numbers by value.

    Raises:
        UnknownNameError: the cache has no such column; those that it has are listed.
        DataError: a sample without a label, labels that are neither text nor whole numbers, or, with `classes`,
            labels that are no class: says which, and of how many samples.
    """
    place = f"column {column!r} of {cache.path}"
    found, which_M = _distinct(cache, samples, column, place)
    if classes is None:
        order = sorted(found)
        numbers: Mapping[Label, int] = {label: number for number, label in enumerate(order)}
        names = [str(label) for label in order]
    else:
        numbers, names = _numbers(found, classes, place), list(classes)
        _refuse_others(found, which_M, numbers, names, place)
    number_F = np.array([numbers[label] for label in found], np.int64)
    return Labels(names=names, numbers=number_F[which_M])


def _distinct(cache: Cache, samples: Ints, column: str, place: str) -> tuple[list[Label], Ints]:
    """Read the labels: each that there is, and (M,) which of them each sample has."""
    _require_column(cache, column)
    values = _read(cache, samples, column)
    if values.null_count:
        first = cache.samples["key"][int(samples[np.flatnonzero(values.is_null())[0]])].as_py()
        raise DataError(
            f"{values.null_count:,} of {len(samples):,} samples have no label in {place}, the first is {first!r}; "
            "give them one in the source and extract again, or name another column"
        )
    if len(samples) and not any(is_label(values.type) for is_label in _IS_LABEL):
        raise DataError(f"{place} holds {values.type}; a label is a class's name, or its number from 0 on")
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.string())
    encoded = values.dictionary_encode()
    which_M: Array = encoded.indices.to_numpy(zero_copy_only=False)
    return encoded.dictionary.to_pylist(), which_M.astype(np.int64)


def _read(cache: Cache, samples: Ints, column: str) -> pa.Array:
    """Read some samples' labels; an empty text, as a table of text holds where nothing stands, is none."""
    values = cache.samples[column].combine_chunks().take(pa.array(samples))
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    return pc.if_else(pc.equal(values, ""), None, values) if is_text else values


def _require_column(cache: Cache, column: str) -> None:
    if column not in cache.columns:
        has = [name for name in cache.columns if name != "key"]
        hint = "a folder of class folders gives its samples the column 'label'"
        raise unknown_name(f"column of samples of {cache.path}", column, has, hint=hint)


def _numbers(found: Sequence[Label], classes: Sequence[str], place: str) -> dict[Label, int]:
    """Give each class its number, under its name or under its number, whichever the labels are."""
    if found and isinstance(found[0], int):
        return {number: number for number in range(len(classes))}
    if not set(found) & set(classes) and all(str(label).isdecimal() for label in found):
        return {str(number): number for number in range(len(classes))}  # as a CSV holds them
    numbers: dict[Label, int] = {}
    for number, name in enumerate(classes):
        if name in numbers and name in found:
            raise DataError(
                f"{name!r} is the name of classes {numbers[name]} and {number}, and {place} holds names; "
                "label samples with the numbers of their classes, or give each class a name of its own"
            )
        numbers.setdefault(name, number)
    return numbers


def _refuse_others(
    found: Sequence[Label], which_M: Ints, numbers: Mapping[Label, int], names: Sequence[str], place: str
) -> None:
    count_F = np.bincount(which_M, minlength=len(found))
    others = [position for position, label in enumerate(found) if label not in numbers]
    if not others:
        return
    others.sort(key=lambda position: -count_F[position])
    listed = ", ".join(_other(found[position], int(count_F[position]), names) for position in others[:_MOST_SHOWN])
    more = f" and {len(others) - _MOST_SHOWN:,} others" if len(others) > _MOST_SHOWN else ""
    raise DataError(
        f"{count_F[others].sum():,} of {len(which_M):,} samples have labels in {place} that are no class: "
        f"{listed}{more}; the labels are {_start(sorted(found))}; the classes are {_start(names)}, numbered from 0"
    )


def _other(label: Label, count: int, names: Sequence[str]) -> str:
    near = get_close_matches(label, names, n=1, cutoff=0.5) if isinstance(label, str) else []
    hint = f", did you mean {near[0]!r}?" if near else ""
    return f"{label!r} ({count:,} samples{hint})"


def _start(values: Sequence[Any]) -> str:
    shown = ", ".join(repr(value) for value in values[:_MOST_SHOWN])
    return f"{shown}, … ({len(values):,})" if len(values) > _MOST_SHOWN else shown
