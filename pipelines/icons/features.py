"""Other features in the pipeline of icons, on 100,000 pairs: tokens by their bytes, encoders chosen on 1,000 pairs.

They are extracted for a cut of the icons: the training, validation and test pairs of the first seed. Finished
caches, runs and results are reused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.cli.console import open_progress, print_line, print_table
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.dataset.splits import Split, read_split, write_split
from embedcache.evaluate.encoder_pairs import PairsReport, evaluate_pairs
from embedcache.evaluate.settings import pairs_settings
from embedcache.extract.settings import ExtractSettings
from embedcache.maintain.copy import cut_cache
from embedcache.provenance import digest_file
from embedcache.reports.render import Table, format_count, format_fraction, round_json
from embedcache.runs import Run
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.train.recipes import TrainingLength
from pipelines.common import IMAGE_ENCODER, TEXT_ENCODER, extract_source
from pipelines.icons.ablation import NUM_PAIRS
from pipelines.icons.correlations import Outcomes, correlation_table, pair_table
from pipelines.icons.curve import (
    EMOJI,
    FAMILIES,
    NAMES,
    RECIPES,
    Recipe,
    SeedRuns,
    open_runs,
    question,
    run_all,
    selection_path,
)
from pipelines.icons.curve_page import CREDIT, estimate_of, format_gain, run_json
from pipelines.icons.encoders import USE, WORDLLAMA
from pipelines.icons.steps import Data
from pipelines.results import Part, Result, Results, estimates_json, with_both, write_pages

_MEASURE = "R@10"
NUM_MEASURED = 1_000
_VALIDATION = 0.25
_DRAWS = (0, 1, 2)
_LENGTH = TrainingLength(1_000_000, 10, 30)
_LITE0 = "efficientnet-lite0"
_LITE1 = "efficientnet-lite1"
_MINI = "all-MiniLM-L6-v2"
_TOKENS = {"initialization": "random", "dropout": 0.3, "precision": "bfloat16"}
_TRAINED: Mapping[str, Recipe] = {
    "mlp": Recipe(options={"projector": "mlp", "initialization": "cca"}, length=_LENGTH),
    "CCA": RECIPES["CCA"],
}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Features that are compared.

    Args:
        image_encoders: encoder -> features to extract.
        text_encoders: encoder -> features to extract.
        tokens: name -> image feature. After a `+`, its tokens.
        images: image features whose pairs with all of `texts` are compared.
        texts: text features.
        recipes: recipes of pairs of features.
        length: length of the training of tokens.
    """

    image_encoders: Mapping[str, Sequence[str]]
    text_encoders: Mapping[str, Sequence[str]]
    tokens: Mapping[str, str]
    images: Sequence[str]
    texts: Sequence[str]
    recipes: Mapping[str, Recipe] = field(default_factory=lambda: _TRAINED)
    length: TrainingLength = _LENGTH

    def token_recipes(self) -> dict[str, Recipe]:
        """Return a recipe with the paper's token projectors for each token feature."""
        recipes = {}
        for name, image in self.tokens.items():
            projector = "cls_token" if "+" in image else "token"
            recipes[name] = Recipe(
                options={**_TOKENS, "projector": f"{projector}+token_mlp"},
                length=self.length,
                features={"image": image, "text": self.texts[0]},
            )
        return recipes

    def pair_recipes(self) -> dict[str, Recipe]:
        """Return `mlp` and the closed form for each pair of features."""
        recipes = {}
        for kind, recipe in self.recipes.items():
            for image, text in product(self.images, self.texts):
                recipes[_pair_name(kind, image, text)] = replace(recipe, features={"image": image, "text": text})
        return recipes


COMPARED = Compared(
    image_encoders={
        IMAGE_ENCODER: ("patch_mean", "layer12.patch_mean", "kmeans:4", "grid:4"),
        "lite:efficientnet-lite1": ("patch_mean", "layer12.patch_mean"),
    },
    text_encoders={TEXT_ENCODER: ("mean", "layer4.mean"), WORDLLAMA: ("mean",), USE: ("dense",)},
    tokens={
        "patch_mean": f"{_LITE0}/patch_mean",
        "patch_mean + kmeans:4": f"{_LITE0}/patch_mean+{_LITE0}/kmeans:4",
        "kmeans:4": f"{_LITE0}/kmeans:4",
        "grid:4": f"{_LITE0}/grid:4",
    },
    images=[f"{name}/{layer}patch_mean" for name in (_LITE0, _LITE1) for layer in ("", "layer12.")],
    texts=[f"{_MINI}/mean", f"{_MINI}/layer4.mean", "l2_supercat_256/mean", "multilingual-v3/dense"],
)
TITLE = "Tokens by their bytes, and encoders chosen on 1,000 pairs"
NOTES = [
    "The pairs, split and tests of the learning curve, with other features. All train on the same pairs, ten epochs."
]
_TOKEN_NOTE = (
    "R@10 over the queries of both directions, and its gain over the first feature on the same items, with 95% "
    "intervals over items and seeds. Token projectors are explained in `pipelines/icons/README.md`."
)
_PAIR_NOTE = (
    "The metrics of `evaluate pairs` on 1,000 pairs, as means of three draws, and test R@10 on names never seen after "
    "training on all pairs. Intervals of rank correlations are too narrow, since pairs share encoders."
)


