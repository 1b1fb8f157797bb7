"""An inverted file whose lists lie on the disk, built part by part: the vectors never have to fit into memory."""

import os
from pathlib import Path

import numpy as np

from embedcache.arrays import Ints
from embedcache.curate.indexes.faiss_index import RowIndex, read_index
from embedcache.curate.vectors import Vectors
from embedcache.errors import SettingError
from embedcache.progress import Progress

FILES = ("index.part-*.faiss", "lists-*.ivfdata")

PART_BYTES = 256_000_000
"""Codes of a part: what building keeps in memory beside a chunk, and what a killed build does again at most."""


def check_lists(index: RowIndex, factory: str) -> None:
    """Refuse a kind of index whose vectors do not lie in lists.

    Raises:
        SettingError: names the factory string.
    """
    if not index.num_lists or index.is_refined:
        raise SettingError(f"{factory!r} has no lists to leave on the disk; give one such as IVF4096,SQfp16")


def lists_name(num_vectors: int) -> str:
    """Name the file of the lists: another one for another number of items, so that the old index stays whole."""
    return f"lists-{num_vectors}.ivfdata"


def clean(folder: Path, *, keeps: str | None) -> None:
    """Remove parts, and lists that no index has any more."""
    for path in [path for pattern in FILES for path in folder.glob(pattern)]:
        if path.name != keeps:
            path.unlink()


def fill(folder: Path, trained_path: Path, old: RowIndex | None, vectors: Vectors, progress: Progress) -> RowIndex:
    """Index all valid rows: parts that are there stay, others are made, and all are merged into one file of lists.

    Args:
        folder: of the index.
        trained_path: a trained index that holds nothing.
        old: a finished index on the disk that holds some of the rows.
        vectors: of the feature.
        progress: told about items.
    """
    parts = [] if old is None else [old]
    for path in sorted(folder.glob("index.part-*.faiss")):
        part = read_index(path, is_mapped=True)
        if np.isin(part.rows, _rows(parts)).any():  # merged before the process was killed
            path.unlink()
        else:
            parts.append(part)
    missing = np.setdiff1d(vectors.rows, _rows(parts))
    if old is not None and not len(missing) and len(parts) == 1:
        return old
    progress.start("indexing on the disk", len(missing), f"{vectors.modality}s")
    chunk_size = vectors.cache.info.chunk_size
    numbers = np.unique(missing // chunk_size).tolist()
    while numbers:
        part, num_before = read_index(trained_path, is_mapped=False), sum(map(len, parts))
        while numbers and len(part) * part.code_size < PART_BYTES:
            rows, vectors_BP = vectors.chunk(numbers.pop(0))
            is_new = np.isin(rows, missing)
            part.add_part(rows[is_new], vectors_BP[is_new], num_before + len(part))
            progress.advance(int(is_new.sum()))
        path = folder / f"index.part-{part.rows[0]:012d}.faiss"
        part.write(path)
        parts.append(read_index(path, is_mapped=True))
    progress.finish()
    return _merged(read_index(trained_path, is_mapped=False), parts, folder)


def _rows(parts: list[RowIndex]) -> Ints:
    return np.concatenate([np.empty(0, np.int64), *(part.rows for part in parts)])


def _merged(index: RowIndex, parts: list[RowIndex], folder: Path) -> RowIndex:
    path = folder / lists_name(sum(map(len, parts)))
    merged = index.merge_on_disk(parts, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return merged
