"""One network for every task on cached features, and data that it was never trained on: Uni-Perceiver.

    python -m pipelines.uniperceiver work/                          # three seeds, 1 % of the answers of easy-VQA
    python -m pipelines.uniperceiver work/ --seeds 0
    python -m pipelines.uniperceiver work/ --fractions 0.01 0.05 0.2 1
    python -m pipelines.uniperceiver work/ --ablations              # also each task of pre-training separately
    python -m pipelines.uniperceiver work/ --tiny                   # a few images, to see that everything runs

A network is pre-trained on classes, captions, masked words and descriptions together. It is then tuned on a fraction of
the answers of easy-VQA, of the labels of Fashion-MNIST and of the captions of OpenMoji: by prompts, in all weights, and
by prompts without pre-training. Linear probes and blind answers are compared with it. Recorded letters need a new
adapter, which is then the only part that is trained. Results are kept in the folder; a second call goes on.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from embedcache.cli.console import print_table, run_program
from pipelines.parallel import run_parallel
from pipelines.results import Results
from pipelines.uniperceiver.data import make_data
from pipelines.uniperceiver.images import show_images
from pipelines.uniperceiver.measures import MEASURED, evaluation_steps
from pipelines.uniperceiver.page import novel_table, pretraining_table, title_of, write_pages
from pipelines.uniperceiver.runs import Runs, tuning_steps
from pipelines.uniperceiver.tables import EASY_VQA, LETTERS, TINY, Size


def main() -> None:
    """Make the data, pre-train, tune, measure, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fractions", type=float, nargs="+", help="fractions of the answers; 0.01 without it")
    parser.add_argument(
        "--ablations", action="store_true", help="each task of pre-training separately, for the first seed"
    )
    parser.add_argument("--tiny", action="store_true", help="a few images, to see that everything runs")
    options = parser.parse_args()

    # One thread per process: the runs of all seeds share the cores.
    torch.set_num_threads(1)
    run_all = partial(run_parallel, num_processes=1 if options.tiny else None)  # a new process imports for seconds
    size = TINY if options.tiny else Size()
    seeds = options.seeds[:1] if options.tiny else options.seeds
    fractions = options.fractions or size.fractions

    data = make_data(options.workdir, size.data)
    seed_runs = [Runs(folder=options.workdir / f"seed{seed}", data=data, seed=seed, size=size) for seed in seeds]

    # Several measures can belong to one task.
    tasks = list(dict.fromkeys(measure.task for measure in MEASURED.values())) if options.ablations else []
    pretraining = [(runs.pretrain,) for runs in seed_runs]
    controls = [(runs.train_controls, fractions) for runs in seed_runs]
    ablations = [(seed_runs[0].pretrain_alone, task) for task in tasks]

    # Tuning waits for the pre-trained runs, and evaluation for the tuned ones.
    run_all([*pretraining, *controls, *ablations])
    run_all(tuning_steps(seed_runs, fractions))
    run_all(evaluation_steps(seed_runs, fractions, tasks))

    results = Results.read(options.workdir)
    print_table(*pretraining_table(results, list(MEASURED)), title="tasks of pre-training")

    for name, fraction in [*((EASY_VQA, part) for part in fractions), *size.other_fractions.items(), (LETTERS, 1)]:
        print_table(*novel_table(results, name, fraction), title=title_of(name, fraction))
    write_pages(options.workdir, results, fractions, size.other_fractions, show_images(seed_runs[0], min(fractions)))


if __name__ == "__main__":
    run_program(main)