def _pair_name(kind: str, image: str, text: str) -> str:
    return f"{kind}, {image}, {text}"


def run_features(data: Data, seed: int, size: int = NUM_PAIRS, compared: Compared = COMPARED) -> dict[str, Any]:
    """Run all unfinished extractions, trainings and tests, write a page, and return the results as JSON values."""
    folder = data.folder / "features"
    recipes = {**compared.token_recipes(), **compared.pair_recipes()}
    (runs,) = open_runs(data, folder, [seed], [size], recipes)

    selection = selection_path(runs.folder, size)
    caches = cut_caches(data, folder, seed, selection)
    write_pairs_split(folder, seed)

    encoders = {**compared.image_encoders, **compared.text_encoders}
    request = {
        "pairs": digest_file(selection),
        "encoders": {name: list(features) for name, features in encoders.items()},
    }
    data.step("features/encoders", request, lambda: _extract_all(compared, caches))

    tests = {name: [path] for name, path in caches.items()}
    runs = replace(runs, icons=caches[NAMES], tests=tests, split=f"{folder}/split-{{seed}}.parquet")
    choices = run_all([runs])
    weights = [Run.open(runs.path(*key, choice)).info.weights for key, choice in choices.items()]

    def measure() -> dict[str, Any]:
        values = features_json(runs, choices, compared)

        # Metrics are averaged over draws, because 1,000 pairs are few.
        outcomes = pair_outcomes(values, compared, [_measure_pairs(runs, compared, draw) for draw in _DRAWS])
        correlations = correlation_table(outcomes)
        write_feature_pages(folder, values, outcomes, correlations)
        return {**values, "pairs": _table_json(pair_table(outcomes)), "rank": _table_json(correlations)}

    request = {"runs": weights, "pairs": digest_file(folder / f"pairs-{seed}.parquet")}
    values = data.step("features", request, measure)
    print_table(*token_table(values), title="tokens")
    print_line(f"{folder}.html; {folder}.json")
    return values


def cut_caches(data: Data, folder: Path, seed: int, selection: Path) -> dict[str, Path]:
    """Cut the icons of a selection, of validation and of the test, and the caches of the other tests.

    The split of the cut is `split-SEED.parquet` in the folder.

    Returns:
        Test -> its cache. The cache of the names never seen also has the training pairs.
    """
    split = read_split(data.folder / f"split-{seed}.parquet", [data.icons])

    # Only these icons need the other features, which would take hours for all.
    rows = [read_selection(selection, [data.icons]), split.rows("val"), split.rows("test")]
    cut = Selection(rows=np.sort(np.concatenate(rows)))
    write_selection(folder / "used.parquet", data.icons, cut, {"seed": seed})

    caches = {NAMES: folder / "icons", FAMILIES: folder / "families", EMOJI: folder / "emoji"}
    cut_cache(data.icons.path, folder / "used.parquet", caches[NAMES])

    split = Split(
        parts=np.array(split.parts)[cut.rows].tolist(),
        groups=np.array(split.groups)[cut.rows].tolist(),
    )
    write_split(folder / f"split-{seed}.parquet", [Cache(caches[NAMES])], split)

    cut_cache(data.icons.path, data.folder / "families.parquet", caches[FAMILIES])
    cut_cache(data.workdir / "emoji", data.folder / "emoji.parquet", caches[EMOJI])
    return caches


def write_pairs_split(folder: Path, seed: int) -> None:
    """Write `pairs-SEED.parquet`, the split of the cut with a quarter of the other pairs in validation.

    Few pairs are drawn from it: a hundredth in validation would be ten pairs, on which any R@10 is 1.
    """
    icons = Cache(folder / "icons")
    split = read_split(folder / f"split-{seed}.parquet", [icons])
    is_used = np.array(split.parts) != "test"
    groups = np.array(split.groups)

    names = np.unique(groups[is_used])

    # Whole names, as in the strict split.
    validation = np.random.default_rng(seed).choice(names, round(_VALIDATION * len(names)), replace=False)

    in_validation = is_used & np.isin(groups, validation)
    parts = np.where(in_validation, "val", np.where(is_used, "train", "test")).tolist()
    write_split(folder / f"pairs-{seed}.parquet", [icons], replace(split, parts=parts))


def _extract_all(compared: Compared, caches: Mapping[str, Path]) -> dict[str, int]:
    """Extract all features of all caches, and return test -> number of samples."""
    for path in caches.values():
        for encoder, features in compared.image_encoders.items():
            # The caches are cuts, so that they are the source of their own items.
            settings = ExtractSettings(features=tuple(features))
            extract_source(path, path, images=[encoder], texts=[], settings=settings)
        for encoder, features in compared.text_encoders.items():
            settings = ExtractSettings(features=tuple(features))
            extract_source(path, path, images=[], texts=[encoder], settings=settings)
    return {name: len(Cache(path)) for name, path in caches.items()}


