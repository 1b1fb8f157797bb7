"""Audio-visual speech recognition on cached features, on synthetic talking mouths and real recordings: AVSR (ACL 2022).

    python -m pipelines.avsr work/                 # three seeds; about 20 minutes each on 2 cores
    python -m pipelines.avsr work/ --seeds 0
    python -m pipelines.avsr work/ --ablations     # further fusions, with the first seed
    python -m pipelines.avsr work/ --tiny          # a few utterances, to see that everything runs

A recognizer is trained on sound and one on lips, then fusions of both that start from the two complete runs with their
encoders frozen. Sets: A, unseen voices and faces; B, another synthesizer; R, real recordings. Results are kept in the
folder; a second call goes on. All settings were chosen on the sets `valid` and K, without A, B and R.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from embedcache.cli.console import print_table, run_program
from pipelines.avsr.decoding import Decoding
from pipelines.avsr.page import SETS, show_utterances, write_pages
from pipelines.avsr.results import rate_table
from pipelines.avsr.steps import (
    ABLATIONS,
    AUDIO,
    DECODING,
    DEEP,
    FUSION,
    FUSIONS,
    TEST_VIEWS,
    TINY,
    VIDEO,
    Question,
    Runs,
    Size,
    make_caches,
)
from pipelines.parallel import run_parallel
from pipelines.results import Results

GREEDY = Decoding(decoder="ctc")
AS_PUBLISHED = Decoding()
SHOWN = {"A": ("0003", "0011"), "R": ("0007",)}


def main() -> None:
    """Make caches, train both streams and the fusions, recognize the test sets, write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablations", action="store_true", help="further fusions, with the first seed")
    parser.add_argument("--tiny", action="store_true", help="a few utterances, to see that everything runs")
    options = parser.parse_args()

    # One thread per process: the runs of a seed share the cores.
    torch.set_num_threads(1)
    run_all = partial(run_parallel, num_processes=1 if options.tiny else None)  # a new process imports for seconds
    size = TINY if options.tiny else Size()
    seeds = options.seeds[:1] if options.tiny else options.seeds
    sets = ("A", "R") if options.tiny else tuple(SETS)

    caches = make_caches(options.workdir, size, sets)
    for seed in seeds:
        runs = Runs(folder=options.workdir / f"seed{seed}", caches=caches, seed=seed, size=size)
        variants = dict(FUSIONS)
        if options.ablations and seed == seeds[0]:
            variants |= ABLATIONS
        models = (AUDIO, VIDEO, *variants)
        evaluations = {name: [(runs.evaluate, *question) for question in questions(name, sets)] for name in models}

        run_all([(runs.train_audio,), (runs.train_lips,)])

        # The run on lips starts from the readouts of the run on sound, and each fusion from both.
        run_all([(runs.train_video,), *evaluations[AUDIO]])
        run_all([*((runs.train_fusion, *variant) for variant in variants.items()), *evaluations[VIDEO]])
        run_all([step for steps in evaluations.values() for step in steps])

        results = Results.read(options.workdir, seed=seed)
        print_table(*rate_table(results, models, "A"), title=f"seed {seed}, set A, WER in %")

    runs = Runs(folder=options.workdir / f"seed{seeds[0]}", caches=caches, seed=seeds[0], size=size)
    rows = []
    for name in sets:
        keys = ("0001",) if options.tiny else SHOWN.get(name)
        if keys:
            models_shown = {model: runs.path(model) for model in (AUDIO, FUSION)}
            world = options.workdir / "world" / name
            rows += show_utterances(world, caches[name], models_shown, keys, TEST_VIEWS[3], DECODING)

    ablations = list(ABLATIONS) if options.ablations else []
    write_pages(options.workdir, Results.read(options.workdir), sets, ablations, rows=rows)


def questions(name: str, sets: Sequence[str]) -> list[tuple[str, Question]]:
    """Return the questions that are asked of a run, each with the name of the run."""
    if name == DEEP:
        return [(name, Question(model=name, test_set="A", streams=("video",)))]

    test_sets = sets if name in (AUDIO, VIDEO, FUSION) else ("A",)
    items = [Question(model=name, test_set=test_set) for test_set in test_sets]
    if name in (AUDIO, FUSION):
        items.append(Question(model=f"{name}, greedy", test_set="A", decoding=GREEDY))
        items.append(Question(model=f"{name}, λ 0.1", test_set="A", decoding=AS_PUBLISHED))

    # Controls: does the fusion use the lips of the speaker, and what does it lose with each stream?
    if name == FUSION:
        items.append(Question(model=f"{name}, lips of others", test_set="A", is_shuffled=True))
        items.append(Question(model=f"{name}, without video", test_set="A", streams=("audio",)))
        items.append(Question(model=f"{name}, without audio", test_set="A", streams=("video",)))
    return [(name, question) for question in items]


if __name__ == "__main__":
    run_program(main)
