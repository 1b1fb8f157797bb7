"""The folder of one encoder, a Zarr group with the fingerprint, and its features, an array each.

A commit is written after the arrays of its chunk. Without it the chunk does not exist. The `zarr.json` of a feature
states the shape and dtype of its items, and their axis. Rows are gathered from memory maps, chunks read in order.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError

from embedcache.arrays import Array, Bools, Ints, distinct, to_rows
from embedcache.errors import ArtifactError, CorruptError, DataError, PathError, UnfinishedError
from embedcache.files import find_files
from embedcache.progress import Progress
from embedcache.provenance import DERIVED, IMPORTED, RUN, Manifest, add_digest, check_record, check_same, digest
from embedcache.settings import explain
from embedcache.store.arrays import (
    CRC_BYTES,
    REPAIR,
    chunk_path,
    group_metadata,
    max_maps,
    open_chunk,
    read_metadata,
    write_metadata,
)
from embedcache.store.commits import HASH, Commit, finish, is_complete, read_commit
from embedcache.store.layout import Axis, CacheInfo, commit_path, encoder_path, read_info
from embedcache.store.tables import Column, is_none, to_array

M = TypeVar("M", bound=Manifest)

ATTRIBUTE = "embedcache"
"""Name of the Zarr attribute that contains all attributes of embedcache."""

_SAME_ENCODER = "use the same encoder, --backend and --precision as before, or extract into a new folder"
_OTHER_NAME = (
    "an encoder of another family has this name, the model part of its spec: extract into a new folder, or name the "
    "model of your own encoder otherwise"
)
_WRITE_AGAIN = "restore that file, or remove it and run the same embedcache extract, derive or import again"
_SAME_DERIVATION = "use the same inputs and parameters as before, or derive under another name"


@dataclass(frozen=True, kw_only=True)
class EncoderGroup:
    """The features of one encoder, or of one view of it.

    Args:
        spec: name with which the encoder is opened again.
        fingerprint: everything that decides the features.
        view: name with which the view is opened again from any folder, if the name in the fingerprint does not.
    """

    path: Path
    modality: str
    info: CacheInfo
    spec: str
    fingerprint: Mapping[str, Any]
    view: str = ""

    @cached_property
    def fingerprint_digest(self) -> str:
        """Digest of the fingerprint, as in the commits."""
        return digest(self.fingerprint)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def is_derived(self) -> bool:
        """Whether the features were computed from other features of the cache."""
        return self.fingerprint.get("family") == DERIVED

    @property
    def is_from_run(self) -> bool:
        """Whether a trained run computed the features."""
        return self.is_derived and self.fingerprint.get("model") == RUN

    @property
    def is_imported(self) -> bool:
        """Whether the vectors were imported. The hashes are then hashes of the vectors, since nobody has the items."""
        return self.fingerprint.get("family") == IMPORTED

    @property
    def command(self) -> str:
        """Command that computes the features that are missing."""
        return "embedcache derive" if self.is_derived else "embedcache extract"

    @property
    def inputs(self) -> list[tuple[str, str]]:
        """Modality and name, `encoder/feature`, of the features from which derived features were computed."""
        entries = self.fingerprint.get("view", {}).get("inputs") or self.fingerprint.get("inputs", ())
        return [(entry["modality"], entry["feature"]) for entry in entries]

    @property
    def features(self) -> list[str]:
        """Names of the features, complete or not, even if their metadata are missing."""
        return feature_names(self.path)

    @property
    def has_commits(self) -> bool:
        """Whether any chunk is committed."""
        return any(find_files(self.path, "chunks/*.json"))

    def commit(self, chunk: int) -> Commit | None:
        """Return the commit of a chunk with the rows of the current tables, or None.

        Raises:
            CorruptError: the commit belongs to another encoder or to other rows, or has another number of rows.
        """
        commit = read_commit(self.path, chunk)
        if commit is None:
            return None
        if commit.encoder != self.fingerprint_digest:
            raise CorruptError(f"chunk {chunk} in {self.path} belongs to another encoder; {REPAIR}")

        num_rows = self.info.num_chunk_rows(commit.index_digest, self.modality, chunk)
        if num_rows is None:
            # Another process may have appended samples since this one opened the cache.
            num_rows = read_info(self.path.parents[1]).num_chunk_rows(commit.index_digest, self.modality, chunk)
        if num_rows is None:
            raise CorruptError(f"chunk {chunk} in {self.path} belongs to other rows; {REPAIR}")
        if len(commit.hashes) != num_rows:
            raise CorruptError(f"chunk {chunk} in {self.path}: expected {num_rows} rows, got {len(commit.hashes)}")

        return commit.resize(self.info.count_items(self.modality, [chunk]))

    def has(self, commit: Commit | None, feature: str) -> bool:
        """Return whether a chunk has a feature for all of its rows, in files of the right size."""
        return commit is not None and commit.is_complete(feature) and self.has_files(commit, feature)

    def has_files(self, commit: Commit, feature: str) -> bool:
        """Return whether the files of a feature of a chunk exist and have the right size."""
        return all(_has_right_size(self.path / file) for file in commit.features[feature])

    def check_same(self, fingerprint: Mapping[str, Any]) -> None:
        """Check that the stored features have a fingerprint. The `FingerprintError` names each field that differs."""
        is_same_family = self.fingerprint.get("family") == fingerprint.get("family")
        is_derived = self.is_derived and is_same_family
        what = f"{'derived feature' if is_derived else 'encoder'} {self.name!r} of cache {self.path.parents[1]}"
        next_step = _SAME_DERIVATION if is_derived else _SAME_ENCODER if is_same_family else _OTHER_NAME
        check_same(what, self.fingerprint, fingerprint, next_step=next_step)


def _has_right_size(file: Path) -> bool:
    """Return whether a file of a commit, the folder of its array and its number, exists and has the right size."""
    array_path = file.parent

    try:
        metadata = read_metadata(array_path)
        shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        num_bytes = math.prod(shape) * np.dtype(metadata["data_type"]).itemsize + CRC_BYTES
        return bool(chunk_path(array_path, int(file.name), len(shape)).stat().st_size == num_bytes)
    except (FileNotFoundError, PathError, CorruptError):
        return False
    except (LookupError, TypeError, ValueError):
        # These are the metadata of another array, so they are rewritten with the chunk.
        return False


def open_group(cache_path: Path, modality: str, name: str, info: CacheInfo) -> EncoderGroup:
    """Open the folder of one encoder, which may have no chunks yet.

    Raises:
        PathError: there is no such folder.
        CorruptError: its metadata does not describe an encoder.
    """
    path = encoder_path(cache_path, modality, name)
    record = _read_attributes(path)
    check_record(path / "zarr.json", record, next_step=_WRITE_AGAIN)

    attributes = _construct(path, _GroupAttributes, record)
    return EncoderGroup(
        path=path,
        modality=modality,
        info=info,
        spec=attributes.spec,
        fingerprint=attributes.fingerprint,
        view=attributes.view,
    )


def encoder_names(folder: Path) -> list[str]:
    """Return the encoders in the folder of a modality, even if their metadata are missing."""
    names = set()
    for path in find_files(folder, f"*/{commit_path(Path(), 0)}"):
        names.add(path.parents[1].name)
    for path in find_files(folder, "*/zarr.json"):
        names.add(path.parent.name)
    return sorted(names)


def feature_names(folder: Path) -> list[str]:
    """Return the features in the folder of an encoder, even if their metadata are missing."""
    commit = first_commit(folder)
    names = set(commit.features) if commit else set()
    for path in find_files(folder, "*/zarr.json"):
        names.add(path.parent.name)
    return sorted(names)


def first_commit(folder: Path) -> Commit | None:
    """Return the commit of the first chunk, or None if it does not exist or is damaged."""
    with suppress(ArtifactError, PathError):
        return read_commit(folder, 0)
    return None


def find_group(cache_path: Path, modality: str, name: str, info: CacheInfo) -> EncoderGroup | None:
    """Open the folder of one encoder. Returns None if no chunk is committed."""
    path = encoder_path(cache_path, modality, name)
    has_commits = (path / "zarr.json").exists() and any(find_files(path, "chunks/*.json"))
    return open_group(cache_path, modality, name, info) if has_commits else None


def create_group(
    cache_path: Path,
    modality: str,
    name: str,
    info: CacheInfo,
    *,
    spec: str,
    fingerprint: Mapping[str, Any],
    view: str = "",
) -> EncoderGroup:
    """Create the folder of one encoder, or open it if the same encoder wrote it.

    A folder without commits is replaced.

    Raises:
        FingerprintError: another encoder wrote it. The error names each field that differs with both values.
    """
    if (group := find_group(cache_path, modality, name, info)) is not None:
        group.check_same(fingerprint)
        return group

    path = encoder_path(cache_path, modality, name)
    attributes = {"spec": spec, "fingerprint": dict(fingerprint)}
    if view:
        attributes["view"] = view
    write_metadata(path, group_metadata({ATTRIBUTE: add_digest(attributes)}))
    return EncoderGroup(path=path, modality=modality, info=info, spec=spec, fingerprint=fingerprint, view=view)


_DTYPES = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64"})


class _GroupAttributes(Manifest):
    """Attributes of an encoder in the metadata of its folder."""

    spec: str
    fingerprint: dict[str, Any]
    view: str = ""
    digest: str


class FeatureAttributes(Manifest):
    """Attributes of a feature in its metadata.

    Args:
        item_shape: (D,), (T, D), or (-1, D) for any number of tokens.
    """

    item_shape: tuple[Annotated[int, Field(ge=-1, lt=2**31)], ...] = Field(strict=False, min_length=1, max_length=2)
    dtype: str
    axis: Axis | None = None

    def model_post_init(self, _context: object) -> None:
        if self.item_shape[-1] < 0 or self.dtype not in _DTYPES:
            raise ValueError(
                f"expected the item_shape and dtype of a feature, got {self.item_shape} and {self.dtype!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON values."""
        return self.model_dump(mode="json", exclude_none=True)


