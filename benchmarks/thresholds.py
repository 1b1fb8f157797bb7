"""Precision and recall of coverage thresholds by labels: OpenMoji's images and names, its ten groups as concepts.

Precision is the fraction of the items above a group's threshold that belong to the group, recall the fraction of the
group above it; chance is what a normal background alone would put there. Concepts are the names of the groups, or
prototypes: the mean of 128 images of each, or of half of a smaller group, which are left out of the pool.
"""

import tempfile
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Floats, mean_directions
from embedcache.cli.console import print_table
from embedcache.curate.counting import SAMPLE, estimate_background
from embedcache.extract.extract import extract
from embedcache.search.concepts import MAX_EXAMPLES, open_concepts
from embedcache.search.vectors import Vectors
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import TrainSettings
from embedcache.train.train import train

IMAGE, TEXT = "lite:efficientnet-lite0", "st:all-MiniLM-L6-v2"
DEVIATIONS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0)


def main(*, quick: bool) -> None:
    """Print precision and recall."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extract(open_source("openmoji:en"), folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT])
        cache = Cache(folder / "cache")
        groups = sorted(set(cache.samples["label"].drop_null().to_pylist()))
        (folder / "groups.txt").write_text("\n".join(groups))
        extract(open_source(f"prompts:{folder / 'groups.txt'}"), folder / "groups", text_encoder=[TEXT])
        train(cache.path, folder / "run", settings=TrainSettings())
        rows = []
        for modality, run in (("text", None), ("text", folder / "run"), ("image", folder / "run")):
            pool = Vectors(cache.path, modality, run_path=run)
            concepts = open_concepts(Cache(folder / "groups"), pool)
            space = "names, projected" if run else "names, plain"
            rows += _rows(f"{modality}s: {space}", concepts.vectors, pool.read(pool.rows), _labels(pool, groups))
        rows += _prototypes(Vectors(cache.path, "image"), groups)
    print_table(
        ["OpenMoji, ten groups", "deviations", "above", "by chance", "precision", "recall", "fraction of the pool"],
        rows,
    )


def _prototypes(pool: Vectors, groups: list[str]) -> list[list[str]]:
    labels, vectors = _labels(pool, groups), pool.read(pool.rows)
    rng, is_example = np.random.default_rng(0), np.zeros(len(labels), bool)
    for group in range(len(groups)):
        found = rng.permutation(np.flatnonzero(labels == group))
        is_example[found[: min(MAX_EXAMPLES, len(found) // 2)]] = True
    concepts = mean_directions(vectors[is_example], labels[is_example], len(groups))
    return _rows("images: prototypes, plain", concepts, vectors[~is_example], labels[~is_example])


def _labels(pool: Vectors, groups: list[str]) -> Array:
    """Return the group number of each item, -1 if it is in none."""
    samples = pool.cache.items(pool.modality)["sample"].to_numpy()[pool.rows]
    found = pool.cache.samples["label"].take(pa.array(samples)).to_pylist()
    return np.array([-1 if label is None else groups.index(label) for label in found])


def _rows(title: str, concepts_CP: Floats, vectors_NP: Floats, labels_N: Array) -> list[list[str]]:
    background = estimate_background(concepts_CP, vectors_NP[:SAMPLE], 10)
    sims = vectors_NP @ concepts_CP.T
    is_of = labels_N[:, None] == np.arange(len(concepts_CP))
    rows = []
    for deviations in DEVIATIONS:
        is_above = sims > background.thresholds(deviations)
        both = (is_above & is_of).sum()
        rows.append(
            [
                title,
                f"{deviations:g}",
                f"{is_above.sum():,}",
                f"{is_above.size * NormalDist().cdf(-deviations):.1f}",
                f"{both / max(1, is_above.sum()):.3f}",
                f"{both / is_of.sum():.3f}",
                f"{is_of.mean():.3f}",
            ]
        )
    return rows
