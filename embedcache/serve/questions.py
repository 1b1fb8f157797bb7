"""Answering questions that came at about the same time: one batch through each encoder, one search a filter."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL.Image import Image

from embedcache.arrays import Floats
from embedcache.curate.indexes.filters import Filter
from embedcache.curate.indexes.hits import Hit
from embedcache.curate.indexes.queries import Queries
from embedcache.curate.indexes.search import OpenIndex
from embedcache.errors import EmbedcacheError


@dataclass(frozen=True, kw_only=True)
class Question:
    """What one visitor asks: a text, a picture or a row.

    Args:
        text: words.
        picture: RGB.
        row: of an item of the index: what is like it.
        k: hits, or as many as the filter leaves.
        keep: what may be found.
    """

    text: str | None = None
    picture: Image | None = None
    row: int | None = None
    k: int
    keep: Filter = field(default_factory=Filter)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found.

    Args:
        hits: best first; none where the filter leaves nothing.
        encode_ms: that the batch's encoders took, or reading the vectors of rows.
        search_ms: that the search and looking the hits up took, with others who asked with the same filter.
    """

    hits: Sequence[Hit]
    encode_ms: float
    search_ms: float


def answer_all(index: OpenIndex, questions: Sequence[Question]) -> list[Answer | EmbedcacheError]:
    """Answer each question, in order; one that cannot be answered gets its error, and the others their answers."""
    started = time.perf_counter()
    try:
        vectors_QP = _vectors(index, questions)
    except EmbedcacheError as error:
        return [error] * len(questions) if len(questions) == 1 else [answer_all(index, [one])[0] for one in questions]
    encode_ms = 1000 * (time.perf_counter() - started)
    places: dict[object, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        places[question.keep.key].append(place)
    answers: dict[int, Answer | EmbedcacheError] = {}
    for group in places.values():
        found = _find(index, vectors_QP[group], [questions[place] for place in group], encode_ms)
        answers |= dict(zip(group, found, strict=True))
    return [answers[place] for place in range(len(questions))]


def _vectors(index: OpenIndex, questions: Sequence[Question]) -> Floats:
    """Get a vector a question, in order: (Q, P)."""
    of_texts = [place for place, one in enumerate(questions) if one.text is not None]
    of_pictures = [place for place, one in enumerate(questions) if one.picture is not None]
    of_rows = [place for place, one in enumerate(questions) if one.row is not None]
    queries = Queries(
        texts=[one.text for one in questions if one.text is not None],
        images=[one.picture for one in questions if one.picture is not None],
        rows=[one.row for one in questions if one.row is not None],
    )
    found = index.asker.vectors(queries)
    ordered = found.copy()
    ordered[[*of_texts, *of_pictures, *of_rows]] = found
    return ordered


def _find(
    index: OpenIndex, vectors_QP: Floats, questions: Sequence[Question], encode_ms: float
) -> Sequence[Answer | EmbedcacheError]:
    started, keep = time.perf_counter(), questions[0].keep
    try:
        k = min(max(question.k for question in questions), index.num_kept(keep))
        found: Sequence[Sequence[Hit]] = index.find(vectors_QP, k=k, keep=keep) if k else [[]] * len(questions)
    except EmbedcacheError as error:
        return [error] * len(questions)
    search_ms = 1000 * (time.perf_counter() - started)
    return [
        Answer(hits=hits[: question.k], encode_ms=encode_ms, search_ms=search_ms)
        for question, hits in zip(questions, found, strict=True)
    ]
