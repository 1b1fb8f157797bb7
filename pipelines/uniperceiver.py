"""One likelihood for every task on cached features, and questions that it was never trained on: Uni-Perceiver.

    python -m pipelines.uniperceiver work/                          # three seeds, 1 % of the answers of easy-VQA
    python -m pipelines.uniperceiver work/ --seeds 0
    python -m pipelines.uniperceiver work/ --fractions 0.01 0.05 0.2 1
    python -m pipelines.uniperceiver work/ --tiny                   # a few images, to see that everything runs

A network is pre-trained on classes, captions, masked words and texts together, then tuned on a fraction of the answers
of easy-VQA: by prompts, in all weights, and by prompts without pre-training, beside linear probes and blind answers.
Results are kept in the folder; a second call goes on.
"""

import argparse
from pathlib import Path

import torch

from embedcache.cli.console import print_table
from pipelines.common import run_parallel
from pipelines.perceiver.results import PRETRAINED, Results, answer_table, pretraining_table, write_pages
from pipelines.perceiver.runs import (
    BLIND_ANSWERS,
    MEASURED,
    NEVER,
    PROBES,
    TUNINGS,
    Runs,
    evaluation_steps,
    tuning_steps,
)
from pipelines.perceiver.steps import make_data
from pipelines.perceiver.tasks import CACHES, TINY, Size


def main() -> None:
    """Make the data, pre-train, tune, measure, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fractions", type=float, nargs="+", help="fractions of the answers; 0.01 without it")
    parser.add_argument("--tiny", action="store_true", help="a few images, to see that everything runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size, seeds = (TINY, options.seeds[:1]) if options.tiny else (Size(), options.seeds)
    fractions = options.fractions or size.fractions
    data = make_data(options.workdir, size.data, caches=CACHES)
    every = [Runs(folder=options.workdir / f"seed{seed}", data=data, seed=seed, size=size) for seed in seeds]
    run_parallel([(runs.pretrain, name) for name in (PRETRAINED, NEVER) for runs in every])
    run_parallel(tuning_steps(every, fractions))
    run_parallel(evaluation_steps(every, fractions))
    results, models = Results.read(options.workdir), [*TUNINGS, *PROBES, *BLIND_ANSWERS]
    print_table(*pretraining_table(results, list(MEASURED)), title="tasks of pre-training")
    for fraction in fractions:
        print_table(*answer_table(results, fraction, models), title=f"easy-VQA, {100 * fraction:g} % of the answers")
    write_pages(options.workdir, results, list(MEASURED), models, fractions)


if __name__ == "__main__":
    main()
