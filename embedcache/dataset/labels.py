"""Classes: labels in a column of the sample table, and prompts.

In a cache of `extract prompts:…`, each sample is a class and its captions are the prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Floats, Ints, mean_directions
from embedcache.dataset.inputs import InputFeature
from embedcache.encoders.open import EncoderSpec, why_no_encoder
from embedcache.errors import DataError, first_few, quoted
from embedcache.projectors.base import project
from embedcache.provenance import IMPORTED
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.modeling.heads import AnyTower

Label: TypeAlias = str | int

_MAX_WHOLE = 2**53  # beyond it, floating-point numbers are further apart than 1


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The class number of each sample, (M,) int64, and the class names in the order of their numbers."""

    names: list[str]
    numbers: Ints


def has_label(cache: Cache, samples: Ints, *, column: str = "label") -> Bools:
    """Return whether each of some samples has a label: (M,) bool. Raises the errors of `read_labels`."""
    has_value: Bools = _read(cache, samples, column).is_valid().to_numpy(zero_copy_only=False)
    return has_value


def read_labels(cache: Cache, samples: Ints, *, column: str = "label", classes: Sequence[str] | None = None) -> Labels:
    """Read the label of each of some samples. Memory: the column.

    Args:
        samples: (M,) int64 rows of `cache.samples`, in any order.
        column: column of the labels, which are class names or class numbers from 0. Whole numbers in floating point are
            class numbers and NaN is a missing label, because pandas stores integers like this if one is missing.
        classes: names of all classes (the sorted distinct labels if None).

    Raises:
        UnknownNameError: the cache has no such column. The message lists its columns.
        DataError: a sample has no label, labels are neither strings nor whole numbers, labels are not among `classes`,
            or some labels are names and others are numbers.
    """
    location = f"column {column!r} of {cache.path}"
    labels, label_M = _find_distinct(cache, samples, column, location)

    if classes is None:
        sorted_labels = sorted(labels)
        numbers: Mapping[Label, int] = dict(zip(sorted_labels, range(len(labels)), strict=True))
        names = list(map(str, sorted_labels))
    else:
        numbers = _number_labels(labels, classes, location)
        names = list(classes)
        _check_known(labels, label_M, numbers, names, location)

    # Distinct labels are looked up once each: samples are many, labels few.
    label_numbers = [numbers[label] for label in labels]
    return Labels(names=names, numbers=np.array(label_numbers, np.int64)[label_M])


def _find_distinct(cache: Cache, samples: Ints, column: str, location: str) -> tuple[list[Label], Ints]:
    """Return the distinct labels, and the position of each sample's label among them: (M,)."""
    values = _read(cache, samples, column)

    if values.null_count:
        first = cache.key(int(samples[np.flatnonzero(values.is_null())[0]]))
        raise DataError(
            f"{values.null_count:,} of {len(samples):,} samples have no label in {location}, first {first!r}; "
            "label them in the source and extract again, or choose another column"
        )

    # Booleans are names of two classes, not the numbers 0 and 1.
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.large_string())

    encoded = values.dictionary_encode()
    label_M: Array = encoded.indices.to_numpy(zero_copy_only=False)
    return encoded.dictionary.to_pylist(), label_M.astype(np.int64)


def _read(cache: Cache, samples: Ints, column: str) -> pa.Array:
    """Read the labels of some samples as strings, integers or booleans."""
    require_column(cache, column)
    values = cache.column(column).combine_chunks().take(pa.array(samples))

    # In a CSV, an empty string is a missing label.
    if pa.types.is_large_string(values.type):
        return pc.if_else(pc.equal(values, ""), None, values)
    if pa.types.is_floating(values.type):
        return _to_integers(cache, column, values.to_numpy(zero_copy_only=False))
    return values


def _to_integers(cache: Cache, column: str, values_M: Array) -> pa.Array:
    """Return whole numbers in floating point as integers, and NaN as null."""
    # NaN has no integer; a zero stands in for it below the mask.
    is_missing = np.isnan(values_M)
    numbers_M = np.where(is_missing, 0, values_M.astype(np.float64))

    is_whole = (np.trunc(numbers_M) == numbers_M) & (np.abs(numbers_M) < _MAX_WHOLE)
    if not is_whole.all():
        raise DataError(
            f"column {column!r} of {cache.path}: expected class names, or class numbers from 0, got "
            f"{values_M[~is_whole][0]}; name another column with --label"
        )

    return pa.array(numbers_M.astype(np.int64), mask=is_missing)


def label_text(value: Any) -> str | None:
    """Return a value of a column of labels as a string, or None for a missing label, as `read_labels` reads it.

    A missing label is null, an empty string or NaN. A whole number in floating point is written as an integer, a
    boolean as in JSON.
    """
    if value is None or value == "" or value != value:  # NaN differs from itself
        return None
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def require_column(cache: Cache, column: str) -> None:
    """Check that samples have a column, or raise an `UnknownNameError` that lists their columns."""
    if column not in cache.columns:
        names = [name for name in cache.columns if name != "key"]
        hint = "a folder with a subfolder per class has the column 'label'"
        raise unknown_name("column of samples", column, names, where=f"of {cache.path}", hint=hint)


