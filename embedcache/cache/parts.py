"""Cutting samples into parts: what splits of pairs and of labelled items share."""

import hashlib
from collections.abc import Sequence

from embedcache.cache.split import Part

PART_NAMES: dict[str, Part] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""What a source's column `split` may say, in lower case, and the part it means."""


def take_groups(groups: Sequence[Sequence[int]], keys: Sequence[str], quota: int, seed: int) -> set[int]:
    """Take whole groups in an order that only keys and the seed decide; one too large for what is left is passed by.

    Args:
        groups: rows that must stay together, none of them empty.
        keys: the key of each row.
        quota: rows to take at most.
        seed: which of the possible orders.

    Returns:
        The rows of the groups taken.
    """

    def order(group: Sequence[int]) -> bytes:
        return hashlib.sha256(f"{seed}:{min(keys[row] for row in group)}".encode()).digest()

    taken: set[int] = set()
    for group in sorted(groups, key=order):
        if len(taken) + len(group) <= quota:
            taken.update(group)
    return taken
