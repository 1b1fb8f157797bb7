"""All projectors and losses on OpenMoji: strict split, five seeds, chance level and shuffled control.

    python -m pipelines.compare_projectors work/

Writes docs/benchmarks/projectors.md and .svg. Existing results in the folder are reused.
"""

from pathlib import Path
from typing import TypeAlias

from embedcache.cli.console import print_line
from embedcache.cli.failures import run_program
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.train.data import open_data
from embedcache.train.settings import TrainSettings, train_settings
from pipelines.common import IMAGE_FEATURE, TEXT_FEATURE, extract_source, parse_workdir, train_seeds, with_options
from pipelines.comparison import Method, write_comparison

SEEDS = (0, 1, 2, 3, 4)
PAGE = Path("docs/benchmarks/projectors.md")
Options: TypeAlias = dict[str, object]
BASE = train_settings({"batch_size": 512, "dropout": 0.3, "initialization": "random", "epochs": 30, "patience": 8})
LARGE: Options = {"epochs": 8, "lr": 5e-4, "precision": "bfloat16"}  # tens of millions of parameters
LEARNED: dict[str, Options] = {
    "linear": {"projector": "linear"},
    "mlp": {"projector": "mlp"},
    "token": {"projector": "token+token_mlp"},
    "sharelock": {"projector": "identity+sharelock", "shared_width": 1280, **LARGE},
    "glu": {"projector": "glu", **LARGE},
    "fusemix": {"projector": "fusemix", **LARGE},
}
LOSSES = ("info_nce", "multi_positive", "siglip", "sail")
EXTRAS: dict[str, Options] = {
    "mixup 1": {"mixup": 1.0},
    "STRUCTURE 10": {"structure": 10.0},
    "shuffled pairs": {"shuffle_pairs": True},
}
CLOSED_FORMS = ("ridge", "procrustes", "cca", "csa")
NOTES = (
    "EfficientNet-Lite0's `patch_mean` and MiniLM's `mean`, both frozen and cached once. Produced by "
    "`python -m pipelines.compare_projectors work/` on 2 CPU cores.",
    "Five seeds: five splits, batch orders and initializations. Learned projectors start from random weights and keep "
    "those of the best validation recall: the small ones in 30 epochs at learning rate 1e-3, the large ones "
    "(sharelock, glu, fusemix) in 8 epochs at 5e-4 in bfloat16, which is what two cores allow and less than they need. "
    "`token` gets one pooled vector per image. Closed forms use shrinkage 1. The control is trained on shuffled pairs.",
)


def methods() -> dict[tuple[str, str], TrainSettings]:
    """Return the settings of each method, by group and name."""
    closed = {
        ("closed form", form): with_options(BASE, projector="linear", initialization=form, epochs=0)
        for form in CLOSED_FORMS
    }
    asif = {("closed form", "asif"): with_options(BASE, projector="asif", initialization=None, shared_width=1200)}
    learned = {
        (group, loss): with_options(BASE, loss=loss, **options) for group, options in LEARNED.items() for loss in LOSSES
    }
    extras = {("mlp", name): with_options(BASE, **LEARNED["mlp"], **options) for name, options in EXTRAS.items()}
    return closed | asif | learned | extras


def main() -> None:
    """Extract features, train each method with each seed, evaluate on the test part and write the page."""
    workdir = parse_workdir(__doc__)
    cache_path = workdir / "cache"
    extract_source("openmoji:en", cache_path)
    data = open_data(cache_path, {"image": IMAGE_FEATURE, "text": TEXT_FEATURE}, memory_bytes=10**9)
    results = []
    for (group, name), settings in methods().items():
        run_paths, runs = train_seeds(data, workdir / "runs" / f"{group}-{name}".replace(" ", "-"), settings, SEEDS)
        report = evaluate_retrieval(cache_path, run_paths)
        about = {"parameters": f"{runs[0].num_parameters:,}", "MFLOP per pair": f"{runs[0].flops_per_pair / 1e6:.1f}"}
        results.append(Method(group=group, name=name, about=about, report=report))
        print_line(f"{group}, {name}: i2t R@10 {report.recalls['i2t']['r@10'].value:.3f}")
    write_comparison(PAGE, results, title="Projectors and losses on OpenMoji", notes=NOTES)


if __name__ == "__main__":
    run_program(main)
