"""The chunks that an extraction works on: the features that each lacks, the rows it has stored, and its leases."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.extract.feature_writer import FeatureWriter
from embedcache.modalities import MODALITIES


@dataclass(frozen=True, eq=False)
class ChunkTask:
    """A chunk, and for each writer the features that it lacks; this process holds the lease of each writer.

    Args:
        num_stored: number of rows at its start that are not encoded, as they are stored already.
    """

    chunk: int
    missing: Mapping[FeatureWriter, Sequence[str]]
    num_stored: int = 0

    def release(self) -> None:
        """Release the leases of all writers."""
        for writer in self.missing:
            writer.leases.release(self.chunk)


def lease_free_chunks(writers: Sequence[FeatureWriter], chunks: Iterable[int]) -> Iterator[ChunkTask]:
    """Iterate over the chunks that no other process works on; each is leased when it is requested."""
    for chunk in chunks:
        leased = [writer for writer in writers if writer.missing(chunk) and writer.leases.acquire(chunk)]
        task = _open_task(chunk, leased)
        if task.missing:
            yield task


def lease_chunk(writer: FeatureWriter, chunk: int) -> ChunkTask:
    """Lease a chunk, waiting until no other process works on it.

    Only for a process that holds no other lease: two of them could wait for each other.
    """
    writer.leases.acquire(chunk, wait=True)
    return _open_task(chunk, [writer])


def _open_task(chunk: int, leased: Sequence[FeatureWriter]) -> ChunkTask:
    """Create the task, without the writers whose chunk another process committed just before the lease was taken."""
    missing = {writer: writer.missing(chunk, refresh=True) for writer in leased}
    ChunkTask(chunk, {writer: names for writer, names in missing.items() if not names}).release()
    missing = {writer: names for writer, names in missing.items() if names}
    return ChunkTask(chunk, missing, _count_stored(chunk, missing))


def _count_stored(chunk: int, missing: Mapping[FeatureWriter, Sequence[str]]) -> int:
    """Count the rows at the start of a chunk that are not encoded, as all writers have stored them before.

    A chunk that is not full when it is committed gets more rows with samples that are appended; see
    `embedcache.store.commits`. It is 0 for texts, whose batches are sorted by length.
    """
    is_start = np.ones(1, bool)  # whether all writers can begin after a number of rows
    for writer, names in missing.items():
        commit = writer.stored_commit(chunk)
        if commit is None or MODALITIES[writer.group.modality].kind == "texts":
            return 0
        for name in names:
            if name not in commit.features or not writer.group.has_files(commit, name):
                return 0
            is_start = is_start & commit.stored_starts(name, writer.encoder.batch_size)
    return int(np.flatnonzero(is_start).max())
