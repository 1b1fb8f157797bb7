"""Retrieval as one page: figures, and queries to look at."""

from collections.abc import Callable, Mapping
from pathlib import Path

from embedcache.cache.cache import Cache
from embedcache.evaluate.gallery import Example, draw_examples
from embedcache.evaluate.plots import recall_bars, recall_curves
from embedcache.evaluate.report import order_rows, retrieval_rows
from embedcache.evaluate.retrieval import Ranking, RetrievalReport
from embedcache.pages.pictures import Pictures, credit
from embedcache.pages.sections import Case, Section, Shown, write_sections

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
