"""report.html: one page that holds everything it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from embedcache.cache.cache import Cache
from embedcache.curate.indexes.hits import Hit
from embedcache.evaluate.plots import recall_bars
from embedcache.evaluate.report import retrieval_rows
from embedcache.evaluate.retrieval import RetrievalReport, rank
from embedcache.evaluate.retrieval_page import query_sections
from embedcache.evaluate.runs import load_runs
from embedcache.pages.pictures import Pictures
from embedcache.pages.write import write_page
from embedcache.quickstart.plots import curves


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
    ranking = rank(cache, load_runs(content.run_paths[:1])[0])
    pictures = Pictures(cache)
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
        queries=query_sections(cache, ranking),
        hits=[
            (query, [(pictures.data_url(hit.row), hit.captions, hit.score) for hit in found])
            for query, found in content.hits.items()
        ],
    )
