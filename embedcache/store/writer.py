"""Write features: their metadata, then chunk by chunk the arrays, and the commit that makes them valid."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, blocks, fit_integers
from embedcache.errors import ArtifactError, CorruptError, DataError, FingerprintError, PathError
from embedcache.files import find_files, locked
from embedcache.modalities import MODALITIES
from embedcache.provenance import check_same, digest
from embedcache.store.arrays import (
    array_metadata,
    chunk_path,
    fill_value,
    group_metadata,
    has_metadata,
    write_chunk,
    write_metadata,
)
from embedcache.store.cache import Cache
from embedcache.store.commits import (
    PENDING,
    REMOVED,
    Commit,
    remove_commit,
    removed_hash,
    replacing_together,
    roll_forward,
    write_commit,
)
from embedcache.store.feature import ATTRIBUTE, EncoderGroup, Feature, FeatureAttributes, open_group, read_feature
from embedcache.store.layout import Axis, read_info
from embedcache.store.tables import read_removed


class ChunkFeatures(NamedTuple):
    """Features of the items of one chunk, in row order.

    Args:
        items: feature -> one array per item in the dtype on disk, None for a failed item.
        hashes: hash of each item's raw bytes or text, or None if they could not be read.
        failures: feature -> reason for each failed item, `PENDING` for items that were not tried, None for the others.
    """

    items: Mapping[str, Sequence[Array | None]]
    hashes: Sequence[bytes | None]
    failures: Mapping[str, Sequence[str | None]]


def add_feature(
    group: EncoderGroup, feature: str, item_shape: tuple[int, ...], dtype: str, *, axis: Axis | None = None
) -> None:
    """Write the metadata of a feature with items of shape (D,), (T, D) or (-1, D), unless a chunk is committed.

    Raises:
        FingerprintError: the feature exists with another shape, dtype or axis.
    """
    attributes = FeatureAttributes(item_shape=item_shape, dtype=dtype, axis=axis)
    if (group.path / feature / "zarr.json").exists():
        old_attributes = read_feature(group, feature)
        if old_attributes != attributes and _is_committed(group, feature):
            next_step = "use the same, or extract into a new folder"
            what = f"feature {group.name}/{feature}"
            check_same(what, old_attributes.to_json(), attributes.to_json(), next_step=next_step)

    for folder, metadata in feature_metadata(group, feature, attributes).items():
        if not has_metadata(folder, metadata):  # new, damaged, or of fewer samples
            write_metadata(folder, metadata)


def _is_committed(group: EncoderGroup, feature: str) -> bool:
    """Return whether the commit of any chunk has a feature."""
    for chunk in range(group.info.num_chunks(group.modality)):
        commit = group.commit(chunk)
        if commit is not None and feature in commit.features:
            return True
    return False


def feature_metadata(
    group: EncoderGroup, feature: str, attributes: FeatureAttributes, *, num_items: int | None = None
) -> dict[Path, dict[str, Any]]:
    """Return the metadata of a feature: folder -> content of its `zarr.json`. The folder of the feature comes last.

    Each chunk of a feature with a varying number of tokens also has `token_metadata`.

    Args:
        num_items: number of items. If None, the cache's current number.
    """
    path = group.path / feature
    item_shape = attributes.item_shape
    num_items = group.info.num_items[group.modality] if num_items is None else num_items

    if item_shape[0] >= 0:
        chunks = group.info.chunk_shape(item_shape, attributes.dtype)
        values = {ATTRIBUTE: attributes.to_json()}
        return {path: array_metadata((num_items, *item_shape), chunks, attributes.dtype, values)}

    return {
        path / "lengths": array_metadata((num_items,), (group.info.chunk_size,), "int32"),
        path / "values": group_metadata({}),
        path: group_metadata({ATTRIBUTE: attributes.to_json()}),
    }


def token_metadata(num_tokens: int, width: int, dtype: str) -> dict[str, Any]:
    """Return the metadata of the tokens of one chunk."""
    return array_metadata((num_tokens, width), (num_tokens, width), dtype)


def commit_chunk(
    group: EncoderGroup,
    chunk: int,
    features: Mapping[str, Sequence[Array | None]],
    hashes: Sequence[bytes | None],
    failures: Mapping[str, Sequence[str | None]],
    *,
    overwrite_failed: bool = False,
) -> None:
    """Write features of one chunk, then the commit that makes them valid.

    Stored data stays: features that the chunk has, even if another process committed them meanwhile, and rows of a
    chunk that was not full when samples were appended (`embedcache.store.commits`). The chunk is locked. Files of
    features that get new rows are replaced in one transaction. Items of samples that were removed from the cache are
    left out, even if they were read before the removal.

    Args:
        features: feature -> one array per item from `cast_item`, in row order, or None for a failed item.
        hashes: hash of each item's raw bytes or text, or None if they could not be read.
        failures: feature -> reason for each failed item, `PENDING` for items that were not tried, None for the others.
        overwrite_failed: also write rows that failed before, or the reasons why they fail now.

    Raises:
        FingerprintError: an item has other bytes than when the features of this or another encoder were stored, or the
            folder belongs to another encoder by now.
    """
    new_features = ChunkFeatures(features, hashes, failures)
    with locked(group.path / "chunks", chunk):
        roll_forward(group.path, chunk)

        # Two processes may have created the folder together.
        open_group(group.path.parents[1], group.modality, group.name, group.info).check_same(group.fingerprint)

        new_features = _without_removed(group, chunk, new_features)
        old_commit = group.commit(chunk)
        _check_same_items(group, new_features.hashes, chunk, old_commit)
        if old_commit is not None:
            new_features = _keep_stored(group, old_commit, new_features, overwrite_failed=overwrite_failed)
        if not new_features.items:
            return

        # New files need no transaction: without the commit, which comes last, they are not read.
        if old_commit is None or old_commit.features.keys().isdisjoint(new_features.items):
            _write(group, group.path, chunk, new_features, old_commit)
            return

        with replacing_together(group.path, chunk) as folder:
            _write(group, folder, chunk, new_features, old_commit)


def rewrite_chunk(group: EncoderGroup, chunk: int) -> None:
    """Write a committed chunk again, in one transaction, without the items of samples that are removed by now."""
    with locked(group.path / "chunks", chunk):
        roll_forward(group.path, chunk)
        commit = group.commit(chunk)
        assert commit is not None

        items = {}
        for name in commit.features:
            values = Feature(group, name).items(commit)
            # Samples may have been appended since the chunk was written.
            items[name] = values + [None] * (len(commit.hashes) - len(values))

        features = _without_removed(group, chunk, ChunkFeatures(items, commit.hashes, commit.failures))
        with replacing_together(group.path, chunk) as folder:
            _write(group, folder, chunk, features, old_commit=None)


def _write(
    group: EncoderGroup, folder: Path, chunk: int, new_features: ChunkFeatures, old_commit: Commit | None
) -> None:
    """Write features of one chunk below a folder, then the commit that they are added to."""
    features = {} if old_commit is None else dict(old_commit.features)
    failures = {} if old_commit is None else dict(old_commit.failures)
    attributes = {} if old_commit is None else dict(old_commit.attributes)
    for name, items in new_features.items.items():
        features[name] = write_feature_chunk(group, name, chunk, items, folder=folder)
        failures[name] = new_features.failures[name]
        attributes[name] = digest(read_feature(group, name).to_json())

    # Readers trust the commit, so it is written after all arrays.
    commit = Commit(
        chunk=chunk,
        encoder=group.fingerprint_digest,
        index_digest=group.info.index_digest,
        features=features,
        hashes=new_features.hashes,
        failures=failures,
        attributes=attributes,
    )
    write_commit(folder, commit)


def _without_removed(group: EncoderGroup, chunk: int, features: ChunkFeatures) -> ChunkFeatures:
    """Leave out the items of samples that are removed by now. A removal writes the tables before any chunk."""
    cache_path = group.path.parents[1]
    info = read_info(cache_path)
    if not info.removed:
        return features

    items = {}
    failures = {}
    for name, values in features.items.items():
        items[name] = list(values)
        failures[name] = list(features.failures[name])

    hashes = list(features.hashes)
    samples = _read_items(group, chunk, "sample").to_numpy()
    for row in np.flatnonzero(np.isin(samples[: len(hashes)], read_removed(cache_path, info).rows)).tolist():
        hashes[row] = removed_hash(group.modality)
        for name in items:
            items[name][row] = None
            failures[name][row] = REMOVED
    return ChunkFeatures(items, hashes, failures)


def _check_same_items(group: EncoderGroup, hashes: Sequence[bytes | None], chunk: int, commit: Commit | None) -> None:
    """Check that items have the same bytes as when features of the chunk were stored, by this or another encoder.

    Imported vectors have no items to compare.
    """
    if group.is_imported:
        return

    commits = {group.name: commit}
    for path in find_files(group.path.parent, "*/zarr.json"):
        name = path.parent.name
        if name not in commits:
            # `verify` reports an encoder that is damaged.
            with suppress(ArtifactError, PathError):
                commits[name] = open_group(group.path.parents[1], group.modality, name, group.info).commit(chunk)

    first_row = group.info.chunk_rows(group.modality, chunk).start
    hash_of_removed = removed_hash(group.modality)
    for name, stored_commit in commits.items():
        if stored_commit is None:
            continue

        old_hashes = list(stored_commit.hashes)
        for row in stored_commit.used_rows():
            old_hash = old_hashes[row]
            new_hash = hashes[row]
            if old_hash is not None and new_hash not in (None, hash_of_removed, old_hash):
                raise FingerprintError(
                    f"{group.modality} {_item_path(group, chunk, row)}in row {first_row + row} has other bytes now "
                    f"than when {name} was extracted; put the old file back, or extract into a new folder"
                )


def _item_path(group: EncoderGroup, chunk: int, offset: int) -> str:
    """Return the path of an item followed by a space, or an empty string for a text."""
    if MODALITIES[group.modality].kind == "texts":
        return ""
    return f"{_read_items(group, chunk, 'path')[offset]} "


def _read_items(group: EncoderGroup, chunk: int, column: str) -> pa.ChunkedArray:
    """Read a column of the current item table in the rows of a chunk."""
    cache = Cache(group.path.parents[1])
    return cache.items(group.modality, chunk=chunk, columns=[column])[column]


def _keep_stored(
    group: EncoderGroup, commit: Commit, new_features: ChunkFeatures, *, overwrite_failed: bool
) -> ChunkFeatures:
    """Leave out features that a chunk has, and replace new items, reasons and hashes by the stored ones."""
    items = {}
    failures = {}
    for name, new_items in new_features.items.items():
        if not overwrite_failed and group.has(commit, name):
            continue

        items[name] = list(new_items)
        failures[name] = list(new_features.failures[name])

        # Without its files, all rows of a feature are written again.
        if name not in commit.features or not group.has_files(commit, name):
            continue

        stored_items = Feature(group, name).items(commit)
        for row, (item, reason) in enumerate(zip(stored_items, commit.failures[name], strict=False)):
            is_retried = overwrite_failed and reason is not None and failures[name][row] != PENDING
            if reason != PENDING and not is_retried:
                items[name][row] = item
                failures[name][row] = reason

    hashes = []
    for new_hash, old_hash in zip(new_features.hashes, commit.hashes, strict=True):
        hashes.append(old_hash if new_hash is None else new_hash)
    return ChunkFeatures(items, hashes, failures)


def withdraw(group: EncoderGroup, chunk: int, features: Collection[str]) -> None:
    """Remove features of one chunk from its commit, so that the next extraction encodes them again."""
    with locked(group.path / "chunks", chunk):
        roll_forward(group.path, chunk)
        try:
            old_commit = group.commit(chunk)
        except CorruptError:
            remove_commit(group.path, chunk)
            return
        if old_commit is None:
            return

        new_commit = old_commit.without(features)
        if not new_commit.features:
            remove_commit(group.path, chunk)
        elif len(new_commit.features) < len(old_commit.features):
            write_commit(group.path, replace(new_commit, index_digest=group.info.index_digest))


def write_feature_chunk(
    group: EncoderGroup, feature: str, chunk: int, items: Sequence[Array | None], *, folder: Path | None = None
) -> dict[str, str]:
    """Write the arrays of one feature of one chunk, and return file relative to the folder -> CRC-32C of its rows.

    Args:
        folder: folder in which the files get the same paths as in the folder of the encoder, which is used if None.
    """
    path = (folder or group.path) / feature
    attributes = read_feature(group, feature)
    item_shape = attributes.item_shape
    dtype = attributes.dtype

    dtypes = {item.dtype for item in items if item is not None}
    dtype_names = set(map(str, dtypes))
    if dtype_names - {dtype}:
        raise FingerprintError(
            f"feature {group.name}/{feature} is stored as {dtype}, got {', '.join(dtype_names)}: another process "
            "created it; use the same --dtype"
        )

    if item_shape[0] < 0:
        return _write_ragged(path, chunk, items, item_shape[1], dtype, group.info.chunk_size)

    # A chunk of the commit has several chunks of the array if its items are large.
    blank_item = np.full(item_shape, fill_value(dtype), dtype)
    shape = group.info.chunk_shape(item_shape, dtype)
    files = {}
    for number, rows in enumerate(blocks(len(items), shape[0]), chunk * group.info.chunk_size // shape[0]):
        values = np.stack([blank_item if item is None else item for item in items[rows]])
        files[f"{feature}/{number}"] = write_chunk(path, number, [values], shape, dtype)
    return files


def _write_ragged(
    path: Path, chunk: int, items: Sequence[Array | None], width: int, dtype: str, chunk_size: int
) -> dict[str, str]:
    lengths = np.array([-1 if item is None else len(item) for item in items], np.int32)
    tokens = [item for item in items if item is not None]
    num_tokens = sum(map(len, tokens))
    shape = (max(num_tokens, 1), width)  # Zarr has no chunk without values

    name = f"values/{chunk:05d}"
    write_metadata(path / name, token_metadata(num_tokens, width, dtype))
    tokens_crc = write_chunk(path / name, 0, tokens, shape, dtype)
    lengths_crc = write_chunk(path / "lengths", chunk, [lengths], (chunk_size,), str(lengths.dtype))
    return {f"{path.name}/{name}/0": tokens_crc, f"{path.name}/lengths/{chunk}": lengths_crc}


def chunk_files(group: EncoderGroup, feature: str, chunk: int) -> list[Path]:
    """Return the files of a feature of a chunk, whether they exist or not."""
    attributes = read_feature(group, feature)
    path = group.path / feature
    if attributes.item_shape[0] < 0:
        values = path / "values" / f"{chunk:05d}"
        return [chunk_path(path / "lengths", chunk, 1), chunk_path(values, 0, 2), values / "zarr.json"]

    shape = group.info.chunk_shape(attributes.item_shape, attributes.dtype)
    num_files = group.info.chunk_size // shape[0]
    return [chunk_path(path, chunk * num_files + number, len(shape)) for number in range(num_files)]


def cast_item(item: Array, item_shape: tuple[int, ...], dtype: str, name: str) -> Array:
    """Convert the value of one item, (D,) or (T, D), to the dtype on disk.

    Raises:
        DataError: the shape differs, or a value is NaN, beyond the range of the dtype on disk, or not whole although
            the dtype on disk is an integer.
    """
    # An item of shape (-1, D) has any number of tokens.
    first_size = item.shape[0] if item.ndim and item_shape[0] == -1 else item_shape[0]
    if item.shape != (first_size, *item_shape[1:]):
        raise DataError(f"feature {name}: expected shape {item_shape}, got {item.shape}")
    if np.dtype(dtype).kind == "i":
        return _cast_integers(item, dtype, name)

    # A view is copied: it may keep a whole batch in memory.
    with np.errstate(over="ignore"):
        is_stored = item.dtype == dtype and item.base is None
        stored = item if is_stored else item.astype(dtype)

    if not np.isfinite(stored).all():
        largest = float(np.abs(item).max())
        if np.isfinite(largest):
            raise DataError(
                f"feature {name} holds {largest:.6g}, beyond the range of {dtype}; extract with --dtype float32"
            )
        raise DataError(f"feature {name}: expected finite values, got NaN or infinity; check weights and precision")
    return stored


def _cast_integers(item: Array, dtype: str, name: str) -> Array:
    """Convert the value of one item to an integer dtype. A missing value is -1."""
    is_valid = fit_integers(item, dtype)
    if not is_valid.all():
        limits = np.iinfo(dtype)
        raise DataError(
            f"feature {name}: expected whole numbers from {limits.min} to {limits.max}, the range of {dtype}, got "
            f"{item[~is_valid].flat[0]}"
        )
    return item.astype(dtype)
