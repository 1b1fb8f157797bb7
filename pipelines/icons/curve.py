"""The learning curve of the pipeline of icons: recipes on nested draws of more and more pairs.

The validation part of the first seed chooses the settings of a recipe for each number of pairs. Finished runs and
results are reused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from embedcache.dataset.selections import Selection, write_selection
from embedcache.dataset.splits import read_split
from embedcache.evaluate.retrieval import chance_at, rank
from embedcache.evaluate.runs import load_runs
from embedcache.evaluate.settings import RetrievalSettings, ZeroShotSettings
from embedcache.evaluate.zero_shot import classify
from embedcache.metrics import MetricValues
from embedcache.processes import Precision
from embedcache.progress import Progress
from embedcache.provenance import digest_file
from embedcache.runs import PAIR, Run
from embedcache.store.cache import Cache
from embedcache.train.data import TrainData, open_data
from embedcache.train.recipes import TrainingLength
from embedcache.train.settings import TrainSettings, train_settings
from embedcache.train.train import TrainReport, train_on
from pipelines.common import with_options
from pipelines.icons.steps import FEATURES, Data
from pipelines.parallel import run_parallel
from pipelines.results import Result, file_name, keep_result

NAMES = "names never seen"
FAMILIES = "families never seen"
EMOJI = "OpenMoji"
CLOTHES = "Fashion-MNIST"
"""The tests."""
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
_K = 10
_MAX_SAMPLES = 10_000
_MEMORY_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training on any number of pairs.

    Args:
        options: options for every number of pairs, named as on the command line.
        choices: alternatives, from which validation chooses one for each number of pairs.
        length: length of the training, or None for a closed form.
        control_of: recipe whose control this is, and whose choices it uses.
        features: modality -> its feature.
    """

    options: Mapping[str, object]
    choices: Sequence[Mapping[str, float]] = ({},)
    length: TrainingLength | None = None
    control_of: str | None = None
    features: Mapping[str, str] = field(default_factory=lambda: FEATURES)

    def settings(self, num_pairs: int) -> list[TrainSettings]:
        """Return the settings of each choice for so many pairs."""
        length = self.length.options(num_pairs) if self.length else {"epochs": 0}
        return [train_settings({**self.options, **length, **choice}) for choice in self.choices]


_SHRINKAGES = tuple({"shrinkage": value} for value in (10.0, 1.0, 0.1, 0.01))
_DROPOUTS = tuple({"dropout": value} for value in (0.1, 0.5))
_LENGTH = TrainingLength(2_000_000, 10, 100)
_LINEAR: Mapping[str, object] = {"projector": "linear", "initialization": "cca"}
_MLP: Mapping[str, object] = {"projector": "mlp", "initialization": "cca"}
_TOKEN: Mapping[str, object] = {"projector": "token+token_mlp", "initialization": "random"}
_GLU: Mapping[str, object] = {"projector": "glu", "initialization": "random", "dropout": 0.3, "lr": 5e-4}
RECIPES: Mapping[str, Recipe] = {
    "ridge": Recipe(options={**_LINEAR, "initialization": "ridge"}, choices=_SHRINKAGES),
    "CCA": Recipe(options=_LINEAR, choices=_SHRINKAGES),
    "linear": Recipe(options=_LINEAR, choices=_DROPOUTS, length=_LENGTH),
    "mlp": Recipe(options=_MLP, choices=_DROPOUTS, length=_LENGTH),
    "mlp, siglip": Recipe(options={**_MLP, "loss": "siglip"}, choices=_DROPOUTS, length=_LENGTH),
    "token": Recipe(options=_TOKEN, choices=_DROPOUTS, length=_LENGTH),
    "glu": Recipe(options=_GLU, length=_LENGTH),
    "CCA of shuffled pairs": Recipe(options={**_LINEAR, "shuffle_pairs": True}, choices=_SHRINKAGES, control_of="CCA"),
}
"""Name -> recipe."""


def in_precision(recipes: Mapping[str, Recipe], precision: Precision) -> dict[str, Recipe]:
    """Return recipes that train in a precision. Closed forms stay in float32."""
    return {
        name: replace(recipe, options={**recipe.options, "precision": precision}) if recipe.length else recipe
        for name, recipe in recipes.items()
    }


