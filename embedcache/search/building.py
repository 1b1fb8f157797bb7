"""Building an index chunk by chunk, with checkpoints, in memory or with inverted lists on disk.

| file of an unfinished index | content |
| --- | --- |
| `building.json` | its source, the kind that is being built, kinds that were rejected, and the checksums below |
| `index.partial.faiss` | in memory: the index with the rows added so far; on disk: the trained index, empty |
| `index.part-ROW.faiss` | on disk: a part of the rows, the first of which is ROW |
| `lists-N.ivfdata` | on disk: the inverted lists of all parts, merged |

A finished build writes the lists, then `index.faiss`, then the card. Before the index and before the card, the
checksums of what is written by then are recorded in `building.json`: if the process is killed in between, the next one
can tell files that are newer than the card from damaged ones. What the next build of the same kind begins with:

| killed | in memory | with lists on disk |
| --- | --- | --- |
| before the first checkpoint | nothing, or the finished index that it extends | the same |
| while rows are added | the rows of `index.partial.faiss` | its training, and the rows of its parts up to a lost one |
| between index and card | the last checkpoint; `index.faiss` if there is none | `index.faiss` |

A build of another kind first removes all files of this one.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Ints, distinct
from embedcache.dataset.vectors import Vectors
from embedcache.devices import AUTO
from embedcache.errors import CorruptError, PathError, SettingError
from embedcache.files import flush
from embedcache.modalities import noun
from embedcache.progress import Progress
from embedcache.provenance import check_same
from embedcache.search.autotune import Configuration, sampled_recall
from embedcache.search.card import (
    INDEX,
    STATE,
    BuildState,
    IndexCard,
    check_lists,
    open_row_index,
    read_state,
    write_state,
)
from embedcache.search.faiss_index import RowIndex, is_whole, make_index, read_index
from embedcache.settings import replace_fields
from embedcache.store.arrays import file_checksum
from embedcache.store.layout import CacheInfo

PART_BYTES = 256_000_000  # codes per part on disk: kept in memory beside a chunk, and repeated by a killed build
_PARTIAL = "index.partial.faiss"
_PARTS = "index.part-*.faiss"
_LIST_FILES = (_PARTS, "lists-*.ivfdata")
_REMOVED = "samples that the index holds were removed from the cache: adding all others again, without training"

FILES = (INDEX, _PARTIAL, STATE, "record.json", *_LIST_FILES)


class IndexBuilder:
    """The unfinished index in a folder. The ids in its files say which rows they hold.

    Args:
        folder: folder of the index.
        source: what the index is built from, as fields of the card.
        info: the cache.
        card: card of the finished index in the folder, which is extended; None: there is none.
        device: FAISS uses GPUs unless it is `cpu`.

    Raises:
        FingerprintError: the folder holds an unfinished index of another source; the cache may have grown since.
    """

    def __init__(
        self,
        folder: Path,
        source: Mapping[str, Any],
        info: CacheInfo,
        *,
        card: IndexCard | None = None,
        device: str = AUTO,
    ) -> None:
        self._folder, self._card, self._device = folder, card, device
        self._is_resumed, self._state = (folder / STATE).is_file(), BuildState(source=source)
        if self._is_resumed:
            state = read_state(folder)
            stored = str(state.source.get("index_digest"))
            requested = {**source, "index_digest": stored if info.has_rows_of(stored) else source["index_digest"]}
            check_same(
                f"the unfinished index {folder}", state.source, requested, next_step="give the path of a new folder"
            )
            self._state = replace_fields(state, source=source)  # with the digest of the present samples

    @property
    def rejected(self) -> Mapping[str, float]:
        """Recall of each kind of index, by factory string, that missed the requested recall."""
        return self._state.rejected

    def build(
        self, kind: Configuration, vectors: Vectors, progress: Progress, *, checkpoint_s: float, min_recall: float = 0.0
    ) -> RowIndex | None:
        """Build an index of all valid rows, or resume an interrupted build of the same kind.

        In memory, checkpoints are written every `checkpoint_s`, less often if writing takes longer than a tenth of
        that; with lists on disk, finished parts are kept. Returns None, and rejects the kind, if a sample shows that
        its codes cannot reach a recall.

        Raises `SettingError` if FAISS rejects the factory string, has too few vectors to train, or has no lists that
        can stay on disk.
        """
        if kind.is_on_disk:
            return self._build_on_disk(kind.factory, vectors, progress)
        index = self._start(kind.factory, vectors, progress)
        if min_recall and not len(index) and (recall := sampled_recall(index, vectors)) < min_recall:
            self.reject(kind.factory, recall)
            progress.note(f"{kind.factory}: recall@10 {recall:.3f} on a sample is too low, not built")
            return None
        self._fill(index, kind.factory, vectors, progress, checkpoint_s)
        return index

    def reject(self, factory: str, recall: float) -> None:
        """Record that a kind of index missed the recall, and remove its files."""
        self._write_state(factory=None, rejected={**self._state.rejected, factory: recall})
        self._remove_unfinished()

    def write(self, index: RowIndex) -> dict[str, str]:
        """Write the index, complete but for its card, and return the checksums of its files, as the card states them.

        They are recorded before each file that relies on them: those of the lists before the index, all before the
        card.
        """
        name = index.lists_file
        checksums = {} if name is None else {name: file_checksum(self._folder / name)}
        self._write_state(checksums={**self._state.checksums, "lists": checksums})
        index.write(self._folder / INDEX)
        checksums = {INDEX: file_checksum(self._folder / INDEX), **checksums}
        self._write_state(checksums={**self._state.checksums, "checksums": checksums})
        return checksums

    def _start(self, factory: str, vectors: Vectors, progress: Progress) -> RowIndex:
        """Return the index in memory that an earlier build left, or a new one that is trained and empty."""
        partial = self._read_partial(factory)
        index = self._read_finished(factory) if partial is None else partial
        if index is None:
            index = make_index(factory, vectors.width, device=self._device)
            self._set_kind(factory)
            if not index.is_trained:
                _train(index, factory, vectors, progress)
                index.write(self._folder / _PARTIAL)
            return index
        self._set_kind(factory)
        if _holds_removed(index, vectors):
            progress.note(_REMOVED)
            return index.emptied()
        return index

    def _fill(self, index: RowIndex, factory: str, vectors: Vectors, progress: Progress, checkpoint_s: float) -> None:
        """Add all valid rows that an index in memory does not hold."""
        index.resume()
        missing = np.setdiff1d(vectors.rows, index.rows, assume_unique=True)
        is_missing_N = _mask(missing, vectors)
        progress.start(f"indexing as {factory}", len(missing), noun(vectors.modality))
        last, writing_s = time.monotonic(), 0.0
        for number in distinct(missing // vectors.cache.info.chunk_size):
            rows, vectors_BP = vectors.chunk(int(number))
            is_new = is_missing_N[rows]
            index.add(rows[is_new], vectors_BP[is_new])
            progress.advance(int(is_new.sum()))
            if time.monotonic() - last >= max(checkpoint_s, 10 * writing_s):
                started = time.monotonic()
                index.write(self._folder / _PARTIAL)
                last = time.monotonic()
                writing_s = last - started if checkpoint_s else 0.0
        progress.finish()

    def _build_on_disk(self, factory: str, vectors: Vectors, progress: Progress) -> RowIndex:
        """Train an index, or take the training of a finished one, and fill lists on disk with all valid rows.

        The rows of the finished index and of parts on disk are kept, unless some of them were removed from the cache.
        """
        old = kept = self._read_finished(factory)
        if old is not None and _holds_removed(old, vectors):
            progress.note(_REMOVED)
            kept = None
        self._write_trained(factory, old, vectors, progress)
        parts = self._reusable_parts(kept, vectors)
        missing = np.setdiff1d(vectors.rows, _rows(parts), assume_unique=True)
        if kept is not None and kept.lists_file is not None and not len(missing) and len(parts) == 1:
            return kept
        parts += self._write_parts(missing, vectors, progress, num_before=sum(map(len, parts)))
        return self._merge(parts, old)

    def _write_trained(self, factory: str, old: RowIndex | None, vectors: Vectors, progress: Progress) -> None:
        """Write the trained, empty index that each part begins with, unless an interrupted build of this kind did."""
        trained = self._read_partial(factory)
        index = make_index(factory, vectors.width, device=self._device) if trained is None else trained
        if not index.num_lists:
            raise SettingError(
                f"factory: expected inverted lists to leave on disk, such as IVF4096,SQfp16, got {factory!r}"
            )
        self._set_kind(factory)
        if trained is not None and not len(trained):
            return
        for path in self._folder.glob(_PARTS):
            path.unlink()  # of another trained index
        if trained is not None:  # the checkpoint of a build in memory
            index = trained.emptied()
        elif old is not None:
            index = read_index(self._folder / INDEX, is_mapped=False, device=self._device).emptied()
        else:
            _train(index, factory, vectors, progress)
        index.write(self._folder / _PARTIAL)

    def _reusable_parts(self, kept: RowIndex | None, vectors: Vectors) -> list[RowIndex]:
        """Return the kept index and the parts on disk whose positions follow; delete others, such as those in it."""
        parts = [kept] if kept is not None else []
        found = [(path, part) for path in self._folder.glob(_PARTS) if (part := _read_unfinished(path, is_mapped=True))]
        for path, part in sorted(found, key=lambda each: each[1].first_position):
            is_next = part.first_position == sum(map(len, parts)) and not np.isin(part.rows, _rows(parts)).any()
            if is_next and not _holds_removed(part, vectors):
                parts.append(part)
            else:
                path.unlink()
        return parts

    def _write_parts(self, missing: Ints, vectors: Vectors, progress: Progress, *, num_before: int) -> list[RowIndex]:
        """Add missing rows to parts of `PART_BYTES`, at positions after those of the other parts, and write each."""
        is_missing_N, parts = _mask(missing, vectors), []
        progress.start("indexing on disk", len(missing), noun(vectors.modality))
        numbers = distinct(missing // vectors.cache.info.chunk_size).tolist()
        while numbers:
            part = read_index(self._folder / _PARTIAL, is_mapped=False, device=self._device)
            while numbers and len(part) * part.code_size < PART_BYTES:
                rows, vectors_BP = vectors.chunk(numbers.pop(0))
                is_new = is_missing_N[rows]
                part.add_part(rows[is_new], vectors_BP[is_new], num_before + len(part))
                progress.advance(int(is_new.sum()))
            num_before += len(part)
            path = self._folder / f"index.part-{part.rows[0]:012d}.faiss"
            part.write(path)
            parts.append(read_index(path, is_mapped=True))
        progress.finish()
        return parts

    def _merge(self, parts: list[RowIndex], old: RowIndex | None) -> RowIndex:
        """Merge parts into one file of lists; those of the card and of `index.faiss` stay intact until the new card."""
        used = [] if old is None else [old.lists_file]
        name = f"lists-{sum(map(len, parts))}.ivfdata"
        while name in used or (self._card is not None and name == self._card.lists):
            name = name.replace(".ivfdata", "-again.ivfdata")
        path = self._folder / name
        merged = read_index(self._folder / _PARTIAL, is_mapped=False, device=self._device).merge_on_disk(parts, path)
        flush(path)
        return merged

    def _read_partial(self, factory: str) -> RowIndex | None:
        """Read the last checkpoint of an interrupted build of this kind; None: there is none."""
        is_same_kind = self._state.factory == factory
        return _read_unfinished(self._folder / _PARTIAL, device=self._device) if is_same_kind else None

    def _read_finished(self, factory: str) -> RowIndex | None:
        """Read `index.faiss`, if it is of this kind: that of the card, or without one that in `building.json`."""
        if self._card is not None:
            return self._read_with_card(self._card)
        return self._read_without_card() if self._state.factory == factory else None

    def _read_with_card(self, card: IndexCard) -> RowIndex:
        """Read the index to extend, which is newer than its card if a build was killed in between."""
        path = self._folder / INDEX
        if self._is_resumed and not is_whole(path):
            return open_row_index(self._folder, card, device=self._device)
        index = read_index(path, is_mapped=False, device=self._device)
        if self._is_resumed:
            check_lists(self._folder, index, {**card.checksums, **self._state.recorded})
        return index

    def _read_without_card(self) -> RowIndex | None:
        """Read the index of a build that was killed before its first card; a damaged one is removed."""
        path = self._folder / INDEX
        index = _read_unfinished(path, device=self._device)
        try:
            if index is not None:
                check_lists(self._folder, index, self._state.recorded)
        except (CorruptError, PathError):
            path.unlink()
            index = None
        return index

    def _set_kind(self, factory: str) -> None:
        """Record the kind that is being built, once no file of another kind is left that could be taken for it."""
        if self._state.factory != factory:
            self._remove_unfinished()
            self._write_state(factory=factory)

    def _remove_unfinished(self) -> None:
        """Remove the files of an unfinished index; a finished one stays, also where it is newer than its card."""
        if self._card is None:
            _remove_rows(self._folder)
            (self._folder / INDEX).unlink(missing_ok=True)
            self._state = replace_fields(self._state, checksums={})
        else:
            _remove_rows(self._folder, self._card.lists, *self._state.recorded)

    def _write_state(self, **changes: Any) -> None:
        self._state = replace_fields(self._state, **changes)
        write_state(self._folder, self._state)


def _train(index: RowIndex, factory: str, vectors: Vectors, progress: Progress) -> None:
    progress.note(f"training {factory}")
    index.train(vectors.sample(index.num_training, progress=progress))


def _holds_removed(index: RowIndex, vectors: Vectors) -> bool:
    """Return whether an index holds samples that were removed from the cache since."""
    return not np.isin(index.rows, vectors.rows).all()


def _read_unfinished(path: Path, *, is_mapped: bool = False, device: str = AUTO) -> RowIndex | None:
    """Read a file of an interrupted build; one with other bytes is removed, as if it had not been written."""
    try:
        if is_whole(path):
            return read_index(path, is_mapped=is_mapped, device=device)
    except FileNotFoundError:
        return None
    except CorruptError:
        pass  # bytes that FAISS did not write
    path.unlink()
    return None


def _mask(rows: Ints, vectors: Vectors) -> Bools:
    mask_N = np.zeros(vectors.feature.num_items, bool)
    mask_N[rows] = True
    return mask_N


def _rows(parts: list[RowIndex]) -> Ints:
    return np.concatenate([np.empty(0, np.int64), *(part.rows for part in parts)])


def remove_leftovers(folder: Path, *, lists: str | None) -> None:
    """Remove what building leaves once the card is written, except for the file of lists that the index uses."""
    _remove_rows(folder, lists)
    (folder / STATE).unlink(missing_ok=True)


def _remove_rows(folder: Path, *kept: str | None) -> None:
    """Remove checkpoints, parts, and files of lists, but for those of some names."""
    for path in [path for pattern in (_PARTIAL, *_LIST_FILES) for path in folder.glob(pattern)]:
        if path.name not in kept:
            path.unlink()