def read_feature(group: EncoderGroup, feature: str) -> FeatureAttributes:
    """Read the shape and the dtype of a feature, and its axis if it has one."""
    path = group.path / feature
    return _construct(path, FeatureAttributes, _read_attributes(path))


def _read_attributes(path: Path) -> dict[str, Any]:
    """Read the attributes of embedcache in the metadata of a Zarr group or array. CorruptError if there are none."""
    try:
        attributes = read_metadata(path)
    except CorruptError as error:
        raise CorruptError(f"{error}; {_WRITE_AGAIN}") from error
    except PathError as error:
        raise PathError(f"{error}; run the same embedcache extract, derive or import again") from error

    for name in ("attributes", ATTRIBUTE):
        attributes = attributes.get(name) if isinstance(attributes, dict) else None
    if not isinstance(attributes, dict):
        path = path / "zarr.json"
        raise CorruptError(f"{path}: expected Zarr attributes of embedcache, got none; {_WRITE_AGAIN}")
    return attributes


def _construct(path: Path, kind: type[M], attributes: dict[str, Any]) -> M:
    try:
        return kind(**attributes)
    except ValidationError as error:
        raise CorruptError(f"{path / 'zarr.json'}: {explain(error)}; {_WRITE_AGAIN}") from error


T = TypeVar("T")


