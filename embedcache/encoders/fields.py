"""`fields:xyz,uv,label`: named arrays of a point cloud as features, one row per point, unchanged.

Coordinates, labels and links between points and pixels become features, with hashes, commits, failures and provenance
like any other. A name may be followed by its number of columns, its dtype or both, `normal:3` or `moving:int16`;
`FIELDS` has those of common names, others are one float32 column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedcache.arrays import Array, fit_integers
from embedcache.axis import Axis
from embedcache.encoders.base import NO_WEIGHTS, Encoder, Fingerprint, ItemShape, Modality, check_names
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import ItemError, SettingError

DTYPES = ("float32", "int16", "int32")
MISSING = -1
"""Value of an integer field for a point that has none; NaN in a raw item."""


@dataclass(frozen=True)
class Field:
    """A field: its number of columns and its dtype on disk."""

    width: int = 1
    dtype: str = "float32"


FIELDS: Mapping[str, Field] = {
    "xyz": Field(3),
    "uv": Field(2),
    "rgb": Field(3),
    "normal": Field(3),
    "label": Field(1, "int16"),
    "instance": Field(1, "int32"),
}


def open_fields(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the encoder that copies arrays."""
    check_options(spec, ())
    check_modality(spec, modality, "points")
    fields: dict[str, Field] = {}
    for text in spec.model.split("+"):
        name, field = _parse_field(text, spec)
        if name in fields:
            raise SettingError(f"field {name} in {spec.text}: expected it once, got it twice; remove one")
        fields[name] = field
    return _Fields(fields, batch_size=settings.batch_size or 32)


def _parse_field(text: str, spec: EncoderSpec) -> tuple[str, Field]:
    name, *details = text.strip().split(":")
    width, dtype = FIELDS.get(name, Field()).width, FIELDS.get(name, Field()).dtype
    for detail in details:
        if detail.isdecimal() and int(detail):
            width = int(detail)
        elif detail in DTYPES:
            dtype = detail
        else:
            raise SettingError(
                f"field {text!r} in {spec.text}: expected NAME, NAME:COLUMNS, NAME:DTYPE or NAME:COLUMNS:DTYPE with a "
                f"dtype of {', '.join(DTYPES)}, got {detail!r}"
            )
    if not name.isidentifier():
        raise SettingError(f"field {text!r} in {spec.text}: expected a name of letters, digits and _, got {name!r}")
    return name, Field(width, dtype)


class _Fields:
    """The encoder: it copies the arrays of each point cloud."""

    modality: Modality = "points"

    def __init__(self, fields: Mapping[str, Field], *, batch_size: int) -> None:
        self._fields = fields
        self._dtype = np.dtype([(name, field.dtype, (field.width,)) for name, field in fields.items()])
        self.features: Mapping[str, ItemShape] = {name: (-1, field.width) for name, field in fields.items()}
        self.defaults = tuple(fields)
        self.dtypes = {name: field.dtype for name, field in fields.items()}
        self.axes = dict.fromkeys(fields, Axis(kind="points"))
        self.batch_size = batch_size
        self.fingerprint = Fingerprint(
            family="fields",
            model="fields",
            weights=NO_WEIGHTS,
            preprocessing={"missing": MISSING},
            pooling={name: f"a copy, {field.width} columns of {field.dtype}" for name, field in fields.items()},
            backend="numpy",
        )

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Return one structured array per item, with a row per point and the fields as its columns."""
        return [self._copy(item) for item in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        check_names(names, self.features)
        return {name: [np.ascontiguousarray(rows[name]) for rows in prepared] for name in names}

    def _copy(self, item: Mapping[str, Array]) -> Array:
        rows = np.empty(len(item["xyz"]), self._dtype)
        for name, field in self._fields.items():
            if name not in item:
                raise ItemError(f"no array {name!r}: found {', '.join(sorted(item))}")
            rows[name] = _checked(name, np.asarray(item[name]), field, len(rows))
        return rows


def _checked(name: str, array: Array, field: Field, num_points: int) -> Array:
    """Return an array as (N, width) of the field's dtype, or raise an `ItemError`."""
    values = array[:, None] if array.ndim == 1 else array
    if values.shape != (num_points, field.width):
        raise ItemError(f"array {name!r}: expected shape {(num_points, field.width)}, got {array.shape}")
    if values.dtype.kind not in "biuf":
        raise ItemError(f"array {name!r}: expected numbers, got {array.dtype}")
    if field.dtype == "float32":
        with np.errstate(over="ignore"):
            copied = values.astype(np.float32)
        if not np.isfinite(copied).all():
            num_bad = np.count_nonzero(~np.isfinite(copied).all(axis=1))
            raise ItemError(f"array {name!r}: {num_bad} of {num_points} rows have NaN or infinite values")
        return copied
    return _to_integers(name, values, field.dtype)


def _to_integers(name: str, values: Array, dtype: str) -> Array:
    """Return whole numbers in an integer dtype, with `MISSING` for NaN, or raise an `ItemError`."""
    is_missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
    filled = np.where(is_missing, MISSING, values)
    is_valid = fit_integers(filled, dtype)
    if not is_valid.all():
        limits = np.iinfo(dtype)
        raise ItemError(
            f"array {name!r}: expected integers from {limits.min} to {limits.max}, or NaN; got {filled[~is_valid][0]}"
        )
    return filled.astype(dtype)
