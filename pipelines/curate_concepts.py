"""Is choosing worth it? Ways to select from a noisy pool, at equal budgets, by what training on them reaches.

    python -m pip install "embedcache[cpu,demo,clip-benchmark]"
    python -m pipelines.curate_concepts work/

Writes docs/benchmarks/curation.md and .svg. What is in the folder already is used again.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from embedcache.cli.console import print_line
from embedcache.curate.select.select import SelectSettings, select
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.evaluate.settings import RetrievalSettings, ZeroShotSettings
from embedcache.evaluate.zero_shot import evaluate_zero_shot
from embedcache.reports.base import format_estimate
from embedcache.train.data import TrainData, open_data
from embedcache.train.settings import train_settings
from embedcache.train.train import train_on
from pipelines.comparison import Method, write_comparison
from pipelines.noisy_openmoji import CLOSED, NOTES, count_english, make_caches, make_cut

SEEDS, BUDGETS, PAGE = (0, 1, 2, 3, 4), (300, 600, 1200), Path("docs/benchmarks/curation.md")
BY_CONCEPTS, ENGLISH = ("top-score", "rare-first", "metaclip"), "random of the English"
METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("random", "top-score", "clip-score", "rare-first", "k-center", ENGLISH)},
    "metaclip": {"threshold": 0.4},
    "hierarchical": {"clusters": (100, 10)},
}


def choose(workdir: Path, name: str, budget: int, seed: int) -> None:
    """Select from the training part of one cut."""
    method, cut = ("random" if name == ENGLISH else name), workdir / f"cut-{seed}"
    given: dict[str, Any] = {
        "concepts_path": workdir / "concepts" if method in BY_CONCEPTS else None,
        "joins_names": True,  # two names of ImageNet stand twice
        "run_path": cut / "scorer" if method == "clip-score" else None,
        "within": cut / ("english.parquet" if name == ENGLISH else "training.parquet"),
    }
    settings = SelectSettings(budget=budget, seed=seed, **METHODS[name])
    select(workdir / "pool", cut / f"{name}-{budget}.parquet", method, settings=settings, **given)


def measure(workdir: Path, data: TrainData, group: str, name: str, file: str) -> Method:
    """Train on a selection of every cut and evaluate."""
    cuts, runs = f"{workdir}/cut-{{seed}}", [workdir / f"cut-{seed}" / file for seed in SEEDS]
    paths = {"split": f"{cuts}/split.parquet", "selection": f"{cuts}/{file}.parquet"}
    for seed, run in zip(SEEDS, runs, strict=True):
        train_on(data, run, train_settings({**CLOSED, **paths, "seed": seed}))
    report = evaluate_retrieval(workdir / "pool", runs, RetrievalSettings(language=("en",)))
    classified = evaluate_zero_shot(workdir / "pool", runs, workdir / "groups", ZeroShotSettings(check_overlap=False))
    accuracy = format_estimate(classified.accuracies["mean_per_class_recall"])
    print_line(f"{group} {name}: i2t R@10 {report.recalls['i2t']['r@10'].value:.3f}, classes {accuracy}")
    about = {"English pairs": f"{count_english(workdir, file, SEEDS):,.0f}", "9 classes": accuracy}
    return Method(group=group, name=name, about=about, report=report)


def main() -> None:
    """Make the pool, measure every method at every budget and all there is, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    workdir = parser.parse_args().workdir
    make_caches(workdir)
    for seed in SEEDS:
        make_cut(workdir, seed)
        for name, budget in product(METHODS, BUDGETS):
            choose(workdir, name, budget, seed)
    data = open_data(workdir / "pool", image=None, text=None, memory_gb=1)
    rows = [(f"{budget:,}", name, f"{name}-{budget}") for budget in BUDGETS for name in METHODS]
    rows += [("all", "everything", "training"), ("all", "the English", "english")]
    methods = [measure(workdir, data, *row) for row in rows]
    write_comparison(PAGE, methods, title="Selecting from a noisy pool", notes=NOTES)


if __name__ == "__main__":
    main()
