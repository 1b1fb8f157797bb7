"""Splits of samples into training, validation and test parts: by near-duplicate groups, by key, or by a column."""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as cache_calls
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Ints, blocks, distinct, number_values
from embedcache.dataset.inputs import Reader
from embedcache.dataset.near_duplicate_groups import near_duplicate_groups
from embedcache.dataset.pairs import Pairs, caption_languages, name_caches
from embedcache.dataset.settings import KINDS, SplitSettings
from embedcache.errors import CorruptError, DataError, PathError, SettingError, SourceError, one_line
from embedcache.files import replacing
from embedcache.outputs import with_metadata
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import INDEX_DIGEST, digest_file, read_record
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache, keys_of
from embedcache.store.columns import Column, to_array
from embedcache.store.tables import read_table, write_table

_log = logging.getLogger(__name__)

Part: TypeAlias = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The part of each sample of a cache, or of several caches one after another.

    Args:
        keys: keys of the samples, in row order.
        parts: `train`, `val`, `test`, or an empty string for a sample that is left out.
        groups: near-duplicate group of each sample; a group is never divided.
        index_digests: index digest of each sample's cache; empty for a single cache.
    """

    keys: Sequence[str]
    parts: Sequence[str]
    groups: Sequence[int]
    index_digests: Sequence[str] = ()

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


def write_split(path: Path, split: Split) -> None:
    """Write a split as Parquet: `row`, `key`, `part`, `group`, and `spine` for several caches."""
    columns = {
        "row": np.arange(len(split.keys)),
        "key": to_array(split.keys, pa.string()),
        "part": to_array(split.parts, pa.string()),
        "group": to_array(split.groups, pa.int64()),
    }
    if split.index_digests:
        columns[INDEX_DIGEST] = to_array(split.index_digests, pa.string())
    with replacing(path) as temporary:
        write_table(temporary, with_metadata(pa.table(columns), {}))


def check_split(path: Path) -> None:
    """Compare a split with its digest in the `config.json` of its run, or the `study.json` of its study, if any.

    Raises:
        CorruptError: the split is missing, or it or that file has changed since it was written.
    """
    for name in _MANIFESTS if path.name == "split.parquet" else ():
        if (manifest := path.with_name(name)).is_file():
            written = read_record(manifest, next_step="restore the file").get("split")
            if isinstance(written, str) and written and not (path.is_file() and digest_file(path) == written):
                got = "another file" if path.is_file() else "none"
                raise CorruptError(
                    f"{path}: expected the split that {manifest.name} was written for, got {got}; restore it, or use "
                    "a new folder"
                )


_MANIFESTS = ("config.json", "study.json")


def read_split(path: Path, caches: Sequence[Cache]) -> Split:
    """Read the split of all or some of its caches. Samples that were appended to a cache later are in no part.

    Nor are those that were removed from it since, of which a warning tells the number.

    Args:
        path: the file; of a finished run or of a study, it is compared with its digest.
        caches: caches whose samples are returned, one after another.

    Raises:
        PathError: the file does not exist.
        CorruptError: the file is not a split, or has changed since it was written.
        DataError: the split belongs to other samples.
    """
    if not path.is_file():
        raise PathError(f"{path} does not exist; it is written by embedcache train")
    check_split(path)
    try:
        table = read_table(path)
        schema = _COLUMNS if INDEX_DIGEST in table.column_names else _COLUMNS.remove(len(_COLUMNS) - 1)
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise CorruptError(
            f"{path}: expected a split with the columns key, part and group: {one_line(error)}"
        ) from error
    parts = [_select_cache(path, table, cache) for cache in caches]
    joined = pa.concat_tables(parts)
    several = [cache.info.index_digest for cache, part in zip(caches, parts, strict=True) for _ in range(len(part))]
    return Split(
        keys=Column(joined["key"]),
        parts=Column(joined["part"]),
        groups=Column(joined["group"]),
        index_digests=several if len(caches) > 1 else (),
    )


_COLUMNS = pa.schema([("key", pa.string()), ("part", pa.string()), ("group", pa.int64()), (INDEX_DIGEST, pa.string())])


def _select_cache(path: Path, table: pa.Table, cache: Cache) -> pa.Table:
    """Return key, part and group of the samples of one cache, with appended samples in no part."""
    keys = cache.column("key").cast(pa.string())
    if INDEX_DIGEST in table.column_names:
        same = pa.array(filter(cache.info.has_rows_of, pc.unique(table[INDEX_DIGEST]).to_pylist()), pa.string())
        table = table.filter(pc.is_in(table[INDEX_DIGEST], value_set=same)).drop_columns(INDEX_DIGEST)
    table = _without_removed(path, table, cache)
    if not len(table) or not table["key"].equals(keys.slice(0, len(table))):
        raise DataError(
            f"split {path} belongs to other samples: it has {len(table)} keys, {cache.path} has {len(keys)}, and "
            "they differ; use a split of the same samples"
        )
    num_added, first_group = len(keys) - len(table), (pc.max(table["group"]).as_py() or 0) + 1
    if not num_added:
        return table
    added = {
        "key": keys.slice(len(table)),
        "part": pa.repeat("", num_added),
        "group": np.arange(first_group, first_group + num_added),
    }
    return pa.concat_tables([table, pa.table(added, schema=table.schema)])


def _without_removed(path: Path, table: pa.Table, cache: Cache) -> pa.Table:
    """Return a split's table in which samples that were removed since are in no part, under their present keys."""
    rows = cache.removed[cache.removed < len(table)]
    if not len(rows):
        return table
    warn_removed(f"{len(rows):,} samples of the split {path} were removed from {cache.path}; they are in no part")
    is_removed = np.zeros(len(table), bool)
    is_removed[rows] = True
    mask, keys = pa.array(is_removed), cache.column("key").cast(pa.string()).slice(0, len(table))
    columns = {"key": pc.if_else(mask, keys, table["key"]), "part": pc.if_else(mask, "", table["part"])}
    return pa.table({**columns, "group": table["group"]}, table.schema)


