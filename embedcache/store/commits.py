"""The commit of a chunk: its features, their files with checksums, and hashes of its items.

A commit is written after the arrays of its chunk. Without it the chunk does not exist.

For each feature, `Commit.failures` has the state of each row. It is None if the arrays contain a value, `PENDING` if
the row was not tried, `REMOVED` if its sample is no longer in the cache, and any other reason if the row failed.

A chunk that is not full is committed with its present rows. When samples are appended to the cache, it has more rows
than its commit, which stays valid, so that nothing is encoded twice. The new rows are pending:

1. `Commit.resize` adds them whenever a commit is read. Readers find items without a value.
2. `Commit.is_complete` is false for them, so that the next extraction works on the chunk again.
3. Extraction begins with the first pending row. For the rows before, as for all rows that it does not try, it passes
   `PENDING` to `commit_chunk`.
4. `commit_chunk` writes the chunk again, in one transaction: values and reasons of the commit stay, and pending rows
   get the new ones.

A transaction replaces files of one folder together: all of them or none, whenever the process is killed. The new files
are written below a folder of the transaction. Then a file is written there that says that all are complete: at this
moment they have replaced the old ones. They are then moved to their places by the writer itself or, if it was killed,
by the next writer, or by a reader that finds an old file next to a new one.
"""

import base64
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Strict, ValidationError

from embedcache.arrays import Array, Ints, number_values
from embedcache.errors import CorruptError, EmbedcacheError, PathError, UnfinishedError, one_line
from embedcache.files import (
    check_no_link,
    flush,
    io_reason,
    is_remote,
    locked,
    put_file,
    read_file,
    remove_file,
    remove_folder,
    write_atomic,
)
from embedcache.modalities import MODALITIES
from embedcache.provenance import FileName, Manifest, add_digest, canonical_json, check_record
from embedcache.settings import explain
from embedcache.store.arrays import REPAIR
from embedcache.store.layout import Count, commit_path
from embedcache.store.tables import Column, is_none, to_array

_COMPLETE = "complete"
"""File of a transaction whose other files are all written."""

PENDING = "not extracted yet"
"""Reason of a row that was not tried. The next extraction encodes it."""

REMOVED = "removed"
"""Reason of an item whose sample was removed from the cache."""

HASH_BYTES = 16
HASH = pa.binary(HASH_BYTES)
"""Type of a hash of `hash_item`, which is null for an item that was not read."""


@contextmanager
def replacing_together(root: Path, number: int) -> Iterator[Path]:
    """Create a folder whose files replace, after the block, the files of the same paths below `root`, all or none.

    After an error none is replaced. The caller must have locked the number in `root/chunks`, and finished the
    transaction of a killed writer.

    Args:
        root: folder of an encoder.
        number: number of the transaction, such as the number of the chunk whose files are replaced.

    Example:
        >>> with replacing_together(group.path, chunk) as folder:  # doctest: +SKIP
        ...     write_atomic(folder / "chunks/00003.json", commit)
    """
    folder = _folder(root, number)
    try:
        yield folder
    except BaseException:
        _remove(folder)
        raise

    write_atomic(folder / _COMPLETE, b"")
    roll_forward(root, number)


def roll_forward(root: Path, number: int) -> None:
    """Finish a transaction, as `finish` does, for a caller that has locked it."""
    folder = _folder(root, number)
    if not is_remote(folder):
        check_no_link(folder)

    if is_complete(root, number):
        # The commit comes last: a new array differs from the checksum in an old commit, which readers notice.
        for name in sorted(_find_names(folder), key=lambda name: name.startswith("chunks/")):
            _move(folder / name, root / name)
    _remove(folder)


def finish(root: Path, number: int) -> None:
    """Move the files of a complete transaction to their places, or remove the files of an incomplete one.

    This waits for a writer that works on the transaction.
    """
    if _folder(root, number).exists():
        with locked(root / "chunks", number):
            roll_forward(root, number)


def is_complete(root: Path, number: int) -> bool:
    """Return whether a transaction is complete, but some of its files may not be in their places yet."""
    return (_folder(root, number) / _COMPLETE).exists()


def find_transactions(root: Path) -> list[int]:
    """Return the numbers of the transactions in a local folder, which are in work or were left by killed writers."""
    return sorted(int(path.stem) for path in (root / "chunks").glob("*.txn"))


def _folder(root: Path, number: int) -> Path:
    return root / "chunks" / f"{number:05d}.txn"


def _find_names(folder: Path) -> list[str]:
    """Return the paths of the files of a transaction below its folder, without the one that completes it."""
    names = set()
    if is_remote(folder):
        prefix = f"{folder.path}/"  # type: ignore[attr-defined]
        for location in folder.fs.find(folder.path):  # type: ignore[attr-defined]
            names.add(location.removeprefix(prefix))
    else:
        for path in folder.rglob("*"):
            if path.is_file():
                names.add(path.relative_to(folder).as_posix())
    return sorted(names - {_COMPLETE})