@dataclass(frozen=True, kw_only=True)
class SeedRuns:
    """The runs of one seed.

    Args:
        folder: folder of the runs, next to the folders of other seeds.
        icons: cache of the icons.
        tests: name of a test -> its cache, and the cache of its class names if it has classes.
        split: the split, with `{seed}` for the seed.
        num_pairs: size -> training pairs of the first seed, for which the epochs are counted.
        seed: seed of the split, the draws and the trainings.
        recipes: recipes by name.
    """

    folder: Path
    icons: Path
    tests: Mapping[str, Sequence[Path]]
    split: str
    num_pairs: Mapping[int, int]
    seed: int
    recipes: Mapping[str, Recipe]

    def path(self, recipe: str, size: int, choice: int) -> Path:
        """Return the folder of a run."""
        return self.folder / file_name(f"{size} {recipe} {choice_name(self.recipes[recipe].choices[choice])}")

    def train(self, recipe: str, size: int, choice: int, *, progress: Progress | None = None) -> None:
        """Train a recipe with one of its choices on a draw of pairs."""
        # `{seed}` stays a placeholder, so that runs of all seeds have equal settings.
        selection = selection_path(self.folder.with_name("seed{seed}"), size)
        settings = with_options(
            self.recipes[recipe].settings(self.num_pairs[size])[choice],
            split=self.split,
            selection=str(selection),
            seed=self.seed,
        )

        data = _open_icons(self.icons, tuple(self.recipes[recipe].features.items()))
        train_on(data, self.path(recipe, size, choice), settings, progress=progress)

    def measure(self, recipe: str, size: int, choice: int, *, progress: Progress | None = None) -> None:
        """Measure a run on all tests."""
        run_path = self.path(recipe, size, choice)
        weights = Run.open(run_path, kind=PAIR).info.weights

        for test in self.tests:
            compute = partial(self._measure, test, run_path)
            keep_result(self.folder, recipe, question(test, size), weights, compute, progress)

    def _measure(self, test: str, run_path: Path) -> Result:
        paths = self.tests[test]
        cache = Cache(paths[0])
        run = load_runs(run_path)[0]

        measures = {}
        chance = {}

        # A test without class names is a retrieval of captions.
        if len(paths) == 1:
            ranking = rank(cache, run, RetrievalSettings(check_overlap=False, max_samples=_MAX_SAMPLES))
            for direction, ranks in ranking.ranks.items():
                name = f"{direction} R@{_K}"
                measures[name] = MetricValues(ranks <= _K, ranking.clusters(direction))
                chance[name] = chance_at(ranking, direction, _K)
        else:
            predictions = classify(cache, run, Cache(paths[1]), ZeroShotSettings(check_overlap=False))
            clusters_M = predictions.split.groups[predictions.items.samples]
            measures["top-1"] = MetricValues(predictions.ranks == 1, clusters_M)
            chance["top-1"] = 1 / len(predictions.names)

        return Result(
            seed=self.seed,
            num_examples=max(len(item.values_M) for item in measures.values()),
            num_trained=read_report(run_path).num_samples["train"],
            measures=measures,
            chance=chance,
        )


def choice_name(choice: Mapping[str, float]) -> str:
    """Return a choice as text, such as `dropout 0.5`; empty for one without alternatives."""
    return " ".join(f"{option} {value:g}" for option, value in choice.items())


def question(test: str, size: int) -> str:
    """Return the name of a test of runs on so many pairs."""
    return f"{test} {size}"


def selection_path(folder: Path, size: int) -> Path:
    """Return the file of the pairs that the runs of a seed are trained on."""
    return folder / f"{size}-pairs.parquet"


@lru_cache(1)
def _open_icons(path: Path, features: Sequence[tuple[str, str]]) -> TrainData:
    """Open features; the last ones stay open in the process."""
    return open_data(path, dict(features), memory_bytes=_MEMORY_BYTES)


def curve_sizes(data: Data, seed: int, sizes: Sequence[int]) -> list[int]:
    """Return the sizes below the training part of a seed, then the number of all icons for the whole training part."""
    count = data.split(seed)["train"]
    return [*(size for size in sorted(sizes) if size < count), data.icons.info.num_samples]


def open_runs(
    data: Data, folder: Path, seeds: Sequence[int], sizes: Sequence[int], recipes: Mapping[str, Recipe]
) -> list[SeedRuns]:
    """Draw nested numbers of pairs from the training part of each seed, and return the runs of each seed.

    Args:
        data: the icons.
        folder: folder of the runs, with a folder of each seed.
        seeds: seeds of splits, draws and trainings.
        sizes: numbers of pairs; if a training part has fewer, all of it.
        recipes: recipes by name.
    """
    counts = {seed: data.split(seed)["train"] for seed in seeds}
    folders = [draw_pairs(data, folder / f"seed{seed}", seed, sizes) for seed in seeds]

    return [
        SeedRuns(
            folder=path,
            icons=data.icons.path,
            tests=list_tests(data),
            split=f"{data.folder}/split-{{seed}}.parquet",
            num_pairs={size: min(size, counts[seeds[0]]) for size in sizes},
            seed=seed,
            recipes=recipes,
        )
        for seed, path in zip(seeds, folders, strict=True)
    ]


