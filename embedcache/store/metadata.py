"""The metadata of a feature: the shape, dtype and axis of its items, in the `zarr.json` of its arrays."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedcache.axis import Axis
from embedcache.errors import CorruptError, DataError
from embedcache.provenance import check_same
from embedcache.store.arrays import array_metadata, group_metadata, has_metadata, write_metadata
from embedcache.store.group import ATTRIBUTE, EncoderGroup, read_attributes

_MAX_SIZE = 2**31
_DTYPES = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64"})


def add_feature(
    group: EncoderGroup, feature: str, item_shape: tuple[int, ...], dtype: str, *, axis: Axis | None = None
) -> None:
    """Write the metadata of a feature with items of shape (D,), (T, D) or (-1, D), unless a chunk is committed.

    A feature with committed chunks that was created without an axis keeps its metadata.

    Raises:
        FingerprintError: the feature exists with another shape, dtype or axis.
    """
    path = group.path / feature
    attributes: dict[str, Any] = {"item_shape": list(item_shape), "dtype": dtype}
    if axis is not None:
        attributes["axis"] = axis.to_json()
    if (path / "zarr.json").exists() and _must_keep(group, feature, attributes):
        next_step = "use the same, or extract into a new folder"
        stored = read_feature(group, feature)
        requested = attributes if "axis" in stored else {k: v for k, v in attributes.items() if k != "axis"}
        check_same(f"feature {group.name}/{feature}", stored, requested, next_step=next_step)
        attributes = stored
    for folder, metadata in feature_metadata(group, feature, attributes).items():
        if not has_metadata(folder, metadata):  # new, damaged, or of fewer samples
            write_metadata(folder, metadata)


def feature_metadata(
    group: EncoderGroup, feature: str, attributes: Mapping[str, Any], *, num_items: int | None = None
) -> dict[Path, bytes]:
    """Return the metadata of a feature: folder -> content of its `zarr.json`, that of the feature last.

    Each chunk of a feature with a varying number of tokens has one more, `token_metadata`.

    Args:
        num_items: number of items; None: of the cache now.
    """
    path, item_shape, dtype = group.path / feature, tuple(attributes["item_shape"]), attributes["dtype"]
    num_items = group.info.num_items[group.modality] if num_items is None else num_items
    if item_shape[0] >= 0:
        chunks = group.info.chunk_shape(item_shape, dtype)
        return {path: array_metadata((num_items, *item_shape), chunks, dtype, {ATTRIBUTE: attributes})}
    return {
        path / "lengths": array_metadata((num_items,), (group.info.chunk_size,), "int32"),
        path / "values": group_metadata({}),
        path: group_metadata({ATTRIBUTE: attributes}),
    }


def token_metadata(num_tokens: int, width: int, dtype: str) -> bytes:
    """Return the metadata of the tokens of one chunk."""
    return array_metadata((num_tokens, width), (num_tokens, width), dtype)


def _must_keep(group: EncoderGroup, feature: str, attributes: Mapping[str, Any]) -> bool:
    """Return whether the metadata is as requested, or a chunk of the feature is committed."""
    if read_feature(group, feature) == attributes:
        return True
    commits = (group.commit(chunk) for chunk in range(group.info.num_chunks(group.modality)))
    return any(commit is not None and feature in commit.features for commit in commits)


def read_feature(group: EncoderGroup, feature: str) -> dict[str, Any]:
    """Read the `item_shape` and `dtype` of a feature, and its `axis` if it has one."""
    attributes = read_attributes(group.path / feature)
    shape, dtype = attributes.get("item_shape"), attributes.get("dtype")
    if not (_is_item_shape(shape) and isinstance(dtype, str) and dtype in _DTYPES):
        raise CorruptError(
            f"{group.path / feature / 'zarr.json'}: expected the item_shape and dtype of a feature, got "
            f"{shape!r} and {dtype!r}; restore that file"
        )
    return attributes


def _is_item_shape(shape: Any) -> bool:
    """Return whether a JSON value is (D,), (T, D) or (-1, D)."""
    if not isinstance(shape, list) or not all(type(size) is int and -1 <= size < _MAX_SIZE for size in shape):
        return False
    return (len(shape) == 1 and shape[0] >= 0) or (len(shape) == 2 and shape[1] >= 0)


def read_axis(attributes: Mapping[str, Any], name: str) -> Axis | None:
    """Return the axis in the attributes of a feature; None if it has none.

    Raises:
        CorruptError: the attributes hold something else.
    """
    if "axis" not in attributes:
        return None
    try:
        return Axis.from_json(attributes["axis"])
    except (DataError, TypeError, AttributeError) as error:
        raise CorruptError(f"feature {name}: {error}; extract into a new folder") from None
