"""A pool with real noise: pairs of an OpenMoji picture and its name in one of 14 languages, for an English encoder.

What `pipelines.curate_concepts` selects from. What is in the folder already is used again.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embedcache.cli.console import open_progress
from embedcache.curate.select.combine import combine_selections
from embedcache.dataset.selections import Selection, write_selection
from embedcache.dataset.splits import read_split, spread_split, swap_parts, write_split
from embedcache.extract.extract import extract
from embedcache.projectors.saved import split_path
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import train_settings
from embedcache.train.train import train

IMAGE, TEXT = "lite:efficientnet-lite0", "st:all-MiniLM-L6-v2"
CLOSED: dict[str, object] = {"projector": "linear", "initialization": "cca", "epochs": 0}
GROUPS = (
    "Activities,Animals & Nature,Flags,Food & Drink,Objects,People & Body,Smileys & Emotion,Symbols,Travel & Places"
)
NOTES = (
    "Made by `python -m pipelines.curate_concepts work/` on 2 CPU cores. The pool is 26,796 pairs of an OpenMoji "
    "picture and its name in one of 14 languages, under EfficientNet-Lite0 and MiniLM, which reads English: 13 of 14 "
    "pairs are noise, as in a crawl. Five seeds, five strict cuts by picture; each method selects 300, 600 or 1,200 of "
    "the training pairs, a linear CCA is fitted on them, and tested on English pairs held out.",
    "`top-score`, `rare-first` (the paper's) and `metaclip` (matches at cosine .4) compare captions with the names of "
    "ImageNet's 1,000 classes. `clip-score` uses a CCA of validation's 190 English pairs, which no other method sees. "
    "`hierarchical` (100 clusters under 10) and `k-center` look at images alone; `image-based` has nothing to go by, "
    "as every language shows the same pictures. 'Random of the English' is a perfect filter. 'English pairs' are those "
    "selected; '9 classes' is the mean accuracy over Unicode's groups of emoji, zero-shot, by their bare names (chance "
    ".111).",
)


def make_caches(workdir: Path) -> None:
    """Extract `clean` (English names), `pool`, `concepts` (ImageNet's names) and `groups` (the classes of pictures)."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "groups.txt").write_text(GROUPS.replace(",", "\n"))
    (workdir / "name.txt").write_text("{c}")
    prompts = {
        name: f"prompts:{classes}+{workdir}/name.txt"
        for name, classes in (("concepts", "imagenet1k"), ("groups", f"{workdir}/groups.txt"))
    }
    pictures = {"clean": "openmoji:en", "pool": "pairs:openmoji:"}
    for name, location in (pictures | prompts).items():
        image = [IMAGE] if name in pictures else []
        extract(
            open_source(location), workdir / name, image_encoders=image, text_encoders=[TEXT], progress=open_progress()
        )


def count_english(workdir: Path, file: str, seeds: Sequence[int]) -> float:
    """Count the English pairs of a selection: the mean over the cuts."""
    parts = [(workdir / f"cut-{seed}" / f"{file}.parquet", workdir / f"cut-{seed}") for seed in seeds]
    both = [
        combine_selections(workdir / "pool", cut / "both.parquet", one, "and", cut / "english.parquet")
        for one, cut in parts
    ]
    return float(np.mean(both))


def make_cut(workdir: Path, seed: int) -> Path:
    """Cut the pictures strictly, by their English names, and their pairs likewise; train a scorer on validation alone.

    Gives a folder with `split.parquet` of the pool, the selections `training.parquet` and `english.parquet` of its
    training part, and the run `scorer`.
    """
    cut = workdir / f"cut-{seed}"
    clean, pool = Cache(workdir / "clean"), Cache(workdir / "pool")
    train(clean.path, cut / "clean", settings=train_settings({**CLOSED, "seed": seed}))
    pictures = read_split(split_path(cut / "clean"), [clean])
    write_split(cut / "swapped.parquet", swap_parts(pictures, "train", "val"))
    swapped = {**CLOSED, "seed": seed, "split": str(cut / "swapped.parquet")}
    train(clean.path, cut / "scorer", settings=train_settings(swapped))
    split = spread_split(pictures, pool, "sample")
    write_split(cut / "split.parquet", split)
    rows = split.rows("train")
    is_english = np.array(pool.samples["language"].to_pylist())[rows] == "en"
    for name, kept in (("training", rows), ("english", rows[is_english])):
        selection = Selection(rows=kept, reasons=["of the training part"] * len(kept))
        write_selection(cut / f"{name}.parquet", pool, selection, {})
    return cut