def _number_labels(labels: Sequence[Label], classes: Sequence[str], location: str) -> dict[Label, int]:
    """Return label -> class number, given labels that are class names or class numbers."""
    class_numbers = range(len(classes))
    if labels and isinstance(labels[0], int):
        return dict(zip(class_numbers, class_numbers, strict=True))

    # In a CSV, class numbers are strings of digits.
    if not set(labels) & set(classes) and all(map(str.isdecimal, map(str, labels))):
        return dict(zip(map(str, class_numbers), class_numbers, strict=True))

    # Two classes may share a name as long as no sample is labeled with it.
    numbers: dict[Label, int] = {}
    for number, name in enumerate(classes):
        if name in numbers and name in labels:
            raise DataError(
                f"{name!r} is the name of classes {numbers[name]} and {number}, and {location} holds names; "
                "label samples with class numbers, or make the class names unique"
            )
        numbers.setdefault(name, number)

    return numbers


def _check_known(
    labels: Sequence[Label], label_M: Ints, numbers: Mapping[Label, int], names: Sequence[str], location: str
) -> None:
    """Check that every label is a class, or raise a `DataError` that counts the samples with other labels."""
    is_unknown_F = np.zeros(len(labels), bool)
    unknown_labels: list[Label] = []
    for position, label in enumerate(labels):
        if label not in numbers:
            is_unknown_F[position] = True
            unknown_labels.append(label)

    if unknown_labels:
        raise DataError(
            f"{is_unknown_F[label_M].sum():,} of {len(label_M):,} samples have labels in {location} that are not "
            f"classes: {first_few(unknown_labels, 5, show=repr)}; the classes are {first_few(names, 5, show=repr)}, "
            "counted from 0"
        )


CLASS = "class"
"""Column of the samples that names the class of their prompts."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The encoded prompts of some classes.

    Args:
        names: class names, in the order of their numbers.
        rows: (M,) rows of the encoded text items.
        classes: (M,) class number of each prompt.
    """

    feature: InputFeature
    names: list[str]
    rows: Ints
    classes: Ints

    @property
    def counts(self) -> Ints:
        """Number of prompts per class: (C,)."""
        counts: Ints = np.bincount(self.classes, minlength=len(self.names))
        return counts


def has_prompts(cache: Cache) -> bool:
    """Return whether a cache may contain prompts, which are captions of samples with a column `class`."""
    return CLASS in cache.columns and "text" in cache.info.num_items


def check_prompts(cache: Cache, spec: str) -> None:
    """Check that a cache may contain prompts. The error names the command that extracts them with this encoder."""
    if not has_prompts(cache):
        out = quoted(f"{cache.path.name}-prompts")
        command = f"embedcache extract prompts:CLASSES+TEMPLATES {out} --text-encoder {quoted(spec)}"
        instead = (
            f"import captions and prompts, with their {CLASS!r}, at once, and divide them with: embedcache cache cut"
        )

        # An imported feature has no encoder that could encode prompts.
        encoder = EncoderSpec.parse(spec)
        reason = why_no_encoder(encoder, "text", next_step=instead if encoder.family == IMPORTED else None)
        requirement = "texts" if CLASS in cache.columns else f"column {CLASS!r}"
        raise DataError(
            f"{cache.path} holds no prompts: it has no {requirement}; {reason or f'create them: {command}'}"
        )


def read_prompts(cache: Cache, feature: InputFeature) -> Prompts:
    """Read the encoded prompts of each class.

    Raises:
        DataError: a class has no encoded prompt.
        UnfinishedError: the feature has uncommitted chunks.
    """
    feature.require_complete()

    names: list[str] = cache.samples[CLASS].to_pylist()
    rows = np.flatnonzero(feature.valid)
    prompt_samples = cache.items("text", columns=["sample"])["sample"].to_numpy()
    prompts = Prompts(
        feature=feature,
        names=names,
        rows=rows,
        classes=prompt_samples[rows],
    )

    # A class without prompts has no direction.
    empty_classes = np.flatnonzero(prompts.counts == 0)
    if len(empty_classes):
        raise DataError(
            f"{len(empty_classes)} of {len(names)} classes of {cache.path} have no encoded prompt, first "
            f"{names[empty_classes[0]]!r}; add one and extract again"
        )

    return prompts


def class_vectors(prompts: Prompts, tower: "AnyTower", *, device: str = "cpu") -> Floats:
    """Project the prompts and average them by class: normalize, mean, normalize -> (C, P) float32."""
    projected_MP = project(tower, prompts.feature.read(prompts.rows), device=device)
    return mean_directions(projected_MP, prompts.classes, len(prompts.names))
