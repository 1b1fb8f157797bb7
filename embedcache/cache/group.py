"""One encoder's folder in a cache: a Zarr group whose attributes are the fingerprint, with an array a feature."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, blocks
from embedcache.artifact import check_same, digest
from embedcache.cache.commit import NOT_YET, Commit, read_commit, remove_commit, write_commit
from embedcache.cache.layout import FORMAT_VERSION, CacheInfo, encoder_path
from embedcache.cache.store import CRC_BYTES, chunk_path, read_metadata, write_array, write_chunk, write_group
from embedcache.disk import locked
from embedcache.errors import CorruptError, DataError, FingerprintError

_TOKEN_CHUNK_BYTES = 16 * 2**20
_ATTRIBUTE = "embedcache"


@dataclass(frozen=True, kw_only=True)
class EncoderGroup:
    """The features of one encoder.

    Args:
        path: its folder.
        modality: `image` or `text`.
        info: the cache it lies in.
        spec: what opens the encoder again.
        fingerprint: all that decided the features.
    """

    path: Path
    modality: str
    info: CacheInfo
    spec: str
    fingerprint: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def features(self) -> list[str]:
        """Names of the features that have metadata, complete or not."""
        return sorted(path.parent.name for path in self.path.glob("*/zarr.json"))

    def commit(self, chunk: int) -> Commit | None:
        """Get the commit of a chunk, or None.

        Raises:
            CorruptError: it was written by another encoder or for other rows, or does not count the chunk's rows.
        """
        commit = read_commit(self.path, chunk)
        if commit is None:
            return None
        if commit.encoder != digest(self.fingerprint):
            raise CorruptError(f"chunk {chunk} in {self.path} was written by another encoder than the folder's")
        num_rows = self.info.num_rows_then(commit.spine, self.modality, chunk)
        if num_rows is None:
            raise CorruptError(f"chunk {chunk} in {self.path} was written for other rows than this cache numbers")
        if len(commit.hashes) != num_rows:
            raise CorruptError(f"chunk {chunk} in {self.path} has {len(commit.hashes)} rows; it should have {num_rows}")
        rows = self.info.chunk_rows(self.modality, chunk)
        return commit.padded(rows.stop - rows.start)

    def has(self, commit: Commit | None, feature: str) -> bool:
        """Say whether a chunk has a feature for all its rows, in files that are there and as long as they should be."""
        if commit is None or feature not in commit.features or NOT_YET in commit.failures[feature]:
            return False
        return all(_is_whole(self.path / file) for file in commit.features[feature])


def _is_whole(file: Path) -> bool:
    grid = read_metadata(file.parent)
    shape = grid["chunk_grid"]["configuration"]["chunk_shape"]
    path = chunk_path(file.parent, int(file.name), len(shape))
    num_bytes = int(np.prod(shape)) * np.dtype(grid["data_type"]).itemsize + CRC_BYTES
    try:
        return bool(path.stat().st_size == num_bytes)
    except FileNotFoundError:
        return False


def open_group(cache_path: Path, modality: str, name: str, info: CacheInfo) -> EncoderGroup:
    """Open one encoder's folder.

    Raises:
        PathError: there is none.
        CorruptError: its attributes are not ours.
    """
    path = encoder_path(cache_path, modality, name)
    attributes = read_metadata(path).get("attributes", {}).get(_ATTRIBUTE)
    if attributes is None:
        raise CorruptError(f"{path} is a Zarr group without a fingerprint; it was not written by embedcache")
    return EncoderGroup(
        path=path,
        modality=modality,
        info=info,
        spec=attributes["spec"],
        fingerprint=attributes["fingerprint"],
    )


def create_group(
    cache_path: Path,
    modality: str,
    name: str,
    info: CacheInfo,
    *,
    spec: str,
    fingerprint: Mapping[str, Any],
) -> EncoderGroup:
    """Make one encoder's folder, or open it where the same encoder made it. One without a commit is made anew.

    Raises:
        FingerprintError: another encoder made it; each differing field is named with both values.
    """
    path = encoder_path(cache_path, modality, name)
    if (path / "zarr.json").exists() and any(path.glob("chunks/*.parquet")):
        group = open_group(cache_path, modality, name, info)
        check_same(
            f"encoder {name!r} of cache {cache_path}",
            group.fingerprint,
            fingerprint,
            next_step="ask for the same encoder as before, --backend and --precision too, or extract elsewhere",
        )
        return group
    about = {"format": FORMAT_VERSION, "spec": spec, "fingerprint": dict(fingerprint)}
    write_group(path, {_ATTRIBUTE: about})
    return EncoderGroup(path=path, modality=modality, info=info, spec=spec, fingerprint=fingerprint)


def add_feature(group: EncoderGroup, feature: str, item_shape: tuple[int, ...], dtype: str) -> None:
    """Write the metadata of a feature that the group does not have yet, or has no committed chunk of.

    Args:
        group: the encoder's folder.
        feature: name of the feature.
        item_shape: `(D,)`, `(T, D)` or `(-1, D)` for one item.
        dtype: `float16` or `float32`.

    Raises:
        FingerprintError: the feature is there with another shape or dtype.
    """
    path = group.path / feature
    about = {"item_shape": list(item_shape), "dtype": dtype}
    num_items = group.info.num_items[group.modality]
    if (path / "zarr.json").exists() and _is_begun(group, feature, about):
        found = feature_about(group, feature)
        next_step = "ask for the same, or extract into another folder"
        check_same(f"feature {group.name}/{feature}", found, about, next_step=next_step)
        first_axis = path / "lengths" if item_shape[0] < 0 else path
        if read_metadata(first_axis)["shape"][0] == num_items:
            return  # else samples were added since
    if item_shape[0] < 0:
        chunk_size = group.info.chunk_size
        write_array(path / "lengths", (num_items,), (chunk_size,), "int32", {})
        write_group(path / "values", {})
        write_group(path, {_ATTRIBUTE: about})
    else:
        chunks = chunk_shape(group.info, item_shape, dtype)
        write_array(path, (num_items, *item_shape), chunks, dtype, {_ATTRIBUTE: about})


def _is_begun(group: EncoderGroup, feature: str, about: Mapping[str, Any]) -> bool:
    """Say whether a feature must stay as it is: it is as asked, or a chunk of it is committed."""
    if feature_about(group, feature) == about:
        return True
    commits = (group.commit(chunk) for chunk in range(group.info.num_chunks(group.modality)))
    return any(commit is not None and feature in commit.features for commit in commits)


def feature_about(group: EncoderGroup, feature: str) -> dict[str, Any]:
    """Read a feature's `item_shape` and `dtype`."""
    about = read_metadata(group.path / feature).get("attributes", {}).get(_ATTRIBUTE)
    if about is None:
        raise CorruptError(f"{group.path / feature} was not written by embedcache: it has no attributes of ours")
    return dict(about)