class Feature:
    """One named output of one encoder over all items of its modality, read-only. Open it with `Cache.feature`.

    `load()` reads all rows into one array, `gather(rows)` reads any rows, and `chunks()` iterates over all rows without
    keeping them in memory. `valid` tells which rows have a value, and `failures` why the others have none.

    Opening reads no vectors. No byte is used before it was compared with its checksum: each time a chunk is read in
    order, and once in a process when a chunk is mapped for rows in any order.
    Memory: the commits (under 100 bytes per item) once rows are read, and memory maps, which the system may drop at any
    time.

    Example:
        >>> feature = embedcache.Cache("cache").feature("image")
        >>> feature.load().shape, feature.dtype
        ((12, 48), 'float16')
        >>> feature.gather([3, 1]).shape, feature.valid.all().item()
        ((2, 48), True)
    """

    def __init__(self, group: EncoderGroup, feature: str) -> None:
        attributes = read_feature(group, feature)
        self.group = group
        self.feature = feature
        self.item_shape = attributes.item_shape
        self.dtype = attributes.dtype
        self.axis = attributes.axis
        self.num_items = group.info.num_items[group.modality]
        self._attributes_digest = digest(attributes.to_json())
        self._maps: OrderedDict[int, Array] = OrderedDict()

        # Both are filled only for the chunks that were requested.
        self._commits: dict[int, Commit | None] = {}
        self._valid_N = np.zeros(self.num_items, bool)

    def __repr__(self) -> str:
        shape = ", ".join("any" if size < 0 else str(size) for size in self.shape)
        return f"Feature({self.name}: {self.modality}, ({shape}) {self.dtype})"

    @property
    def name(self) -> str:
        """`encoder/feature`, as on the command line."""
        return f"{self.group.name}/{self.feature}"

    @property
    def modality(self) -> str:
        """Name of the modality of its items."""
        return self.group.modality

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Everything that decides the values."""
        return self.group.fingerprint

    @property
    def is_ragged(self) -> bool:
        """Whether the number of tokens varies between items."""
        return self.item_shape[0] < 0

    @property
    def num_tokens(self) -> int:
        """Number of vectors of all committed items."""
        if not self.is_ragged:
            return self.num_items * (self.item_shape[0] if len(self.item_shape) > 1 else 1)
        return int(self.lengths().sum())

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of items, then the shape of one item, in which -1 is a varying number of tokens."""
        return (self.num_items, *self.item_shape)

    @cached_property
    def commits(self) -> list[Commit | None]:
        """Commit of each chunk, or None if this feature is not committed.

        Raises:
            CorruptError: a commit has changed, or the metadata of this feature has changed since it was committed.
        """
        return [self._find_commit(chunk) for chunk in range(self.group.info.num_chunks(self.modality))]

    def _find_commit(self, chunk: int) -> Commit | None:
        """Return the commit of a chunk, or None if this feature is not committed. Each commit is read once."""
        if chunk not in self._commits:
            commit = self._own(self.group.commit(chunk))
            if commit is not None:
                # Set first, because a thread that finds the commit relies on these rows.
                self._valid_N[self._rows(chunk)] = is_none(commit.failures[self.feature])
            self._commits[chunk] = commit
        return self._commits[chunk]

    def _own(self, commit: Commit | None) -> Commit | None:
        """Return a commit if it has this feature with the attributes of the metadata, or None without the feature."""
        if commit is None or self.feature not in commit.features:
            return None
        self.check_attributes(commit)
        return commit

    def check_attributes(self, commit: Commit | None) -> None:
        """Check that a chunk was committed with the current shape, dtype and axis of the metadata.

        Raises:
            CorruptError: they differ.
        """
        if commit is not None and commit.attributes.get(self.feature) != self._attributes_digest:
            path = self.group.path / self.feature / "zarr.json"
            raise CorruptError(
                f"{path}: its attributes have changed since chunk {commit.chunk} was committed; restore that file"
            )

    @property
    def valid(self) -> Bools:
        """(N,) bool, whether each item has this feature. Use `has` for a few items."""
        # Reading a commit sets the rows of its chunk, so all commits are read.
        _ = self.commits
        return self._valid_N

    def has(self, rows: Ints) -> Bools:
        """Return whether each row has this feature: (B,) bool, which is False if there is no such row.

        Only the commits of their chunks are read.
        """
        rows = to_rows(rows)
        has_B = (rows >= 0) & (rows < self.num_items)
        rows = rows[has_B]

        if len(self._commits) < self.group.info.num_chunks(self.modality):
            for chunk in distinct(rows // self.group.info.chunk_size).tolist():
                self._find_commit(chunk)

        has_B[has_B] = self._valid_N[rows]
        return has_B

    @cached_property
    def failed(self) -> tuple[Ints, pa.ChunkedArray]:
        """Rows of the failed items, ascending, and the reason of each: (M,) int64 and M strings."""
        # The first pieces are empty, because an empty list cannot be concatenated.
        rows = [np.empty(0, np.int64)]
        reasons = [pa.array([], pa.string())]

        for commit in self.commits:
            if commit is not None:
                chunk_reasons = to_array(commit.failures[self.feature], pa.string())
                rows.append(self._rows(commit.chunk).start + np.flatnonzero(chunk_reasons.is_valid()))
                reasons.append(chunk_reasons.drop_null())
        return np.concatenate(rows), pa.chunked_array(reasons)

    @cached_property
    def failures(self) -> dict[int, str]:
        """Row of each failed item -> reason, in row order."""
        rows, reasons = self.failed
        return dict(zip(rows.tolist(), reasons.to_pylist(), strict=True))

    @property
    def hashes(self) -> Column[bytes | None]:
        """BLAKE2b-128 of each item's raw bytes or text, in row order, for committed chunks only."""
        arrays = [to_array(commit.hashes, HASH) for commit in self.commits if commit is not None]
        return Column(pa.chunked_array(arrays, HASH))

    def require_complete(self) -> None:
        """Check that every chunk is committed, or raise an `UnfinishedError`."""
        num_missing = 0
        for commit in self.commits:
            if commit is None or not commit.is_complete(self.feature):
                num_missing += 1
        if num_missing:
            are = "is" if num_missing == 1 else "are"
            raise UnfinishedError(
                f"feature {self.name} is not finished: {num_missing} of {len(self.commits)} chunks {are} missing; "
                f"run the same {self.group.command} again to resume it"
            )

    def gather(self, rows: Ints) -> Array:
        """Copy rows in the given order: (B,) int -> (B, D) or (B, T, D) in the dtype on disk.

        Raises:
            DataError: the feature is ragged, or a row is not an integer, out of range, failed or not committed.
            CorruptError: a chunk differs from its checksum, which is compared when this process first maps it.
        """
        self._require_fixed()
        rows = self._check_rows(rows)
        out = np.empty((len(rows), *self.item_shape), self.dtype)
        size = self._chunk_shape[0]

        # In ascending order, the rows of one chunk are next to each other, so each chunk is mapped once.
        order = np.argsort(rows, kind="stable")
        ordered_rows = rows[order]
        numbers, starts = np.unique(ordered_rows // size, return_index=True)
        bounds = pairwise([*starts.tolist(), len(rows)])

        for number, (start, stop) in zip(numbers.tolist(), bounds, strict=True):
            places = ordered_rows[start:stop] - number * size

            # `take` copies whole rows, as an index does not.
            out[order[start:stop]] = self._map(number).take(places, axis=0)
        return out

    def gather_tokens(self, rows: Ints) -> list[Array]:
        """Copy rows in the given order, as `gather` does, but as one (D,) or (T, D) array per item."""
        if not self.is_ragged:
            return list(self.gather(rows))

        rows = self._check_rows(rows)
        tokens: list[Array | None] = [None] * len(rows)
        for chunk in distinct(rows // self.group.info.chunk_size):
            start = self._rows(int(chunk)).start
            items = self._read(self._commit_of(int(chunk)), partial(self._ragged_items, once=True))
            for position in np.flatnonzero(rows // self.group.info.chunk_size == chunk):
                tokens[position] = items[rows[position] - start]

        # Every row is valid, so every item has tokens.
        arrays = [array for array in tokens if array is not None]
        assert len(arrays) == len(rows)
        return arrays

    def lengths(self) -> Ints:
        """Return the number of tokens of each item without reading them: (N,) int64, 0 for a failed item."""
        num_tokens = self.item_shape[0] if len(self.item_shape) > 1 else 1
        lengths_N = np.zeros(self.num_items, np.int64)
        for commit in self.commits:
            if commit is not None:
                rows = self._rows(commit.chunk)
                if self.is_ragged:
                    lengths_B = self._read(commit, partial(self._lengths, once=True))
                    lengths_N[rows] = lengths_B[: rows.stop - rows.start]
                else:
                    lengths_N[rows] = num_tokens

        # Items of one shape have a row in their chunk even if they failed.
        lengths_N[~self.valid] = 0
        return lengths_N

    def chunks(self) -> Iterator[tuple[slice, Any]]:
        """Iterate over the committed chunks in row order, with checksums checked.

        Yields:
            The rows, and their (rows, D) or (rows, T, D) array, a read-only view. Failed rows are NaN, or -1 for
            integers. A ragged feature yields a list of (T, D) arrays, with None for a failed item.
        """
        for commit in self.commits:
            if commit is not None:
                yield from self.read_chunk(commit)

    def read_chunk(self, commit: Commit) -> Iterator[tuple[slice, Any]]:
        """Read one committed chunk, with checksums checked, as `chunks` yields it.

        Raises:
            CorruptError: a checksum does not match.
            UnfinishedError: a file is missing.
        """
        if self.is_ragged:
            yield self._rows(commit.chunk), self._read(commit, self._ragged_items)
            return

        rows = self._rows(commit.chunk)
        size = self._chunk_shape[0]
        for start in range(rows.start, rows.stop, size):
            number = start // size

            # The rows of samples that were appended later are not in the commit.
            if f"{self.feature}/{number}" not in commit.features[self.feature]:
                return

            values = self._read(commit, partial(self._values, number=number))
            stop = min(start + size, rows.stop)
            yield slice(start, stop), values[: stop - start]

    def items(self, commit: Commit) -> list[Array | None]:
        """Read one committed chunk as one array per item, or None for a failed item. Raises as `read_chunk` does."""
        items: list[Array | None] = []
        for _, values in self.read_chunk(commit):
            items += list(values)

        reasons = commit.failures[self.feature][: len(items)]
        return [item if reason is None else None for item, reason in zip(items, reasons, strict=True)]

    def load(self, *, progress: Progress | None = None) -> Array:
        """Read the complete feature into memory: (N, D) or (N, T, D), with checksums checked.

        Failed rows are NaN, or -1 for integers. `progress`, in which the caller has started a step, advances by rows.

        Raises:
            UnfinishedError: chunks are missing.
            CorruptError: a checksum does not match.
            DataError: the feature is ragged.
        """
        self._require_fixed()
        self.require_complete()

        out = np.empty(self.shape, self.dtype)
        for rows, values in self.chunks():
            out[rows] = values
            if progress:
                progress.advance(len(values))
        return out

    def _require_fixed(self) -> None:
        if self.is_ragged:
            raise DataError(f"feature {self.name} has a varying number of tokens; use gather_tokens or chunks")

    def _rows(self, chunk: int) -> slice:
        return self.group.info.chunk_rows(self.modality, chunk)

    @cached_property
    def _chunk_shape(self) -> tuple[int, ...]:
        return self.group.info.chunk_shape(self.item_shape, self.dtype)

    def _check_rows(self, rows: Ints) -> Ints:
        rows = to_rows(rows)
        is_outside_B = (rows < 0) | (rows >= self.num_items)
        if is_outside_B.any():
            raise DataError(
                f"feature {self.name}: expected rows from 0 to {self.num_items - 1}, got {rows[is_outside_B][0]}"
            )

        has_B = self.has(rows)
        if not has_B.all():
            row = int(rows[~has_B][0])
            reason = self.failures.get(row, "its chunk is not committed")
            raise DataError(f"row {row} has no feature {self.name}: {reason}")
        return rows

    def _commit_of(self, chunk: int) -> Commit:
        """Return the commit of a chunk with valid rows."""
        commit = self._find_commit(chunk)

        # The caller has checked its rows.
        assert commit is not None
        return commit

    def _read(self, commit: Commit, read: Callable[[Commit], T]) -> T:
        """Read files of a chunk, and again with its new commit if another process has written the chunk since.

        After `--extend` and `--retry-failed`, earlier values are the same in the new files. After a removal, an
        UnfinishedError is raised.
        """
        try:
            return read(commit)
        except (CorruptError, UnfinishedError):
            current = self._commit_after_writers(commit.chunk)
            if current is None or current.features[self.feature] == commit.features[self.feature]:
                raise
            current.check_keeps(commit, self.feature)

        return read(current)

    def _commit_after_writers(self, chunk: int) -> Commit | None:
        """Read the commit of a chunk, after the transaction of a running or killed process is finished."""
        # A user who must not write the cache cannot finish the write of a process that was killed.
        with suppress(OSError):
            finish(self.group.path, chunk)

        if is_complete(self.group.path, chunk):
            raise UnfinishedError(
                f"chunk {chunk} of feature {self.name} is being written by another process, or was when it ended; "
                f"run the same command again once {self.group.command} has finished"
            )

        return self._own(self.group.commit(chunk))

    def _map(self, number: int) -> Array:
        """Map one chunk, unless it is still mapped. Thread-safe."""
        # Other threads may remove a map at any time, so it is looked up only once.
        values = self._maps.get(number)
        if values is None:
            commit = self._commit_of(number * self._chunk_shape[0] // self.group.info.chunk_size)
            values = self._maps[number] = self._read(commit, partial(self._values, number=number, once=True))

            chunk_bytes = math.prod(self._chunk_shape) * np.dtype(self.dtype).itemsize
            if len(self._maps) > max_maps(self.group.path / self.feature, chunk_bytes):
                # Other threads may have removed all.
                with suppress(KeyError):
                    self._maps.popitem(last=False)
        return values

    def _checksum(self, commit: Commit, file: str) -> str:
        """Return the committed checksum of a file."""
        try:
            return commit.features[self.feature][file]
        except KeyError:
            raise CorruptError(f"the commit of chunk {commit.chunk} of {self.name} lacks {file}; {REPAIR}") from None

    def _values(self, commit: Commit, *, number: int, once: bool = False) -> Array:
        """Map one chunk of the array of a feature with items of one shape."""
        crc = self._checksum(commit, f"{self.feature}/{number}")
        return open_chunk(self.group.path / self.feature, number, self._chunk_shape, self.dtype, crc, once=once)

    def _lengths(self, commit: Commit, *, once: bool = False) -> Array:
        """Map the number of tokens of each item of one chunk, which is -1 for a failed item."""
        crc = self._checksum(commit, f"{self.feature}/lengths/{commit.chunk}")
        path = self.group.path / self.feature / "lengths"
        shape = (self.group.info.chunk_size,)
        return open_chunk(path, commit.chunk, shape, "int32", crc, once=once)

    def _ragged_items(self, commit: Commit, *, once: bool = False) -> list[Array | None]:
        """Map one chunk of tokens."""
        lengths = self._lengths(commit, once=once)
        name = f"values/{commit.chunk:05d}"

        # A chunk without tokens has one row.
        shape = (max(int(np.maximum(lengths, 0).sum()), 1), self.item_shape[1])
        crc = self._checksum(commit, f"{self.feature}/{name}/0")
        values = open_chunk(self.group.path / self.feature / name, 0, shape, self.dtype, crc, once=once)

        # The last chunk of a cache may have fewer items than its array.
        lengths = lengths[: self.group.info.count_items(self.modality, [commit.chunk])]
        stops = np.cumsum(np.maximum(lengths, 0))
        return [
            None if length < 0 else values[stop - length : stop] for length, stop in zip(lengths, stops, strict=True)
        ]
