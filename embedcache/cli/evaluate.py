"""embedcache evaluate"""

from pathlib import Path
from typing import Annotated, Any

import typer

from embedcache.cli.commands import CacheArgument, Features, command, new_group
from embedcache.evaluate.settings import (
    AdapterEvalSettings,
    PairsSettings,
    ProbeSettings,
    RetrievalSettings,
    ZeroShotSettings,
    pairs_settings,
    probe_settings,
)

app = new_group("Measure runs and features.")

Runs = Annotated[list[Path], typer.Argument(metavar="RUN", help="Runs. Runs that differ only in seed are averaged.")]
ControlRuns = Annotated[
    list[Path] | None,
    typer.Option(metavar="RUN", help="Run trained with --shuffle-pairs, as a control. May be repeated."),
]


@command(app, "retrieval", settings=RetrievalSettings, has_page=True, reads_items=True)
def retrieval(cache: CacheArgument, run: Runs, control_run: ControlRuns = None, *, settings: RetrievalSettings) -> Any:
    """Measure retrieval, such as of images and texts.

    Report recalls in both directions with confidence intervals and the chance level, for each language that is named. A
    JSON report has the format of CLIP_benchmark; several recipes or languages are a list.

    Example: embedcache evaluate retrieval cache/ run/ --part test --html page.html
    """
    from embedcache.cli.console import open_progress
    from embedcache.evaluate.retrieval import compare_retrieval
    from embedcache.reports.retrieval import present_retrieval

    reports = compare_retrieval(cache, run, settings, control_run=control_run or [], progress=open_progress())
    return present_retrieval(reports, cache, settings)


@command(app, "zero-shot", settings=ZeroShotSettings, has_page=True, reads_items=True)
def zero_shot(
    cache: CacheArgument,
    run: Runs,
    prompts: Annotated[
        str, typer.Option(metavar="CACHE|FILE", help="A .txt with one class name per line, or a cache of prompts.")
    ],
    control_run: ControlRuns = None,
    *,
    settings: ZeroShotSettings,
) -> Any:
    """Classify items by their similarity to prompts.

    Items are of the modality that the run pairs with texts, such as images. Report accuracies with confidence
    intervals and the chance level. A JSON report has the format of CLIP_benchmark; several recipes are a list.

    Example: embedcache evaluate zero-shot labeled/ run/ --prompts names.txt
    """
    from embedcache.cli.console import open_progress
    from embedcache.evaluate.zero_shot import compare_zero_shot
    from embedcache.reports.zero_shot import present_zero_shot

    reports = compare_zero_shot(cache, run, prompts, settings, control_run=control_run or [], progress=open_progress())
    return present_zero_shot(reports, cache, settings)


@command(app, "adapter", settings=AdapterEvalSettings, has_page=True)
def adapter(
    cache: CacheArgument,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter of a feature, written by adapt.")],
    control_run: Annotated[
        Path | None, typer.Option(metavar="ADAPTER", help="Adapter fitted with --shuffle-pairs, as a control.")
    ] = None,
    *,
    settings: AdapterEvalSettings,
) -> Any:
    """Measure how much of a new encoder's search an adapter keeps.

    Held-out items search the old encoder's vectors through the adapter. Their neighbors are compared with those among
    the new encoder's own vectors, as if everything had been encoded again.

    Example: embedcache evaluate adapter cache/ adapter/ --control-run shuffled/
    """
    from embedcache.cli.console import open_progress
    from embedcache.evaluate.adapter import evaluate_adapter
    from embedcache.reports.adapter import present_adapter

    return present_adapter(evaluate_adapter(cache, adapter, settings, control=control_run, progress=open_progress()))


@command(app, "probe", settings=ProbeSettings, build={"settings": probe_settings}, has_page=True, plugins=("methods",))
def probe(cache: CacheArgument, *, settings: ProbeSettings) -> Any:
    """Train classifiers on a frozen feature.

    These are nearest neighbors and linear probes, also on few examples per class, with the chance level. The column
    split of the cache decides the parts, unless --split is given. A JSON report has the format of CLIP_benchmark.

    Example: embedcache evaluate probe labeled/ --feature resnet18/pooled --shots 1,2,4,8
    """
    from embedcache.cli.console import open_progress
    from embedcache.evaluate.probe import evaluate_probe
    from embedcache.reports.probe import present_probe

    return present_probe(evaluate_probe(cache, settings, progress=open_progress()), Path(cache).name)


@command(
    app,
    "pairs",
    settings=PairsSettings,
    build={"settings": pairs_settings},
    skip=("test_fraction", "max_test"),
    has_page=True,
)
def pairs(cache: CacheArgument, feature: Features = None, *, settings: PairsSettings) -> Any:
    """Compare encoder pairs before any training.

    Print CKA, mutual kNN and a closed-form probe of every pair of features of two modalities, such as images and texts.

    Example: embedcache evaluate pairs cache/ --html pairs.html
    """
    from embedcache.cli.console import open_progress
    from embedcache.evaluate.encoder_pairs import evaluate_pairs
    from embedcache.reports.encoder_pairs import present_encoder_pairs

    return present_encoder_pairs(evaluate_pairs(cache, settings, feature=feature, progress=open_progress()))
