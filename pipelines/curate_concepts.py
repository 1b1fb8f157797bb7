"""Is selection worth it? Methods that select from a noisy pool at equal budgets, compared by training on the result.

    python -m pip install "embedcache[cpu,demo,clip-benchmark]"
    python -m pipelines.curate_concepts work/

Writes docs/benchmarks/curation.md and .svg. Existing results in the folder are reused.
"""

from itertools import product
from pathlib import Path
from typing import Any

from embedcache.cli.console import print_line
from embedcache.cli.failures import run_program
from embedcache.curate.select.select import select
from embedcache.curate.select.settings import SelectSettings
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.evaluate.settings import RetrievalSettings, ZeroShotSettings
from embedcache.evaluate.zero_shot import evaluate_zero_shot
from embedcache.reports.base import format_estimate
from embedcache.train.data import TrainData, open_data
from embedcache.train.train import train_on
from pipelines.common import parse_workdir, with_options
from pipelines.comparison import Method, write_comparison
from pipelines.noisy_openmoji import CLOSED_FORM, NOTES, count_english, make_caches, split_pool

SEEDS, BUDGETS, PAGE = (0, 1, 2, 3, 4), (300, 600, 1200), Path("docs/benchmarks/curation.md")
BY_CONCEPTS, ENGLISH = ("top-score", "rare-first", "metaclip", "assigned"), "random of the English"
METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("random", "top-score", "clip-score", "rare-first", "k-center", ENGLISH)},
    "metaclip": {"threshold": 0.4},
    "hierarchical": {"clusters": (100, 10)},
    "assigned": {},
}


def select_pairs(workdir: Path, name: str, budget: int, seed: int) -> None:
    """Select pairs from the training part of one split."""
    method = {ENGLISH: "random", "assigned": "pipelines.assigned_selector:AssignedSelector"}.get(name, name)
    folder = workdir / f"cut-{seed}"
    select(
        workdir / "pool",
        folder / f"{name}-{budget}.parquet",
        method,
        SelectSettings(
            budget=budget,
            concepts=workdir / "concepts" if name in BY_CONCEPTS else None,
            join_names=True,  # two class names of ImageNet occur twice
            run=folder / "scorer" if name == "clip-score" else None,
            selection=folder / ("english.parquet" if name == ENGLISH else "training.parquet"),
            seed=seed,
            **METHODS[name],
        ),
    )


def measure(workdir: Path, data: TrainData, group: str, name: str, file: str) -> Method:
    """Train on one selection of each split and evaluate."""
    folders = f"{workdir}/cut-{{seed}}"
    settings = with_options(CLOSED_FORM, split=f"{folders}/split.parquet", selection=f"{folders}/{file}.parquet")
    run_paths = [workdir / f"cut-{seed}" / file for seed in SEEDS]
    for seed, run_path in zip(SEEDS, run_paths, strict=True):
        train_on(data, run_path, with_options(settings, seed=seed))
    report = evaluate_retrieval(workdir / "pool", run_paths, RetrievalSettings(language=("en",)))
    classified = evaluate_zero_shot(
        workdir / "pool", run_paths, workdir / "groups", ZeroShotSettings(check_overlap=False)
    )
    accuracy = format_estimate(classified.accuracies["mean_per_class_recall"])
    print_line(f"{group} {name}: i2t R@10 {report.recalls['i2t']['r@10'].value:.3f}, classes {accuracy}")
    about = {"English pairs": f"{count_english(workdir, file, SEEDS):,.0f}", "9 classes": accuracy}
    return Method(group=group, name=name, about=about, report=report)


def main() -> None:
    """Create the pool, measure every method at every budget and on the whole pool, and write the page."""
    workdir = parse_workdir(__doc__)
    make_caches(workdir)
    for seed in SEEDS:
        split_pool(workdir, seed)
        for name, budget in product(METHODS, BUDGETS):
            select_pairs(workdir, name, budget, seed)
    data = open_data(workdir / "pool", {"image": None, "text": None}, memory_bytes=10**9)
    rows = [(f"{budget:,}", name, f"{name}-{budget}") for budget in BUDGETS for name in METHODS]
    rows += [("all", "everything", "training"), ("all", "the English", "english")]
    methods = [measure(workdir, data, *row) for row in rows]
    write_comparison(PAGE, methods, title="Selecting from a noisy pool", notes=NOTES)


if __name__ == "__main__":
    run_program(main)