def _measure_pairs(runs: SeedRuns, compared: Compared, draw: int) -> PairsReport:
    feature = {"image": tuple(compared.images), "text": tuple(compared.texts)}
    settings = {
        "num_samples": NUM_MEASURED,
        "seed": draw,
        "split": str(runs.icons.parent / f"pairs-{runs.seed}.parquet"),
    }
    return evaluate_pairs(runs.icons, pairs_settings(settings), feature=feature, progress=open_progress())


def features_json(runs: SeedRuns, choices: Mapping[tuple[str, int], int], compared: Compared) -> dict[str, Any]:
    """Return all results as JSON values.

    `runs`: recipe -> its features, choice, validation recall, and costs of the training. `num_bytes`: token feature ->
    bytes per image. `tests`: test -> `chance`, `values`, recipe -> R@10 of both directions, and `gains`, token feature
    -> gain over the first one.
    """
    (size,) = runs.num_pairs
    results = Results(with_both(Result.read(path)) for path in sorted((runs.folder / "results").glob("*.json")))
    names = list(runs.recipes)

    recipes = {}
    for name in names:
        cost = run_json([runs], name, size, choices[name, size])
        recipes[name] = {**cost, "features": dict(runs.recipes[name].features)}

    # A token feature of two parts stores both for every image.
    icons = Cache(runs.icons)
    num_bytes = {}
    for name, image in compared.tokens.items():
        num_bytes[name] = sum(_bytes_per_item(icons.feature("image", feature)) for feature in image.split("+"))

    tokens = list(compared.tokens)
    return {
        "seeds": [runs.seed],
        "runs": recipes,
        "num_bytes": num_bytes,
        "tests": {test: _recalls_json(results, question(test, size), names, tokens) for test in runs.tests},
    }


def _bytes_per_item(feature: Feature) -> int:
    return int(np.prod(feature.shape[1:])) * np.dtype(feature.dtype).itemsize


def _recalls_json(results: Results, question_name: str, names: Sequence[str], tokens: Sequence[str]) -> dict[str, Any]:
    """Return the recalls of one test, and the gain of each kind of tokens over the first, from the same resamples."""
    means = results.resample([(name, question_name) for name in names], _MEASURE)
    columns = dict(zip(names, means.T, strict=True))
    gains = {name: columns[name] - columns[tokens[0]] for name in tokens[1:]}
    return {
        "chance": round_json(results.seeds(names[0], question_name)[0].chance[_MEASURE]),
        "values": estimates_json(columns),
        "gains": estimates_json(gains),
    }


def pair_outcomes(values: Mapping[str, Any], compared: Compared, measured: Sequence[PairsReport]) -> Outcomes:
    """Return the recalls of all pairs of features on names never seen, and their metrics on few pairs."""
    estimates = values["tests"][NAMES]["values"]
    recalls: dict[str, dict[tuple[str, str], float]] = {}
    for kind in compared.recipes:
        recalls[kind] = {}
        for image, text in product(compared.images, compared.texts):
            recalls[kind][image, text] = estimates[_pair_name(kind, image, text)]["value"]
    return Outcomes(measured=measured, recalls=recalls)


def _table_json(table: Table) -> list[dict[str, str]]:
    columns, rows = table
    return [dict(zip(columns, row, strict=True)) for row in rows]


def write_feature_pages(path: Path, values: Mapping[str, Any], outcomes: Outcomes, correlations: Table) -> None:
    """Write the page as HTML and Markdown, with the rank correlations of `correlation_table`."""
    parts = [
        Part("Tokens", [_TOKEN_NOTE], token_table(values)),
        Part("Encoders", [_PAIR_NOTE], correlations),
        Part("All pairs of features", ["Sorted by recall."], pair_table(outcomes)),
    ]
    write_pages(path, TITLE, parts, notes=NOTES, credit=CREDIT)


def token_table(values: Mapping[str, Any]) -> Table:
    """Return the recalls of each token feature by its bytes, with chance, and its gain over the first one."""
    tests = values["tests"]
    rows = []
    for name, num_bytes in values["num_bytes"].items():
        run = values["runs"][name]
        cells = []
        for estimates in tests.values():
            cells += [str(estimate_of(estimates["values"][name])), _gain(estimates["gains"].get(name))]
        rows.append([name, format_count(num_bytes), *cells, f"{run['seconds']:,.0f}", f"{run['flops'] / 1e12:,.1f}"])

    chances = [cell for estimates in tests.values() for cell in (format_fraction(estimates["chance"]), "")]
    columns = [column for test in tests for column in (test, "gain")]
    return ["image feature", "bytes", *columns, "seconds", "TFLOP"], [*rows, ["chance", "", *chances, "", ""]]


def _gain(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else format_gain(estimate_of(value))
