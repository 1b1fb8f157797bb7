"""Drawing whole groups of samples at random, in an order that depends only on their keys and a seed."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Bools, Ints
from embedcache.progress import NullProgress, Progress
from embedcache.store.columns import Column

_KEYS_PER_BLOCK = 65_536


def draw_groups(
    keys: "Column[str] | pa.Array | pa.ChunkedArray",
    groups_S: Ints,
    quotas: Sequence[int],
    seed: int,
    progress: Progress | None = None,
) -> Ints:
    """Draw whole groups of samples for each of several quotas, in an order that depends only on keys and seed.

    Groups larger than the rest of a quota are skipped. Memory: about 60 bytes per sample, and the keys of samples that
    share a group.

    Args:
        keys: (S,) key of each sample; a column is read in blocks.
        groups_S: group of each sample, from 0 to G - 1, none of them empty.
        quotas: most samples to draw; a later quota draws from what the earlier ones left.
        progress: progress in samples, as the step "splitting".

    Returns:
        (S,) int64 position of the quota that a sample was drawn for, or -1.
    """
    keys = keys if isinstance(keys, Column) else Column(keys)
    sizes_G = np.bincount(groups_S)
    progress = progress or NullProgress()
    progress.start("splitting", len(groups_S), "samples")
    drawn_G, leads_G = np.full(len(sizes_G), -1, np.int64), _leads(keys, groups_S, sizes_G)
    order = _random_order(keys, leads_G, sizes_G, seed, progress)
    for number, quota in enumerate(quotas):
        is_taken = _take_first(sizes_G[order], quota)
        drawn_G[order[is_taken]] = number
        order = order[~is_taken]
    progress.finish()
    return drawn_G[groups_S]


def _leads(keys: Column[str], groups_S: Ints, sizes_G: Ints) -> Ints:
    """Return the sample of the lowest key of each group."""
    lead_G, is_shared_S = np.empty(len(sizes_G), np.int64), sizes_G[groups_S] > 1
    lead_G[groups_S[~is_shared_S]] = np.flatnonzero(~is_shared_S)
    shared = np.flatnonzero(is_shared_S)
    if len(shared):
        by_key = shared[pc.sort_indices(keys.select(shared).array).to_numpy()]
        lead_G[groups_S[by_key[::-1]]] = by_key[::-1]  # the last assignment is that of the lowest key
    return lead_G


def _random_order(keys: Column[str], lead_G: Ints, sizes_G: Ints, seed: int, progress: Progress) -> Ints:
    """Return the groups by the SHA-256 of the seed and their lowest key."""
    by_lead_G, words_G2 = np.argsort(lead_G, kind="stable"), np.empty((len(lead_G), 2), np.uint64)
    salt, sha256, done = f"{seed}:".encode(), hashlib.sha256, 0
    for block in keys.select(lead_G[by_lead_G]).blocks(_KEYS_PER_BLOCK):
        digests = [sha256(salt + name).digest()[:16] for name in block.cast(pa.binary()).to_pylist()]
        hashed = by_lead_G[done : done + len(block)]
        words_G2[hashed] = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2)
        done += len(block)
        progress.advance(int(sizes_G[hashed].sum()))
    order_G = np.argsort(words_G2[:, 0], kind="stable")
    first_G = words_G2[order_G, 0]
    return order_G if (first_G[1:] != first_G[:-1]).all() else np.lexsort((words_G2[:, 1], words_G2[:, 0]))


def _take_first(sizes: Ints, quota: int) -> Bools:
    """Return which of some groups to take in their order, skipping those that are larger than what is left."""
    is_taken, start = np.zeros(len(sizes), bool), 0
    while len(fits := np.flatnonzero(sizes[start:] <= quota)):
        start += int(fits[0])
        count = int(np.searchsorted(np.cumsum(sizes[start:]), quota, side="right"))
        is_taken[start : start + count] = True
        quota -= int(sizes[start : start + count].sum())
        start += count
    return is_taken
