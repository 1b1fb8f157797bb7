"""Examples to look at: held-out queries, right and wrong, with what was ranked first."""

from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Ints
from embedcache.evaluate.retrieval import WAYS, Ranking


@dataclass(frozen=True, kw_only=True)
class Example:
    """One query and the candidates ranked first. Positions are those of the ranking's `pairs`.

    Args:
        query: position of the query.
        rank: of its best positive, 1 is the top.
        shown: positions of the first candidates, best first.
        is_right: for each of them, whether it is a positive.
        answer: position of a positive, to show where none of the first is one.
    """

    query: int
    rank: int
    shown: list[int]
    is_right: list[bool]
    answer: int


def draw_examples(ranking: Ranking, way: str, *, num_each: int, num_shown: int, seed: int = 0) -> list[Example]:
    """Draw queries at random: `num_each` whose first candidate is right, then `num_each` whose first is wrong.

    Args:
        ranking: of a held-out part.
        way: `i2t` or `t2i`.
        num_each: how many of each kind; fewer where there are fewer.
        num_shown: how many candidates to show.
        seed: of the drawing.
    """
    rng = np.random.default_rng(seed)
    is_right = ranking.ranks[way] == 1
    chosen = [
        int(query) for kind in (is_right, ~is_right) for query in rng.permutation(np.flatnonzero(kind))[:num_each]
    ]
    return [_example(ranking, way, query, num_shown) for query in chosen]


def _example(ranking: Ranking, way: str, query: int, num_shown: int) -> Example:
    vectors = (ranking.images, ranking.texts) if way == "i2t" else (ranking.texts, ranking.images)
    order = np.argsort(-(vectors[1] @ vectors[0][query]), kind="stable")[:num_shown]
    positives = _positives_of(ranking, way, query)
    return Example(
        query=query,
        rank=int(ranking.ranks[way][query]),
        shown=order.tolist(),
        is_right=np.isin(order, positives).tolist(),
        answer=int(positives[0]),
    )


def _positives_of(ranking: Ranking, way: str, query: int) -> Ints:
    queries, candidates = ranking.positives if WAYS.index(way) == 0 else ranking.positives[::-1]
    positives: Ints = candidates[queries == query]
    return positives