def list_tests(data: Data) -> dict[str, list[Path]]:
    """Return name of a test -> its cache, and the cache of its class names if it has classes."""
    tests = {NAMES: [data.icons.path], FAMILIES: [data.folder / "families"], EMOJI: [data.folder / "emoji"]}
    if data.has_clothes:
        tests[CLOTHES] = [data.folder / "clothes", data.folder / "clothes-names"]
    return tests


def draw_pairs(data: Data, folder: Path, seed: int, sizes: Sequence[int]) -> Path:
    """Write nested selections of so many pairs of the training part, and return their folder."""
    split = data.folder / f"split-{seed}.parquet"
    folder.mkdir(parents=True, exist_ok=True)

    def compute() -> Mapping[str, int]:
        # One permutation for all sizes, so that each draw contains the smaller ones.
        rows = np.random.default_rng(seed).permutation(read_split(split, [data.icons]).rows("train"))
        for size in sizes:
            selection = Selection(rows=np.sort(rows[:size]))
            write_selection(selection_path(folder, size), data.icons, selection, {"seed": seed})
        return {str(size): len(rows[:size]) for size in sizes}

    name = str((folder / "pairs").relative_to(data.folder))
    data.step(name, {"split": digest_file(split), "sizes": list(sizes)}, compute)
    return folder


def run_all(seed_runs: Sequence[SeedRuns]) -> dict[tuple[str, int], int]:
    """Train all choices of the first seed, then the best choice of each recipe with the other seeds, and measure it.

    Returns:
        Recipe and size -> number of its choice.
    """
    run_parallel(choice_steps(seed_runs[0]))
    choices = choose(seed_runs[:1])

    trainings = [(name, size, choice) for (name, size), choice in choices.items()]
    run_parallel([(runs.train, *training) for runs in seed_runs for training in trainings])
    run_parallel([(runs.measure, *training) for runs in seed_runs for training in trainings])
    return choices


def choice_steps(first: SeedRuns) -> list[tuple[object, ...]]:
    """Return the trainings of all choices as steps of `run_parallel`, on fewer pairs first."""
    steps: list[tuple[object, ...]] = []
    for size in first.num_pairs:
        for name, recipe in first.recipes.items():
            if recipe.control_of is None:
                steps += [(first.train, name, size, choice) for choice in range(len(recipe.choices))]
    return steps


def choose(draws: Sequence[SeedRuns]) -> dict[tuple[str, int], int]:
    """Return the choice of each recipe and size with the highest mean validation recall over draws of one seed."""
    recipes = draws[0].recipes

    def best(name: str, size: int) -> int:
        # A control has the settings that were chosen for its recipe.
        name = recipes[name].control_of or name
        choices = range(len(recipes[name].choices))

        # Averaged over draws, so that the choice does not depend on one of them.
        scores = [fmean(read_score(runs.path(name, size, choice)) for runs in draws) for choice in choices]
        return int(np.argmax(scores))

    return {(name, size): best(name, size) for size in draws[0].num_pairs for name in recipes}


def read_report(run_path: Path) -> TrainReport:
    """Read the report of a finished run."""
    return TrainReport.model_validate(Run.open(run_path).info.report)


def read_score(run_path: Path) -> float:
    """Return the validation recall of a run, averaged over k and both directions."""
    score = read_report(run_path).score
    assert score is not None
    return score


class Cost(NamedTuple):
    """The cost of a training: epochs, seconds of one thread, and floating-point operations."""

    epochs: int
    seconds: float
    flops: float


def read_cost(run_path: Path) -> Cost:
    """Compute the cost of the training of a run.

    Operations are three forward passes of each pair, with two operations per parameter, and four products of the batch
    and the shared width in the loss. The second moments of all pairs, for means and closed forms, and the eigenvectors
    and singular vectors of a closed form are added.
    """
    run = Run.open(run_path)
    report = read_report(run_path)
    lines = [json.loads(line) for line in (run_path / "losses.jsonl").read_text().splitlines()]
    epochs = max((line["epoch"] for line in lines if "validation" in line), default=0)

    num_pairs = report.num_samples["train"]
    settings = run.info.settings
    batch_size = min(settings["optimizer"]["batch_size"] or 1024, num_pairs)
    widths = [item.width for item in run.info.inputs.values()]

    flops = epochs * num_pairs * (6.0 * report.num_parameters + 8.0 * batch_size * run.shared_width)
    flops += 2.0 * num_pairs * sum(widths) ** 2
    if settings["model"]["initialization"] != "random":
        flops += sum(10.0 * width**3 for width in widths)
    return Cost(epochs, run.info.record["seconds"], flops)
