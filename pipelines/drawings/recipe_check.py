"""A recipe against the defaults of training and the best closed form, on one collection of images with names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean

from embedcache.arrays import Array
from embedcache.cli.console import open_progress
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import write_split
from embedcache.evaluate.ranking import rank
from embedcache.evaluate.retrieval import chance_at
from embedcache.evaluate.runs import load_runs
from embedcache.evaluate.settings import RetrievalSettings
from embedcache.metrics.intervals import MetricValues, interval_of
from embedcache.projectors.saved import read_config
from embedcache.reports.base import Table, format_estimate
from embedcache.store.cache import Cache
from embedcache.train.data import TrainData, open_data
from embedcache.train.recipes import apply_recipe
from embedcache.train.settings import TrainSettings, command_line, train_settings
from embedcache.train.train import train_on
from pipelines.common import with_options
from pipelines.drawings.curve import read_report, read_score
from pipelines.drawings.steps import FEATURES
from pipelines.results import Result, Results, keep_result

AUTO, DEFAULT, CLOSED_FORM, SHUFFLED = "--recipe auto", "defaults of train", "best closed form", "auto, shuffled pairs"
_K = 10
MEASURES = (f"i2t R@{_K}", f"t2i R@{_K}")
_CLOSED_FORMS = [
    {"projector": "linear", "initialization": form, "shrinkage": shrinkage, "epochs": 0}
    for form in ("cca", "ridge")
    for shrinkage in (10.0, 1.0, 0.1, 0.01)
]


@dataclass(frozen=True, kw_only=True)
class Check:
    """The rows of one collection, each with the settings that it was trained with, and what was measured.

    Args:
        name: name of the collection.
        num_pairs: training pairs, averaged over seeds.
        rows: row -> settings of the first seed.
        results: recalls of each row, on the question `name`.
    """

    name: str
    num_pairs: float
    rows: Mapping[str, TrainSettings]
    results: Results

    def table_rows(self) -> list[list[str]]:
        """Return recalls of all rows and of chance, and the gain of the recipe over each row."""
        columns = {measure: self._columns(measure) for measure in MEASURES}
        rows = []
        for name, settings in self.rows.items():
            cells = [format_estimate(interval_of(columns[measure][name])) for measure in MEASURES]
            gains = [
                "" if name == AUTO else format_estimate(interval_of(columns[measure][AUTO] - columns[measure][name]))
                for measure in MEASURES
            ]
            rows.append([self.name, f"{self.num_pairs:,.0f}", name, options_of(settings), *cells, *gains])
        found = self.results.seeds(AUTO, self.name)
        chance = [f"{fmean(result.chance[measure] for result in found):.3f}" for measure in MEASURES]
        return [*rows, [self.name, "", "chance", "", *chance, "", ""]]

    def _columns(self, measure: str) -> dict[str, Array]:
        means = self.results.resample([(name, self.name) for name in self.rows], measure)
        return dict(zip(self.rows, means.T, strict=True))


def options_of(settings: TrainSettings) -> str:
    """Return the options that ask for the settings, without the seed."""
    words = command_line(with_options(settings, seed=0, split_seed=0))[:-2]
    return f"`{' '.join(words)}`" if words else ""


def check_recipe(
    name: str, cache_path: Path, folder: Path, seeds: Sequence[int], features: Mapping[str, str] = FEATURES
) -> Check:
    """Train all rows with each seed and measure them on the test part of its split, which all rows share.

    The split is strict unless `seedN/split.parquet` is there. The best closed form is the one with the highest
    validation recall over seeds. Runs that are there are reused.
    """
    data = open_data(cache_path, features, memory_bytes=2**30)
    auto = apply_recipe(train_settings({"recipe": "auto"}), data, open_progress())
    closed = [train_settings(options) for options in _CLOSED_FORMS]
    best = max(closed, key=lambda form: fmean(read_score(path) for path in _train(data, folder, form, seeds)))
    rows = {AUTO: auto, DEFAULT: TrainSettings(), CLOSED_FORM: best, SHUFFLED: with_options(auto, shuffle_pairs=True)}
    results, counts = [], []
    for row, settings in rows.items():
        for seed, path in zip(seeds, _train(data, folder, settings, seeds), strict=True):
            results.append(_measure(name, row, cache_path, path, seed))
            counts.append(read_report(path).num_samples["train"])
    return Check(name=name, num_pairs=fmean(counts), rows=rows, results=Results(results))


def check_table(checks: Sequence[Check]) -> Table:
    """Return the rows of all collections."""
    columns = [
        "collection",
        "training pairs",
        "",
        "options",
        *MEASURES,
        *(f"gain of auto, {name}" for name in MEASURES),
    ]
    return columns, [row for check in checks for row in check.table_rows()]


def _train(data: TrainData, folder: Path, settings: TrainSettings, seeds: Sequence[int]) -> list[Path]:
    """Train with each seed into a folder named by the settings, so that rows with the same ones share their runs."""
    name = sha256(options_of(settings).encode()).hexdigest()[:12]
    paths = [folder / f"seed{seed}" / name for seed in seeds]
    for seed, path in zip(seeds, paths, strict=True):
        split = path.with_name("split.parquet")
        if not split.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_split(split, data.split(data.pairs(None), SplitSettings(seed=seed)))
        train_on(data, path, with_options(settings, split=str(split), seed=seed), progress=open_progress())
    return paths


def _measure(collection: str, row: str, cache_path: Path, run_path: Path, seed: int) -> Result:
    """Rank the test part in both directions, whose near-duplicates are the clusters of intervals."""

    def compute() -> Result:
        ranking = rank(Cache(cache_path), load_runs(run_path)[0], RetrievalSettings(check_overlap=False))
        measures = {
            f"{direction} R@{_K}": MetricValues(ranks <= _K, ranking.groups[ranking.queries(direction)])
            for direction, ranks in ranking.ranks.items()
        }
        chance = {f"{direction} R@{_K}": chance_at(ranking, direction, _K) for direction in ranking.ranks}
        count = max(len(item.values_M) for item in measures.values())
        return Result(seed=seed, num_examples=count, measures=measures, chance=chance)

    return keep_result(run_path.parent, row, collection, read_config(run_path).weights_digest, compute, None)
