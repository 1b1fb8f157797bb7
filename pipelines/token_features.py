"""What token features are worth for their bytes: the paper's token projector on all patches of OpenMoji, and on fewer.

    python -m pipelines.token_features work/

Writes docs/benchmarks/tokens.md and .svg. What is in the folder already is used again.
"""

import argparse
from pathlib import Path

from embedcache.cli.console import open_progress, print_line
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.train.data import open_data
from embedcache.train.settings import train_settings
from embedcache.train.train import train_on
from pipelines.comparison import Method, write_comparison

IMAGE, TEXT = "lite:efficientnet-lite0", "st:all-MiniLM-L6-v2"
FEATURES = ("patch_mean", "grid:2", "kmeans:4", "kmeans:8", "grid:4", "patches", "mean")
TOKENS = ("patch_mean", "grid:2", "kmeans:4", "kmeans:8", "grid:4", "patches")
WITH_GLOBAL = ("patch_mean+grid:2", "patch_mean+kmeans:4", "patch_mean+grid:4", "patch_mean+patches")
PROJECTORS = {**dict.fromkeys(TOKENS, "token"), **dict.fromkeys(WITH_GLOBAL, "cls_token")}
SEEDS = (0, 1, 2)
PAGE = Path("docs/benchmarks/tokens.md")
RECIPE = {"batch_size": 512, "dropout": 0.3, "epochs": 30, "patience": 8, "precision": "bfloat16"}
NOTES = (
    "EfficientNet-Lite0's 7 x 7 map of 1,280-wide patches and MiniLM's `mean`. Made by "
    "`python -m pipelines.token_features work/` on 2 CPU cores.",
    "The same projectors on all rows: `token`, the mean of T over an image's tokens, or `cls_token`, T of a global "
    "vector plus the mean of another T over the tokens, as the paper's vision side; the text side is `token_mlp`. This "
    "network has no CLS token: `patch_mean` is its global vector. Random weights at the start, learning rate 1e-3.",
)


def main() -> None:
    """Extract all features in one decode, train each with every seed, evaluate on the test part, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    workdir, progress = parser.parse_args().workdir, open_progress()
    cache_path = workdir / "cache"
    stored = ExtractSettings(features=FEATURES)
    extract(
        open_source("openmoji:en"),
        cache_path,
        image_encoders=[IMAGE],
        text_encoders=[TEXT],
        settings=stored,
        progress=progress,
    )
    methods = []
    for name, projector in PROJECTORS.items():
        image = "+".join(f"efficientnet-lite0/{part}" for part in name.split("+"))
        data = open_data(cache_path, image=image, text="all-MiniLM-L6-v2/mean", memory_gb=4)
        paths = [workdir / "runs" / f"{name}-{seed}".replace(":", "-") for seed in SEEDS]
        runs = [
            train_on(
                data,
                path,
                train_settings({**RECIPE, "projector": f"{projector}+token_mlp", "seed": seed}),
                progress=progress,
            )
            for seed, path in zip(SEEDS, paths, strict=True)
        ]
        num_bytes = round(data.images[0].num_bytes / data.images[0].num_items)
        about = {"bytes an image": f"{num_bytes:,}", "MFLOP per pair": f"{runs[0].flops_per_pair / 1e6:.1f}"}
        report = evaluate_retrieval(cache_path, paths)
        methods.append(Method(group=projector, name=name, about=about, report=report))
        print_line(f"{name}: i2t R@10 {report.recalls['i2t']['r@10'].value:.3f}")
    write_comparison(PAGE, methods, title="Token features for their bytes", notes=NOTES)


if __name__ == "__main__":
    main()
