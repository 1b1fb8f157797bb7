"""Items of a cache with a feature and a label, cut into parts for training, validation and test."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from embedcache.arrays import Bools, Floats, Ints
from embedcache.dataset.inputs import InputFeature, mean_vectors, open_input
from embedcache.dataset.labels import Labels, has_label, read_labels
from embedcache.dataset.pairs import Items, items_of
from embedcache.dataset.splits import PART_NAMES, PARTS, take_groups
from embedcache.errors import DataError
from embedcache.evaluate.classifiers import Examples
from embedcache.store.cache import Cache

HeldOut: TypeAlias = Literal["test", "val"]
_Parts: TypeAlias = npt.NDArray[Any]

_TEST_SHARE, _VAL_SHARE = 0.25, 0.1
_SPLIT = "split"


@dataclass(frozen=True, kw_only=True)
class Labeled:
    """The labeled items of one feature, in row order.

    Args:
        side: the feature.
        names: the classes.
        items: (M,) of each: row, sample and content.
        examples: (M, D) vectors, the mean of an item's tokens where it has several, and (M,) classes.
        parts: (M,) `train`, `val` or `test`.
        cut: how they were cut, in words.
        num_unlabeled: items without a label, left out.
        num_left_out: others that are in no part, or failed.
    """

    side: InputFeature
    names: list[str]
    items: Items
    examples: Examples
    parts: _Parts
    cut: str
    num_unlabeled: int
    num_left_out: int

    def rows(self, part: str) -> Ints:
        """Get the positions of a part's items, ascending."""
        return np.flatnonzero(self.parts == part)

    def overlap(self) -> int:
        """Count the test items whose bytes or text are, exactly, in training or validation too."""
        is_test = self.parts == "test"
        return int(np.isin(self.items.contents[is_test], self.items.contents[~is_test]).sum())


def read_labeled(
    cache: Cache, modality: str, name: str | None, *, label: str = "label", part: HeldOut = "test", seed: int = 0
) -> Labeled:
    """Read a feature's vectors, labels and parts.

    The parts are those of the column `split`, where the cache has one; validation is cut from training where that
    names none. Else a hash of the keys cuts 25 % for test and 10 % for validation. Copies of an item stay together in
    what is cut. Items without a label are left out. Memory: the vectors in float32.

    Args:
        cache: the cache.
        modality: `image` or `text`.
        name: as of `open_input`.
        label: the column that holds the labels.
        part: which part of the column `split` is the test; of `val`, validation is cut from training, and `test` is
            left out.
        seed: which of the possible cuts.

    Raises:
        UnknownNameError: there is no such feature or column.
        UnfinishedError: the feature has uncommitted chunks.
        DataError: a part is empty, there is one class only, no item has a label, or the column `split` names no part.
        CorruptError: bytes differ from their checksum.
    """
    side = open_input(cache, modality, name)
    side.require_complete()
    items, num_unlabeled = _with_label(items_of([cache], [side]), cache, label)
    part_S, cut = _parts(cache, items, part, seed)
    parts = part_S[items.samples]
    kept = items.where(parts != "")
    parts = parts[parts != ""]
    _require_parts(parts, cache, side, cut)
    labels = read_labels(cache, kept.samples, column=label)
    _require_classes(labels, parts == "train", f"column {label!r} of {cache.path}")
    return Labeled(
        side=side,
        names=labels.names,
        items=kept,
        examples=Examples(vectors=_read_vectors(side, kept.rows), labels=labels.numbers),
        parts=parts,
        cut=cut,
        num_unlabeled=num_unlabeled,
        num_left_out=side.num_items - num_unlabeled - len(kept.rows),
    )


def _with_label(items: Items, cache: Cache, label: str) -> tuple[Items, int]:
    """Keep the items whose sample has a label, and count the others."""
    has_one = has_label(cache, items.samples, column=label)
    if not has_one.any():
        raise DataError(f"none of {len(has_one):,} items of {cache.path} has a label in column {label!r}")
    return items.where(has_one), int((~has_one).sum())


