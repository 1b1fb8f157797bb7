"""Recipes of `train --recipe auto`: settings by the number of training pairs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from embedcache.dataset.selections import read_selection
from embedcache.errors import SettingError
from embedcache.progress import Progress
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
    """Settings for at least `min_pairs` training pairs: options by name, and how long to train; None: not at all."""

    min_pairs: int
    options: Mapping[str, Any]
    length: TrainingLength | None = None


RECIPES = (
    Recipe(min_pairs=0, options={"projector": "linear", "shrinkage": 10.0}),
    Recipe(min_pairs=550, options={"projector": "linear", "shrinkage": 1.0}),
    Recipe(
        min_pairs=5_500,
        options={"projector": "glu", "initialization": "random", "dropout": 0.3, "lr": 5e-4},
        length=TrainingLength(2_000_000, 10, 100),
    ),
)
"""Recipes in ascending order of pairs, chosen on icons: docs/about/results.md. They change halfway between the
sizes that were measured, on a logarithmic axis.

A recipe leaves out `initialization` where it is the default, so that `--init-from` and other projectors keep theirs.
"""

_REPLACED = ("projector", "initialization", "init_from", "trainable")
"""Settings that replace what a closed form consists of, so that training is needed."""


def apply_recipe(settings: TrainSettings, data: TrainData, progress: Progress) -> TrainSettings:
    """Return settings in which a recipe is replaced by the settings that it chooses, apart from those that were given.

    Errors are those of `choose_settings`, and of reading the selection and the split.
    """
    chosen = choose_settings(count_training_pairs(data, settings), to_flat(settings), progress)
    return replace_flat(settings, {**chosen, "recipe": None})


def choose_settings(num_pairs: int, given: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Return what the recipe for so many training pairs sets, by flat name, without settings that are given.

    Args:
        num_pairs: number of training pairs.
        given: settings that the user chose, by flat name.
        progress: gets a note of what is chosen.

    Raises:
        SettingError: the recipe is a closed form, and what is given needs training.
    """
    recipe = [recipe for recipe in RECIPES if recipe.min_pairs <= num_pairs][-1]
    settings = {**recipe.options, **(recipe.length.options(num_pairs) if recipe.length else {"epochs": 0})}
    replaced = [name for name in _REPLACED if name in given and given[name] != settings.get(name)]
    if replaced and recipe.length is None and "epochs" not in given:
        raise SettingError(
            f"{replaced[0]}: expected none with --recipe auto, whose recipe for {num_pairs:,} training pairs is a "
            f"closed form, got {given[replaced[0]]}; give --epochs too, or omit one of them"
        )
    if replaced:
        settings.pop("initialization", None)  # of the projector that is replaced
    chosen = {name: value for name, value in settings.items() if name not in given}
    words = ", ".join(f"{name} {value}" for name, value in chosen.items())
    progress.note(f"recipe for {num_pairs:,} training pairs: {words or 'all of its settings are given'}")
    return chosen


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