def chunk_shape(info: CacheInfo, item_shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Choose an array's chunks: the commit chunk for vectors, an exact fraction of it for tokens."""
    rows = info.chunk_size
    item_bytes = int(np.prod(item_shape)) * np.dtype(dtype).itemsize
    if len(item_shape) > 1:
        while rows % 2 == 0 and rows * item_bytes > _TOKEN_CHUNK_BYTES:
            rows //= 2
    return (rows, *item_shape)


def write_feature_chunk(group: EncoderGroup, feature: str, chunk: int, items: Sequence[Array | None]) -> dict[str, str]:
    """Write one feature of one chunk. It does not exist before its commit; `commit_chunk` does both.

    Args:
        group: the encoder's folder.
        feature: a feature that `add_feature` made.
        chunk: which chunk.
        items: one array an item from `fit_item`, in row order; None for a failed item.

    Returns:
        The files written, relative to the group, with the CRC-32C of their rows.
    """
    about = feature_about(group, feature)
    item_shape, dtype = tuple(about["item_shape"]), about["dtype"]
    if item_shape[0] < 0:
        return _write_ragged(group, feature, chunk, items, item_shape[1], dtype)
    missing = np.full(item_shape, np.nan, dtype)
    shape = chunk_shape(group.info, item_shape, dtype)
    files = {}
    for number, rows in enumerate(blocks(len(items), shape[0]), chunk * group.info.chunk_size // shape[0]):
        values = np.stack([missing if item is None else item for item in items[rows]])
        files[f"{feature}/{number}"] = write_chunk(group.path / feature, number, values, shape)
    return files


def _write_ragged(
    group: EncoderGroup,
    feature: str,
    chunk: int,
    items: Sequence[Array | None],
    width: int,
    dtype: str,
) -> dict[str, str]:
    path = group.path / feature
    lengths = np.array([-1 if item is None else len(item) for item in items], np.int32)
    tokens = [item for item in items if item is not None]
    values = np.concatenate(tokens) if tokens else np.empty((0, width), dtype)
    shape = (max(len(values), 1), width)
    name = f"values/{chunk:05d}"
    write_array(path / name, values.shape, shape, dtype, {})
    return {
        f"{feature}/{name}/0": write_chunk(path / name, 0, values, shape),
        f"{feature}/lengths/{chunk}": write_chunk(path / "lengths", chunk, lengths, (group.info.chunk_size,)),
    }


def commit_chunk(
    group: EncoderGroup,
    chunk: int,
    features: Mapping[str, Sequence[Array | None]],
    hashes: Sequence[bytes | None],
    failures: Sequence[str | None],
    *,
    replaces: bool = False,
) -> None:
    """Write features of one chunk, then the record that makes them exist.

    Features that the chunk has already stay as they are, those that another process committed meanwhile too. One
    writer at a time: the encoder's folder is locked. What is written again does not exist meanwhile.

    Args:
        group: the encoder's folder.
        chunk: which chunk.
        features: feature -> one array an item from `fit_item`, in row order; None for a failed item.
        hashes: of each item's raw bytes or text; None where they could not be read.
        failures: why an item has none of these features; None where it has them.
        replaces: write features again that the chunk has.

    Raises:
        FingerprintError: an item's bytes are no longer those that the earlier features were made from.
    """
    with locked(group.path / "chunks"):
        before = group.commit(chunk)
        if before is not None:
            _refuse_changed(group, before, hashes)
            if not replaces:
                features = {name: items for name, items in features.items() if not group.has(before, name)}
            hashes = [now if now is not None else earlier for now, earlier in zip(hashes, before.hashes, strict=True)]
        if not features:
            return
        if before is not None:
            before = _withdraw(group, before, features)
        files = {name: write_feature_chunk(group, name, chunk, items) for name, items in features.items()}
        reasons = dict.fromkeys(features, failures)
        record = Commit(
            chunk=chunk,
            encoder=digest(group.fingerprint),
            spine=group.info.spine,
            features=files if before is None else {**before.features, **files},
            hashes=hashes,
            failures=reasons if before is None else {**before.failures, **reasons},
        )
        write_commit(group.path, record)


def withdraw(group: EncoderGroup, chunk: int, features: Collection[str]) -> None:
    """Make features of one chunk not exist, so that the next extraction makes them again."""
    with locked(group.path / "chunks"):
        try:
            before = group.commit(chunk)
        except CorruptError:
            remove_commit(group.path, chunk)
            return
        if before is not None:
            _withdraw(group, before, features)


def _withdraw(group: EncoderGroup, before: Commit, features: Collection[str]) -> Commit | None:
    """Take features out of a commit; give what is left of it."""
    left = before.without(features)
    if not left.features:
        remove_commit(group.path, before.chunk)
        return None
    if len(left.features) < len(before.features):
        write_commit(group.path, replace(left, spine=group.info.spine))
    return left


def _refuse_changed(group: EncoderGroup, before: Commit, now: Sequence[bytes | None]) -> None:
    """Refuse items with other bytes than some feature was made from."""
    first = group.info.chunk_rows(group.modality, before.chunk).start
    for offset, (old, new) in enumerate(zip(before.hashes, now, strict=True)):
        is_used = any(reasons[offset] is None for reasons in before.failures.values())
        if is_used and old is not None and new is not None and old != new:
            raise FingerprintError(
                f"{group.modality} row {first + offset} has other bytes now than when {group.name} was extracted; "
                "put the old file back, or extract into a new folder"
            )


def fit_item(item: Array, item_shape: tuple[int, ...], dtype: str, name: str) -> Array:
    """Turn what an encoder gave for one item into what is stored.

    Args:
        item: (D,) or (T, D) float.
        item_shape: the shape the feature should have, -1 where it may vary.
        dtype: the dtype on disk.
        name: the feature's name, for errors.

    Raises:
        DataError: the shape differs, or a value is NaN or beyond the range of the dtype on disk.
    """
    if item.shape[-1] != item_shape[-1] or (item_shape[0] >= 0 and item.shape != item_shape):
        raise DataError(f"feature {name} should be shaped {item_shape}, the encoder gave {item.shape}")
    with np.errstate(over="ignore"):
        stored = item.astype(dtype)
    if not np.isfinite(stored).all():
        largest = float(np.abs(item).max())
        if np.isfinite(largest):
            raise DataError(
                f"feature {name} holds {largest:.6g}, beyond the range of {dtype}; extract with --dtype float32"
            )
        raise DataError(f"the encoder gave NaN or infinity for feature {name}; check its weights and its precision")
    return stored