def _move(file: Path, path: Path) -> None:
    if is_remote(file):
        file.fs.cp_file(file.path, path.path)  # type: ignore[attr-defined]
    else:
        put_file(file, path)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        remove_folder(folder)


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The record of one chunk of one encoder.

    Args:
        encoder: digest of the encoder's fingerprint.
        index_digest: identity of the cache's rows.
        features: feature name -> file below the encoder's folder -> CRC-32C of its rows.
        hashes: BLAKE2b-128 of each item's raw bytes or UTF-8 text, or None if they could not be read.
        failures: feature name -> reason for each failed item, None for the others.
        attributes: feature name -> digest of the attributes in its metadata.
    """

    chunk: int
    encoder: str
    index_digest: str
    features: Mapping[str, Mapping[str, str]]
    hashes: Sequence[bytes | None]
    failures: Mapping[str, Sequence[str | None]]
    attributes: Mapping[str, str]

    def resize(self, num_rows: int) -> "Commit":
        """Return the commit with the number of rows of the caller's tables. Appended rows are pending."""
        if num_rows == len(self.hashes):
            return self

        # The commit has more rows if samples were appended since the caller read the tables.
        num_added = max(num_rows - len(self.hashes), 0)
        failures = {}
        for feature, reasons in self.failures.items():
            failures[feature] = [*reasons[:num_rows], *[PENDING] * num_added]
        return replace(self, hashes=[*self.hashes[:num_rows], *[None] * num_added], failures=failures)

    def without(self, features: Collection[str]) -> "Commit":
        """Return the commit without some features."""
        files = dict(self.features)
        for name in features:
            files.pop(name, None)
        attributes = {name: value for name, value in self.attributes.items() if name in files}
        return replace(self, features=files, attributes=attributes)

    def used_rows(self) -> list[int]:
        """Return the rows, counted from the start of the chunk, that have at least one feature."""
        is_used = np.logical_or.reduce([is_none(reasons) for reasons in self.failures.values()])
        rows: list[int] = np.flatnonzero(is_used).tolist()
        return rows

    def is_complete(self, feature: str) -> bool:
        """Return whether every row has the feature, or a reason other than `PENDING`."""
        return feature in self.features and not self.failures[feature].count(PENDING)

    def check_keeps(self, earlier: "Commit", feature: str) -> None:
        """Check that rows that had a feature in an earlier commit of the chunk still have it.

        Raises:
            UnfinishedError: their samples were removed since.
        """
        had_value = is_none(earlier.failures[feature])
        has_value = is_none(self.failures[feature])

        # One of the commits is longer if samples were appended.
        size = min(len(had_value), len(has_value))
        if (had_value[:size] & ~has_value[:size]).any():
            raise UnfinishedError("samples were removed from the cache while it was read; run the same command again")

    def count_tried(self, feature: str) -> int:
        """Return how many rows from the start of the chunk are not pending."""
        reasons = self.failures[feature]
        for row, reason in enumerate(reasons):
            if reason == PENDING:
                return row
        return len(reasons)


def has_failed(reason: str | None) -> bool:
    """Return whether an item with this reason was tried without success."""
    return reason not in (None, PENDING, REMOVED)


def describe_failures(failures: Mapping[str, int]) -> str:
    """Return the numbers of removed and failed items by kind, in a phrase such as `failed 1: 1 damaged`.

    Args:
        failures: kind of failure -> number of items. Removed items are one of the kinds.
    """
    num_failed = 0
    counts = []
    for kind, count in failures.items():
        if has_failed(kind):
            num_failed += count
            counts.append(f"{count:,} {kind}")

    removed = f"removed {failures[REMOVED]:,}, " if REMOVED in failures else ""
    return f"{removed}failed {num_failed:,}{': ' + '; '.join(counts) if counts else ''}"


class _Record(Manifest):
    """The JSON object of a commit, with plain lists, which are checked without an object per row."""

    chunk: int
    encoder: str
    index_digest: str
    num_rows: Count
    features: Mapping[FileName, Mapping[FileName, str]]
    attributes: Mapping[str, str]
    failures: Mapping[str, Sequence[Annotated[tuple[int, str], Strict(strict=False)]]]
    hashes: str
    without_hash: Sequence[int]
    digest: str = ""


def write_commit(encoder_folder: Path, commit: Commit) -> None:
    """Commit a chunk. Its arrays must be on disk already."""
    # The bytes of a null are undefined, but the file must not be.
    without_hash = is_none(commit.hashes)
    hashes_N16 = np.array(to_bytes(to_array(commit.hashes, HASH)))
    hashes_N16[without_hash] = 0

    record = _Record(
        chunk=commit.chunk,
        encoder=commit.encoder,
        index_digest=commit.index_digest,
        num_rows=len(commit.hashes),
        features=commit.features,
        attributes=commit.attributes,
        failures={name: _reasons_by_row(commit.failures[name]) for name in commit.features},
        hashes=base64.b64encode(hashes_N16.tobytes()).decode(),
        without_hash=np.flatnonzero(without_hash).tolist(),
    )
    write_atomic(commit_path(encoder_folder, commit.chunk), canonical_json(add_digest(record.to_json())))


