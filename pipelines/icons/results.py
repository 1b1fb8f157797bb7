"""Runs of the pipeline of icons, measured on what none of them has seen, as JSON values and tables."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embedcache.cli.console import open_progress, print_line
from embedcache.evaluate.ranking import rank
from embedcache.evaluate.retrieval import RetrievalReport, evaluate_retrieval
from embedcache.evaluate.runs import load_runs
from embedcache.evaluate.settings import RetrievalSettings, ZeroShotSettings
from embedcache.evaluate.zero_shot import ZeroShotReport, evaluate_zero_shot
from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import Section, Table, format_count, format_estimate, format_percent, write_report
from embedcache.reports.items import ItemRenderer, PageItem
from embedcache.reports.retrieval import query_examples, recall_bars, retrieval_json, retrieval_table
from embedcache.reports.zero_shot import zero_shot_json
from embedcache.settings import to_flat
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.data import open_data
from embedcache.train.settings import TrainSettings, train_settings
from embedcache.train.train import train_on
from pipelines.common import with_options
from pipelines.icons.source import KIND, IconifySource
from pipelines.icons.steps import FEATURES, Data

MLP, CLOSED_FORM, SHUFFLED = "mlp", "closed form", "closed form of shuffled pairs"
_CLOSED_FORM = {"projector": "linear", "initialization": "cca", "epochs": 0}
RECIPES: Mapping[str, TrainSettings] = {
    CLOSED_FORM: train_settings(_CLOSED_FORM),
    MLP: train_settings({"projector": "mlp", "initialization": "cca"}),
    SHUFFLED: train_settings({**_CLOSED_FORM, "shuffle_pairs": True}),
}
NAMES, FAMILIES, EMOJI = "names never seen", "families never seen", "OpenMoji"
CLOTHES = "Fashion-MNIST"
_MEMORY_BYTES = 4 * 2**30


def train_runs(data: Data, seeds: Sequence[int]) -> dict[str, list[Path]]:
    """Train each recipe with each seed on the training part of its split; return the runs of each recipe."""
    features = open_data(data.icons.path, FEATURES, memory_bytes=_MEMORY_BYTES)
    runs: dict[str, list[Path]] = {}
    split = f"{data.folder}/split-{{seed}}.parquet"
    for name, settings in RECIPES.items():
        runs[name] = [data.folder / f"{name.replace(' ', '-')}-{seed}" for seed in seeds]
        for seed, path in zip(seeds, runs[name], strict=True):
            settings = with_options(settings, split=split, seed=seed)
            report = train_on(features, path, settings, progress=open_progress())
            print_line(report.line(path))
    return runs


def measure_retrieval(data: Data, runs: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, RetrievalReport]]:
    """Return test -> recipe -> recalls, averaged over seeds."""
    caches = {NAMES: data.icons.path, FAMILIES: data.folder / "families", EMOJI: data.folder / "emoji"}
    settings, progress = RetrievalSettings(max_samples=10_000), open_progress()
    return {
        test: {name: evaluate_retrieval(cache, paths, settings, progress=progress) for name, paths in runs.items()}
        for test, cache in caches.items()
    }


def measure_clothes(data: Data, runs: Mapping[str, Sequence[Path]]) -> dict[str, ZeroShotReport]:
    """Return recipe -> accuracy on Fashion-MNIST by the bare names of its classes; empty if it is not installed."""
    if not data.has_clothes:
        return {}
    caches, settings = (data.folder / "clothes", data.folder / "clothes-names"), ZeroShotSettings(check_overlap=False)
    return {name: evaluate_zero_shot(caches[0], paths, caches[1], settings) for name, paths in runs.items()}


def results_json(
    retrieval: Mapping[str, Mapping[str, RetrievalReport]], clothes: Mapping[str, ZeroShotReport]
) -> dict[str, Any]:
    """Return all reports as JSON values, with the settings of each recipe."""
    return {
        "recipes": {name: {key: str(value) for key, value in to_flat(kind).items()} for name, kind in RECIPES.items()},
        "retrieval": {
            test: {name: retrieval_json(report) for name, report in reports.items()}
            for test, reports in retrieval.items()
        },
        "zero_shot": {CLOTHES: {name: zero_shot_json(report) for name, report in clothes.items()}} if clothes else {},
    }


def recall_table(values: Mapping[str, Any]) -> Table:
    """Return R@10 in both directions of each recipe and of chance on each test, from the JSON values."""
    rows = []
    for test, reports in values["retrieval"].items():
        chance = next(iter(reports.values()))["chance"]
        for name, report in [*reports.items(), ("chance", chance)]:
            cells = [_estimate(report[way], "r@10") for way in ("i2t", "t2i")]
            rows.append([test, name, *cells])
    return ["test", "recipe", "i2t R@10", "t2i R@10"], rows


def accuracy_table(values: Mapping[str, Any]) -> Table:
    """Return the accuracy of each recipe and of chance on sets with classes, from the JSON values."""
    rows = []
    for test, reports in values["zero_shot"].items():
        rows += [[test, name, _estimate(report, "acc1")] for name, report in reports.items()]
        rows.append([test, "chance", _estimate(next(iter(reports.values()))["chance"], "acc1")])
    return ["test", "recipe", "top-1"], rows


def split_table(counts: Mapping[int, Mapping[str, int]]) -> Table:
    """Return the number of icons of each part of the split of each seed, and of what is in none."""
    names = list(next(iter(counts.values())))
    rows = [
        [
            str(seed),
            *(f"{count:,} ({format_percent(count / max(1, sum(of_seed.values())))})" for count in of_seed.values()),
        ]
        for seed, of_seed in counts.items()
    ]
    return ["seed", *names], rows


def _estimate(values: Mapping[str, Any], name: str) -> str:
    low, high = values["intervals"][name]
    return format_estimate(Estimate(values[name], low, high))


TITLE = "Icons with their names: what is aligned by training on cached features"
_NOTES = ["Brackets hold 95% intervals over names. What the tests are: `pipelines/icons/README.md`."]
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
    source = open_source(str(data.icons_path), kind=KIND)
    assert isinstance(source, IconifySource)
    accuracy = [Section(title="Classes", table=accuracy_table(values))] if values["zero_shot"] else []
    write_report(
        path,
        title=TITLE,
        summary=_summary(values, splits),
        sections=[
            Section(title="Recall at 10", notes=_NOTES, table=recall_table(values)),
            *accuracy,
            Section(title="Splits", table=split_table(splits)),
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
