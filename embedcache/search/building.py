"""Building an index chunk by chunk, with checkpoints, in memory or with inverted lists on disk.

| file of an unfinished index | content |
| --- | --- |
| `building.json` | its source, the kind that is being built, kinds that were refused, and the checksums below |
| `index.partial.faiss` | in memory: the index with the rows added so far; on disk: the trained index, empty |
| `index.part-ROW.faiss` | on disk: a part of the rows, the first of which is ROW |
| `lists-N.ivfdata` | on disk: the inverted lists of all parts, merged |

A finished build writes the lists, then the index, then the card. Before the index and before the card, the checksums
of what is written by then are recorded in `building.json`: if the process is killed in between, the next one can tell
files that are newer than the card from damaged ones.
"""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Ints, distinct
from embedcache.devices import AUTO
from embedcache.errors import CorruptError, PathError, SettingError
from embedcache.modalities import noun
from embedcache.progress import Progress
from embedcache.provenance import INDEX_DIGEST, check_same, construct, read_json, write_json
from embedcache.search.autotune import Configuration, sampled_recall
from embedcache.search.card import CARD, INDEX, STATE, check_lists, open_row_index, read_card
from embedcache.search.faiss_gpu import import_faiss
from embedcache.search.faiss_index import RowIndex, is_whole, make_index, read_index
from embedcache.search.vectors import Vectors
from embedcache.store.layout import CacheInfo

PART_BYTES = 256_000_000  # codes per part on disk: kept in memory beside a chunk, and repeated by a killed build
_LIST_FILES = ("index.part-*.faiss", "lists-*.ivfdata")

FILES = (INDEX, "index.partial.faiss", STATE, "record.json", *_LIST_FILES)


