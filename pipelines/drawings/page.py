"""The page of the pipeline of icons: tables, and queries with their hits, with the families that are shown credited."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from embedcache.evaluate.ranking import rank
from embedcache.evaluate.retrieval import RetrievalReport
from embedcache.evaluate.runs import load_runs
from embedcache.reports.base import Section, Table, format_count, write_report
from embedcache.reports.items import ItemRenderer, PageItem
from embedcache.reports.retrieval import query_examples, recall_bars, retrieval_table
from embedcache.sources import open_source
from embedcache.sources.iconify import IconifySource
from embedcache.store.cache import Cache
from pipelines.drawings.results import CLOSED_FORM, FAMILIES, MLP, NAMES, accuracy_table, recall_table, split_table
from pipelines.drawings.steps import Data

TITLE = "Icons with their names: what is aligned by training on cached features"
_NOTES = (
    "Pairs of an icon of Iconify and its name, under EfficientNet-Lite0 and MiniLM. Families of emoji, and icons that "
    "are near-duplicates of OpenMoji's by drawing or name, are left out. Brackets hold 95% intervals over names.",
    "Names never seen: icons whose names, and drawings, are no near-duplicates of any in training. Families never "
    "seen: whole families, whose drawings are no near-duplicates of any in training; their names may be. OpenMoji: the "
    "test part of its strict split. Fashion-MNIST: ten classes by their bare names.",
)
_EXAMPLES_NOTE = "Drawn at random: first queries whose top result is correct, then queries whose top result is wrong."


class Gallery:
    """Queries and hits of runs, and how many icons of each family are shown."""

    def __init__(self) -> None:
        self.shown: Counter[str] = Counter()

    def sections(self, title: str, cache: Cache, run_path: Path) -> list[Section]:
        """Return queries of one run on a test: names to icons, then icons to names."""
        ranking = rank(cache, load_runs([run_path])[0])
        first, second = ranking.pairs.first, ranking.pairs.second
        show_image, show_text = self._show_image(cache, first.rows), _show_text(cache, second.rows)
        return [
            Section(
                title=f"{title}: {queries}",
                notes=[_EXAMPLES_NOTE],
                examples=query_examples(ranking, direction, *shown),
            )
            for queries, direction, shown in (
                ("names to icons", "t2i", (show_text, show_image)),
                ("icons to names", "i2t", (show_image, show_text)),
            )
        ]

    def credits(self, families: Mapping[str, Mapping[str, Any]]) -> Table:
        """Return the authors and licences of the families that are shown."""
        rows = []
        for prefix, count in sorted(self.shown.items()):
            about = families[prefix]
            author, licence = about.get("author", {}), about.get("license", {})
            names = [
                f"{about.get('name', prefix)} ({prefix})",
                f"{author.get('name', '')} {author.get('url', '')}".strip(),
            ]
            rows.append([*names, f"{licence.get('spdx')} {licence.get('url', '')}".strip(), format_count(count)])
        return ["family", "author", "licence", "icons shown"], rows

    def _show_image(self, cache: Cache, rows: Any) -> Callable[..., PageItem]:
        renderer, families = ItemRenderer(cache, "image"), cache.column("family")
        samples = cache.items("image", columns=["sample"])["sample"]

        def show(position: int, *, is_correct: bool = False) -> PageItem:
            row = int(rows[position])
            self.shown[families[samples[row].as_py()].as_py()] += 1
            return renderer.render(row, is_correct=is_correct)

        return show


def _show_text(cache: Cache, rows: Any) -> Callable[..., PageItem]:
    renderer = ItemRenderer(cache, "text")

    def show(position: int, *, is_correct: bool = False) -> PageItem:
        return renderer.render(int(rows[position]), is_correct=is_correct)

    return show


def write_icon_page(
    path: Path,
    data: Data,
    retrieval: Mapping[str, Mapping[str, RetrievalReport]],
    values: Mapping[str, Any],
    splits: Mapping[int, Mapping[str, int]],
    run_path: Path,
) -> None:
    """Write the page.

    Args:
        path: HTML file.
        data: caches.
        retrieval: test -> recipe -> report.
        values: the same and zero-shot accuracies as JSON values.
        splits: seed -> number of icons of each part.
        run_path: run whose queries are shown.
    """
    gallery, tests = Gallery(), []
    for test, reports in retrieval.items():
        chance = next(iter(reports.values())).chance
        bars = recall_bars({**{name: report.recalls for name, report in reports.items()}, "chance": chance})
        notes = [f"{name}: {report.overlap.line()}." for name, report in reports.items() if report.overlap]
        first = next(iter(reports.values()))
        tests.append(
            Section(title=test, notes=[first.line(), *notes[:1]], table=retrieval_table(reports), figures=[bars])
        )
    queries = [
        *gallery.sections(FAMILIES, Cache(data.folder / "families"), run_path),
        *gallery.sections(NAMES, data.icons, run_path),
    ]
    source = open_source(f"iconify:{data.icons_path}")
    assert isinstance(source, IconifySource)
    accuracy = [Section(title="Classes", table=accuracy_table(values))] if values["zero_shot"] else []
    write_report(
        path,
        title=TITLE,
        summary=_summary(values, splits),
        sections=[
            Section(title="Recall at 10", notes=_NOTES, table=recall_table(values)),
            *accuracy,
            Section(title="Splits", notes=[_split_note(data)], table=split_table(splits)),
            *tests,
            *queries,
            Section(title="Icons that are shown", table=gallery.credits(source.families)),
        ],
        credit=source.credit,
    )


def _summary(values: Mapping[str, Any], splits: Mapping[int, Mapping[str, int]]) -> str:
    """Return what training changes on each test, in a few sentences."""
    pairs = " and ".join(dict.fromkeys(f"{counts['train']:,}" for counts in splits.values()))
    lines = [f"R@10 of {CLOSED_FORM} → {MLP}, icons to names and names to icons, with {pairs} training pairs"]
    for test, reports in values["retrieval"].items():
        before, after = reports[CLOSED_FORM], reports[MLP]
        changes = [f"{before[way]['r@10']:.3f} → {after[way]['r@10']:.3f}" for way in ("i2t", "t2i")]
        lines.append(f"{test}: {', '.join(changes)}")
    return ". ".join(lines) + "."


def _split_note(data: Data) -> str:
    counts = pc.value_counts(data.icons.column("palette")).to_pylist()
    palettes = ", ".join(f"{count['counts']:,} {count['values']}" for count in counts)
    families = len(pc.unique(data.icons.column("family")))
    return f"{data.icons.info.num_samples:,} icons of {families:,} families ({palettes})."
