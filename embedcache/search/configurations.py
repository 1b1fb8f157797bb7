"""The kinds of index that are tried, and the bytes that each takes: arithmetic only."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embedcache.errors import SettingError

FLAT_LIMIT = 200_000
"""Up to this many vectors the default index is exact: a query takes tens of milliseconds on one core."""

_ID = 8
_LINKS = 272  # HNSW32: 64 neighbors of 4 bytes on the ground, about 2 above, and 12 bytes of book-keeping
_DISK_LIST = 24  # where a list lies in its file
_RABITQ = 20  # factors that RaBitQ keeps beside a vector's bits; 8 with one bit a number
_MANY_LISTS = 2**14  # from here on a graph over the centroids is quicker than comparing with all
_POINTS_A_LIST = 39  # fewer, and FAISS warns that k-means has too little to go by


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A kind of index for a given number of vectors.

    Args:
        factory: FAISS factory string.
        memory_bytes: of the finished index, as far as a formula says.
        bits: kept of each number: with fewer, no search however long finds more.
        is_on_disk: whether its lists lie in a file of their own, which is not counted as memory.
    """

    factory: str
    memory_bytes: int
    bits: int
    is_on_disk: bool = False

    @property
    def is_graph(self) -> bool:
        """Whether what it misses is due to its edges, not to its bits."""
        return self.factory.startswith("HNSW")


def configurations(num_vectors: int, width: int) -> list[Configuration]:
    """List the kinds in the order they are tried: exact where that is quick, a graph, then ever smaller codes in lists.

    Args:
        num_vectors: N.
        width: P.
    """
    exact = Configuration(factory="Flat", memory_bytes=num_vectors * (4 * width + _ID), bits=32)
    graph = Configuration(factory="HNSW32", memory_bytes=num_vectors * (4 * width + _LINKS + _ID), bits=32)
    return [*([exact] if num_vectors <= FLAT_LIMIT else []), graph, *_in_lists(num_vectors, width)]


def on_disk(num_vectors: int, width: int) -> list[Configuration]:
    """List the kinds whose vectors stay on the disk: one, as near to exact as float16 is.

    In memory are the centroids, and the items' rows twice.
    """
    coarse, fixed = _coarse(num_vectors, width)
    size = num_vectors * 2 * _ID + fixed + num_lists(num_vectors) * _DISK_LIST
    return [Configuration(factory=f"{coarse},SQfp16", memory_bytes=size, bits=16, is_on_disk=True)]


def fitting(every: Sequence[Configuration], memory_bytes: int | None) -> list[Configuration]:
    """Choose those that fit a memory; None is any.

    Raises:
        SettingError: none does; says what the smallest takes.
    """
    found = [one for one in every if memory_bytes is None or one.memory_bytes <= memory_bytes]
    if not found:
        smallest = min(every, key=lambda one: one.memory_bytes)
        least_kb = math.ceil(smallest.memory_bytes / 1024)
        raise SettingError(
            f"no index of these vectors fits {memory_bytes:,} bytes of memory; the smallest, {smallest.factory}, takes "
            f"{smallest.memory_bytes:,}: give --memory {least_kb}K or more{_elsewhere(smallest)}"
        )
    return found


def _elsewhere(smallest: Configuration) -> str:
    return "" if smallest.is_on_disk else ", or leave the vectors --on-disk"


def still_worth_trying(rest: Sequence[Configuration], failed: Configuration) -> list[Configuration]:
    """Leave out what keeps fewer bits of each number than lists that missed the recall when all were searched."""
    return [one for one in rest if failed.is_graph or one.bits >= failed.bits]


def num_lists(num_vectors: int) -> int:
    """Get the number of lists for N vectors: the power of two next to 2 √N, with enough vectors for each."""
    power = round(math.log2(2 * math.sqrt(num_vectors)))
    return int(max(1, min(2**power, num_vectors // _POINTS_A_LIST)))


def _in_lists(num_vectors: int, width: int) -> Iterator[Configuration]:
    coarse, fixed = _coarse(num_vectors, width)
    for codes, bits, code_bytes, table_bytes in _codes(num_vectors, width):
        size = round(num_vectors * (code_bytes + 2 * _ID)) + fixed + table_bytes
        yield Configuration(factory=f"{coarse},{codes}", memory_bytes=size, bits=bits)


def _coarse(num_vectors: int, width: int) -> tuple[str, int]:
    """Name the part of a factory string that finds lists, and the bytes of its centroids."""
    lists = num_lists(num_vectors)
    if lists < _MANY_LISTS:
        return f"IVF{lists}", lists * 4 * width
    return f"IVF{lists}_HNSW32", lists * (4 * width + _LINKS)


def _codes(num_vectors: int, width: int) -> Iterator[tuple[str, int, float, int]]:
    """Name, bits a number, bytes a vector, and bytes beside the vectors."""
    yield "SQfp16", 16, 2 * width, 0
    yield "RaBitQ,Refine(SQ8)", 8, width / 8 + 8 + width, 8 * width
    yield "SQ8", 8, width, 8 * width
    yield "SQ6", 6, width * 6 / 8, 8 * width
    yield "RaBitQ4", 4, width / 2 + _RABITQ, 0
    if width % 4 == 0 and num_vectors >= 256 * _POINTS_A_LIST:
        yield f"PQ{width // 4}", 2, width / 4, 4 * 256 * width
    yield "RaBitQ", 1, width / 8 + 8, 0
