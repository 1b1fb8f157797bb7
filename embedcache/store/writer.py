"""Writing a chunk of features: the arrays first, the commit that makes them exist last."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from embedcache.arrays import Array, blocks
from embedcache.errors import CorruptError, DataError, FingerprintError
from embedcache.files import locked
from embedcache.provenance import digest
from embedcache.store.arrays import write_array, write_chunk
from embedcache.store.commit import NOT_YET, Commit, remove_commit, write_commit
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, chunk_shape, feature_about
from embedcache.store.layout import items_path
from embedcache.store.tables import open_table, table_errors


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
    found = {str(item.dtype) for item in items if item is not None}
    if found - {dtype}:
        raise FingerprintError(
            f"feature {group.name}/{feature} is stored as {dtype}, not as {', '.join(found)}: "
            "another process began it so; ask for the same --dtype"
        )
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
    failures: Mapping[str, Sequence[str | None]],
    *,
    mends: bool = False,
) -> None:
    """Write features of one chunk, then the record that makes them exist.

    What the chunk has already stays as it is: features, those too that another process committed meanwhile, and rows,
    where samples were added to a chunk that was not full. One writer at a time: the chunk is locked. A feature that
    gets rows does not exist while it is written.

    Args:
        group: the encoder's folder.
        chunk: which chunk.
        features: feature -> one array an item from `fit_item`, in row order; None for a failed item.
        hashes: of each item's raw bytes or text; None where they could not be read.
        failures: feature -> why an item has none; None where it has one.
        mends: give items to rows that failed, too.

    Raises:
        FingerprintError: an item's bytes are no longer those that the earlier features were made from, or the folder
            is another encoder's by now.
    """
    with locked(group.path / "chunks", chunk):
        group.check_same_maker()
        before = group.commit(chunk)
        if before is not None:
            _refuse_changed(group, before, hashes)
            if not mends:
                features = {name: items for name, items in features.items() if not group.has(before, name)}
            features, failures = _with_stored(group, before, features, failures, mends=mends)
            hashes = [now if now is not None else earlier for now, earlier in zip(hashes, before.hashes, strict=True)]
        if not features:
            return
        if before is not None:
            before = _withdraw(group, before, features)
        files = {name: write_feature_chunk(group, name, chunk, items) for name, items in features.items()}
        reasons = {name: failures[name] for name in features}
        record = Commit(
            chunk=chunk,
            encoder=digest(group.fingerprint),
            index_digest=group.info.index_digest,
            features=files if before is None else {**before.features, **files},
            hashes=hashes,
            failures=reasons if before is None else {**before.failures, **reasons},
        )
        write_commit(group.path, record)


def _with_stored(
    group: EncoderGroup,
    before: Commit,
    features: Mapping[str, Sequence[Array | None]],
    failures: Mapping[str, Sequence[str | None]],
    *,
    mends: bool,
) -> tuple[dict[str, list[Array | None]], dict[str, list[str | None]]]:
    """Put what a chunk has in the place of what came out for those rows now."""
    items = {name: list(new) for name, new in features.items()}
    reasons = {name: list(failures[name]) for name in features}
    for name in before.features.keys() & features.keys():
        if not group.is_whole(before, name):
            continue  # it is made again
        stored = Feature(group, name).items(before)
        for row, (item, reason) in enumerate(zip(stored, before.failures[name], strict=False)):
            if reason == NOT_YET or (mends and reason is not None and reasons[name][row] is None):
                continue
            items[name][row], reasons[name][row] = item, reason
    return items, reasons


def withdraw(group: EncoderGroup, chunk: int, features: Collection[str]) -> None:
    """Make features of one chunk not exist, so that the next extraction makes them again."""
    with locked(group.path / "chunks", chunk):
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
        write_commit(group.path, replace(left, index_digest=group.info.index_digest))
    return left


def _refuse_changed(group: EncoderGroup, before: Commit, now: Sequence[bytes | None]) -> None:
    """Refuse items with other bytes than some feature was made from."""
    first = group.info.chunk_rows(group.modality, before.chunk).start
    for offset, (old, new) in enumerate(zip(before.hashes, now, strict=True)):
        is_used = any(reasons[offset] is None for reasons in before.failures.values())
        if is_used and old is not None and new is not None and old != new:
            path = _path(group, before.chunk, offset)
            raise FingerprintError(
                f"{group.modality} {path}in row {first + offset} has other bytes now than when {group.name} was "
                "extracted; put the old file back, or extract into a new folder"
            )


def _path(group: EncoderGroup, chunk: int, offset: int) -> str:
    """Get the path of an image, and a space; texts have none."""
    if group.modality != "image":
        return ""
    path = items_path(group.path.parents[1], group.modality)
    with table_errors(path), open_table(path) as table:
        return f"{table.read_row_group(chunk, columns=['path'], use_threads=False)['path'][offset]} "


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
