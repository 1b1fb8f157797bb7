"""Splits of samples into training, validation and test parts: by near-duplicate groups, by key, by a column or a file.

Whole groups are drawn in an order that depends only on the keys of their samples and a seed.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Ints, distinct, number_values
from embedcache.dataset import keytable
from embedcache.dataset.inputs import InputFeature, Reader, join_readers, open_input
from embedcache.dataset.matches import near_duplicate_groups, pair_sides
from embedcache.dataset.pairs import Items, Pairs, name_caches, read_items
from embedcache.dataset.settings import KINDS, NEAR_DUPLICATE_COSINES, SplitSettings
from embedcache.errors import CorruptError, DataError, SettingError, SourceError, UnfinishedError, UnknownNameError
from embedcache.modalities import MODALITIES, noun
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import construct, digest_file, name_differences, read_study
from embedcache.registry import unknown_name
from embedcache.runs import MANIFEST, SPLIT, read_info
from embedcache.store.arrays import check_file
from embedcache.store.cache import Cache, Keys
from embedcache.store.tables import Column, to_array

Part: TypeAlias = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
PART_NAMES: dict[str, Part] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""Value of a source's column `split`, in lower case -> part."""

_RESTORE = "restore it, or use a new folder"


@dataclass(frozen=True, kw_only=True)
class Split:
    """The part of each sample of a cache, or of several caches one after another.

    Args:
        parts: `train`, `val`, `test`, or an empty string for a sample that is left out.
        groups: near-duplicate group of each sample; a group is never divided.
        rule: `strict`, `key` or `column`; empty if it is unknown.
        compared: modalities whose near-duplicates are in one part; empty unless the split is strict.
        cosines: modality -> cosine above which items are near-duplicates.
    """

    parts: Sequence[str]
    groups: Sequence[int]
    rule: str = ""
    compared: Sequence[str] = ()
    cosines: Mapping[str, float] = field(default_factory=lambda: dict(NEAR_DUPLICATE_COSINES))

    def line(self) -> str:
        """Describe its rule, such as `strict, cosine image > 0.9, text > 0.7`. It is empty if the rule is unknown."""
        limits = ", ".join(f"{modality} > {self.cosines[modality]:g}" for modality in self.compared)
        return f"{self.rule}, cosine {limits}" if limits else self.rule

    def mask(self, part: str) -> Bools:
        """Return whether each sample is in a part: (S,) bool."""
        is_in_part: Bools = pc.equal(to_array(self.parts, pa.string()), part).to_numpy(zero_copy_only=False)
        return is_in_part

    def rows(self, part: str) -> Ints:
        """Return the sample rows of one part, ascending.

        Raises:
            DataError: the part is empty.
        """
        rows = np.flatnonzero(self.mask(part))
        if not len(rows):
            counts = ", ".join(f"{name}: {self.parts.count(name)}" for name in PARTS)
            raise DataError(f"the split has no {part} samples ({counts})")
        return rows


def write_split(path: Path, caches: Sequence[Cache], split: Split) -> None:
    """Write a split of all samples of some caches: a keyed table with the columns `part` and `group`.

    Its header says how the split was made.
    """
    about = {"rule": split.rule, "compared": list(split.compared), "cosines": dict(split.cosines)}
    keytable.write(path, caches, {"part": split.parts, "group": split.groups}, "split", about)


def check_split(path: Path) -> None:
    """Compare a split with the `run.json` of its run, or the `study.json` of its study, if it has one.

    Raises:
        PathError: it is missing.
        CorruptError: the split or that file has changed since it was written.
    """
    folder = path.parent
    if path.name != SPLIT:
        return
    if (folder / MANIFEST).is_file():
        files = read_info(folder).files
        if SPLIT in files:
            check_file(path, files[SPLIT].checksum, next_step=_RESTORE)
    elif (folder / "study.json").is_file():
        expected = read_study(folder)["split_digest"]
        if not path.is_file() or digest_file(path) != expected:
            raise CorruptError(f"{path}: expected the split that study.json was written for; {_RESTORE}")


