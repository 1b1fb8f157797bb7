"""Near-duplicate groups against connected components of all pairs, compared at once and within clusters."""

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Floats, Inputs, Ints, normalize
from embedcache.dataset import matches as module
from embedcache.dataset.inputs import Reader
from embedcache.dataset.matches import near_duplicate_groups
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.settings import SplitSettings
from embedcache.neighbors import clusters
from tests.recorded import RecordedProgress

COSINES = SplitSettings(cosines={"image": 0.9, "text": 0.5}, seed=3)


def made(seed: int, num_samples: int) -> tuple[Pairs, dict[str, Reader], list[tuple[Items, Floats, float]]]:
    """Return samples, of which each second one is used, with one image and one or two texts in a table with others."""
    rng = np.random.default_rng(seed)
    used = np.arange(1, 2 * num_samples, 2)
    sides, vectors = [], []
    for samples in (used, np.sort(np.concatenate([used, used[: num_samples // 2]]))):
        rows = np.sort(rng.permutation(2 * len(samples))[: len(samples)])
        sides.append(Items(rows=rows, samples=samples, contents=np.arange(len(samples))))
        vectors.append(normalize(rng.standard_normal((2 * len(samples), 4))))
    readers = {"image": lambda rows: Inputs(vectors[0][rows]), "text": lambda rows: Inputs(vectors[1][rows])}
    of_sides = [(items, of_side[items.rows], cosine) for items, of_side, cosine in zip(sides, vectors, (0.9, 0.5))]  # noqa: B905
    return Pairs(first=sides[0], second=sides[1]), readers, of_sides


def components(pairs: Pairs, sides: list[tuple[Items, Floats, float]]) -> Ints:
    """Return the connected components of all pairs of samples with items above a cosine."""
    size = len(pairs.samples)
    near = np.zeros((size, size), bool)
    for items, vectors, cosine in sides:
        left, right = np.nonzero(vectors @ vectors.T > cosine)
        place = np.searchsorted(pairs.samples, items.samples)
        near[place[left], place[right]] = True
    return scipy.sparse.csgraph.connected_components(near)[1]


def together(groups: Ints) -> list[list[bool]]:
    return (groups[:, None] == groups[None, :]).tolist()


@pytest.mark.slow
@settings(max_examples=15)
@given(st.integers(0, 999), st.integers(2, 40), st.sampled_from([2, 7]))
def test_groups_are_connected_components(seed: int, num_samples: int, block: int) -> None:
    """Check both ways; blocks of any size, and edges that are merged at any time, give the same."""
    pairs, readers, sides = made(seed, num_samples)
    expected = together(components(pairs, sides))
    progress = RecordedProgress()
    assert together(near_duplicate_groups(pairs, COSINES, readers, progress)) == expected
    assert progress.counts == {what: count for what, count, _ in progress.started}
    progress = RecordedProgress()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_COMPARED_ITEMS", 1)
        patch.setattr(clusters, "BLOCK", block)
        found = near_duplicate_groups(pairs, COSINES, readers, progress)
    assert found.dtype == np.int64
    assert together(found) == expected  # so few clusters that every border is crossed
    assert progress.counts == {what: count for what, count, _ in progress.started}
