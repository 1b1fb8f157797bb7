"""report.html: one page that holds everything it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.cache.cache import Cache
from embedcache.curate.search import Hit
from embedcache.evaluate.gallery import Example, draw_examples
from embedcache.evaluate.report import retrieval_rows
from embedcache.evaluate.retrieval import Ranking, RetrievalReport, rank
from embedcache.pages.pictures import Pictures
from embedcache.pages.write import write_page
from embedcache.projectors.saved import load_pair
from embedcache.quickstart.plots import curves, recall_bars

_NUM_EACH = 5
_NUM_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One thing that was done.

    Args:
        name: in a word or two.
        command: what does the same from a shell.
        seconds: how long it took.
        outcome: what came of it, in one line.
    """

    name: str
    command: str
    seconds: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class PageContent:
    """What the page shows.

    Args:
        stages: what was done, in order.
        reports: name -> figures; the first is the trained runs.
        run_paths: the trained runs; the gallery shows the first.
        hits: query -> what the index found.
        peak_memory_bytes: of the whole process.
        credit: whose pictures these are.
    """

    stages: Sequence[Stage]
    reports: Mapping[str, RetrievalReport]
    run_paths: Sequence[Path]
    hits: Mapping[str, Sequence[Hit]]
    peak_memory_bytes: int
    credit: str


def write_report(path: Path, cache: Cache, content: PageContent) -> None:
    """Write the page. It asks for nothing from outside."""
    columns, rows = retrieval_rows(content.reports)
    trained = next(iter(content.reports.values()))
    pair, config = load_pair(content.run_paths[0])
    ranking = rank(cache, content.run_paths[0], pair, config, part=trained.part)
    pictures = Pictures(cache)
    texts = cache.items("text")["text"].to_pylist()
    write_page(
        path,
        "quickstart",
        content=content,
        total_seconds=sum(stage.seconds for stage in content.stages),
        trained=trained,
        columns=columns,
        rows=rows,
        curves=curves(content.run_paths),
        bars=recall_bars(
            {
                **{name: report.recalls for name, report in content.reports.items()},
                "chance": trained.chance,
            }
        ),
        text_to_image=_text_to_image(ranking, pictures, texts),
        image_to_text=_image_to_text(ranking, pictures, texts),
        hits=[
            (query, [(pictures.data_url(hit.row), hit.captions, hit.score) for hit in found])
            for query, found in content.hits.items()
        ],
    )


def _text_to_image(ranking: Ranking, pictures: Pictures, texts: Sequence[str]) -> list[dict[str, Any]]:
    def picture(position: int) -> str:
        return str(pictures.data_url(int(ranking.pairs.image.rows[position])))

    return [
        {
            "query": texts[ranking.pairs.text.rows[example.query]],
            "shown": [(picture(shown), right) for shown, right in _shown(example)],
            "answer": picture(example.answer),
            "rank": example.rank,
        }
        for example in draw_examples(ranking, "t2i", num_each=_NUM_EACH, num_shown=_NUM_SHOWN)
    ]


def _image_to_text(ranking: Ranking, pictures: Pictures, texts: Sequence[str]) -> list[dict[str, Any]]:
    def caption(position: int) -> str:
        return texts[int(ranking.pairs.text.rows[position])]

    return [
        {
            "query": pictures.data_url(int(ranking.pairs.image.rows[example.query])),
            "shown": [(caption(shown), right) for shown, right in _shown(example)],
            "answer": caption(example.answer),
            "rank": example.rank,
        }
        for example in draw_examples(ranking, "i2t", num_each=_NUM_EACH, num_shown=_NUM_SHOWN)
    ]


def _shown(example: Example) -> list[tuple[int, bool]]:
    return list(zip(example.shown, example.is_right, strict=True))