def _reasons_by_row(reasons: Sequence[str | None]) -> list[tuple[int, str]]:
    """Return the rows that have a reason, ascending, each with its reason."""
    rows = np.flatnonzero(~is_none(reasons)).tolist()
    present = to_array(reasons, pa.string()).drop_null().to_pylist()
    return list(zip(rows, present, strict=True))


def remove_commit(encoder_folder: Path, chunk: int) -> None:
    """Remove a commit, so that the chunk no longer exists."""
    path = commit_path(encoder_folder, chunk)
    remove_file(path, missing_ok=True)
    flush(path.parent)


def read_commit(encoder_folder: Path, chunk: int) -> Commit | None:
    """Read the commit of a chunk. Returns None if the chunk is not committed.

    Raises:
        CorruptError: the file cannot be read or its content changed.
    """
    path = commit_path(encoder_folder, chunk)
    try:
        data = read_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PathError(f"cannot read {path}: {io_reason(error)}") from error

    try:
        record = json.loads(data)
        check_record(path, record, next_step=REPAIR)
        commit = _parse(_Record.model_validate(record))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, EmbedcacheError):  # it says what is wrong with the file
            raise
        reason = explain(error) if isinstance(error, ValidationError) else error
        raise CorruptError(f"{path} is not a readable commit: {one_line(reason)}; {REPAIR}") from error

    if commit.chunk != chunk:
        raise CorruptError(f"{path}: expected the commit of chunk {chunk}, got chunk {commit.chunk}; {REPAIR}")
    return commit


def _parse(record: _Record) -> Commit:
    num_rows = record.num_rows
    hashes = base64.b64decode(record.hashes, validate=True)
    if len(hashes) != HASH_BYTES * num_rows:
        raise ValueError(f"expected {num_rows} hashes, got {len(hashes)} bytes")

    # A bit for each row tells Arrow which hashes are null. Arrow needs no bits if none is null.
    without_hash = record.without_hash
    is_present = np.ones(num_rows, bool)
    is_present[without_hash] = False
    validity = pa.array(is_present).buffers()[1] if without_hash else None
    column = pa.FixedSizeBinaryArray.from_buffers(HASH, num_rows, [validity, pa.py_buffer(hashes)])

    return Commit(
        chunk=record.chunk,
        encoder=record.encoder,
        index_digest=record.index_digest,
        features=record.features,
        hashes=Column[bytes | None](column),
        failures={name: _reasons_column(num_rows, reasons) for name, reasons in record.failures.items()},
        attributes=record.attributes,
    )


def _reasons_column(num_rows: int, reasons: Sequence[tuple[int, str]]) -> Column[str | None]:
    """Return the reasons of a chunk's rows, null for the others. Memory: 4 bytes per row, and the strings."""
    values: list[str | None] = [None] * num_rows
    for row, reason in reasons:
        values[row] = reason
    return Column(pa.array(values, pa.string()))


def hash_item(data: bytes, *, interval: tuple[float | None, float | None] = (None, None)) -> bytes:
    """Return the BLAKE2b-128 of an item's raw bytes or UTF-8 text. The hash of an interval includes its bounds."""
    content = hashlib.blake2b(data, digest_size=16)
    if interval != (None, None):
        content.update(canonical_json(list(interval)))
    return content.digest()


def removed_hash(modality: str) -> bytes | None:
    """Return the hash that replaces the hash of a removed item: None, or for texts the hash of an empty string."""
    return hash_item(b"") if MODALITIES[modality].kind == "texts" else None


def number_contents(hashes: "pa.Array | pa.ChunkedArray") -> Ints:
    """Number hashes in order of first appearance, null as one value: (N,) int64. Memory: about 50 bytes per item.

    Their first 8 bytes are compared: with a probability of 1e-5, two of 20 million contents get one number.

    Example:
        >>> number_contents(pa.array([b"b" * 16, None, b"a" * 16, b"b" * 16], pa.binary(16))).tolist()
        [0, 1, 2, 0]
    """
    # The first piece is empty, because NumPy cannot concatenate zero arrays.
    pieces = [np.empty((0, 8), np.uint8)]
    for chunk in hashes.chunks if isinstance(hashes, pa.ChunkedArray) else [hashes]:
        pieces.append(to_bytes(chunk)[:, :8])
    first_N = np.concatenate(pieces).view(np.int64)[:, 0]

    # Rows of null are undefined bytes.
    first_N[hashes.is_null().to_numpy(zero_copy_only=False)] = 0
    return number_values(first_N)


def to_bytes(hashes: pa.Array) -> Array:
    """Return hashes as (N, 16) uint8. Rows of null are undefined."""
    data = np.frombuffer(hashes.buffers()[1], np.uint8)
    start = hashes.offset * HASH_BYTES
    return data[start : start + len(hashes) * HASH_BYTES].reshape(-1, HASH_BYTES)
