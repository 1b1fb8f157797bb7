"""Runs of the pipeline of icons, measured on what none of them has seen, as JSON values and tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedcache.cli.console import open_progress, print_line
from embedcache.evaluate.retrieval import RetrievalReport, evaluate_retrieval
from embedcache.evaluate.settings import RetrievalSettings, ZeroShotSettings
from embedcache.evaluate.zero_shot import ZeroShotReport, evaluate_zero_shot
from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import Table, format_estimate, format_percent
from embedcache.reports.retrieval import retrieval_json
from embedcache.reports.zero_shot import zero_shot_json
from embedcache.settings import to_flat
from embedcache.train.data import open_data
from embedcache.train.settings import TrainSettings, train_settings
from embedcache.train.train import train_on
from pipelines.common import with_options
from pipelines.drawings.steps import FEATURES, Data

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
