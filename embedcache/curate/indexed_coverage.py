"""Coverage through an index: it names the items to look at, and their exact cosines are counted."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from embedcache.arrays import Bools, Floats, Ints, blocks
from embedcache.curate.counting import Counting, Tally
from embedcache.errors import FingerprintError
from embedcache.progress import Progress
from embedcache.search.faiss_index import RowIndex, read_index
from embedcache.search.index import IndexCard, check_card, read_card
from embedcache.search.vectors import Vectors

_Matches: TypeAlias = tuple[Ints, Ints, Floats]
"""Rows, concepts and exact cosines: (M,) each."""

_FIRST = 256
"""Items asked for at first; twice as many as long as some of the last half are above."""

_MORE_LISTS = 4

_AT_ONCE = 2**17
"""Items that are looked at together, of as many concepts as that is."""


def open_index(path: Path | str, pool: Vectors) -> tuple[RowIndex, IndexCard]:
    """Open an index of the very vectors of a pool.

    Raises:
        PathError: there is no finished index.
        FingerprintError: it was made from other samples, another feature or run, or holds fewer items.
    """
    path = Path(path)
    card = read_card(path)
    if not pool.cache.info.has_rows_of(card.index_digest):
        raise FingerprintError(f"index {path} was made from other samples than {pool.cache.path} holds")
    asked = {
        "modality": pool.modality,
        "feature": pool.side.name,
        "fingerprint": pool.side.fingerprint,
        "run_weights": None if pool.config is None else pool.config.weights,
        "num_vectors": len(pool.rows),
    }
    make = f"build one: embedcache curate index {pool.cache.path} NEW-INDEX --modality {pool.modality}"
    check_card(path, card, asked, next_step=make)
    return read_index(path / "index.faiss"), card


def count_indexed(
    pool: Vectors, work: Counting, concepts_CP: Floats, index: RowIndex, effort: Mapping[str, int], progress: Progress
) -> Tally:
    """Count what an index finds of each concept: never too much, and too little by what the index misses.

    Memory: 20 bytes a match, and the vectors of 131,072 items.

    Args:
        pool: whose vectors the index holds.
        work: what is counted.
        concepts_CP: rows of length 1.
        index: of the pool.
        effort: search parameters.
        progress: told about concepts.
    """
    tally = work.nothing()
    tally.num_items = work.count_items(pool.rows)
    progress.start("searching", len(concepts_CP), "concepts")
    parts = list(_matches(pool, concepts_CP, work.lower_C, index, effort, progress))
    progress.finish()
    rows_M, concepts_M = (np.concatenate([part[column] for part in parts]) for column in (0, 1))
    order = np.lexsort((concepts_M, rows_M))
    work.add(tally, rows_M[order], concepts_M[order], np.concatenate([part[2] for part in parts])[order])
    return tally


def _matches(
    pool: Vectors,
    concepts_CP: Floats,
    lower_C: Floats,
    index: RowIndex,
    effort: Mapping[str, int],
    progress: Progress,
) -> Iterator[_Matches]:
    """Find the items that are not below a concept's limit."""
    numbers, k = np.arange(len(concepts_CP)), min(_FIRST, len(index))
    while len(numbers):
        unfinished = []
        for block in blocks(len(numbers), max(1, _AT_ONCE // k)):
            part = numbers[block]
            rows_BK = index.search(concepts_CP[part], k, _deeper(effort, k))[1]
            sims_BK = _exact(pool, concepts_CP[part], rows_BK)
            is_match_BK: Bools = (rows_BK >= 0) & (sims_BK >= lower_C[part, None])
            goes_on_B = is_match_BK[:, k // 2 :].max(axis=1) * (k < len(index))
            which, places = np.nonzero(is_match_BK & ~goes_on_B[:, None])
            yield rows_BK[which, places], part[which], sims_BK[which, places]
            unfinished.append(part[goes_on_B])
            progress.advance(int((~goes_on_B).sum()))
        numbers, k = np.concatenate(unfinished), min(2 * k, len(index))


def _exact(pool: Vectors, concepts_BP: Floats, rows_BK: Ints) -> Floats:
    """Compare concepts with the very vectors of what was found for each: (B, K); anything where nothing was found."""
    rows_U, places = np.unique(rows_BK.clip(min=pool.rows[0]), return_inverse=True)
    sims_BU = concepts_BP @ pool.read(rows_U).T
    sims_BK: Floats = np.take_along_axis(sims_BU, places.reshape(rows_BK.shape), axis=1)
    return sims_BK


def _deeper(effort: Mapping[str, int], k: int) -> dict[str, int]:
    """Look further: the effort was chosen for the 10 nearest, and what is above a threshold lies in more lists."""
    further = {"nprobe": _MORE_LISTS * -(-k // _FIRST), "efSearch": -(-2 * k // effort.get("efSearch", 1))}
    return {name: value * max(1, further.get(name, 1)) for name, value in effort.items()}