@cache_calls
def warn_removed(message: str) -> None:
    """Log that something names samples that were removed from a cache, once in a process."""
    _log.warning(message)


def make_split(
    caches: Sequence[Cache],
    pairs: Pairs,
    settings: SplitSettings,
    readers: Mapping[str, Reader],
    *,
    progress: Progress | None = None,
) -> Split:
    """Split the samples that have both features. The same features and settings give the same split.

    Only a strict split reads the features; time and memory as in `near_duplicate_groups`.

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
        return split_samples(caches, pairs.samples, settings)
    groups = near_duplicate_groups(pairs, settings, readers, progress or NullProgress())
    split = _by_groups(keys_of(caches), pairs.samples, groups, settings)
    _require_parts(split, groups, settings, readers, _languages(caches, pairs, list(readers)))
    return _of_caches(caches, split)


def split_samples(caches: Sequence[Cache], samples: Ints, settings: SplitSettings) -> Split:
    """Split samples without their features: by key, by a column or by a file.

    Args:
        caches: the caches.
        samples: (S,) the samples, counted across caches; the others are in no part.
        settings: settings of the split.

    Raises:
        UnknownNameError, SettingError, SourceError: as in `make_split`.
    """
    keys = keys_of(caches)
    if settings.kind == "column":
        split = _by_column(caches, keys, samples, settings)
    elif settings.kind == "key":
        split = _by_groups(keys, samples, samples, settings)
        _require_parts(split, samples, settings, ())
    elif settings.path is None or not settings.path.is_file():
        raise unknown_name("split", settings.kind, KINDS, hint="or use the path of another run's split.parquet")
    else:
        split = read_split(settings.path, caches)
    return _of_caches(caches, split)


def _of_caches(caches: Sequence[Cache], split: Split) -> Split:
    if len(caches) == 1:
        return split
    return replace(
        split, index_digests=[cache.info.index_digest for cache in caches for _ in range(cache.info.num_samples)]
    )


def _languages(caches: Sequence[Cache], pairs: Pairs, modalities: Sequence[str]) -> list[str]:
    """Return the languages of the captions of some pairs, sorted."""
    if "text" not in modalities:
        return []
    captions = (pairs.first, pairs.second)[modalities.index("text")]
    languages = caption_languages(caches).take(pa.array(captions.rows))
    return sorted(pc.unique(languages.drop_null()).to_pylist())


def _require_parts(
    split: Split, groups: Ints, settings: SplitSettings, modalities: Iterable[str], languages: Sequence[str] = ()
) -> None:
    if split.parts.count("val") and split.parts.count("test"):
        return
    if settings.kind == "key":
        raise SettingError(
            f"--split key leaves no validation or test samples among {len(groups)}; raise --val-fraction and "
            "--test-fraction, or use more samples"
        )
    thresholds = [settings.cosine(modality) for modality in modalities]
    named = " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in thresholds)
    advice = ""
    if len(languages) > 1:
        advice = (
            f"its captions are in {len(languages)} languages, and an encoder finds captions alike in those that it "
            f"does not know: use --language with one of {', '.join(languages)}, or else "
        )
    raise SettingError(
        f"--split {settings.kind} leaves no validation or test samples among {len(groups)}: the largest near-duplicate "
        f"group has {np.bincount(groups).max()} samples; {advice}raise {named}, or use --split key"
    )


def _by_column(caches: Sequence[Cache], keys: pa.ChunkedArray, samples: Ints, settings: SplitSettings) -> Split:
    for cache in caches:
        if "split" not in cache.columns:
            raise SourceError(f"the samples of {cache.path} have no column 'split'; use --split strict or --split key")
    columns = [cache.column("split") for cache in caches]
    codes = [pc.index_in(column_parts(names), value_set=pa.array(list(_CODES))) for names in columns]
    part_S = np.concatenate([of_cache.to_numpy() for of_cache in codes]).astype(np.int8)
    if not {_CODES["train"], _CODES["test"]} <= set(distinct(part_S).tolist()):
        known = sorted({str(name).lower() for names in columns for name in pc.unique(names).to_pylist()})
        raise SourceError(f"column 'split' of {name_caches(caches)}: expected train and test, got {', '.join(known)}")
    is_used = np.zeros(len(part_S), bool)
    is_used[samples] = True
    part_S[~is_used] = _CODES[""]
    if not (part_S == _CODES["val"]).any():
        train = np.flatnonzero(part_S == _CODES["train"])
        quota = _quota(settings.val_fraction, settings.max_val, len(train))
        drawn = draw_groups(keys.take(pa.array(train)), np.arange(len(train)), [quota], settings.seed)
        part_S[train[drawn == 0]] = _CODES["val"]
    return _split(keys, part_S, np.arange(len(keys)))


def _by_groups(keys: pa.ChunkedArray, samples: Ints, groups: Ints, settings: SplitSettings) -> Split:
    quotas = [
        _quota(settings.test_fraction, settings.max_test, len(samples)),
        _quota(settings.val_fraction, settings.max_val, len(samples)),
    ]
    numbers = number_values(groups)
    drawn = draw_groups(keys.take(pa.array(samples)), numbers, quotas, settings.seed)
    part_S, group_S = np.full(len(keys), _CODES[""], np.int8), np.full(len(keys), -1, np.int64)
    part_S[samples] = np.array([_CODES["train"], _CODES["test"], _CODES["val"]], np.int8)[drawn + 1]
    group_S[samples] = numbers
    return _split(keys, part_S, group_S)


_CODES = {"train": 0, "val": 1, "test": 2, "": 3}


def _split(keys: pa.ChunkedArray, part_S: Array, group_S: Ints) -> Split:
    names = pa.array(list(_CODES), pa.string())
    return Split(keys=Column(keys), parts=Column(names.take(pa.array(part_S))), groups=Column(pa.array(group_S)))


def _quota(fraction: float, largest: int, count: int) -> int:
    return min(round(fraction * count), largest)


PART_NAMES: dict[str, Part] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""Value of a source's column `split`, in lower case -> part."""