def require_split(path: Path) -> None:
    """Check that a file exists and, as `check_split` does, that it is the split of its run.

    Raises:
        PathError: there is no such file.
        CorruptError: it has changed since it was written.
    """
    with keytable.reading_table(path, "split"):
        check_split(path)


def read_split(path: Path, caches: Sequence[Cache]) -> Split:
    """Read the split of all or some of its caches. Samples that were appended to a cache later are in no part.

    Nor are those that were removed from it since, of which a warning tells the number.

    Args:
        path: the file; of a finished run or of a study, it is compared with its digest.
        caches: caches whose samples are returned, one after another.

    Raises:
        PathError: there is no such file.
        CorruptError: the file is not a split, or has changed since it was written.
        DataError: the split belongs to other samples, or all of its samples were removed.
    """
    require_split(path)
    num_samples = sum(map(len, caches))
    split = keytable.read(path, caches, "split")
    table = split.align(num_samples)
    parts = pc.fill_null(table["part"], "")

    # Each sample that the file lacks is a group of its own, so that no two of them count as near-duplicates.
    is_other = table["group"].is_null().to_numpy()
    groups = pc.fill_null(table["group"], -1).to_numpy().copy()
    groups[is_other] = groups.max() + 1 + np.arange(np.count_nonzero(is_other))

    return Split(parts=Column(parts), groups=Column(pa.array(groups)), **_read_rule(path, split.about))


def read_split_cosines(path: Path) -> Mapping[str, float]:
    """Return modality -> cosine above which items are near-duplicates, by the header of a split; errors: `read_split`.

    Those of a split that does not say are the defaults.
    """
    require_split(path)
    cosines: Mapping[str, float] = _read_rule(path, keytable.read_header(path, "split"))["cosines"]
    return cosines


