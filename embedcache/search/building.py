"""Filling an index chunk by chunk, so that a killed process loses at most what came after its last checkpoint.

An inverted file whose lists lie on the disk, built part by part: the vectors never have to fit into memory.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Ints
from embedcache.errors import SettingError
from embedcache.progress import Progress
from embedcache.provenance import check_same, read_json, write_json
from embedcache.search.autotune import Configuration
from embedcache.search.faiss_index import RowIndex, make_index, read_index
from embedcache.search.vectors import Vectors
from embedcache.store.layout import CacheInfo

CHECKPOINT_S = 60.0
"""Seconds between checkpoints; more where writing one takes more than a tenth of them."""

_LIST_FILES = ("index.part-*.faiss", "lists-*.ivfdata")

FILES = ("index.faiss", "index.partial.faiss", "building.json", "record.json", *_LIST_FILES)


def clean(folder: Path, *, lists: str | None) -> None:
    """Remove what building leaves, once the card is written; not the file of lists that the index has on the disk."""
    _remove_lists(folder, keeps=lists)
    for name in ("index.partial.faiss", "building.json"):
        (folder / name).unlink(missing_ok=True)


class IndexBuilder:
    """The unfinished index of a folder. The ids of `index.partial.faiss` say which rows are in.

    Args:
        folder: of the index.
        about: what it is made from; another unfinished index in the folder is refused.
        lists: the file of lists that a finished index there has on the disk.
        info: of the cache, which may have grown since.

    Raises:
        FingerprintError: the folder holds an unfinished index of something else.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], info: CacheInfo, *, lists: str | None = None) -> None:
        self._folder, self._lists = folder, lists
        self._state_path = folder / "building.json"
        self._partial_path = folder / "index.partial.faiss"
        self._about = dict(about)
        self._factory: str | None = None
        self.refused: dict[str, float] = {}
        if self._state_path.is_file():
            state = read_json(self._state_path)
            then = state["about"]["spine"]
            asked = {**about, "spine": then if info.has_rows_of(then) else about["spine"]}
            check_same(
                f"the unfinished index {folder}", state["about"], asked, next_step="give the path of a new folder"
            )
            self._factory, self.refused = state["factory"], state["refused"]

    def fill(self, kind: Configuration, vectors: Vectors, progress: Progress, *, checkpoint_s: float) -> RowIndex:
        """Get an index of all valid rows: go on with the checkpoint, or with the finished index, or begin.

        One whose lists are a file has no checkpoints: a build that was stopped keeps its finished parts.

        Args:
            kind: what to make.
            vectors: of the feature.
            progress: told about items.
            checkpoint_s: seconds between checkpoints.

        Raises:
            SettingError: FAISS does not know the factory string, cannot train it on this little, or it has no lists to
                leave on the disk.
        """
        if kind.is_on_disk:
            return self._fill_on_disk(kind.factory, vectors, progress)
        return self._fill(kind.factory, vectors, progress, checkpoint_s)

    def _fill_on_disk(self, factory: str, vectors: Vectors, progress: Progress) -> RowIndex:
        finished_path = self._folder / "index.faiss"
        old = read_index(finished_path, is_mapped=False) if finished_path.is_file() else None
        if self._factory != factory or not self._partial_path.is_file():
            index = make_index(factory, vectors.width)
            check_lists(index, factory)
            self._write_state(factory)
            if old is None:
                progress.note(f"training {factory}")
                index.train(vectors.sample(index.num_training))
            else:
                index = read_index(finished_path, is_mapped=False).emptied()
            index.write(self._partial_path)
        return fill_lists(self._folder, self._partial_path, old, vectors, progress)

    def _fill(self, factory: str, vectors: Vectors, progress: Progress, checkpoint_s: float) -> RowIndex:
        index = self._resume(factory)
        if index is None:
            index = make_index(factory, vectors.width)
            self._write_state(factory)
            if not index.is_trained:
                progress.note(f"training {factory}")
                index.train(vectors.sample(index.num_training))
                index.write(self._partial_path)
        missing = np.setdiff1d(vectors.rows, index.rows)
        progress.start(f"indexing as {factory}", len(missing), f"{vectors.modality}s")
        self._add(index, vectors, missing, progress, checkpoint_s)
        progress.finish()
        return index

    def refuse(self, factory: str, recall: float) -> None:
        """Remember that a kind of index missed the recall, and drop it."""
        self.refused[factory] = recall
        self._write_state(None)
        self._partial_path.unlink(missing_ok=True)
        _remove_lists(self._folder, keeps=self._lists)

    def finish(self, index: RowIndex) -> None:
        """Put the index in its place."""
        index.write(self._folder / "index.faiss")

    def _resume(self, factory: str) -> RowIndex | None:
        if self._factory == factory and self._partial_path.is_file():
            return read_index(self._partial_path, is_mapped=False).go_on()
        finished_path = self._folder / "index.faiss"
        if not finished_path.is_file() or self._factory not in (None, factory):
            return None
        index = read_index(finished_path, is_mapped=False).go_on()
        self._write_state(factory)
        return index

    def _add(self, index: RowIndex, vectors: Vectors, missing: Ints, progress: Progress, checkpoint_s: float) -> None:
        last, took = time.monotonic(), 0.0
        chunk_size = vectors.cache.info.chunk_size
        for number in np.unique(missing // chunk_size):
            rows, vectors_BP = vectors.chunk(int(number))
            is_new = np.isin(rows, missing)
            index.add(rows[is_new], vectors_BP[is_new])
            progress.advance(int(is_new.sum()))
            if time.monotonic() - last >= max(checkpoint_s, 10 * took):
                started = time.monotonic()
                index.write(self._partial_path)
                last = time.monotonic()
                took = last - started if checkpoint_s else 0.0

    def _write_state(self, factory: str | None) -> None:
        self._factory = factory
        state = {"about": self._about, "factory": factory, "refused": self.refused}
        write_json(self._state_path, state)


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


def _remove_lists(folder: Path, *, keeps: str | None) -> None:
    """Remove parts, and lists that no index has any more."""
    for path in [path for pattern in _LIST_FILES for path in folder.glob(pattern)]:
        if path.name != keeps:
            path.unlink()


def fill_lists(
    folder: Path, trained_path: Path, old: RowIndex | None, vectors: Vectors, progress: Progress
) -> RowIndex:
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
