"""The best samples of each concept, against sorting everything."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Floats, Ints
from embedcache.curate.select.best_samples import best_samples, whole_samples


@given(st.integers(0, 999), st.integers(1, 14), st.integers(1, 8))
def test_best_samples_equal_sorting(seed: int, size: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    samples = np.sort(rng.integers(0, 9, 13))
    vectors = rng.integers(-2, 3, (13, 4)).astype(np.float32)  # small whole numbers: many ties
    concepts = rng.integers(-2, 3, (3, 4)).astype(np.float32)
    blocks = [(samples[start : start + size], vectors[start : start + size]) for start in range(0, 13, size)]
    found = best_samples(blocks, concepts, k)
    for concept in range(3):
        best = {int(s): max(float(v @ concepts[concept]) for v in vectors[samples == s]) for s in samples}
        expected = sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
        assert list(zip(found.samples_CK[concept].tolist(), found.scores_CK[concept].tolist(), strict=True)) == expected


def test_memory_of_best_samples_does_not_grow_with_the_items() -> None:
    concepts = np.ones((64, 1), np.float32)

    def blocks(count: int) -> Iterator[tuple[Ints, Floats]]:
        for number in range(count):
            yield np.arange(16 * number, 16 * number + 16), np.zeros((16, 1), np.float32)

    def peak(count: int) -> int:
        tracemalloc.start()
        best_samples(blocks(count), concepts, 4)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(2)
    assert peak(200) < 1.2 * peak(20)


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 5))
def test_whole_samples(samples: list[int], size: int) -> None:
    ordered = np.array(sorted(samples), np.int64)
    cut = [
        (ordered[start : start + size], np.zeros((len(ordered[start : start + size]), 1), np.float32))
        for start in range(0, len(ordered), size)
    ]
    found = [block.tolist() for block, _ in whole_samples(cut)]
    assert [sample for block in found for sample in block] == ordered.tolist()
    assert sum(len(set(block)) for block in found) == len(set(samples))
