"""All projectors x losses on OpenMoji: strict split, five seeds, chance and the shuffled control; a table and a plot.

    python -m pipelines.compare_projectors work/

Writes docs/benchmarks/projectors.md and .svg; what is in the folder already is used again.
"""

import argparse
from pathlib import Path
from typing import TypeAlias

from embedcache.cli.console import open_progress, print_line
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.extract.extract import extract
from embedcache.sources import open_source
from embedcache.train.data import open_data
from embedcache.train.settings import train_settings
from embedcache.train.train import train_on
from pipelines.comparison import Method, write_comparison

IMAGE, TEXT = "lite:efficientnet-lite0", "st:all-MiniLM-L6-v2"
SEEDS = (0, 1, 2, 3, 4)
PAGE = Path("docs/benchmarks/projectors.md")
Options: TypeAlias = dict[str, object]
COMMON: Options = {"batch_size": 512, "dropout": 0.3, "initialization": "random", "epochs": 30, "patience": 8}
LARGE: Options = {"epochs": 8, "lr": 5e-4, "precision": "bfloat16"}  # tens of millions of parameters
LEARNED: dict[str, Options] = {
    "linear": {"projector": "linear"},
    "mlp": {"projector": "mlp"},
    "token": {"projector": "token+token_mlp"},
    "sharelock": {"projector": "identity+sharelock", "shared_width": 1280, **LARGE},
    "glu": {"projector": "glu", **LARGE},
    "fusemix": {"projector": "fusemix", **LARGE},
}
LOSSES: dict[str, Options] = {name: {"loss": name} for name in ("info_nce", "multi_positive", "siglip", "sail")}
EXTRAS: dict[str, Options] = {"mixup 1": {"mixup": 1.0}, "STRUCTURE 10": {"structure": 10.0}}
EXTRAS |= {"shuffled pairs": {"shuffle_pairs": True}}
CLOSED: dict[str, Options] = {
    **{
        form: {"projector": "linear", "initialization": form, "epochs": 0}
        for form in ("ridge", "procrustes", "cca", "csa")
    },
    "asif": {"projector": "asif", "initialization": None, "shared_width": 1200},
}
NOTES = (
    "EfficientNet-Lite0's `patch_mean` and MiniLM's `mean`, both frozen and cached once. Made by "
    "`python -m pipelines.compare_projectors work/` on 2 CPU cores.",
    "Five seeds: five cuts, orders and initializations. Learned projectors start from random weights and keep those of "
    "the best validation recall: the small ones of 30 epochs at learning rate 1e-3, the large ones (sharelock, glu, "
    "fusemix) of 8 at 5e-4 in bfloat16, which is what two cores allow and fewer than they want. `token` takes one "
    "pooled vector an image. Closed forms have shrinkage 1. The control is trained on shuffled pairs.",
)


def recipes() -> dict[tuple[str, str], Options]:
    """Give each method's options, by its group and name."""
    closed = {("closed form", form): options for form, options in CLOSED.items()}
    learned = {(group, loss): LEARNED[group] | options for group in LEARNED for loss, options in LOSSES.items()}
    return closed | learned | {("mlp", extra): LEARNED["mlp"] | options for extra, options in EXTRAS.items()}


def main() -> None:
    """Extract, train every recipe with every seed on the same data, evaluate on the test part, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    workdir, progress = parser.parse_args().workdir, open_progress()
    cache_path = workdir / "cache"
    extract(open_source("openmoji:en"), cache_path, image_encoders=[IMAGE], text_encoders=[TEXT], progress=progress)
    data = open_data(cache_path, image="efficientnet-lite0/patch_mean", text="all-MiniLM-L6-v2/mean", memory_gb=1)
    methods = []
    for (group, name), recipe in recipes().items():
        paths = [workdir / "runs" / f"{group}-{name}-{seed}".replace(" ", "-") for seed in SEEDS]
        seeded = [train_settings({**COMMON, **recipe, "seed": seed}) for seed in SEEDS]
        runs = [train_on(data, path, one, progress=progress) for path, one in zip(paths, seeded, strict=True)]
        report = evaluate_retrieval(cache_path, paths)
        about = {"parameters": f"{runs[0].num_parameters:,}", "MFLOP per pair": f"{runs[0].flops_per_pair / 1e6:.1f}"}
        methods.append(Method(group=group, name=name, about=about, report=report))
        print_line(f"{group}, {name}: i2t R@10 {report.recalls['i2t']['r@10'].value:.3f}")
    write_comparison(PAGE, methods, title="Projectors and losses on OpenMoji", notes=NOTES)


if __name__ == "__main__":
    main()