class IndexBuilder:
    """The unfinished index in a folder. The ids in its files say which rows they hold.

    Args:
        folder: folder of the index.
        source: what the index is built from, as fields of the card.
        info: the cache.
        lists: file of inverted lists that a finished index in the folder uses; None: there is none.
        device: FAISS uses GPUs unless it is `cpu`.

    Raises:
        FingerprintError: the folder holds an unfinished index of another source; the cache may have grown since.
    """

    def __init__(
        self, folder: Path, source: Mapping[str, Any], info: CacheInfo, *, lists: str | None = None, device: str = AUTO
    ) -> None:
        self._folder, self._lists, self._device = folder, lists, device
        self._state_path = folder / STATE
        self._partial_path = folder / "index.partial.faiss"
        self._source = dict(source)
        self._factory: str | None = None
        self._checksums: dict[str, dict[str, str]] = {}
        self.rejected: dict[str, float] = {}
        self._is_resumed = self._state_path.is_file()
        if self._is_resumed:
            state = read_json(self._state_path)
            about, self._factory, self.rejected, self._checksums = construct(
                self._state_path,
                lambda: (
                    dict(state["about"]),
                    None if state["factory"] is None else str(state["factory"]),
                    {factory: float(recall) for factory, recall in state["refused"].items()},
                    {
                        name: {file: str(checksum) for file, checksum in state[name].items()}
                        for name in ("lists", "checksums")
                        if name in state
                    },
                ),
            )
            stored = str(about.get(INDEX_DIGEST))
            requested = {**source, INDEX_DIGEST: stored if info.has_rows_of(stored) else source[INDEX_DIGEST]}
            check_same(f"the unfinished index {folder}", about, requested, next_step="give the path of a new folder")

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
        """Record that a configuration missed the recall, and delete its files."""
        self.rejected[factory] = recall
        self._checksums = {}
        self._write_state(None)
        self._partial_path.unlink(missing_ok=True)
        _remove_lists(self._folder, keep=self._lists)

    def _start(self, factory: str, vectors: Vectors, progress: Progress) -> RowIndex:
        """Return what was built of an index in memory, or a new one that is trained and empty."""
        index = _without_removed(self._resume(factory), vectors, progress)
        if index is None:
            index = make_index(factory, vectors.width, device=self._device)
            self._write_state(factory)
            if not index.is_trained:
                _train(index, factory, vectors, progress)
                index.write(self._partial_path)
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
                index.write(self._partial_path)
                last = time.monotonic()
                writing_s = last - started if checkpoint_s else 0.0
        progress.finish()

    def _build_on_disk(self, factory: str, vectors: Vectors, progress: Progress) -> RowIndex:
        """Train an index, or take the training of a finished one, and fill lists on disk with all valid rows."""
        old = self._read_finished()
        has_removed = old is not None and not np.isin(old.rows, vectors.rows).all()
        if has_removed:
            progress.note(_REMOVED)
        trained = _read_unfinished(self._partial_path, device=self._device) if self._factory == factory else None
        if trained is None:
            for path in self._folder.glob("index.part-*.faiss"):
                path.unlink()  # of another trained index
            index = make_index(factory, vectors.width, device=self._device)
            if not index.num_lists or index.is_refined or index.has_blocks:
                raise SettingError(
                    f"factory: expected inverted lists to leave on disk, such as IVF4096,SQfp16, got {factory!r}"
                )
            self._write_state(factory)
            if old is None:
                _train(index, factory, vectors, progress)
            else:
                index = read_index(self._folder / INDEX, is_mapped=False, device=self._device).emptied()
            index.write(self._partial_path)
        kept, used = (None if has_removed else old), self._lists
        return _fill_lists(self._folder, self._partial_path, kept, vectors, progress, used=used)

    def _resume(self, factory: str) -> RowIndex | None:
        """Return the index in memory of an interrupted build of this kind, or the finished one; None: there is none."""
        if self._factory == factory:
            index = _read_unfinished(self._partial_path, device=self._device)
            if index is not None:
                return index
        if self._factory not in (None, factory):
            return None
        index = self._read_finished()
        if index is not None:
            self._write_state(factory)
        return index

    def _read_finished(self) -> RowIndex | None:
        """Read the index whose files are complete, with a card or still without one; None: there is none.

        Its files may be newer than the card, or than any card, if an earlier build was killed: then its lists are
        compared with the checksums that were recorded. Without a card, a damaged index is removed.
        """
        path = self._folder / INDEX
        card = read_card(self._folder) if (self._folder / CARD).is_file() else None
        if card is None:
            index = _read_unfinished(path, device=self._device)
        elif self._is_resumed and not is_whole(path):  # of an early version, or damaged
            return open_row_index(self._folder, card, device=self._device)
        else:
            index = read_index(path, is_mapped=False, device=self._device)
        if index is None or not self._is_resumed:
            return index
        known = {} if card is None else dict(card.checksums)
        for name in ("checksums", "lists"):
            known.update(self._checksums.get(name, {}))
        try:
            check_lists(self._folder, index, known)
        except (CorruptError, PathError):
            if card is not None:
                raise
            path.unlink()
            return None
        return index

    def record(self, **checksums: Mapping[str, str]) -> None:
        """Record checksums by file: of `lists` before the index that names them, of all `checksums` before the card."""
        self._checksums.update({name: dict(of_files) for name, of_files in checksums.items()})
        self._write_state(self._factory)

    def _write_state(self, factory: str | None) -> None:
        self._factory = factory
        state = {"about": self._source, "factory": factory, "refused": self.rejected, **self._checksums}
        write_json(self._state_path, state)


def _train(index: RowIndex, factory: str, vectors: Vectors, progress: Progress) -> None:
    """Train an index on a sample; a note replaces FAISS's warnings of too few vectors."""
    sample_SP, least = vectors.sample(index.num_training, progress=progress), 0
    quantizers = list(_quantizers(index.wrapped))
    for quantizer, num_centroids in quantizers:
        least = max(least, num_centroids * quantizer.cp.min_points_per_centroid)
        quantizer.cp.min_points_per_centroid = 1
    note = f"training {factory}"
    if len(sample_SP) < least:
        note += f" on {len(sample_SP):,} vectors; k-means finds better centroids in {least:,} or more"
    progress.note(note)
    index.train(sample_SP)
    for transform in _rotations(index.wrapped):
        transform.pq = None


def _quantizers(index: Any) -> Iterator[tuple[Any, int]]:
    """Iterate over what k-means trains in a FAISS index, with the number of centroids; `cp` are its parameters."""
    faiss = import_faiss()
    for transform in _rotations(index):
        transform.pq = quantizer = faiss.ProductQuantizer(transform.d_out, transform.M, 8)  # as FAISS's own
        yield quantizer, quantizer.ksub
    index = faiss.downcast_index(index)
    for lists in {index, getattr(index, "q1", index)}:
        if hasattr(lists, "nlist"):
            yield lists, lists.nlist
    if hasattr(index, "pq"):
        yield index.pq, index.pq.ksub
    residuals = [index.rq] if hasattr(index, "rq") else []
    if hasattr(index, "prq"):
        quantizers = (index.prq.subquantizer(number) for number in range(index.prq.nsplits))
        residuals += map(faiss.downcast_AdditiveQuantizer, quantizers)
    for residual in residuals:
        yield residual, 2 ** int(faiss.vector_to_array(residual.nbits).max())
    for inner in ("index", "base_index", "refine_index", "storage", "quantizer"):
        if getattr(index, inner, None) is not None:
            yield from _quantizers(getattr(index, inner))


