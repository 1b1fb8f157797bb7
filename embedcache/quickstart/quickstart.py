"""The complete workflow on packaged data: extract, train, evaluate, index and search, with a page of results."""

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from embedcache.dataset.settings import SplitSettings
from embedcache.errors import PathError, summary
from embedcache.evaluate.retrieval import Ranking, RetrievalReport, evaluate_retrieval, rank
from embedcache.evaluate.runs import load_runs
from embedcache.extract.extract import extract
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import peak_memory_bytes, read_json, recognize, write_record
from embedcache.reports.figures import COLORS, INK, label, open_axes, svg
from embedcache.reports.items import ItemRenderer, PageItem, QueryExample
from embedcache.reports.render import Presentation, Section, format_fraction, write_page
from embedcache.reports.retrieval import (
    NO_CLASS_NAMED,
    query_sections,
    recall_bars,
    recall_tiles,
    retrieval_json,
    retrieval_table,
)
from embedcache.runs import Run
from embedcache.search.index import build_index
from embedcache.search.search import Hit, search
from embedcache.search.settings import IndexSettings, SearchSettings
from embedcache.settings import replace_fields
from embedcache.sources.open import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings, command_line
from embedcache.train.train import TrainReport, train

T = TypeVar("T")

IMAGE_ENCODER = "lite:efficientnet-lite0"
TEXT_ENCODER = "st:all-MiniLM-L6-v2"
SOURCE = "openmoji:en+de+es+fr"
SEEDS = (0, 1, 2)
QUERIES = ("an animal with feathers", "something sweet to eat", "a way to travel over water")
NUM_HITS = 7
RECIPE = TrainSettings(recipe="auto", language="en")
CLOSED_FORM = TrainSettings(
    model=ModelSettings(projector="linear"), optimizer=OptimizerSettings(epochs=0), language="en"
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One finished stage of the quickstart, the shell command that does the same, and its result in one line."""

    name: str
    command: str
    seconds: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class QuickstartReport:
    """Results of the quickstart.

    Args:
        retrieval: recalls of the projectors, which come first, of the closed form and of the shuffled control.
        run_paths: runs of the projectors; the page shows queries of the first.
        hits: query -> hits of the index.
    """

    stages: Sequence[Stage]
    retrieval: Mapping[str, RetrievalReport]
    run_paths: Sequence[Path]
    hits: Mapping[str, Sequence[Hit]]
    cache_path: Path
    peak_memory_bytes: int
    page_path: Path
    metrics_path: Path

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return the result of each stage."""
        return [f"{stage.name}: {stage.outcome}" for stage in self.stages]


def present_quickstart(report: QuickstartReport) -> Presentation:
    """Return the presentation of the quickstart: recalls, training, queries, hits and stages."""
    cache, trained = Cache(report.cache_path), next(iter(report.retrieval.values()))
    renderer = ItemRenderer(cache, "image")
    queries, renderers = query_sections(cache, ("image", "text"), once(lambda: _rank_first(report, cache)))
    search = Section(
        title="Search",
        notes=["Top results with their cosine. The index holds all images, including those seen in training."],
        examples=lambda: [_hits_example(query, hits, renderer) for query, hits in report.hits.items()],
    )
    stages = [[stage.name, f"{stage.seconds:.1f}", stage.command, stage.outcome] for stage in report.stages]
    return Presentation(
        title="embedcache quickstart",
        lines=["two frozen encoders, trained independently, aligned by a small projector trained on cached features"],
        tiles=[
            (f"{sum(stage.seconds for stage in report.stages):.0f} s", "total time"),
            (f"{report.peak_memory_bytes / 1e9:.2f} GB", "peak memory"),
            *recall_tiles(trained),
        ],
        sections=[
            _retrieval_section(report),
            *_training_sections(report.run_paths),
            *queries,
            search,
            Section(title="Stages", table=(["stage", "seconds", "command", "outcome"], stages), num_printed=0),
        ],
        record=lambda: read_json(report.metrics_path),
        notes=[f"metrics: {report.metrics_path}", f"open {report.page_path} in a browser"],
        renderers=[renderer, *renderers],
    )


def _retrieval_section(report: QuickstartReport) -> Section:
    """Return the recalls, with the recipes that were compared and what validation chose."""
    trained, closed_form, shuffled = report.retrieval.values()
    infos = [Run.open(path).info for path in report.run_paths]
    recipes = infos[0].report["recipes"]
    compared = ", ".join(recipe["name"] for recipe in recipes)
    chosen = [next(recipe["name"] for recipe in info.report["recipes"] if recipe["is_chosen"]) for info in infos]
    choice = ", ".join(f"{name} ({chosen.count(name)} of {len(chosen)})" for name in dict.fromkeys(chosen))
    notes = [
        f"Evaluated: {trained.line()}. Near-duplicate groups are never divided between training and test. The control "
        "is trained on shuffled pairs and must score at chance level. In brackets the 95% interval; for chance, the "
        "range that holds 95% of random rankings.",
        f"Compared: {compared}. Validation chose {choice}, each with its own split and seed. The closed form is "
        "regularized CCA of the pairs alone.",
    ]
    if trained.unnamed:
        notes.append(NO_CLASS_NAMED)
    if _is_within_intervals(closed_form, trained):
        num_pairs = infos[0].report["num_samples"]["train"]
        notes.append(
            "No recall of the closed form is outside the interval of the projectors: a linear map learns nearly all "
            f"that {num_pairs:,} pairs can teach."
        )
    table = {f"projectors ({', '.join(dict.fromkeys(chosen))})": trained, "closed form": closed_form}
    recalls = {name: result.recalls for name, result in report.retrieval.items()}
    return Section(
        title="Retrieval on the test split",
        notes=notes,
        table=retrieval_table({**table, "shuffled pairs": shuffled}),
        figures=lambda: [recall_bars({**recalls, "chance": trained.chance})],
    )


def _is_within_intervals(report: RetrievalReport, other: RetrievalReport) -> bool:
    """Return whether no recall of a report is outside the interval of another one."""
    return all(
        interval.low <= report.recalls[direction][name].value <= interval.high
        for direction, intervals in other.recalls.items()
        for name, interval in intervals.items()
    )


def _rank_first(report: QuickstartReport, cache: Cache) -> Ranking:
    return rank(cache, load_runs(report.run_paths[:1])[0])


def _hits_example(query: str, hits: Sequence[Hit], renderer: ItemRenderer) -> QueryExample:
    results = [replace(renderer.render(hit.row), text=format_fraction(hit.score)) for hit in hits]
    return QueryExample(query=PageItem(text=query), outcome="", is_correct=True, results=results)


def _training_sections(run_paths: Sequence[Path]) -> list[Section]:
    """Return the section of the training curves; none of closed forms."""
    logs = {path.name: _read_log(path / "losses.jsonl") for path in run_paths}
    trained_logs = {name: lines for name, lines in logs.items() if any("loss" in line for line in lines)}
    if not trained_logs:
        return []
    return [Section(title="Training", figures=lambda: [_training_curves(trained_logs)])]


def _read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _training_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Draw training loss by step and validation recall by epoch, one line per run, as an SVG element."""
    loss_axes, recall_axes = open_axes(3, ncols=2)
    for (name, lines), color in zip(logs.items(), COLORS, strict=False):
        losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        recalls = [(line["epoch"], fmean(line["validation"].values())) for line in lines if "validation" in line]
        loss_axes.plot(*zip(*losses, strict=True), color=color, label=name)
        recall_axes.plot(*zip(*recalls, strict=True), color=color, marker=".", label=name)
    label(loss_axes, "step", "training loss")
    label(recall_axes, "epoch (0: closed form)", "validation recall, mean of R@1, 5, 10")
    loss_axes.legend(frameon=False, labelcolor=INK)
    return svg(loss_axes.figure)


def quickstart(workdir: Path | str, *, progress: Progress | None = None) -> QuickstartReport:
    """Align two packaged encoders on OpenMoji, and write `report.html` and `metrics.json`.

    Features and runs that already exist in the folder are reused. `progress` also receives each command and outcome.

    Raises:
        PathError: the folder is a cache, a run, an index or a study.
    """
    workdir, stages = Path(workdir), _Stages(progress or NullProgress())
    _check_folder(workdir)
    cache_path = workdir / "cache"
    _extract(stages, "extract", SOURCE, cache_path, {"image": IMAGE_ENCODER, "text": TEXT_ENCODER})
    prototypes = workdir / "prototypes"
    _extract(stages, "extract prototypes", f"prototypes:{IMAGE_ENCODER}", prototypes, {"text": TEXT_ENCODER})
    recipe = replace_fields(RECIPE, prototypes=prototypes)
    runs = {
        "projectors": _train(stages, cache_path, workdir / "runs" / "seed", recipe),
        "closed form": _train(stages, cache_path, workdir / "runs" / "closed-form", CLOSED_FORM),
        "shuffled pairs": _train(
            stages, cache_path, workdir / "runs" / "shuffled", replace_fields(recipe, shuffle_pairs=True)
        ),
    }
    retrieval = {
        name: stages.run(
            f"evaluate {name}",
            ["evaluate", "retrieval", cache_path, *run_paths],
            partial(evaluate_retrieval, cache_path, run_paths),
            RetrievalReport.line,
        )
        for name, run_paths in runs.items()
    }
    hits = _search(stages, cache_path, workdir / "index", runs["projectors"][0])
    report = QuickstartReport(
        stages=stages.finished,
        retrieval=retrieval,
        run_paths=runs["projectors"],
        hits=hits,
        cache_path=cache_path,
        peak_memory_bytes=peak_memory_bytes(),
        page_path=workdir / "report.html",
        metrics_path=workdir / "metrics.json",
    )
    metrics = retrieval_json(
        retrieval["projectors"], closed_form=retrieval["closed form"], shuffled=retrieval["shuffled pairs"]
    )
    write_record(report.metrics_path, {"retrieval": metrics})
    write_page(report.page_path, present_quickstart(report))
    return report


def _check_folder(workdir: Path) -> None:
    """Check that the page of results does not replace that of a study, or lie among the files of another artifact."""
    try:
        kind = recognize(workdir)
    except PathError:  # of anything else
        return
    raise PathError(
        f"{workdir}: expected a new folder, or that of an earlier quickstart, got a finished {kind}; give the path of "
        "another folder"
    )


class _Stages:
    """The stages of the quickstart: runs each, reports its command, and records how long it took."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.finished: list[Stage] = []

    def run(self, name: str, words: Sequence[Any], call: Callable[[], T], summarize: Callable[[T], str]) -> T:
        command = shlex.join(["embedcache", *map(str, words)])
        self.progress.note(f"$ {command}")
        started = time.perf_counter()
        result = call()
        stage = Stage(name=name, command=command, seconds=time.perf_counter() - started, outcome=summarize(result))
        self.finished.append(stage)
        self.progress.note(f"  {stage.outcome} ({stage.seconds:.1f} s)")
        return result


def _extract(stages: _Stages, name: str, source: str, cache_path: Path, encoders: Mapping[str, str]) -> None:
    words = [word for modality, spec in encoders.items() for word in (f"--{modality}-encoder", spec)]
    stages.run(
        name,
        ["extract", source, cache_path, *words],
        lambda: extract(open_source(source), cache_path, encoder=encoders, progress=stages.progress),
        lambda reports: "; ".join(report.line() for report in reports),
    )


def _train(stages: _Stages, cache_path: Path, path: Path, settings: TrainSettings) -> list[Path]:
    """Train once per seed and return the runs: `path` followed by the seed."""
    run_paths = [path.with_name(f"{path.name}-{seed}") for seed in SEEDS]
    for seed, run_path in zip(SEEDS, run_paths, strict=True):
        seeded = replace_fields(settings, split=SplitSettings(seed=seed), seed=seed)
        stages.run(
            f"train {run_path.name}",
            ["train", cache_path, run_path, *command_line(seeded)],
            partial(train, cache_path, run_path, settings=seeded, progress=stages.progress),
            partial(TrainReport.line, run_path=run_path),
        )
    return run_paths


def _search(stages: _Stages, cache_path: Path, index_path: Path, run_path: Path) -> dict[str, list[Hit]]:
    stages.run(
        "index",
        ["curate", "index", cache_path, index_path, "--run", run_path],
        lambda: build_index(cache_path, index_path, IndexSettings(run=run_path), progress=stages.progress),
        lambda card: f"{card.num_vectors:,} images, recall@10 {card.recall_at_10:.3f} against exact search",
    )
    results = stages.run(
        "search",
        ["search", index_path, *QUERIES, "-k", NUM_HITS],
        lambda: search(index_path, QUERIES, SearchSettings(k=NUM_HITS)),
        lambda results: "; ".join(
            f"{query}: {hits[0].captions[0]}" for query, hits in zip(QUERIES, results, strict=True)
        ),
    )
    return dict(zip(QUERIES, results, strict=True))
