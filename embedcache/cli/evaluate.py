"""embedcache evaluate"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from embedcache.cli.options import (
    CacheArgument,
    Feature,
    Html,
    Json,
    Label,
    Languages,
    Modality,
    Output,
    RunArgument,
    Seed,
    add_command,
    new_group,
    split_names,
)
from embedcache.dataset.settings import SplitSettings
from embedcache.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping

app = new_group("Measure runs and features.")

Runs = Annotated[list[Path], typer.Argument(metavar="RUN", help="Runs; those that differ in seed only are averaged.")]
Part = Annotated[
    Literal["train", "val", "test", "all"] | None,
    typer.Option(
        metavar="train|val|test|all",
        help="Part of the run's split, or of the column split, to read.",
        show_default="test, or all without a split",
    ),
]
ControlRuns = Annotated[
    list[Path] | None,
    typer.Option(metavar="RUN", help="Run trained with --shuffle-pairs, as a control. May be repeated."),
]
TrainedOn = Annotated[
    list[str] | None,
    typer.Option(metavar="CACHE", help="Where a training cache is now, if it has moved. May be repeated."),
]
NoOverlapCheck = Annotated[
    bool, typer.Option("--no-overlap-check", metavar="", help="Skip the check for overlap with the training data.")
]


def retrieval(
    cache: CacheArgument,
    run: Runs,
    part: Part = None,
    language: Languages = None,
    control_run: ControlRuns = None,
    trained_on: TrainedOn = None,
    no_overlap_check: NoOverlapCheck = False,
    as_json: Json = False,
    output: Output = None,
    html: Html = None,
) -> None:
    """Measure image-text retrieval in both directions.

    With confidence intervals and the chance level, for each language that is named. A JSON report has the format of
    CLIP_benchmark; --output may name a folder for one file per run.

    Example: embedcache evaluate retrieval cache/ run/ --part test --html page.html
    """
    from embedcache.cli.console import print_table
    from embedcache.evaluate.retrieval import evaluate_retrieval, rank
    from embedcache.evaluate.runs import load_runs, named_recipes
    from embedcache.reports.results import retrieval_result
    from embedcache.reports.retrieval import rank_table, retrieval_table, write_retrieval_page
    from embedcache.store.cache import Cache

    reports, results = {}, {}
    for name, paths, is_control in named_recipes(run, control_run or []):
        for code in language or [""]:
            title = f"{name}, {code}" if code else name
            reports[title] = evaluate_retrieval(
                cache,
                paths,
                part=part,
                language=code or None,
                is_control=is_control,
                trained_on=trained_on or [],
                compares=not no_overlap_check,
            )
            results[title] = retrieval_result(reports[title], cache=cache, runs=paths)

    def show() -> None:
        _show_lines(reports)
        print_table(*retrieval_table(reports))
        print_table(*rank_table(reports))

    def write_page(path: Path) -> None:
        opened = Cache(cache)
        ranking = rank(opened, load_runs(run[:1])[0], part=part, language=language[0] if language else None)
        write_retrieval_page(path, opened, reports, ranking)

    _publish_results(show, results, as_json=as_json, output=output, html=html, write_page=write_page)


def zero_shot(
    cache: CacheArgument,
    run: Runs,
    prompts: Annotated[str, typer.Option(metavar="CACHE", help="Cache of prompts, written by extract prompts:FILE.")],
    label: Label = "label",
    part: Part = None,
    control_run: ControlRuns = None,
    trained_on: TrainedOn = None,
    no_overlap_check: NoOverlapCheck = False,
    as_json: Json = False,
    output: Output = None,
    html: Html = None,
) -> None:
    """Classify images by their similarity to prompts.

    With confidence intervals and the chance level. A JSON report has the format of CLIP_benchmark; --output may name a
    folder for one file per run.

    Example: embedcache evaluate zero-shot labeled/ run/ --prompts prompts/
    """
    from embedcache.cli.console import print_table
    from embedcache.evaluate.runs import load_runs, named_recipes
    from embedcache.evaluate.zero_shot import classify, evaluate_zero_shot
    from embedcache.reports.results import zero_shot_result
    from embedcache.reports.zero_shot import write_zero_shot_page, zero_shot_table
    from embedcache.store.cache import Cache

    reports, results = {}, {}
    for name, paths, is_control in named_recipes(run, control_run or []):
        reports[name] = evaluate_zero_shot(
            cache,
            paths,
            prompts,
            label=label,
            part=part,
            is_control=is_control,
            trained_on=trained_on or [],
            compares=not no_overlap_check,
        )
        results[name] = zero_shot_result(reports[name], cache=cache, prompts=prompts, runs=paths)

    def show() -> None:
        _show_lines(reports)
        print_table(*zero_shot_table(reports))

    def write_page(path: Path) -> None:
        opened = Cache(cache)
        shown = classify(opened, load_runs(run[:1])[0], Cache(prompts), label=label, part=part)
        write_zero_shot_page(path, opened, reports, shown)

    _publish_results(show, results, as_json=as_json, output=output, html=html, write_page=write_page)


def _show_lines(reports: "Mapping[str, Any]") -> None:
    from embedcache.cli.console import print_line

    for name, report in reports.items():
        print_line(f"{name}: {report.line()}")
        if report.overlap:
            print_line(f"  {report.overlap.line()}")


def _publish_results(
    show: Any, results: "Mapping[str, Any]", *, as_json: bool, output: Path | None, html: Path | None, write_page: Any
) -> None:
    """Publish reports of one JSON object per run, which may go to one file each."""
    from embedcache.cli.console import publish
    from embedcache.reports.results import write_results

    def record() -> Any:
        return next(iter(results.values())) if len(results) == 1 else list(results.values())

    publish(
        show,
        record,
        as_json=as_json,
        output=output,
        write_output=lambda path: write_results(path, results),
        html=html,
        write_page=write_page,
    )


def probe(
    cache: CacheArgument,
    modality: Modality = "image",
    feature: Feature = None,
    label: Label = "label",
    classifier: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Classifier: knn, logistic or ridge. May be repeated.", show_default="all three"
        ),
    ] = None,
    part: Annotated[
        Literal["test", "val"], typer.Option(metavar="test|val", help="Part of the column split to measure on.")
    ] = "test",
    shots: Annotated[
        list[str] | None,
        typer.Option(metavar="N,...", help="Training items per class, such as 1,2,4,8,16, for a few-shot curve."),
    ] = None,
    draws: Annotated[
        int, typer.Option(metavar="N", help="Random draws of those items, or shuffles of the control, to average.")
    ] = 5,
    control: Annotated[
        bool, typer.Option("--control", metavar="", help="Also fit on shuffled labels, as a control.")
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
    output: Output = None,
    html: Html = None,
) -> None:
    """Train classifiers on a frozen feature.

    Nearest neighbors, linear probes and few-shot curves, with the chance level. A JSON report has the format of
    CLIP_benchmark.

    Example: embedcache evaluate probe labeled/ --feature resnet18/pooled --shots 1,2,4,8
    """
    from embedcache.cli.console import open_progress, print_line, print_table, publish
    from embedcache.evaluate.classifiers import METHODS
    from embedcache.evaluate.probe import ProbeSettings, evaluate_probe
    from embedcache.reports.probe import few_shot_table, probe_json, probe_table, write_probe_page

    settings = ProbeSettings(
        methods=tuple(classifier or METHODS.paths),
        label=label,
        part=part,
        shots=_whole_numbers(shots),
        num_draws=draws,
        has_control=control,
        seed=seed,
    )
    features = {modality: feature}
    report = evaluate_probe(
        cache,
        image=features.get("image"),
        text=features.get("text"),
        settings=settings,
        progress=open_progress(),
    )

    def show() -> None:
        for line in (report.line(), *report.warnings()):
            print_line(line)
        print_table(*probe_table(report))
        if report.few_shots:
            print_table(*few_shot_table(report))

    publish(
        show,
        lambda: probe_json(report, Path(cache).name),
        as_json=as_json,
        output=output,
        html=html,
        write_page=lambda path: write_probe_page(path, report),
    )


def _whole_numbers(values: list[str] | None) -> tuple[int, ...]:
    words = split_names(values)
    for word in words:
        if not word.isdecimal():
            raise SettingError(f"--shots: expected whole numbers such as 1,2,4,8,16, got {word!r}")
    return tuple(dict.fromkeys(map(int, words)))


def pairs(
    cache: CacheArgument,
    image_feature: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Image feature, as encoder/feature. May be repeated.", show_default="all complete ones"
        ),
    ] = None,
    text_feature: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Text feature, as encoder/feature. May be repeated.", show_default="all complete ones"
        ),
    ] = None,
    language: Annotated[str | None, typer.Option(metavar="CODE", help="Use only captions of this language.")] = None,
    num_samples: Annotated[int, typer.Option(metavar="N", help="Draw at most this many samples.")] = 5000,
    k: Annotated[int, typer.Option("-k", metavar="N", help="Neighbors of mutual kNN.")] = 10,
    seed: Seed = 0,
    split: Annotated[
        str,
        typer.Option(metavar="strict|key|column|FILE", help="How to split: strict, key, column or a split.parquet."),
    ] = SplitSettings.kind,
    val_fraction: Annotated[
        float, typer.Option(metavar="FLOAT", help="Fraction of the samples for validation.")
    ] = 0.25,
    image_cosine: Annotated[
        float,
        typer.Option(metavar="FLOAT", help="Strict split: images above this cosine similarity are near-duplicates."),
    ] = SplitSettings.image_cosine,
    text_cosine: Annotated[
        float,
        typer.Option(metavar="FLOAT", help="Strict split: captions above this cosine similarity are near-duplicates."),
    ] = SplitSettings.text_cosine,
    as_json: Json = False,
    output: Output = None,
    html: Html = None,
) -> None:
    """Compare encoder pairs before any training.

    CKA, mutual kNN and a closed-form probe of every pair of an image and a text feature.

    Example: embedcache evaluate pairs cache/ --html pairs.html
    """
    from embedcache.cli.console import open_progress, print_line, print_table, publish
    from embedcache.evaluate.encoder_pairs import evaluate_pairs
    from embedcache.reports.encoder_pairs import encoder_pairs_json, encoder_pairs_table, write_encoder_pairs_page

    settings = SplitSettings(
        kind=split, val_fraction=val_fraction, image_cosine=image_cosine, text_cosine=text_cosine, seed=seed
    )
    report = evaluate_pairs(
        cache,
        images=image_feature,
        texts=text_feature,
        language=language,
        num_samples=num_samples,
        k=k,
        seed=seed,
        split=settings,
        progress=open_progress(),
    )

    def show() -> None:
        print_line(report.line())
        print_table(*encoder_pairs_table(report))

    publish(
        show,
        lambda: {"pairs": encoder_pairs_json(report)},
        as_json=as_json,
        output=output,
        html=html,
        write_page=lambda path: write_encoder_pairs_page(path, report),
    )


def clip_benchmark(context: typer.Context, run: RunArgument) -> None:
    """Evaluate a run with CLIP_benchmark.

    Its own code, datasets and options: everything after the run is passed on to it; `clip_benchmark eval --help` lists
    its options.

    Example: embedcache evaluate clip-benchmark run/ --dataset cifar10 --dataset_root data/
    """
    from embedcache.interop.clip_benchmark import evaluate

    evaluate(run, context.args)


add_command(app, "retrieval", retrieval)
add_command(app, "zero-shot", zero_shot)
add_command(app, "probe", probe)
add_command(app, "pairs", pairs)
add_command(
    app,
    "clip-benchmark",
    clip_benchmark,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
