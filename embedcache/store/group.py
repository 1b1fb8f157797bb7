"""One encoder's folder in a cache: a Zarr group whose attributes are the fingerprint, with an array a feature."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.errors import CorruptError, PathError
from embedcache.provenance import check_same, digest
from embedcache.store.arrays import CRC_BYTES, chunk_path, read_metadata, write_array, write_group
from embedcache.store.commit import NOT_YET, Commit, read_commit
from embedcache.store.layout import FORMAT_VERSION, CacheInfo, encoder_path, read_info

_TOKEN_CHUNK_BYTES = 16 * 2**20
_ATTRIBUTE = "embedcache"
_ASK_FOR_THE_SAME = "ask for the same encoder as before, --backend and --precision too, or extract elsewhere"


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
        num_rows = self.info.num_rows_then(commit.index_digest, self.modality, chunk)
        if num_rows is None:  # another process may have added samples since this one opened the cache
            num_rows = read_info(self.path.parents[1]).num_rows_then(commit.index_digest, self.modality, chunk)
        if num_rows is None:
            raise CorruptError(f"chunk {chunk} in {self.path} was written for other rows than this cache numbers")
        if len(commit.hashes) != num_rows:
            raise CorruptError(f"chunk {chunk} in {self.path} has {len(commit.hashes)} rows; it should have {num_rows}")
        rows = self.info.chunk_rows(self.modality, chunk)
        return commit.of_rows(rows.stop - rows.start)

    def has(self, commit: Commit | None, feature: str) -> bool:
        """Say whether a chunk has a feature for all its rows, in files that are there and as long as they should be."""
        if commit is None or feature not in commit.features or NOT_YET in commit.failures[feature]:
            return False
        return self.is_whole(commit, feature)

    def is_whole(self, commit: Commit, feature: str) -> bool:
        """Say whether the files of a feature of a chunk are there, and as long as they should be."""
        arrays: dict[str, list[int]] = {}
        for file in commit.features[feature]:
            array, _, number = file.rpartition("/")
            arrays.setdefault(array, []).append(int(number))
        return all(_are_whole(self.path / array, numbers) for array, numbers in arrays.items())

    def check_same_maker(self) -> None:
        """Refuse to go on where the folder is another encoder's by now: two processes may have begun it together.

        Raises:
            FingerprintError: names each field that differs with both values.
        """
        now = open_group(self.path.parents[1], self.modality, self.name, self.info)
        check_same(f"encoder {self.path}", now.fingerprint, self.fingerprint, next_step=_ASK_FOR_THE_SAME)


def _are_whole(array_path: Path, numbers: Sequence[int]) -> bool:
    try:
        grid = read_metadata(array_path)
        shape = grid["chunk_grid"]["configuration"]["chunk_shape"]
        num_bytes = int(np.prod(shape)) * np.dtype(grid["data_type"]).itemsize + CRC_BYTES
        return all(chunk_path(array_path, number, len(shape)).stat().st_size == num_bytes for number in numbers)
    except (FileNotFoundError, PathError):
        return False


def open_group(cache_path: Path, modality: str, name: str, info: CacheInfo) -> EncoderGroup:
    """Open one encoder's folder.

    Raises:
        PathError: there is none.
        CorruptError: its attributes are not ours.
    """
    path = encoder_path(cache_path, modality, name)
    attributes = _attributes(path)
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
            next_step=_ASK_FOR_THE_SAME,
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
    return _attributes(group.path / feature)


def _attributes(path: Path) -> dict[str, Any]:
    metadata = read_metadata(path)
    about = metadata.get("attributes", {}).get(_ATTRIBUTE) if isinstance(metadata, dict) else None
    if not isinstance(about, dict):
        raise CorruptError(f"{path} was not written by embedcache: it has no attributes of ours; extract elsewhere")
    return about


def chunk_shape(info: CacheInfo, item_shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Choose an array's chunks: the commit chunk for vectors, an exact fraction of it for tokens."""
    rows = info.chunk_size
    item_bytes = int(np.prod(item_shape)) * np.dtype(dtype).itemsize
    if len(item_shape) > 1:
        while rows % 2 == 0 and rows * item_bytes > _TOKEN_CHUNK_BYTES:
            rows //= 2
    return (rows, *item_shape)