def column_parts(names: "pa.Array | pa.ChunkedArray") -> "pa.Array | pa.ChunkedArray":
    """Return the part that each value of a column `split` names, as texts: empty for null and all other values."""
    known = pc.unique(names)
    parts = pa.array([PART_NAMES.get(str(name).lower(), "") for name in known.to_pylist()], pa.string())
    return parts.take(pc.index_in(names, value_set=known))


_KEYS_PER_BLOCK = 65_536


def draw_groups(keys: "pa.Array | pa.ChunkedArray", groups_S: Ints, quotas: Sequence[int], seed: int) -> Ints:
    """Draw whole groups of samples for each of several quotas, in an order that depends only on keys and seed.

    Groups larger than the rest of a quota are skipped. Memory: about 60 bytes per sample.

    Args:
        keys: (S,) key of each sample.
        groups_S: group of each sample, from 0 to G - 1, none of them empty.
        quotas: most samples to draw; a later quota draws from what the earlier ones left.

    Returns:
        (S,) int64 position of the quota that a sample was drawn for, or -1.
    """
    sizes_G = np.bincount(groups_S)
    drawn_G, order = np.full(len(sizes_G), -1, np.int64), _random_order(keys, groups_S, sizes_G, seed)
    for number, quota in enumerate(quotas):
        is_taken = _take_first(sizes_G[order], quota)
        drawn_G[order[is_taken]] = number
        order = order[~is_taken]
    return drawn_G[groups_S]


