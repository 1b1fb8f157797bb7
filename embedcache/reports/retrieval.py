"""Examples to look at: held-out queries, right and wrong, with what was ranked first.

Retrieval figures as rows to print and as JSON.

Retrieval as one page: figures, and queries to look at.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Ints
from embedcache.evaluate.retrieval import KS, WAYS, Ranking, RetrievalReport
from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import Case, Section, Shown, write_sections
from embedcache.reports.plots import Figures, recall_bars, recall_curves
from embedcache.reports.thumbnails import Pictures, credit
from embedcache.store.cache import Cache


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


def retrieval_rows(reports: Mapping[str, RetrievalReport]) -> tuple[list[str], list[list[str]]]:
    """Lay reports out as a table: one row each, and a last row of what chance gives on the first one's items.

    Returns:
        The column names, and the rows of text: `value [low, high]`.
    """
    columns = ["", *(f"{way} R@{k}" for way in WAYS for k in KS)]
    rows = [[name, *_cells(report.recalls)] for name, report in reports.items()]
    chance = next(iter(reports.values())).chance
    return columns, [*rows, ["chance", *_cells(chance)]]


def _cells(figures: Figures) -> list[str]:
    return [format_estimate(figures[way][f"r@{k}"]) for way in WAYS for k in KS]


def order_rows(reports: Mapping[str, RetrievalReport]) -> tuple[list[str], list[list[str]]]:
    """Lay mean average precisions and median ranks out as a table, a row a report."""
    columns = ["", *(f"{way} {name}" for way in WAYS for name in ("mAP", "median rank"))]
    return columns, [[name, *_order_cells(report)] for name, report in reports.items()]


def _order_cells(report: RetrievalReport) -> list[str]:
    orders = [report.orders[way] for way in WAYS]
    return [text for one in orders for text in (format_estimate(one["map"]), _format_rank(one["median_rank"]))]


def _format_rank(estimate: Estimate) -> str:
    return f"{estimate.value:,.0f} [{estimate.low:,.0f}, {estimate.high:,.0f}]"


def format_estimate(estimate: Estimate) -> str:
    """Write a share with its interval: `.123 [.101, .145]`."""
    return f"{format_share(estimate.value)} [{format_share(estimate.low)}, {format_share(estimate.high)}]"


def format_share(share: float) -> str:
    """Write a share: `.123`."""
    return f"{share:.3f}".replace("0.", ".", 1)


def retrieval_json(report: RetrievalReport, **others: RetrievalReport | None) -> dict[str, Any]:
    """Give the figures as JSON values: `i2t`, `t2i`, `chance`, one entry for each of `others`, counts and seeds.

    Each way holds `r@1`, `r@5`, `r@10`, the report's own also `map` and `median_rank`, and `intervals` with the 95 %
    interval of each.
    """
    return {
        **_json({way: {**report.recalls[way], **report.orders[way]} for way in WAYS}),
        "chance": _json(report.chance),
        **{name: _json(other.recalls) for name, other in others.items() if other is not None},
        "num_images": report.num_images[0],
        "num_texts": report.num_texts[0],
        "seeds": report.seeds,
        "recall_by_seed": [round(recall, 5) for recall in report.by_seed],
        "part": report.part,
        "language": report.language,
        "overlap": report.overlap.to_json() if report.overlap else None,
    }


def _json(figures: Figures) -> dict[str, Any]:
    return {
        way: {
            **{name: round(estimate.value, 5) for name, estimate in figures[way].items()},
            "intervals": {
                name: [round(estimate.low, 5), round(estimate.high, 5)] for name, estimate in figures[way].items()
            },
        }
        for way in figures
    }


_NUM_EACH = 5
_NUM_SHOWN = 5
_DRAWN = (
    "Drawn at random: first {kind}s whose top answer is right, then {kind}s whose top answer is wrong, with a right "
    "one at the end where none is shown."
)


def write_retrieval(path: Path, cache: Cache, reports: Mapping[str, RetrievalReport], ranking: Ranking) -> None:
    """Write the page of some reports; the queries are one run's.

    Args:
        path: of the page.
        cache: that was measured.
        reports: a name -> figures, the first is the one to look at.
        ranking: whose queries are shown.
    """
    first = next(iter(reports.values()))
    write_sections(
        path,
        credit=credit(cache),
        title="Image-text retrieval",
        lead=f"{cache.path.name}, {first.line()}.",
        warnings=[f"{name}: {report.warning}" for name, report in reports.items() if report.warning],
        sections=[
            Section(
                title="Recall",
                notes=[
                    "In brackets the 95 % interval; for chance, where 95 % of random orders lie.",
                    *(f"{name}: {report.overlap.line()}." for name, report in reports.items() if report.overlap),
                ],
                table=retrieval_rows(reports),
                figures=[
                    recall_curves(reports),
                    recall_bars({**{name: one.recalls for name, one in reports.items()}, "chance": first.chance}),
                ],
            ),
            Section(title="Ranks", table=order_rows(reports)),
            *query_sections(cache, ranking),
        ],
    )


def query_sections(cache: Cache, ranking: Ranking) -> list[Section]:
    """Show captions with the pictures ranked first for them, and pictures with captions."""
    pictures, texts = Pictures(cache), cache.items("text")["text"].to_pylist()

    def image(position: int, *, is_right: bool = False) -> Shown:
        return Shown(picture=pictures.data_url(int(ranking.pairs.image.rows[position])), is_right=is_right)

    def text(position: int, *, is_right: bool = False) -> Shown:
        return Shown(text=texts[int(ranking.pairs.text.rows[position])], is_right=is_right)

    sections = []
    for title, kind, way, query, answer in (
        ("Text to images", "caption", "t2i", text, image),
        ("Image to texts", "picture", "i2t", image, text),
    ):
        examples = draw_examples(ranking, way, num_each=_NUM_EACH, num_shown=_NUM_SHOWN)
        cases = [_case(example, query(example.query), answer) for example in examples]
        sections.append(Section(title=title, notes=[_DRAWN.format(kind=kind)], cases=cases))
    return sections


def _case(example: Example, query: Shown, answer: Callable[..., Shown]) -> Case:
    is_right = example.rank == 1
    return Case(
        query=query,
        said="right at rank 1" if is_right else f"first right one at rank {example.rank:,}",
        is_right=is_right,
        shown=[answer(place, is_right=right) for place, right in zip(example.shown, example.is_right, strict=True)],
        answer=None if any(example.is_right) else answer(example.answer, is_right=True),
    )
