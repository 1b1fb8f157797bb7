"""Recipes that `train --recipe auto` compares on the validation part."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from embedcache.dataset.selections import read_selection
from embedcache.provenance import Manifest
from embedcache.settings import replace_flat, to_flat
from embedcache.train.data import TrainData
from embedcache.train.settings import TrainSettings


class TrainingLength(NamedTuple):
    """How long to train: as many epochs as make `num_pairs` pairs in all, within bounds.

    Training stops earlier, after a quarter of the epochs without a better validation recall, three at least.
    """

    num_pairs: int
    min_epochs: int
    max_epochs: int

    def options(self, num_pairs: int) -> dict[str, object]:
        """Return the options of a training on so many pairs."""
        epochs = min(max(round(self.num_pairs / num_pairs), self.min_epochs), self.max_epochs)
        return {"epochs": epochs, "patience": max(3, epochs // 4)}


class Recipe(NamedTuple):
    """A recipe that `--recipe auto` may compare.

    Args:
        name: its name, also that of a folder.
        options: settings by flat name.
        length: how long to train; None for a closed form.
        min_pairs: fewest training pairs with which it is compared.
        max_pairs: training pairs from which on it is not compared; None: any number.
        has_prototypes: whether prototypes, if some are given, join its closed form.
        starts_from_best: whether it starts from the best closed form.
    """

    name: str
    options: Mapping[str, Any]
    length: TrainingLength | None = None
    min_pairs: int = 0
    max_pairs: int | None = None
    has_prototypes: bool = False
    starts_from_best: bool = False


RECIPES = (
    Recipe("closed-form-3", {"projector": "linear", "shrinkage": 3.0}, max_pairs=5_500),
    Recipe("closed-form-1", {"projector": "linear", "shrinkage": 1.0}, max_pairs=5_500),
    Recipe("closed-form-0.3", {"projector": "linear", "shrinkage": 0.3}, min_pairs=1_750),
    Recipe("closed-form-0.1", {"projector": "linear", "shrinkage": 0.1}, min_pairs=5_500),
    Recipe("prototypes", {"projector": "linear", "shrinkage": 1.0}, has_prototypes=True),
    Recipe(
        "mlp-1e-4",
        {"projector": "mlp", "dropout": 0.5, "lr": 1e-4},
        length=TrainingLength(300_000, 10, 30),
        max_pairs=5_500,
        starts_from_best=True,
    ),
    Recipe(
        "mlp-1e-3",
        {"projector": "mlp", "dropout": 0.5, "lr": 1e-3},
        length=TrainingLength(2_000_000, 10, 100),
        min_pairs=5_500,
        starts_from_best=True,
    ),
    Recipe(
        "glu",
        {"projector": "glu", "initialization": "random", "dropout": 0.3, "lr": 5e-4},
        length=TrainingLength(2_000_000, 10, 100),
        min_pairs=5_500,
    ),
)
"""Recipes from the simplest on, chosen on icons, stamps and emoji: docs/about/results.md.

They change halfway between sizes that were measured, on a logarithmic axis.
"""

_REPLACED = ("projector", "initialization", "init_from", "trainable")
"""Settings that replace what a closed form consists of, so that training is needed."""

_PROTOTYPES = ("prototypes", "prototype_weight", "shuffle_prototypes")

_START = ("shrinkage", *_PROTOTYPES)
"""Settings of a closed form that training starts from."""


class RecipeScore(Manifest):
    """A recipe that was compared.

    Args:
        name: its name.
        options: what it sets, by flat name.
        score: validation score, the mean of the recalls.
        is_chosen: whether it is the run that was kept.
    """

    name: str
    options: Mapping[str, Any]
    score: float
    is_chosen: bool = False


def list_recipes(num_pairs: int, settings: TrainSettings) -> list[Recipe]:
    """Return the recipes to compare on so many training pairs, the simplest first.

    Settings that are given apply to all of them. So a closed form is left out if training is asked for, and training
    with `epochs` 0.
    """
    given = to_flat(settings)
    epochs = given.get("epochs")
    needs_training = bool(epochs) or (epochs is None and any(name in given for name in _REPLACED))
    return [
        recipe
        for recipe in RECIPES
        if recipe.min_pairs <= num_pairs
        and (recipe.max_pairs is None or num_pairs < recipe.max_pairs)
        and (not recipe.has_prototypes or settings.prototypes is not None)
        and not (needs_training if recipe.length is None else epochs == 0)
    ]


def recipe_options(recipe: Recipe, num_pairs: int, settings: TrainSettings, best: RecipeScore | None) -> dict[str, Any]:
    """Return what a recipe sets on so many training pairs, by flat name, without settings that are given.

    Args:
        recipe: the recipe.
        num_pairs: number of training pairs.
        settings: all that is given.
        best: the best closed form, if some were compared.
    """
    given = to_flat(settings)
    options = {**recipe.options, **(recipe.length.options(num_pairs) if recipe.length else {"epochs": 0})}
    if any(name in given and given[name] != options.get(name) for name in _REPLACED):
        options.pop("initialization", None)  # of the projector that is replaced
    if recipe.starts_from_best and best is not None:
        options |= {name: best.options[name] for name in _START if name in best.options}
    elif settings.prototypes is not None and not recipe.has_prototypes:
        options |= dict.fromkeys(_PROTOTYPES)
    return {name: value for name, value in options.items() if name not in given or name in _PROTOTYPES}


def with_recipe(settings: TrainSettings, options: Mapping[str, Any]) -> TrainSettings:
    """Return settings with the options of a recipe in place of `recipe`; only prototypes are replaced if given."""
    replaced = {name for name in _PROTOTYPES if name in options}
    given = {name: value for name, value in to_flat(settings).items() if name not in replaced}
    return replace_flat(settings, {**options, **given, "recipe": None})


def count_training_pairs(data: TrainData, settings: TrainSettings) -> int:
    """Count the samples that will be trained on, before a split is made.

    The training part of a strict split, or of one by key, is estimated from the fractions of the others.
    """
    split, pairs = settings.split, data.pairs(settings.language, where=settings.where)
    samples, fraction = pairs.samples, 1.0
    if split.kind in ("strict", "key"):
        num_val = min(len(samples) * split.val_fraction, split.max_val)
        num_test = min(len(samples) * split.test_fraction, split.max_test)
        fraction = 1 - (num_val + num_test) / len(samples)
    else:
        samples = np.intersect1d(samples, data.split(pairs, split).rows("train"), assume_unique=True)
    if settings.selection_path is not None:
        samples = np.intersect1d(samples, read_selection(settings.selection_path, data.caches), assume_unique=True)
    return round(len(samples) * fraction)
