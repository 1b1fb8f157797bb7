"""Tables of examples of tasks, and draws of a fraction of them.

A row is an example. Its columns are:

- `key`: sample of a cache; null for tasks on text only
- `text`: input words, such as a question; null if there are none
- `target`: text to predict: a class, an answer, a caption
- any others, for strata and for tables of results
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.errors import SettingError
from embedcache.files import replacing
from embedcache.modalities import Source


def make_examples(
    *,
    targets: Sequence[str],
    keys: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[str | None]] | None = None,
) -> pa.Table:
    """Return a table of examples; without `keys` or `texts`, that column is null."""
    data = {"key": keys, "text": texts, "target": targets, **(columns or {})}
    empty = pa.nulls(len(targets), pa.string())
    return pa.table({name: empty if values is None else pa.array(values, pa.string()) for name, values in data.items()})


def write_examples(path: Path, examples: pa.Table) -> None:
    """Write a table of examples as Parquet, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(examples, temporary)


def caption_examples(source: Source) -> pa.Table:
    """Return one example per caption of a source, with its column `split`."""
    rows = []
    for sample in source.samples():
        split = str(sample.columns.get("split") or "")
        rows += [(sample.key, text.text, split) for text in sample.texts]
    return _from_rows(rows)


def label_examples(source: Source) -> pa.Table:
    """Return one example per sample of a source that has a `label`, with its column `split`."""
    rows = [
        (sample.key, str(sample.columns["label"]), str(sample.columns.get("split") or ""))
        for sample in source.samples()
        if sample.columns.get("label") is not None
    ]
    return _from_rows(rows)


def draw_examples(examples: pa.Table, count: int, *, seed: int, by: Sequence[str] = ("target",)) -> pa.Table:
    """Draw examples so that each stratum keeps its fraction of them, up to one example.

    Draws with one seed are nested: a larger draw contains the smaller ones. Rows keep their order.

    Args:
        examples: a table of examples.
        count: number of examples to draw.
        seed: random seed.
        by: columns whose combinations are the strata.

    Raises:
        SettingError: there are fewer examples than `count`.
    """
    if not 0 < count <= len(examples):
        raise SettingError(f"expected 1 to {len(examples):,} examples to draw, got {count:,}")

    strata_N = np.zeros(len(examples), np.int64)
    for name in by:
        codes = pc.dictionary_encode(examples[name].combine_chunks()).indices.fill_null(-1)
        strata_N = strata_N * (pc.max(codes).as_py() + 2) + codes.to_numpy(zero_copy_only=False) + 1

    rng = np.random.default_rng(seed)

    # Sort a random order by stratum, so that the rows of each stratum stay in random order.
    order_N = rng.permutation(len(examples))
    sorted_N = order_N[np.argsort(strata_N[order_N], kind="stable")]
    _, first_S, size_S = np.unique(strata_N[sorted_N], return_index=True, return_counts=True)
    rank_N = np.arange(len(examples)) - np.repeat(first_S, size_S)

    # Examples of each stratum are spread evenly over [0, 1); all of them below a bound are a stratified draw.
    place_N = (rank_N + np.repeat(rng.random(len(size_S)), size_S)) / np.repeat(size_S, size_S)
    rows = sorted_N[np.argsort(place_N, kind="stable")[:count]]
    return examples.take(pa.array(np.sort(rows)))


def in_split(examples: pa.Table, *splits: str) -> pa.Table:
    """Return the examples of some splits."""
    return examples.filter(pc.is_in(examples["split"], pa.array(splits)))


def _from_rows(rows: Iterable[tuple[str, str, str]]) -> pa.Table:
    rows = list(rows)
    keys, targets, splits = zip(*rows, strict=True) if rows else ((), (), ())
    return make_examples(keys=keys, targets=targets, columns={"split": splits})
