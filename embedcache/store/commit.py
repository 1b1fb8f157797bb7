"""The record that ends a chunk: written last, and without it the chunk does not exist."""

import hashlib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.errors import CorruptError, PathError
from embedcache.files import flush, io_reason, write_atomic
from embedcache.provenance import canonical_json, digest
from embedcache.store.layout import commit_path
from embedcache.store.tables import read_table

HASH_BYTES = 16
NOT_YET = "not extracted yet"
"""Why an item that was added to a chunk after its commit has no feature: the next extraction makes the chunk anew."""

_FAILURE = "failure of "
_METADATA_KEY = b"embedcache"
_REPAIR = "make it again with: embedcache verify CACHE --repair"


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What is known of one chunk of one encoder.

    Args:
        chunk: its number.
        encoder: digest of the encoder's fingerprint.
        index_digest: identity of the cache's rows.
        features: feature name -> file below the encoder's folder -> CRC-32C of its rows.
        hashes: BLAKE2b-128 of each item's raw bytes or UTF-8 text; None where they could not be read.
        failures: feature name -> why each item has none; None where it has one.
    """

    chunk: int
    encoder: str
    index_digest: str
    features: Mapping[str, Mapping[str, str]]
    hashes: Sequence[bytes | None]
    failures: Mapping[str, Sequence[str | None]]

    def of_rows(self, num_rows: int) -> "Commit":
        """Give the same for a chunk that has more rows, added since, or fewer, for one who has not seen them yet."""
        added = num_rows - len(self.hashes)
        if not added:
            return self
        failures = {
            feature: [*reasons[:num_rows], *[NOT_YET] * max(added, 0)] for feature, reasons in self.failures.items()
        }
        return replace(self, hashes=[*self.hashes[:num_rows], *[None] * max(added, 0)], failures=failures)

    def without(self, features: Collection[str]) -> "Commit":
        """Give the same without some features."""
        return replace(self, features={name: files for name, files in self.features.items() if name not in features})


def hash_item(data: bytes) -> bytes:
    """Get the BLAKE2b-128 of an item's raw bytes, or of its text as UTF-8."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def write_commit(encoder_folder: Path, commit: Commit) -> None:
    """Commit a chunk. Its arrays must be on the disk already."""
    about = {
        "chunk": commit.chunk,
        "encoder": commit.encoder,
        "spine": commit.index_digest,
        "features": commit.features,
        "digest": _digest(commit),
    }
    columns = {"hash": pa.array(commit.hashes, pa.binary(HASH_BYTES))}
    for feature in sorted(commit.features):
        columns[f"{_FAILURE}{feature}"] = pa.array(commit.failures[feature], pa.string())
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: canonical_json(about)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_atomic(commit_path(encoder_folder, commit.chunk), buffer.getvalue())


def remove_commit(encoder_folder: Path, chunk: int) -> None:
    """Make a chunk not exist."""
    path = commit_path(encoder_folder, chunk)
    path.unlink(missing_ok=True)
    flush(path.parent)


def read_commit(encoder_folder: Path, chunk: int) -> Commit | None:
    """Get a chunk's record, or None where the chunk is not committed.

    Raises:
        CorruptError: the record cannot be read.
    """
    path = commit_path(encoder_folder, chunk)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PathError(f"cannot read {path}: {io_reason(error)}") from error
    try:
        commit, written = _parse(data)
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise CorruptError(f"{path} cannot be read as a commit: {error}; {_REPAIR}") from error
    if written not in (None, _digest(commit)):  # caches of the first day have none
        raise CorruptError(f"{path} has other content than was written; {_REPAIR}")
    if commit.chunk != chunk:
        raise CorruptError(f"{path} is not the commit of chunk {chunk}; {_REPAIR}")
    return commit


def _parse(data: bytes) -> tuple[Commit, str | None]:
    table = read_table(io.BytesIO(data))
    about: dict[str, Any] = json.loads(table.schema.metadata[_METADATA_KEY])
    commit = Commit(
        chunk=about["chunk"],
        encoder=about["encoder"],
        index_digest=about["spine"],
        features=about["features"],
        hashes=table["hash"].to_pylist(),
        failures={feature: table[f"{_FAILURE}{feature}"].to_pylist() for feature in about["features"]},
    )
    return commit, about.get("digest")


def _digest(commit: Commit) -> str:
    """Get the SHA-256 over all that a commit says."""
    hashes = [None if value is None else value.hex() for value in commit.hashes]
    failures = {feature: commit.failures[feature] for feature in commit.features}
    return digest([commit.chunk, commit.encoder, commit.index_digest, commit.features, hashes, failures])