def _parts(cache: Cache, items: Items, part: HeldOut, seed: int) -> tuple[_Parts, str]:
    """Give each sample of the cache a part, or "", and say how."""
    keys = cache.samples["key"].to_pylist()
    part_S = np.full(len(keys), "", "<U5")
    if _SPLIT in cache.columns:
        part_S[:] = _said_parts(cache, part)
        how = f"parts by column {_SPLIT!r}" + (f", {part} is held out" if part != "test" else "")
        if (part_S == "val").any():
            return part_S, how
        train = _groups(items, part_S[items.samples] == "train")
        num_train = int((part_S == "train").sum())
        part_S[list(take_groups(train, keys, round(_VAL_SHARE * num_train), seed))] = "val"
        return part_S, f"{how}, {_VAL_SHARE:.0%} of train for validation"
    if part != "test":
        raise DataError(f"the samples of {cache.path} have no column {_SPLIT!r} that names a part {part!r}; use test")
    groups = _groups(items, np.ones(len(items.rows), bool))
    num_samples = sum(map(len, groups))
    test = take_groups(groups, keys, round(_TEST_SHARE * num_samples), seed)
    rest = [group for group in groups if group[0] not in test]
    val = take_groups(rest, keys, round(_VAL_SHARE * num_samples), seed)
    part_S[np.unique(items.samples)] = "train"
    part_S[list(test)], part_S[list(val)] = "test", "val"
    return part_S, f"parts by a hash of the keys, {_TEST_SHARE:.0%} for test and {_VAL_SHARE:.0%} for validation"


def _said_parts(cache: Cache, part: HeldOut) -> list[str]:
    """Read the column `split`; the part that is held out becomes `test`."""
    said = [str(value).lower() for value in cache.samples[_SPLIT].to_pylist()]
    named = [PART_NAMES.get(value, "") for value in said]
    if not {"train", part} <= set(named):
        held = [name for name in ("test", "val") if name in named and "train" in named]
        next_step = f"; hold out another part: --part {held[0]}" if held else ""
        raise DataError(
            f"column {_SPLIT!r} of {cache.path} holds {', '.join(sorted(set(said)))}; "
            f"it must name train and {part}{next_step}"
        )
    if part == "test":
        return list(named)
    return [{"val": "test", "test": ""}.get(name, name) for name in named]


def _groups(items: Items, mask: Bools) -> list[list[int]]:
    """Group the samples of some items: those that begin with the same content stay together."""
    first: dict[int, int] = {}
    for sample, content in zip(items.samples[mask].tolist(), items.contents[mask].tolist(), strict=True):
        first.setdefault(sample, content)
    groups: dict[int, list[int]] = defaultdict(list)
    for sample, content in first.items():
        groups[content].append(sample)
    return list(groups.values())


def _require_parts(parts: _Parts, cache: Cache, side: InputFeature, cut: str) -> None:
    counts = {part: int((parts == part).sum()) for part in PARTS}
    empty = [part for part, count in counts.items() if not count]
    if empty:
        said = ", ".join(f"{part}: {count:,}" for part, count in counts.items())
        raise DataError(f"{cache.path} has no {empty[0]} items with {side.name} ({said}; {cut})")


def _require_classes(labels: Labels, is_train: Bools, place: str) -> None:
    classes = np.unique(labels.numbers[is_train])
    if len(classes) < 2:
        raise DataError(f"all training items have the label {labels.names[classes[0]]!r} in {place}; a probe needs two")


def _read_vectors(side: InputFeature, rows: Ints) -> Floats:
    """Read the vectors of some rows, checksums compared: (M, D) float32."""
    position_N = np.full(side.num_items, -1)
    position_N[rows] = np.arange(len(rows))
    vectors_MD = np.empty((len(rows), side.width), np.float32)
    for found, inputs in side.blocks():
        position_B = position_N[found]
        is_kept = position_B >= 0
        vectors_MD[position_B[is_kept]] = mean_vectors(inputs)[is_kept]
    return vectors_MD


def name_some(names: Sequence[str], most: int = 5) -> str:
    """Name the first few of many."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most:,} others" if len(names) > most else "")
