"""The pairs of a training run, divided by its split into those that it trains on and those that validate it."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from embedcache.arrays import Ints
from embedcache.dataset.pairs import Pairs
from embedcache.dataset.selections import read_selection
from embedcache.dataset.splits import PARTS, Split, read_split, write_split
from embedcache.errors import DataError
from embedcache.files import read_file, write_atomic
from embedcache.progress import Progress
from embedcache.projectors.saved import run_selection_path, split_path
from embedcache.train.data import TrainData
from embedcache.train.distributed import run_on_first
from embedcache.train.settings import TrainSettings
from embedcache.train.views import parse_views


@dataclass(frozen=True, kw_only=True)
class DividedPairs:
    """The pairs of the training and of the validation part.

    Args:
        num_samples: part -> samples with both features; of training, those that are used.
        num_held_out: samples of the selection in the validation or test part; None without a selection.
    """

    training: Pairs
    validation: Pairs
    num_samples: dict[str, int]
    num_held_out: int | None


def divide_pairs(data: TrainData, run_path: Path, settings: TrainSettings, progress: Progress) -> DividedPairs:
    """Pair the items of both features and divide them by the split of the run, which is made unless it exists.

    Memory: 24 bytes per item of the parts, and for a moment about 150 per sample; the split and the other pairs are not
    kept.

    Raises:
        DataError: the training or the validation part has no pairs.
    """
    pairs = data.pairs(settings.language, progress=progress)
    made = run_on_first(lambda: _make_split(data, pairs, run_path, settings, progress))
    split = made or read_split(split_path(run_path), data.caches)
    selected = None
    if settings.selection_path is not None:
        selected = read_selection(settings.selection_path, data.caches)
    training = _shuffle(_training_pairs(data, pairs, split, selected, settings), settings)
    validation = _shuffle(pairs.select(split.rows("val")), settings)
    if not len(validation.samples):
        raise DataError(
            f"validation part of {split_path(run_path)}: expected samples with both features, got none; "
            "check --language"
        )
    counts: dict[str, int] = {part: split.parts.count(part) for part in PARTS}
    if left_out := split.parts.count(""):
        counts["left out"] = left_out
    return DividedPairs(
        training=training,
        validation=validation,
        num_samples={**counts, "train": len(training.samples)},
        num_held_out=None if selected is None else int((split.mask("val") | split.mask("test"))[selected].sum()),
    )


def _make_split(
    data: TrainData, pairs: Pairs, run_path: Path, settings: TrainSettings, progress: Progress
) -> Split | None:
    """Write the split of a run and a copy of its selection, and return the split; None if an interrupted run did."""
    path = split_path(run_path)
    if path.is_file():
        return None
    if (kept := run_selection_path(run_path, settings.selection)) and settings.selection_path:
        write_atomic(kept, read_file(settings.selection_path))
    is_default = settings.split.kind == "strict" and "split" not in settings.given
    if is_default and any("split" in cache.columns for cache in data.caches):
        progress.note("--split strict ignores the column 'split' of the samples; --split column follows it")
    split = data.split(pairs, settings.split, progress=progress)
    write_split(path, split)
    return split


def _training_pairs(
    data: TrainData, pairs: Pairs, split: Split, selected: Ints | None, settings: TrainSettings
) -> Pairs:
    """Return the pairs of the training part that are in the selection, if there is one, with the views of both sides.

    Raises:
        DataError: there are none.
    """
    rows: Ints = split.rows("train")
    if selected is not None:
        rows = np.intersect1d(rows, selected, assume_unique=True)
    views = parse_views(settings.views)
    training = data.with_views(pairs.select(rows), views) if views else pairs.select(rows)
    if not len(training.samples):
        named = "" if settings.selection is None else f" in selection {settings.selection_path}"
        raise DataError(f"training part{named}: expected samples with both features, got none; check --language")
    return training


def _shuffle(pairs: Pairs, settings: TrainSettings) -> Pairs:
    """Assign each sample's second items, to another sample if `shuffle_pairs` is set, so that only chance remains."""
    if not settings.shuffle_pairs:
        return pairs
    samples = pairs.samples
    shuffled = np.random.default_rng(settings.seed).permutation(samples)
    second = replace(pairs.second, samples=shuffled[np.searchsorted(samples, pairs.second.samples)])
    return Pairs(first=pairs.first, second=second)
