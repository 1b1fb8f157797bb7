"""Other features in the pipeline of icons: tokens by their bytes, and encoders chosen on 1,000 pairs, on 100,000 pairs.

They are extracted for a cut of the icons: the pairs that the first seed trains, validates and tests on. Finished
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
_LITE0, _LITE1, _MINI = "efficientnet-lite0", "efficientnet-lite1", "all-MiniLM-L6-v2"
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
        tokens: name -> image feature, of which the tokens of `+` are the second part.
        images: image features whose pairs with all of `texts` are compared.
        texts: text features.
        recipes: how pairs of features are trained.
        length: how long tokens are trained.
    """

    image_encoders: Mapping[str, Sequence[str]]
    text_encoders: Mapping[str, Sequence[str]]
    tokens: Mapping[str, str]
    images: Sequence[str]
    texts: Sequence[str]
    recipes: Mapping[str, Recipe] = field(default_factory=lambda: _TRAINED)
    length: TrainingLength = _LENGTH

    def token_recipes(self) -> dict[str, Recipe]:
        """Return the paper's projectors of tokens for each token feature."""
        return {
            name: Recipe(
                options={**_TOKENS, "projector": f"{'cls_token' if '+' in image else 'token'}+token_mlp"},
                length=self.length,
                features={"image": image, "text": self.texts[0]},
            )
            for name, image in self.tokens.items()
        }

    def pair_recipes(self) -> dict[str, Recipe]:
        """Return `mlp` and the closed form for each pair of features."""
        return {
            _pair_name(kind, image, text): replace(recipe, features={"image": image, "text": text})
            for kind, recipe in self.recipes.items()
            for image, text in product(self.images, self.texts)
        }


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
    "The pairs, split and tests of the learning curve, and other features. All train on the same pairs, ten epochs."
]
_TOKEN_NOTE = (
    "R@10 over the queries of both directions, and what it gains over the first feature on the same items, with 95% "
    "intervals over items and seeds. How tokens are projected: `pipelines/icons/README.md`."
)
_PAIR_NOTE = (
    "The metrics of `evaluate pairs` on 1,000 pairs, means of three draws, beside test R@10 on names never seen after "
    "training on all pairs. Intervals of rank correlations are too narrow, since pairs share encoders."
)


def _pair_name(kind: str, image: str, text: str) -> str:
    return f"{kind}, {image}, {text}"


def run_features(data: Data, seed: int, size: int = NUM_PAIRS, compared: Compared = COMPARED) -> dict[str, Any]:
    """Extract, train and measure, but for what is finished; return the results as JSON values, with a page."""
    folder = data.folder / "features"
    recipes = {**compared.token_recipes(), **compared.pair_recipes()}
    (runs,) = open_runs(data, folder, [seed], [size], recipes)
    selection = selection_path(runs.folder, size)
    caches = cut_caches(data, folder, seed, selection)
    write_pairs_split(folder, seed)
    encoders = {**compared.image_encoders, **compared.text_encoders}
    made = {"pairs": digest_file(selection), "encoders": {name: list(features) for name, features in encoders.items()}}
    data.step("features/encoders", made, lambda: _extract_all(compared, caches))
    tests = {name: [path] for name, path in caches.items()}
    runs = replace(runs, icons=caches[NAMES], tests=tests, split=f"{folder}/split-{{seed}}.parquet")
    chosen = run_all([runs])
    trained = [Run.open(runs.path(*key, choice)).info.weights for key, choice in chosen.items()]

    def measure() -> dict[str, Any]:
        values = features_json(runs, chosen, compared)
        outcomes = pair_outcomes(values, compared, [_measure_pairs(runs, compared, draw) for draw in _DRAWS])
        ranked = correlation_table(outcomes)
        write_feature_pages(folder, values, outcomes, ranked)
        return {**values, "pairs": _table_json(pair_table(outcomes)), "rank": _table_json(ranked)}

    made = {"runs": trained, "pairs": digest_file(folder / f"pairs-{seed}.parquet")}
    values = data.step("features", made, measure)
    print_table(*token_table(values), title="tokens")
    print_line(f"{folder}.html; {folder}.json")
    return values


def cut_caches(data: Data, folder: Path, seed: int, selection: Path) -> dict[str, Path]:
    """Cut the icons of a selection with those of validation and test, and the caches of the other tests.

    The split of the cut is `split-SEED.parquet` in the folder.

    Returns:
        Test -> its cache; that of the names never seen has the training pairs too.
    """
    split = read_split(data.folder / f"split-{seed}.parquet", [data.icons])
    rows = [read_selection(selection, [data.icons]), split.rows("val"), split.rows("test")]
    used = Selection(rows=np.sort(np.concatenate(rows)))
    write_selection(folder / "used.parquet", data.icons, used, {"seed": seed})
    caches = {NAMES: folder / "icons", FAMILIES: folder / "families", EMOJI: folder / "emoji"}
    cut_cache(data.icons.path, folder / "used.parquet", caches[NAMES])
    of_cut = Split(
        parts=np.array(split.parts)[used.rows].tolist(),
        groups=np.array(split.groups)[used.rows].tolist(),
    )
    write_split(folder / f"split-{seed}.parquet", [Cache(caches[NAMES])], of_cut)
    cut_cache(data.icons.path, data.folder / "families.parquet", caches[FAMILIES])
    cut_cache(data.workdir / "emoji", data.folder / "emoji.parquet", caches[EMOJI])
    return caches


