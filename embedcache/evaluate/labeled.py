"""Labeled items of one feature, divided into training, validation and test parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Floats, Ints, distinct, number_values
from embedcache.dataset.inputs import InputFeature, open_input, to_mean_vectors
from embedcache.dataset.labels import Labels, has_label, read_labels
from embedcache.dataset.pairs import Items, read_items
from embedcache.dataset.splits import PARTS, column_parts, draw_groups
from embedcache.errors import DataError, SettingError
from embedcache.evaluate.classifiers import Examples
from embedcache.evaluate.settings import ProbeSettings
from embedcache.modalities import noun
from embedcache.progress import NullProgress, Progress
from embedcache.store.cache import Cache, Keys

_TEST_FRACTION, _VAL_FRACTION = 0.25, 0.1
_SPLIT = "split"


@dataclass(frozen=True, kw_only=True)
class LabeledFeature:
    """The labeled items of one feature, in row order.

    Args:
        names: names of the classes.
        examples: (M, D) vectors, the mean of the tokens of an item, and (M,) classes.
        parts: (M,) `train`, `val` or `test`.
        split_rule: description of how the parts were made.
        num_unlabeled: items without a label, left out.
        num_left_out: other items that failed or are in no part.
    """

    feature: InputFeature
    names: list[str]
    items: Items
    examples: Examples
    parts: Array
    split_rule: str
    num_unlabeled: int
    num_left_out: int

    def rows(self, part: str) -> Ints:
        """Return the positions of the items of a part, ascending."""
        return np.flatnonzero(self.parts == part)

    def overlap(self) -> int:
        """Count the test items whose bytes or text are in training or validation too."""
        is_test = self.parts == "test"
        return int(np.isin(self.items.contents[is_test], self.items.contents[~is_test]).sum())


def read_labeled(cache: Cache, settings: ProbeSettings, *, progress: Progress | None = None) -> LabeledFeature:
    """Read the vectors, labels and parts of a feature.

    Parts are those of the column `split`, if the cache has one; if it names no validation part, one is taken from
    training. Otherwise a hash of the keys selects 25% for test and 10% for validation. Copies of an item stay
    together. Items without a label are left out. If the settings name `val` as the test part, validation is taken from
    training, and the test part is left out. Memory: the vectors in float32.

    Raises:
        SettingError: more shots than a class has training items.
        UnfinishedError: the feature has missing chunks.
        DataError: a part is empty, there is only one class, no item has a label, or the column `split` names no part.
        CorruptError: bytes differ from their checksum.
    """
    feature = open_input(cache, settings.modality, settings.feature)
    feature.require_complete()
    items = read_items([cache], [feature])
    is_labeled = has_label(cache, items.samples, column=settings.label)
    if not is_labeled.any():
        raise DataError(
            f"column {settings.label!r} of {cache.path}: expected labels, got none for {len(is_labeled):,} items; name "
            "another column with --label"
        )
    items, num_unlabeled = items.where(is_labeled), int((~is_labeled).sum())
    part_S, rule = _parts(cache, items, settings.part, settings.seed)
    parts = part_S[items.samples]
    used_items = items.where(parts != "")
    parts = parts[parts != ""]
    counts = {part: int((parts == part).sum()) for part in PARTS}
    if missing := [part for part in PARTS if not counts[part]]:
        listed = ", ".join(f"{name}: {count:,}" for name, count in counts.items())
        raise DataError(
            f"{cache.path}: expected {missing[0]} items with {feature.name} and a label, got none ({listed}; {rule}); "
            f"label more items, or name their parts in a column {_SPLIT!r}"
        )
    labels = read_labels(cache, used_items.samples, column=settings.label)
    _check_classes(cache, settings, labels, is_training=parts == "train")
    return LabeledFeature(
        feature=feature,
        names=labels.names,
        items=used_items,
        examples=Examples(
            vectors=_read_vectors(feature, used_items.rows, progress or NullProgress()), labels=labels.numbers
        ),
        parts=parts,
        split_rule=rule,
        num_unlabeled=num_unlabeled,
        num_left_out=int((~cache.removed_items(feature.modality)).sum()) - num_unlabeled - len(used_items.rows),
    )


def _check_classes(cache: Cache, settings: ProbeSettings, labels: Labels, *, is_training: Bools) -> None:
    """Check that training items have two classes, and enough items of each for the shots."""
    classes, num_items = np.unique(labels.numbers[is_training], return_counts=True)
    if len(classes) < 2:
        raise DataError(
            f"column {settings.label!r} of {cache.path}: expected at least two classes among the training items, got "
            f"only {labels.names[classes[0]]!r}"
        )
    if max(settings.shots, default=0) > num_items.min():
        least = labels.names[classes[num_items.argmin()]]
        raise SettingError(
            f"shots: expected at most {num_items.min():,}, the training items of class {least!r}, got "
            f"{max(settings.shots):,}"
        )


def _parts(cache: Cache, items: Items, part: Literal["test", "val"], seed: int) -> tuple[Array, str]:
    """Return the (S,) part of each sample, or "", and the rule in words."""
    if _SPLIT in cache.columns:
        part_S = _read_parts(cache, part)
        how = f"parts by column {_SPLIT!r}" + (f", {part} is held out" if part != "test" else "")
        if (part_S == "val").any():
            return part_S, how
        train = items.where(part_S[items.samples] == "train")
        samples, drawn = _draw(cache, train, [round(_VAL_FRACTION * len(distinct(train.samples)))], seed)
        part_S[samples[drawn == 0]] = "val"
        return part_S, f"{how}, {_VAL_FRACTION:.0%} of train for validation"
    if part != "test":
        raise DataError(
            f"part: expected test, as the samples of {cache.path} have no column {_SPLIT!r}, got {part}; use "
            "--part test"
        )
    part_S, num_samples = np.full(cache.info.num_samples, "", "<U5"), len(distinct(items.samples))
    quotas = [round(fraction * num_samples) for fraction in (_TEST_FRACTION, _VAL_FRACTION)]
    samples, drawn = _draw(cache, items, quotas, seed)
    part_S[samples] = np.array(["train", "test", "val"])[drawn + 1]
    return part_S, f"parts by a hash of the keys, {_TEST_FRACTION:.0%} for test and {_VAL_FRACTION:.0%} for validation"


def _read_parts(cache: Cache, part: Literal["test", "val"]) -> Array:
    """Read the part of each sample from the column `split`, (S,) texts; the part to measure on becomes `test`."""
    part_S: Array = column_parts(cache.column(_SPLIT)).to_numpy(zero_copy_only=False).astype("<U5")
    found = set(np.unique(part_S).tolist())
    if not {"train", part} <= found:
        others = [name for name in ("test", "val") if {"train", name} <= found]
        next_step = f"; use another part: --part {others[0]}" if others else ""
        values = sorted({str(value).lower() for value in pc.unique(cache.column(_SPLIT)).to_pylist()})
        raise DataError(
            f"column {_SPLIT!r} of {cache.path}: expected train and {part} among its values, got "
            f"{', '.join(values)}{next_step}"
        )
    if part != "test":
        part_S[part_S == "test"] = ""
        part_S[part_S == part] = "test"
    return part_S


def _draw(cache: Cache, items: Items, quotas: Sequence[int], seed: int) -> tuple[Ints, Ints]:
    """Return the samples of some items, and what `draw_groups` returns: equal first items stay together."""
    samples, first = np.unique(items.samples, return_index=True)
    return samples, draw_groups(Keys([cache], samples), number_values(items.contents[first]), quotas, seed)


def _read_vectors(feature: InputFeature, rows: Ints, progress: Progress) -> Floats:
    """Read the vectors of some rows and compare checksums: (M, D) float32."""
    position_N = np.full(feature.num_items, -1)
    position_N[rows] = np.arange(len(rows))
    vectors_MD = np.empty((len(rows), feature.width), np.float32)
    progress.start(f"loading {feature.name}", feature.num_items, noun(feature.modality))
    for rows_B, inputs in feature.blocks():
        position_B = position_N[rows_B]
        is_kept = position_B >= 0
        vectors_MD[position_B[is_kept]] = to_mean_vectors(inputs)[is_kept]
        progress.advance(len(rows_B))
    progress.finish()
    return vectors_MD
