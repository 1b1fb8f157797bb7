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
        hashes: hash of each item's raw bytes or text; None if they could not be read.
        failures: feature -> why each failed item has no value, `PENDING` for one that was not tried, None for others.
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
    path = group.path / feature
    attributes = FeatureAttributes(item_shape=item_shape, dtype=dtype, axis=axis)
    if (path / "zarr.json").exists() and (stored := read_feature(group, feature)) != attributes:
        commits = (group.commit(chunk) for chunk in range(group.info.num_chunks(group.modality)))
        if any(commit is not None and feature in commit.features for commit in commits):
            next_step = "use the same, or extract into a new folder"
            what = f"feature {group.name}/{feature}"
            check_same(what, stored.to_json(), attributes.to_json(), next_step=next_step)
    for folder, metadata in feature_metadata(group, feature, attributes).items():
        if not has_metadata(folder, metadata):  # new, damaged, or of fewer samples
            write_metadata(folder, metadata)


def feature_metadata(
    group: EncoderGroup, feature: str, attributes: FeatureAttributes, *, num_items: int | None = None
) -> dict[Path, dict[str, Any]]:
    """Return the metadata of a feature: folder -> content of its `zarr.json`, that of the feature last.

    Each chunk of a feature with a varying number of tokens has one more, `token_metadata`.

    Args:
        num_items: number of items; None: of the cache now.
    """
    path, item_shape, dtype = group.path / feature, attributes.item_shape, attributes.dtype
    num_items = group.info.num_items[group.modality] if num_items is None else num_items
    if item_shape[0] >= 0:
        chunks = group.info.chunk_shape(item_shape, dtype)
        return {path: array_metadata((num_items, *item_shape), chunks, dtype, {ATTRIBUTE: attributes.to_json()})}
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

    Stored data stays: features that the chunk has, also those that another process committed meanwhile, and rows of a
    chunk that was not full when samples were appended (`embedcache.store.commits`). The chunk is locked. Files of
    features that get new rows are replaced in one transaction. Items of samples that were removed from the cache are
    left out, also if they were read before.

    Args:
        features: feature -> one array per item from `cast_item`, in row order; None for a failed item.
        hashes: hash of each item's raw bytes or text; None if they could not be read.
        failures: feature -> reason for each failed item, `PENDING` for those that were not tried, None for the others.
        overwrite_failed: also write rows that failed before, or why they fail now.

    Raises:
        FingerprintError: an item's bytes differ from those of the stored features, of this encoder or another, or the
            folder belongs to another encoder by now.
    """
    new = ChunkFeatures(features, hashes, failures)
    with locked(group.path / "chunks", chunk):
        roll_forward(group.path, chunk)
        # Two processes may have created the folder together.
        open_group(group.path.parents[1], group.modality, group.name, group.info).check_same(group.fingerprint)
        new = _without_removed(group, chunk, new)
        before = group.commit(chunk)
        _check_same_items(group, new.hashes, chunk, before)
        if before is not None:
            new = _keep_stored(group, before, new, overwrite_failed=overwrite_failed)
        if not new.items:
            return
        if before is None or before.features.keys().isdisjoint(new.items):
            _write(group, group.path, chunk, new, before)
            return
        with replacing_together(group.path, chunk) as folder:
            _write(group, folder, chunk, new, before)


def rewrite_chunk(group: EncoderGroup, chunk: int) -> None:
    """Write a committed chunk again, in one transaction, without the items of samples that are removed by now."""
    with locked(group.path / "chunks", chunk):
        roll_forward(group.path, chunk)
        commit = group.commit(chunk)
        assert commit is not None
        items = {name: Feature(group, name).items(commit) for name in commit.features}
        for of_feature in items.values():
            of_feature += [None] * (len(commit.hashes) - len(of_feature))
        kept = _without_removed(group, chunk, ChunkFeatures(items, commit.hashes, commit.failures))
        with replacing_together(group.path, chunk) as folder:
            _write(group, folder, chunk, kept, before=None)


def _write(group: EncoderGroup, folder: Path, chunk: int, new: ChunkFeatures, before: Commit | None) -> None:
    """Write features of one chunk below a folder, then the commit that they are added to."""
    files = {name: write_feature_chunk(group, name, chunk, items, folder=folder) for name, items in new.items.items()}
    failures = {name: new.failures[name] for name in files}
    attributes = {name: digest(read_feature(group, name).to_json()) for name in files}
    commit = Commit(
        chunk=chunk,
        encoder=group.fingerprint_digest,
        index_digest=group.info.index_digest,
        features=files if before is None else {**before.features, **files},
        hashes=new.hashes,
        failures=failures if before is None else {**before.failures, **failures},
        attributes=attributes if before is None else {**before.attributes, **attributes},
    )
    write_commit(folder, commit)


def _without_removed(group: EncoderGroup, chunk: int, new: ChunkFeatures) -> ChunkFeatures:
    """Leave out the items of samples that are removed by now: a removal writes the tables before any chunk."""
    cache_path = group.path.parents[1]
    info = read_info(cache_path)
    if not info.removed:
        return new
    items = {name: list(of_feature) for name, of_feature in new.items.items()}
    failures = {name: list(new.failures[name]) for name in items}
    hashes = list(new.hashes)
    samples = _read_items(group, chunk, "sample").to_numpy()
    for row in np.flatnonzero(np.isin(samples[: len(hashes)], read_removed(cache_path, info).rows)).tolist():
        hashes[row] = removed_hash(group.modality)
        for name in items:
            items[name][row] = None
            failures[name][row] = REMOVED
    return ChunkFeatures(items, hashes, failures)


def _check_same_items(group: EncoderGroup, hashes: Sequence[bytes | None], chunk: int, before: Commit | None) -> None:
    """Check that the items are those of the stored features of this chunk, of this encoder and of all others.

    Imported vectors have no items to compare.
    """
    if group.is_imported:
        return
    stored = {group.name: before}
    for path in find_files(group.path.parent, "*/zarr.json"):
        name = path.parent.name
        if name not in stored:
            with suppress(ArtifactError, PathError):  # damaged: `verify` reports it
                stored[name] = open_group(group.path.parents[1], group.modality, name, group.info).commit(chunk)
    first, of_removed = group.info.chunk_rows(group.modality, chunk).start, removed_hash(group.modality)
    for name, commit in stored.items():
        if commit is None:
            continue
        old_hashes = list(commit.hashes)
        for row in commit.used_rows():
            old = old_hashes[row]
            new = hashes[row]
            if old is not None and new not in (None, of_removed, old):
                raise FingerprintError(
                    f"{group.modality} {_item_path(group, chunk, row)}in row {first + row} has other bytes now than "
                    f"when {name} was extracted; put the old file back, or extract into a new folder"
                )


def _item_path(group: EncoderGroup, chunk: int, offset: int) -> str:
    """Return the path of an item followed by a space; texts have none."""
    if MODALITIES[group.modality].kind == "texts":
        return ""
    return f"{_read_items(group, chunk, 'path')[offset]} "


def _read_items(group: EncoderGroup, chunk: int, column: str) -> pa.ChunkedArray:
    """Return a column of the item table as it is now in the rows of a chunk."""
    cache = Cache(group.path.parents[1])
    return cache.items(group.modality, chunk=chunk, columns=[column])[column]


def _keep_stored(group: EncoderGroup, before: Commit, new: ChunkFeatures, *, overwrite_failed: bool) -> ChunkFeatures:
    """Leave out features that a chunk has, and replace new items, reasons and hashes by those already stored."""
    names = [name for name in new.items if overwrite_failed or not group.has(before, name)]
    items = {name: list(new.items[name]) for name in names}
    failures = {name: list(new.failures[name]) for name in names}
    for name in names:
        if name not in before.features or not group.has_files(before, name):
            continue  # all rows are written again
        stored = Feature(group, name).items(before)
        for row, (item, reason) in enumerate(zip(stored, before.failures[name], strict=False)):
            if reason == PENDING or (overwrite_failed and reason is not None and failures[name][row] != PENDING):
                continue
            items[name][row] = item
            failures[name][row] = reason
    hashes = [
        hash_now if hash_now is not None else old for hash_now, old in zip(new.hashes, before.hashes, strict=True)
    ]
    return ChunkFeatures(items, hashes, failures)


def withdraw(group: EncoderGroup, chunk: int, features: Collection[str]) -> None:
    """Remove features of one chunk from its commit, so that the next extraction encodes them again."""
    with locked(group.path / "chunks", chunk):
        roll_forward(group.path, chunk)
        try:
            before = group.commit(chunk)
        except CorruptError:
            remove_commit(group.path, chunk)
            return
        if before is None:
            return
        remaining = before.without(features)
        if not remaining.features:
            remove_commit(group.path, chunk)
        elif len(remaining.features) < len(before.features):
            write_commit(group.path, replace(remaining, index_digest=group.info.index_digest))


def write_feature_chunk(
    group: EncoderGroup, feature: str, chunk: int, items: Sequence[Array | None], *, folder: Path | None = None
) -> dict[str, str]:
    """Write the arrays of one feature of one chunk; return file relative to the folder -> CRC-32C of its rows.

    Args:
        folder: where to write them, as below the folder of the encoder; None: there.
    """
    path = (folder or group.path) / feature
    attributes = read_feature(group, feature)
    item_shape, dtype = attributes.item_shape, attributes.dtype
    dtypes = {str(found) for found in {item.dtype for item in items if item is not None}}
    if dtypes - {dtype}:
        raise FingerprintError(
            f"feature {group.name}/{feature} is stored as {dtype}, got {', '.join(dtypes)}: another process "
            "created it; use the same --dtype"
        )
    if item_shape[0] < 0:
        return _write_ragged(path, chunk, items, item_shape[1], dtype, group.info.chunk_size)
    missing = np.full(item_shape, fill_value(dtype), dtype)
    shape = group.info.chunk_shape(item_shape, dtype)
    files = {}
    for number, rows in enumerate(blocks(len(items), shape[0]), chunk * group.info.chunk_size // shape[0]):
        values = np.stack([missing if item is None else item for item in items[rows]])
        files[f"{feature}/{number}"] = write_chunk(path, number, [values], shape, dtype)
    return files


def _write_ragged(
    path: Path, chunk: int, items: Sequence[Array | None], width: int, dtype: str, chunk_size: int
) -> dict[str, str]:
    lengths = np.array([-1 if item is None else len(item) for item in items], np.int32)
    tokens = [item for item in items if item is not None]
    num_tokens = sum(len(item) for item in tokens)
    shape = (max(num_tokens, 1), width)
    name = f"values/{chunk:05d}"
    write_metadata(path / name, token_metadata(num_tokens, width, dtype))
    return {
        f"{path.name}/{name}/0": write_chunk(path / name, 0, tokens, shape, dtype),
        f"{path.name}/lengths/{chunk}": write_chunk(
            path / "lengths", chunk, [lengths], (chunk_size,), str(lengths.dtype)
        ),
    }


def chunk_files(group: EncoderGroup, feature: str, chunk: int) -> list[Path]:
    """Return the files in which a feature of a chunk is written, whether they exist or not."""
    attributes, path = read_feature(group, feature), group.path / feature
    item_shape, size = attributes.item_shape, group.info.chunk_size
    if item_shape[0] < 0:
        values = path / "values" / f"{chunk:05d}"
        return [chunk_path(path / "lengths", chunk, 1), chunk_path(values, 0, 2), values / "zarr.json"]
    shape = group.info.chunk_shape(item_shape, attributes.dtype)
    per_chunk = size // shape[0]
    return [chunk_path(path, chunk * per_chunk + number, len(shape)) for number in range(per_chunk)]


def cast_item(item: Array, item_shape: tuple[int, ...], dtype: str, name: str) -> Array:
    """Convert the value of one item, (D,) or (T, D), to the dtype on disk.

    Raises:
        DataError: the shape differs, or a value is NaN, beyond the range of the dtype on disk, or not whole where
            the dtype on disk is an integer.
    """
    if item.ndim != len(item_shape) or any(
        size not in (-1, got) for size, got in zip(item_shape, item.shape, strict=True)
    ):
        raise DataError(f"feature {name}: expected shape {item_shape}, got {item.shape}")
    if np.dtype(dtype).kind == "i":
        return _cast_integers(item, dtype, name)
    with np.errstate(over="ignore"):
        is_stored = item.dtype == dtype and item.base is None  # a view may keep a whole batch in memory
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
    """Convert the value of one item to an integer dtype; -1 marks a missing value."""
    is_valid = fit_integers(item, dtype)
    if not is_valid.all():
        limits = np.iinfo(dtype)
        raise DataError(
            f"feature {name}: expected whole numbers from {limits.min} to {limits.max}, the range of {dtype}, got "
            f"{item[~is_valid].flat[0]}"
        )
    return item.astype(dtype)