def _random_order(keys: "pa.Array | pa.ChunkedArray", groups_S: Ints, sizes_G: Ints, seed: int) -> Ints:
    """Return the groups by the SHA-256 of the seed and their lowest key."""
    if isinstance(keys, pa.ChunkedArray):
        keys = keys.combine_chunks()  # Arrow joins the chunks each time that rows are taken from them
    is_shared = sizes_G[groups_S] > 1
    lead_G = np.empty(len(sizes_G), np.int64)
    lead_G[groups_S[~is_shared]] = np.flatnonzero(~is_shared)
    shared = np.flatnonzero(is_shared)
    by_key = shared[pc.sort_indices(keys.take(pa.array(shared))).to_numpy()]
    lead_G[groups_S[by_key[::-1]]] = by_key[::-1]  # the last assignment is that of the lowest key
    digests, salt, sha256 = [], f"{seed}:".encode(), hashlib.sha256
    for block in blocks(len(lead_G), _KEYS_PER_BLOCK):
        names = keys.take(pa.array(lead_G[block])).cast(pa.binary()).to_pylist()
        digests.append(b"".join([sha256(salt + name).digest()[:16] for name in names]))
    words_G2 = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2)
    order_G = np.argsort(words_G2[:, 0], kind="stable")
    first_G = words_G2[order_G, 0]
    return order_G if (first_G[1:] != first_G[:-1]).all() else np.lexsort((words_G2[:, 1], words_G2[:, 0]))


def _take_first(sizes: Ints, quota: int) -> Bools:
    """Return which of some groups to take in their order, skipping those that are larger than what is left."""
    is_taken, start = np.zeros(len(sizes), bool), 0
    while len(fits := np.flatnonzero(sizes[start:] <= quota)):
        start += int(fits[0])
        count = int(np.searchsorted(np.cumsum(sizes[start:]), quota, side="right"))
        is_taken[start : start + count] = True
        quota -= int(sizes[start : start + count].sum())
        start += count
    return is_taken