def write_pairs_split(folder: Path, seed: int) -> None:
    """Write `pairs-SEED.parquet`, the split of the cut with a quarter of the pairs outside the test in validation.

    Few pairs are drawn of it: of a hundredth in validation there would be ten, on which any R@10 is 1.
    """
    icons = Cache(folder / "icons")
    split = read_split(folder / f"split-{seed}.parquet", [icons])
    is_used, groups = np.array(split.parts) != "test", np.array(split.groups)
    names = np.unique(groups[is_used])
    validation = np.random.default_rng(seed).choice(names, round(_VALIDATION * len(names)), replace=False)
    in_validation = is_used & np.isin(groups, validation)
    parts = np.where(in_validation, "val", np.where(is_used, "train", "test")).tolist()
    write_split(folder / f"pairs-{seed}.parquet", [icons], replace(split, parts=parts))


def _extract_all(compared: Compared, caches: Mapping[str, Path]) -> dict[str, int]:
    """Extract all features of all caches, which are cuts; return test -> number of samples."""
    for path in caches.values():
        for encoder, features in compared.image_encoders.items():
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


def features_json(runs: SeedRuns, chosen: Mapping[tuple[str, int], int], compared: Compared) -> dict[str, Any]:
    """Return all results as JSON values.

    `runs`: recipe -> its features, choice, validation recall, and what the training took. `num_bytes`: token feature ->
    bytes per image. `tests`: test -> `chance`, `values`, recipe -> R@10 of both directions, and `gains`, token feature
    -> what it gains over the first one.
    """
    (size,) = runs.num_pairs
    results = Results(with_both(Result.read(path)) for path in sorted((runs.folder / "results").glob("*.json")))
    icons, names = Cache(runs.icons), list(runs.recipes)
    stored = {name: image.split("+") for name, image in compared.tokens.items()}
    return {
        "seeds": [runs.seed],
        "runs": {
            name: {**run_json([runs], name, size, chosen[name, size]), "features": dict(runs.recipes[name].features)}
            for name in names
        },
        "num_bytes": {
            name: sum(_bytes_per_item(icons.feature("image", feature)) for feature in features)
            for name, features in stored.items()
        },
        "tests": {test: _recalls_json(results, question(test, size), names, list(stored)) for test in runs.tests},
    }


def _bytes_per_item(feature: Feature) -> int:
    return int(np.prod(feature.shape[1:])) * np.dtype(feature.dtype).itemsize


def _recalls_json(results: Results, asked: str, names: Sequence[str], tokens: Sequence[str]) -> dict[str, Any]:
    """Return the recalls of one test, and what each kind of tokens gains over the first, from the same resamples."""
    means = results.resample([(name, asked) for name in names], _MEASURE)
    columns = dict(zip(names, means.T, strict=True))
    gains = {name: columns[name] - columns[tokens[0]] for name in tokens[1:]}
    return {
        "chance": round_json(results.seeds(names[0], asked)[0].chance[_MEASURE]),
        "values": estimates_json(columns),
        "gains": estimates_json(gains),
    }


def pair_outcomes(values: Mapping[str, Any], compared: Compared, measured: Sequence[PairsReport]) -> Outcomes:
    """Return the recalls of all pairs of features on names never seen, beside their metrics on few pairs."""
    found = values["tests"][NAMES]["values"]
    recalls = {
        kind: {
            (image, text): found[_pair_name(kind, image, text)]["value"]
            for image, text in product(compared.images, compared.texts)
        }
        for kind in compared.recipes
    }
    return Outcomes(measured=measured, recalls=recalls)


def _table_json(table: Table) -> list[dict[str, str]]:
    columns, rows = table
    return [dict(zip(columns, row, strict=True)) for row in rows]


def write_feature_pages(path: Path, values: Mapping[str, Any], outcomes: Outcomes, ranked: Table) -> None:
    """Write the page as HTML and Markdown, with the rank correlations of `correlation_table`."""
    parts = [
        Part("Tokens", [_TOKEN_NOTE], token_table(values)),
        Part("Encoders", [_PAIR_NOTE], ranked),
        Part("All pairs of features", ["Sorted by recall."], pair_table(outcomes)),
    ]
    write_pages(path, TITLE, parts, notes=NOTES, credit=CREDIT)


def token_table(values: Mapping[str, Any]) -> Table:
    """Return the recalls of each token feature by its bytes, with chance, and what it gains over the first one."""
    rows, tests = [], values["tests"]
    for name, num_bytes in values["num_bytes"].items():
        run = values["runs"][name]
        recalls = [
            cell
            for found in tests.values()
            for cell in (str(estimate_of(found["values"][name])), _gain(found["gains"].get(name)))
        ]
        rows.append([name, format_count(num_bytes), *recalls, f"{run['seconds']:,.0f}", f"{run['flops'] / 1e12:,.1f}"])
    chances = [cell for found in tests.values() for cell in (format_fraction(found["chance"]), "")]
    columns = [column for test in tests for column in (test, "gain")]
    return ["image feature", "bytes", *columns, "seconds", "TFLOP"], [*rows, ["chance", "", *chances, "", ""]]


def _gain(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else format_gain(estimate_of(value))
