"""Inverted lists that stay in a file during search, each compared with its checksum before it is first read."""

from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints, blocks, distinct
from embedcache.errors import CorruptError
from embedcache.progress import NullProgress, Progress, watch
from embedcache.search.faiss_gpu import import_faiss
from embedcache.store.arrays import DIGITS, checksum_of, skips_checksums

_LISTS_AT_ONCE = 64
_STORES_PAIRS = False  # FAISS takes no keyword


def open_disk_lists(index: Any) -> "DiskLists | None":
    """Return the inverted lists of a FAISS index that are mapped from a file; None if all is in memory."""
    faiss = import_faiss()
    inverted = faiss.try_extract_index_ivf(index)
    is_mapped = inverted is not None and isinstance(
        faiss.downcast_InvertedLists(inverted.invlists), faiss.OnDiskInvertedLists
    )
    return DiskLists(index) if is_mapped else None


def has_block_lists(index: Any) -> bool:
    """Return whether the inverted lists of a FAISS index hold blocks of vectors, as of PQ8x4fs: only in memory."""
    faiss = import_faiss()
    inverted = faiss.try_extract_index_ivf(index)
    return inverted is not None and isinstance(
        faiss.downcast_InvertedLists(inverted.invlists), faiss.BlockInvertedLists
    )


class DiskLists:
    """The inverted lists of an index that FAISS maps from a file: vectors as codes, and their positions in the index.

    Args:
        index: FAISS index with such lists, without an `IndexIDMap` around it.
    """

    def __init__(self, index: Any) -> None:
        self._faiss = import_faiss()
        self._index = index
        self._inverted = self._faiss.downcast_index(self._faiss.extract_index_ivf(index))
        self._lists = self._faiss.downcast_InvertedLists(self._inverted.invlists)
        self._path = Path(self._lists.filename)
        self._checksums = ""
        self._next_step = ""
        self._is_checked_L: Bools | None = None  # None: no list is to be compared

    @property
    def file(self) -> str:
        """Name of the file."""
        return self._path.name

    def forget_folder(self) -> None:
        """Store only the name of the file in the index, so that it is found beside the index when it is read."""
        self._lists.filename = self.file

    def checksums(self) -> str:
        """Compute the CRC-32C of each list: 8 hex digits per list, one after another. Reads all lists."""
        return "".join(map(self._checksum, range(self._lists.nlist)))

    def compare(self, path: Path, checksums: str, next_step: str) -> None:
        """Compare each list with its checksum before `search` reads it, unless `skips_checksums`.

        Raises `CorruptError` if the file has another size, which FAISS maps without looking at it.
        """
        size, expected = path.stat().st_size, self._lists.totsize
        if size != expected or len(checksums) != DIGITS * self._lists.nlist:
            raise CorruptError(
                f"{path}: expected {self._lists.nlist:,} lists in {expected:,} bytes, as the index states, got "
                f"{len(checksums) // DIGITS:,} checksums and {size:,} bytes; {next_step}"
            )
        self._path, self._checksums, self._next_step = path, checksums, next_step
        self._is_checked_L = np.full(self._lists.nlist, skips_checksums())

    def check_all(self, *, progress: Progress | None = None) -> None:
        """Compare all lists with what `compare` was given, or raise a `CorruptError`."""
        if self._is_checked_L is not None:
            self._is_checked_L[:] = False
            lists = np.arange(self._lists.nlist)
            for block in watch(
                blocks(len(lists), _LISTS_AT_ONCE), progress or NullProgress(), "checking", len(lists), "lists"
            ):
                self._check(lists[block], self._is_checked_L)

    def search(self, queries_QP: Floats, k: int, nprobe: int, selector: Any) -> tuple[Floats, Ints] | None:
        """Search as FAISS does, after each list that is read was compared: scores and positions (Q, K).

        Returns None if no list is to be compared. `CorruptError` if one has other bytes.
        """
        if self._is_checked_L is None:
            return None
        faiss, inverted, nprobe = self._faiss, self._inverted, min(nprobe, self._lists.nlist)
        queries_QP = self._transform(queries_QP)
        nearness_QL, lists_QL = inverted.quantizer.search(queries_QP, nprobe)
        probed = distinct(lists_QL[lists_QL >= 0])
        self._lists.prefetch_lists(faiss.swig_ptr(probed), len(probed))
        self._check(probed, self._is_checked_L)
        parameters = faiss.SearchParametersIVF(nprobe=nprobe, **({} if selector is None else {"sel": selector}))
        scores_QK = np.empty((len(queries_QP), k), np.float32)
        positions_QK = np.empty((len(queries_QP), k), np.int64)
        inverted.search_preassigned_c(  # FAISS's own method in Python takes no parameters
            len(queries_QP),
            faiss.swig_ptr(queries_QP),
            k,
            *map(faiss.swig_ptr, (lists_QL, nearness_QL, scores_QK, positions_QK)),
            _STORES_PAIRS,
            parameters,
        )
        return scores_QK, positions_QK

    def _transform(self, queries_QP: Floats) -> Floats:
        """Return queries as the lists hold vectors: after the transforms of a factory string such as PCA64,IVF4,SQ8."""
        faiss, outer = self._faiss, self._faiss.downcast_index(self._index)
        for number in range(outer.chain.size() if isinstance(outer, faiss.IndexPreTransform) else 0):
            queries_QP = faiss.downcast_VectorTransform(outer.chain.at(number)).apply(queries_QP)
        return queries_QP

    def _check(self, lists: Ints, is_checked_L: Bools) -> None:
        for number in lists[~is_checked_L[lists]].tolist():
            expected, found = self._checksums[DIGITS * number : DIGITS * (number + 1)], self._checksum(number)
            if found != expected:
                raise CorruptError(
                    f"{self._path}: expected checksum {expected} of list {number}, got {found}: the bytes changed on "
                    f"disk; {self._next_step}"
                )
            is_checked_L[number] = True

    def _checksum(self, number: int) -> str:
        size = self._lists.list_size(number)
        if not size:
            return checksum_of([])
        codes: Array = self._faiss.rev_swig_ptr(self._lists.get_codes(number), size * self._lists.code_size)
        positions: Array = self._faiss.rev_swig_ptr(self._lists.get_ids(number), size)
        return checksum_of([codes, positions])
