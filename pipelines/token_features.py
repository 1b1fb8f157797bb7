"""What token features gain for their size: the paper's token projector on all patches of OpenMoji, and on fewer.

    python -m pipelines.token_features work/

Writes docs/benchmarks/tokens.md and .svg. Existing results in the folder are reused.
"""

from pathlib import Path

from embedcache.cli.console import print_line
from embedcache.cli.failures import run_program
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.extract.settings import ExtractSettings
from embedcache.train.data import open_data
from embedcache.train.settings import train_settings
from pipelines.common import TEXT_FEATURE, extract_source, parse_workdir, train_seeds, with_options
from pipelines.comparison import Method, write_comparison

FEATURES = ("patch_mean", "grid:2", "kmeans:4", "kmeans:8", "grid:4", "patches", "mean")
TOKENS = ("patch_mean", "grid:2", "kmeans:4", "kmeans:8", "grid:4", "patches")
WITH_GLOBAL = ("patch_mean+grid:2", "patch_mean+kmeans:4", "patch_mean+grid:4", "patch_mean+patches")
PROJECTORS = {**dict.fromkeys(TOKENS, "token"), **dict.fromkeys(WITH_GLOBAL, "cls_token")}
SEEDS = (0, 1, 2)
PAGE = Path("docs/benchmarks/tokens.md")
BASE = train_settings({"batch_size": 512, "dropout": 0.3, "epochs": 30, "patience": 8, "precision": "bfloat16"})
NOTES = (
    "EfficientNet-Lite0's 7 x 7 map of 1,280-wide patches and MiniLM's `mean`. Produced by "
    "`python -m pipelines.token_features work/` on 2 CPU cores.",
    "The same projectors on all rows: `token`, the mean of T over an image's tokens, or `cls_token`, T of a global "
    "vector plus the mean of another T over the tokens, as on the paper's vision side; the text side is `token_mlp`. "
    "This network has no CLS token, so `patch_mean` is its global vector. Random initialization, learning rate 1e-3.",
)


def main() -> None:
    """Extract all features in one pass, train on each with every seed, evaluate on the test part, write the page."""
    workdir = parse_workdir(__doc__)
    cache_path = workdir / "cache"
    extract_source("openmoji:en", cache_path, settings=ExtractSettings(features=FEATURES))
    methods = []
    for name, projector in PROJECTORS.items():
        image = "+".join(f"efficientnet-lite0/{part}" for part in name.split("+"))
        data = open_data(cache_path, {"image": image, "text": TEXT_FEATURE}, memory_bytes=4 * 10**9)
        settings = with_options(BASE, projector=f"{projector}+token_mlp")
        run_paths, runs = train_seeds(data, workdir / "runs" / name.replace(":", "-"), settings, SEEDS)
        num_bytes = round(data.features["image"].num_bytes / data.features["image"].num_items)
        about = {"bytes per image": f"{num_bytes:,}", "MFLOP per pair": f"{runs[0].flops_per_pair / 1e6:.1f}"}
        report = evaluate_retrieval(cache_path, run_paths)
        methods.append(Method(group=projector, name=name, about=about, report=report))
        print_line(f"{name}: i2t R@10 {report.recalls['i2t']['r@10'].value:.3f}")
    write_comparison(PAGE, methods, title="Token features for their size", notes=NOTES)


if __name__ == "__main__":
    run_program(main)