def _rotations(index: Any) -> list[Any]:
    """Return the transforms of a FAISS index that are trained for a product quantizer, such as OPQ16."""
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):
        return _rotations(index.index)
    count = index.chain.size() if isinstance(index, faiss.IndexPreTransform) else 0
    transforms = [faiss.downcast_VectorTransform(index.chain.at(number)) for number in range(count)]
    return [transform for transform in transforms if isinstance(transform, faiss.OPQMatrix)]


_REMOVED = "samples that the index holds were removed from the cache: adding all others again, without training"


def _without_removed(index: RowIndex | None, vectors: Vectors, progress: Progress) -> RowIndex | None:
    """Return an index, emptied but for its training if it holds samples that were removed from the cache."""
    if index is None or np.isin(index.rows, vectors.rows).all():
        return index
    progress.note(_REMOVED)
    return index.emptied()


def _fill_lists(
    folder: Path, trained_path: Path, old: RowIndex | None, vectors: Vectors, progress: Progress, *, used: str | None
) -> RowIndex:
    """Index all valid rows part by part, reuse existing parts, and merge all into one file of lists.

    Args:
        folder: folder of the index.
        trained_path: the trained index, which each part begins with.
        old: the index whose rows are kept; None: none are.
        vectors: what is indexed.
        progress: progress in items.
        used: file of lists that is in use and stays as it is.
    """
    parts = _reusable_parts(folder, old, vectors)
    missing = np.setdiff1d(vectors.rows, _rows(parts), assume_unique=True)
    is_missing_N = _mask(missing, vectors)
    if old is not None and not len(missing) and len(parts) == 1:
        return old
    progress.start("indexing on disk", len(missing), noun(vectors.modality))
    numbers = distinct(missing // vectors.cache.info.chunk_size).tolist()
    while numbers:
        part = read_index(trained_path, is_mapped=False, device=vectors.device)
        num_before = sum(map(len, parts))
        while numbers and len(part) * part.code_size < PART_BYTES:
            rows, vectors_BP = vectors.chunk(numbers.pop(0))
            is_new = is_missing_N[rows]
            part.add_part(rows[is_new], vectors_BP[is_new], num_before + len(part))
            progress.advance(int(is_new.sum()))
        path = folder / f"index.part-{part.rows[0]:012d}.faiss"
        part.write(path)
        parts.append(read_index(path, is_mapped=True))
    progress.finish()
    path = folder / _lists_name(sum(map(len, parts)), used)
    merged = read_index(trained_path, is_mapped=False, device=vectors.device).merge_on_disk(parts, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return merged


def _reusable_parts(folder: Path, old: RowIndex | None, vectors: Vectors) -> list[RowIndex]:
    """Return the old index and the parts on disk; remove parts that it holds already, and those of removed samples."""
    parts = [] if old is None else [old]
    for path in sorted(folder.glob("index.part-*.faiss")):
        part = _read_unfinished(path, is_mapped=True)
        if part is None:
            continue
        has_removed = not np.isin(part.rows, vectors.rows).all()
        if has_removed or np.isin(part.rows, _rows(parts)).any():  # merged before the process was killed
            path.unlink()
        else:
            parts.append(part)
    return parts


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


def _lists_name(num_vectors: int, used: str | None) -> str:
    """Return a name of the file of lists that is not in use, so that an old index stays intact."""
    name = f"lists-{num_vectors}.ivfdata"
    return name if name != used else f"lists-{num_vectors}-again.ivfdata"


def remove_leftovers(folder: Path, *, lists: str | None) -> None:
    """Remove what building leaves once the card is written, except for the file of lists that the index uses."""
    _remove_lists(folder, keep=lists)
    for name in ("index.partial.faiss", STATE):
        (folder / name).unlink(missing_ok=True)


def _remove_lists(folder: Path, *, keep: str | None) -> None:
    for path in [path for pattern in _LIST_FILES for path in folder.glob(pattern)]:
        if path.name != keep:
            path.unlink()
