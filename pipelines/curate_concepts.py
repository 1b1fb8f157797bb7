"""Is choosing worth it? Ways to select from a noisy pool, at equal budgets, by what training on them reaches.

    python -m pip install "embedcache[cpu,demo,clip-benchmark]"
    python -m pipelines.curate_concepts work/

Writes docs/benchmarks/curation.md and .svg. What is in the folder already is used again.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.cli.console import say
from embedcache.curate.select.combine import combine
from embedcache.curate.select.contract import SelectSettings
from embedcache.curate.select.select import select
from embedcache.evaluate.comparison import Method, write_comparison
from embedcache.evaluate.report import format_estimate
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.evaluate.zero_shot import evaluate_zero_shot
from embedcache.train.data import TrainData, open_data
from embedcache.train.options import settings_of
from embedcache.train.train import train_on
from pipelines.noisy_openmoji import CLOSED, NOTES, make_caches, make_cut

SEEDS, BUDGETS = (0, 1, 2, 3, 4), (300, 600, 1200)
PAGE = Path("docs/benchmarks/curation.md")
BY_CONCEPTS, ENGLISH = ("top-score", "rare-first", "metaclip"), "random of the English"
METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("random", "top-score", "clip-score", "rare-first", "k-centre")},
    "metaclip": {"threshold": 0.4},
    "hierarchical": {"clusters": (100, 10)},
    ENGLISH: {},
}


def choose(workdir: Path, name: str, budget: int, seed: int) -> float:
    """Select from the training part of one cut, and say what share of it is English."""
    method = "random" if name == ENGLISH else name
    cut = workdir / f"cut-{seed}"
    path = cut / f"{name}-{budget}.parquet"
    select(
        workdir / "pool",
        path,
        method,
        settings=SelectSettings(budget=budget, seed=seed, **METHODS[name]),
        concepts_path=workdir / "concepts" if method in BY_CONCEPTS else None,
        joins_names=True,  # two names of ImageNet stand twice
        run_path=cut / "scorer" if method == "clip-score" else None,
        within=cut / ("english.parquet" if name == ENGLISH else "training.parquet"),
    )
    return combine(workdir / "pool", cut / "both.parquet", path, "and", cut / "english.parquet") / budget


def measure(workdir: Path, data: TrainData, name: str, budget: int) -> Method:
    """Select, train and evaluate with every seed."""
    shares = [choose(workdir, name, budget, seed) for seed in SEEDS]
    cut = workdir / "cut-{seed}"
    recipe = {**CLOSED, "split": str(cut / "split.parquet"), "selection": str(cut / f"{name}-{budget}.parquet")}
    runs = [workdir / f"cut-{seed}" / f"{name}-{budget}" for seed in SEEDS]
    for seed, run in zip(SEEDS, runs, strict=True):
        train_on(data, run, settings_of({**recipe, "seed": seed}))
    report = evaluate_retrieval(workdir / "pool", runs, language="en")
    classified = evaluate_zero_shot(workdir / "pool", runs, workdir / "groups", compares=False)
    accuracy = format_estimate(classified.accuracies["mean_per_class_recall"])
    about = {"English": f"{np.mean(shares):.0%}", "9 classes": accuracy}
    say(f"{budget} {name}: i2t R@10 {report.recalls['i2t']['r@10'].value:.3f}, {about}")
    return Method(group=f"{budget:,}", name=name, about=about, report=report)


def main() -> None:
    """Make the pool, measure every method at every budget, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    workdir = parser.parse_args().workdir
    make_caches(workdir)
    for seed in SEEDS:
        make_cut(workdir, seed)
    data = open_data(workdir / "pool", image=None, text=None, memory_gb=1)
    methods = [measure(workdir, data, name, budget) for budget in BUDGETS for name in METHODS]
    write_comparison(PAGE, methods, title="Selecting from a noisy pool", notes=NOTES)


if __name__ == "__main__":
    main()
