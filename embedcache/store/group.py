"""The folder of one encoder: a Zarr group with the fingerprint, an array per feature and a commit per chunk.

A commit is written after the arrays of its chunk; without it the chunk does not exist. The `zarr.json` of a feature
states the shape and dtype of its items, and their axis.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from embedcache.axis import Axis
from embedcache.errors import CorruptError, PathError
from embedcache.files import find_files
from embedcache.provenance import DERIVED, IMPORTED, RUN, Manifest, add_digest, check_record, check_same, digest
from embedcache.settings import explain
from embedcache.store.arrays import (
    CRC_BYTES,
    REPAIR,
    chunk_path,
    group_metadata,
    read_metadata,
    write_metadata,
)
from embedcache.store.commits import Commit, read_commit
from embedcache.store.layout import CacheInfo, encoder_path, read_info

M = TypeVar("M", bound=Manifest)

ATTRIBUTE = "embedcache"
"""Name of the Zarr attribute that holds all others of embedcache."""

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
        spec: opens the encoder again.
        fingerprint: everything that decides the features.
        view: opens the view again from any folder, if the name in the fingerprint does not.
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
        """Whether the vectors were imported: their hashes are those of the vectors, since nobody has the items."""
        return self.fingerprint.get("family") == IMPORTED

    @property
    def command(self) -> str:
        """Command that computes the features that are missing."""
        return "embedcache derive" if self.is_derived else "embedcache extract"

    @property
    def inputs(self) -> list[tuple[str, str]]:
        """Modality and name, `encoder/feature`, of the features that derived features were computed from."""
        read = self.fingerprint.get("view", {}).get("inputs") or self.fingerprint.get("inputs", ())
        return [(entry["modality"], entry["feature"]) for entry in read]

    @property
    def features(self) -> list[str]:
        """Names of the features that have metadata, complete or not."""
        return sorted(path.parent.name for path in find_files(self.path, "*/zarr.json"))

    @property
    def has_commits(self) -> bool:
        """Whether any chunk is committed."""
        return any(find_files(self.path, "chunks/*.json"))

    def commit(self, chunk: int) -> Commit | None:
        """Return the commit of a chunk with the rows of the tables now, or None.

        Raises:
            CorruptError: the commit belongs to another encoder or to other rows, or has another number of rows.
        """
        commit = read_commit(self.path, chunk)
        if commit is None:
            return None
        if commit.encoder != self.fingerprint_digest:
            raise CorruptError(f"chunk {chunk} in {self.path} belongs to another encoder; {REPAIR}")
        num_rows = self.info.num_chunk_rows(commit.index_digest, self.modality, chunk)
        if num_rows is None:  # another process may have appended samples since this one opened the cache
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
        """Check that the stored features have a fingerprint; `FingerprintError` names each field that differs."""
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
    except (LookupError, TypeError, ValueError):  # metadata of another array: the chunk and they are written again
        return False


def open_group(cache_path: Path, modality: str, name: str, info: CacheInfo) -> EncoderGroup:
    """Open the folder of one encoder, which may have no chunks yet.

    Raises:
        PathError: there is no such folder.
        CorruptError: its metadata is not that of an encoder.
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


def find_group(cache_path: Path, modality: str, name: str, info: CacheInfo) -> EncoderGroup | None:
    """Open the folder of one encoder; None if no chunk of it is committed."""
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
    """Create the folder of one encoder, or open it if the same encoder wrote it; a folder without commits is replaced.

    Raises:
        FingerprintError: another encoder wrote it; names each field that differs with both values.
    """
    if (group := find_group(cache_path, modality, name, info)) is not None:
        group.check_same(fingerprint)
        return group
    path = encoder_path(cache_path, modality, name)
    attributes = {"spec": spec, "fingerprint": dict(fingerprint), **({"view": view} if view else {})}
    write_metadata(path, group_metadata({ATTRIBUTE: add_digest(attributes)}))
    return EncoderGroup(path=path, modality=modality, info=info, spec=spec, fingerprint=fingerprint, view=view)


_DTYPES = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64"})


class _GroupAttributes(Manifest):
    """What the metadata of a folder state of its encoder."""

    spec: str
    fingerprint: dict[str, Any]
    view: str = ""
    digest: str


class FeatureAttributes(Manifest):
    """What the metadata of a feature state besides those of its arrays.

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
    """Read what embedcache states in the metadata of a Zarr group or array; CorruptError if it states nothing."""
    try:
        attributes = read_metadata(path)
    except CorruptError as error:
        raise CorruptError(f"{error}; {_WRITE_AGAIN}") from error
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