def _read_rule(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Split` that the header of its file has."""
    try:
        cosines = SplitSettings(cosines=about.get("cosines", {})).cosines
    except SettingError as error:
        raise CorruptError(f"{path} does not hold the limits of a split: {error}") from error
    compared = construct(path, lambda: tuple(filter(cosines.__contains__, about.get("compared", ()))))
    return {"rule": str(about.get("rule", "")), "compared": compared, "cosines": cosines}


def column_parts(names: "pa.Array | pa.ChunkedArray") -> "pa.Array | pa.ChunkedArray":
    """Return the part that each value of a column `split` names. It is empty for null and all other values."""
    # Few names are distinct, so only these are looked up in Python.
    distinct_names = pc.unique(names)
    parts = pa.array([PART_NAMES.get(str(name).lower(), "") for name in distinct_names.to_pylist()], pa.string())
    return parts.take(pc.index_in(names, value_set=distinct_names))


_CODES = {"train": 0, "val": 1, "test": 2, "": 3}
"""Part -> its number in an array; empty for a sample that is in no part."""


def make_split(
    caches: Sequence[Cache],
    pairs: Pairs,
    settings: SplitSettings,
    readers: Mapping[str, Reader],
    *,
    progress: Progress | None = None,
) -> Split:
    """Split the samples that have both features. The same features and settings give the same split.

    Only a strict split reads the features: those of the readers, and one of each other modality that the samples have
    in the caches, unless `settings.modalities` limits them. Time and memory as in `near_duplicate_groups`, and 24 bytes
    per item of the other modalities.

    Args:
        caches: the caches.
        pairs: items of both features, counted across caches.
        settings: settings of the split.
        readers: modality -> reader of its feature, in the order of the pair's sides.
        progress: progress of a strict split, and what it found among many items.

    Raises:
        UnknownNameError: the kind is neither a known one nor a file.
        SettingError: a part is empty.
        SourceError: `column` without a column `split` that names train and test.
    """
    if settings.kind != "strict":
        return split_samples(caches, pairs.samples, settings, progress=progress)
    progress = progress or NullProgress()
    samples = pairs.samples
    modalities: Sequence[str] = settings.modalities or tuple(MODALITIES)

    # The features of the pair come first, in the order of their readers.
    sides = {}
    for modality, side in pair_sides(pairs, readers).items():
        if modality in modalities:
            sides[modality] = side
    other_modalities = [name for name in MODALITIES if name in modalities and name not in readers]
    sides |= _open_sides(caches, samples, other_modalities, progress)

    # A modality that the user names must be compared, as a silent omission would let near-duplicates leak.
    if settings.modalities and (absent := sorted(set(modalities) - set(sides))):
        raise SettingError(
            f"split_by: expected modalities with a complete feature in {name_caches(caches)}, got {', '.join(absent)}"
        )

    # The comparison stops early once no drawing of the groups can fill the parts.
    groups = near_duplicate_groups(
        samples, settings, sides, progress, are_useless=lambda groups: _lack_parts(groups, settings)
    )

    split = _by_groups(caches, samples, number_values(groups), settings, progress)
    _require_parts(split, groups, settings, sides)
    return replace(split, rule="strict", compared=tuple(sides), cosines=settings.cosines)


def _open_sides(
    caches: Sequence[Cache], samples: Ints, modalities: Iterable[str], progress: Progress
) -> dict[str, tuple[Items, Reader]]:
    """Return modality -> items of some samples and their reader, of the modalities that the caches have."""
    sides: dict[str, tuple[Items, Reader]] = {}
    for modality in modalities:
        if not any(cache.features(modality) for cache in caches):
            continue
        features = _shared_feature(caches, modality)
        if not features:
            progress.note(f"the strict split does not compare {noun(modality)}: the caches have no complete feature")
            continue

        items = read_items(caches, features, is_numbered=False).select(samples)
        if not len(items.rows):
            continue
        reader = join_readers([feature.read for feature in features], [feature.num_items for feature in features])
        sides[modality] = (items, reader)
        progress.note(f"the strict split also compares {noun(modality)}, by {features[0].name}; --split-by limits it")
    return sides


def _shared_feature(caches: Sequence[Cache], modality: str) -> list[InputFeature]:
    """Return a complete feature of a modality in every cache, by one encoder. It is empty if there is none.

    Vectors come before tokens, and the last layer before others.
    """
    candidates = []
    for feature in caches[0].default_features(modality):
        try:
            opened = [open_input(cache, modality, feature.name) for cache in caches]
            for other in opened:
                other.require_complete()
        except (UnknownNameError, UnfinishedError):
            continue

        # Cosines of two encoders cannot be compared.
        differences = []
        for other in opened[1:]:
            differences += name_differences(opened[0].fingerprint, other.fingerprint)
        if not differences:
            candidates.append(opened)
    return min(candidates, key=lambda opened: (opened[0].has_tokens, "/layer" in opened[0].name), default=[])


def split_samples(
    caches: Sequence[Cache], samples: Ints, settings: SplitSettings, *, progress: Progress | None = None
) -> Split:
    """Split samples without their features: by key, by a column or by a file.

    Args:
        caches: the caches.
        samples: (S,) the samples, counted across caches, ascending; the others are in no part.
        settings: settings of the split.
        progress: progress in samples.

    Raises:
        UnknownNameError, SettingError, SourceError: as in `make_split`.
    """
    if settings.kind == "column":
        split = _by_column(caches, samples, settings, progress)
        return replace(split, rule="column", cosines=settings.cosines)
    if settings.kind == "key":
        groups = np.arange(len(samples))
        split = _by_groups(caches, samples, groups, settings, progress)
        _require_parts(split, groups, settings, ())
        return replace(split, rule="key", cosines=settings.cosines)
    if settings.path is None or not settings.path.is_file():
        raise unknown_name("split", settings.kind, KINDS, hint="or use the path of another run's split.parquet")
    return read_split(settings.path, caches)


def draw_groups(
    keys: "Keys | pa.Array | pa.ChunkedArray",
    groups_S: Ints,
    quotas: Sequence[int],
    seed: int,
    progress: Progress | None = None,
) -> Ints:
    """Draw whole groups of samples for each of several quotas, in an order that depends only on keys and seed.

    Groups larger than the rest of a quota are skipped. Memory: about 60 bytes per sample, and the keys of samples that
    share a group.

    Args:
        keys: (S,) key of each sample; those of caches are read in blocks.
        groups_S: group of each sample, from 0 to G - 1, none of them empty.
        quotas: most samples to draw; a later quota draws from what the earlier ones left.
        progress: progress in samples, as the step "splitting".

    Returns:
        (S,) int64 position of the quota that a sample was drawn for, or -1.
    """
    sizes_G = np.bincount(groups_S)
    progress = progress or NullProgress()
    progress.start("splitting", len(groups_S), "samples")
    leads_G = _leads(keys, groups_S, sizes_G)
    order = _random_order(keys, leads_G, sizes_G, seed, progress)

    # A later quota draws only from the groups that the earlier ones did not use.
    drawn_G = np.full(len(sizes_G), -1, np.int64)
    for number, quota in enumerate(quotas):
        is_taken = _take_first(sizes_G[order], quota)
        drawn_G[order[is_taken]] = number
        order = order[~is_taken]
    progress.finish()
    return drawn_G[groups_S]


def _lack_parts(groups: Ints, settings: SplitSettings) -> bool:
    """Return whether groups are so large that validation or test samples are missing, however they are drawn."""
    quotas = _quotas(settings, len(groups))
    sizes = np.bincount(groups)
    return int(((sizes > 0) & (sizes <= max(quotas))).sum()) < len(quotas)


def _require_parts(split: Split, groups: Ints, settings: SplitSettings, modalities: Iterable[str]) -> None:
    if split.parts.count("val") and split.parts.count("test"):
        return
    if settings.kind == "key":
        raise SettingError(
            f"--split key leaves no validation or test samples among {len(groups):,}; raise --val-fraction and "
            "--test-fraction, or use more samples"
        )

    options = " and ".join(f"--cosine {modality}={settings.cosines[modality]}" for modality in modalities)
    raise SettingError(
        f"--split {settings.kind} leaves no validation or test samples among {len(groups):,}: the largest "
        f"near-duplicate group has at least {np.bincount(groups).max():,} samples; raise {options}, compare fewer "
        "modalities with --split-by, use captions in one --language, or use --split key"
    )


def _by_column(caches: Sequence[Cache], samples: Ints, settings: SplitSettings, progress: Progress | None) -> Split:
    for cache in caches:
        if "split" not in cache.columns:
            raise SourceError(f"the samples of {cache.path} have no column 'split'; use --split strict or --split key")

    # Samples are counted across caches.
    codes = []
    values: set[str] = set()
    for cache in caches:
        names = cache.column("split")
        codes.append(pc.index_in(column_parts(names), value_set=pa.array(list(_CODES))).to_numpy())
        values.update(map(str, pc.unique(names).to_pylist()))
    part_S = np.concatenate(codes).astype(np.int8)

    if not {_CODES["train"], _CODES["test"]} <= set(distinct(part_S).tolist()):
        listed = ", ".join(sorted(set(map(str.lower, values))))
        raise SourceError(f"column 'split' of {name_caches(caches)}: expected train and test, got {listed}")

    # Samples without both features are in no part, even if the column names one.
    is_used = np.zeros(len(part_S), bool)
    is_used[samples] = True
    part_S[~is_used] = _CODES[""]

    # A source without validation samples gets them from its training samples, never from its test samples.
    if not (part_S == _CODES["val"]).any():
        train = np.flatnonzero(part_S == _CODES["train"])
        quota = _quota(settings.val_fraction, settings.max_val, len(train))
        quota_numbers = draw_groups(Keys(caches, train), np.arange(len(train)), [quota], settings.seed, progress)
        part_S[train[quota_numbers == 0]] = _CODES["val"]
    return _split(part_S, np.arange(len(part_S)))


def _by_groups(
    caches: Sequence[Cache], samples: Ints, groups: Ints, settings: SplitSettings, progress: Progress | None
) -> Split:
    """Draw the parts of samples, ascending, by whole groups, which are numbered from 0."""
    num_samples = sum(map(len, caches))
    quotas = _quotas(settings, len(samples))
    quota_numbers = draw_groups(Keys(caches, samples), groups, quotas, settings.seed, progress)

    # Samples without both features are in no part and no group.
    part_S = np.full(num_samples, _CODES[""], np.int8)
    group_S = np.full(num_samples, -1, np.int64)
    part_S[samples] = np.array([_CODES["train"], _CODES["test"], _CODES["val"]], np.int8)[quota_numbers + 1]
    group_S[samples] = groups
    return _split(part_S, group_S)


def _split(part_S: Array, group_S: Ints) -> Split:
    """Return the split of all samples by the codes of their parts, (S,) int8, and their groups, (S,) int64."""
    names = pa.array(list(_CODES), pa.string())
    return Split(parts=Column(names.take(pa.array(part_S))), groups=Column(pa.array(group_S)))


def _quotas(settings: SplitSettings, count: int) -> list[int]:
    """Return the most samples of the test and of the validation part."""
    return [
        _quota(settings.test_fraction, settings.max_test, count),
        _quota(settings.val_fraction, settings.max_val, count),
    ]


def _quota(fraction: float, largest: int, count: int) -> int:
    """Return the number of samples of a part: a fraction of all, but at most `largest`."""
    return min(round(fraction * count), largest)


def _leads(keys: "Keys | pa.Array", groups_S: Ints, sizes_G: Ints) -> Ints:
    """Return the sample of the lowest key of each group."""
    lead_G = np.empty(len(sizes_G), np.int64)
    is_shared_S = sizes_G[groups_S] > 1
    lead_G[groups_S[~is_shared_S]] = np.flatnonzero(~is_shared_S)

    # Keys are read and sorted only for groups of several samples, as most groups have one.
    shared = np.flatnonzero(is_shared_S)
    if len(shared):
        by_key = shared[pc.sort_indices(pa.chunked_array(_blocks(keys, shared))).to_numpy()]
        lead_G[groups_S[by_key[::-1]]] = by_key[::-1]  # the last assignment is that of the lowest key
    return lead_G


def _random_order(keys: "Keys | pa.Array", lead_G: Ints, sizes_G: Ints, seed: int, progress: Progress) -> Ints:
    """Return the groups by the SHA-256 of the seed and their lowest key, of which the first 64 bits decide."""
    by_lead_G = np.argsort(lead_G, kind="stable")
    word_G = np.empty(len(lead_G), np.uint64)

    salt = f"{seed}:".encode()
    start = 0
    for block in _blocks(keys, lead_G[by_lead_G]):
        digests = [hashlib.sha256(salt + key).digest()[:8] for key in block.cast(pa.binary()).to_pylist()]

        hashed = by_lead_G[start : start + len(block)]
        word_G[hashed] = np.frombuffer(b"".join(digests), ">u8")
        start += len(block)
        progress.advance(int(sizes_G[hashed].sum()))
    return np.argsort(word_G, kind="stable")


def _blocks(keys: "Keys | pa.Array", rows: Ints) -> Iterator[pa.Array]:
    """Iterate over the keys of some samples, ascending."""
    return keys.select(rows).blocks() if isinstance(keys, Keys) else iter([keys.take(pa.array(rows))])


def _take_first(sizes: Ints, quota: int) -> Bools:
    """Return which of some groups to take in their order, skipping those that are larger than what is left."""
    is_taken = np.zeros(len(sizes), bool)
    start = 0
    while len(fits := np.flatnonzero(sizes[start:] <= quota)):
        start += int(fits[0])
        count = int(np.searchsorted(np.cumsum(sizes[start:]), quota, side="right"))
        is_taken[start : start + count] = True
        quota -= int(sizes[start : start + count].sum())
        start += count
    return is_taken
