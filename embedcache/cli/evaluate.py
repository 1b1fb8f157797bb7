"""embedcache evaluate"""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedcache.cli.commands import add_command, new_group
from embedcache.cli.options import (
    CacheArgument,
    Features,
    Html,
    Json,
    Output,
    ReportOptions,
    check_new_file,
    output_option,
    with_settings,
)
from embedcache.errors import PathError
from embedcache.evaluate.settings import (
    PairsSettings,
    ProbeSettings,
    RetrievalSettings,
    ZeroShotSettings,
    pairs_settings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

app = new_group("Measure runs and features.")

Runs = Annotated[list[Path], typer.Argument(metavar="RUN", help="Runs; those that differ in seed only are averaged.")]
ControlRuns = Annotated[
    list[Path] | None,
    typer.Option(metavar="RUN", help="Run trained with --shuffle-pairs, as a control. May be repeated."),
]


def check_new_results(context: typer.Context, option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Check an output that is a `.json` file or a folder; the command checks the files in it, which it names."""
    if path is None or path.suffix == ".json":
        return check_new_file(context, path)
    if os.path.lexists(path) and not path.is_dir():
        raise PathError(f"{option.opts[0]}: expected a .json file or a folder, got the file {path}; name another")
    return path


Results = Annotated[Path | None, output_option(check_new_results)]


@with_settings(settings=RetrievalSettings, output=Results)
def retrieval(
    cache: CacheArgument,
    run: Runs,
    control_run: ControlRuns = None,
    *,
    settings: RetrievalSettings,
    outputs: ReportOptions,
) -> None:
    """Measure retrieval, such as of images and texts.

    Recalls in both directions have confidence intervals and the chance level beside them, for each language that is
    named. A JSON report has the format of CLIP_benchmark; --output may name a folder for one file per recipe.

    Example: embedcache evaluate retrieval cache/ run/ --part test --html page.html
    """
    from embedcache.cli.console import open_progress, print_table
    from embedcache.evaluate.retrieval import compare_retrieval
    from embedcache.reports.results import retrieval_result
    from embedcache.reports.retrieval import rank_table, retrieval_table, width_table, write_retrieval_page
    from embedcache.store.cache import Cache

    files = _name_files(outputs, "zeroshot_retrieval", cache, run, control_run, settings.language)
    first = _First(is_kept=outputs.html is not None)
    reports = compare_retrieval(
        cache, run, settings, control_run=control_run or [], progress=open_progress(), on_ranking=first.receive
    )
    results = {name: retrieval_result(report, cache=cache, runs=report.run_paths) for name, report in reports.items()}

    def show() -> None:
        _show_lines(reports)
        print_table(*retrieval_table(reports))
        print_table(*rank_table(reports))
        if any(report.by_width for report in reports.values()):
            print_table(*width_table(reports), title="recall by width")

    def write_page(path: Path) -> None:
        write_retrieval_page(path, Cache(cache), reports, first.value)

    _publish_results(outputs, show, results, files, write_page)


@with_settings(settings=ZeroShotSettings, output=Results)
def zero_shot(
    cache: CacheArgument,
    run: Runs,
    prompts: Annotated[str, typer.Option(metavar="CACHE", help="Cache of prompts, written by extract prompts:FILE.")],
    control_run: ControlRuns = None,
    *,
    settings: ZeroShotSettings,
    outputs: ReportOptions,
) -> None:
    """Classify items by their similarity to prompts.

    Items are of the modality that the run pairs with texts, such as images. Accuracies have confidence intervals and
    the chance level beside them. A JSON report has the format of CLIP_benchmark; --output may name a folder for one
    file per recipe.

    Example: embedcache evaluate zero-shot labeled/ run/ --prompts prompts/
    """
    from embedcache.cli.console import open_progress, print_table
    from embedcache.evaluate.zero_shot import compare_zero_shot
    from embedcache.reports.results import zero_shot_result
    from embedcache.reports.zero_shot import write_zero_shot_page, zero_shot_table
    from embedcache.store.cache import Cache

    files = _name_files(outputs, "zeroshot_classification", cache, run, control_run)
    first = _First(is_kept=outputs.html is not None)
    reports = compare_zero_shot(
        cache,
        run,
        prompts,
        settings,
        control_run=control_run or [],
        progress=open_progress(),
        on_predictions=first.receive,
    )
    results = {
        name: zero_shot_result(report, cache=cache, prompts=prompts, runs=report.run_paths)
        for name, report in reports.items()
    }

    def show() -> None:
        _show_lines(reports)
        print_table(*zero_shot_table(reports))

    def write_page(path: Path) -> None:
        write_zero_shot_page(path, Cache(cache), reports, first.value)

    _publish_results(outputs, show, results, files, write_page)


class _First:
    """Keeps the first of the values that it receives, which a page shows: that of the first run."""

    def __init__(self, *, is_kept: bool) -> None:
        self._is_kept = is_kept
        self.value: Any = None

    def receive(self, value: Any) -> None:
        if self._is_kept and self.value is None:
            self.value = value


def _show_lines(reports: "Mapping[str, Any]") -> None:
    from embedcache.cli.console import print_line

    for name, report in reports.items():
        print_line(f"{name}: {replace(report, overlap=None).line()}")
        if report.overlap:
            print_line(f"  {'WARNING: ' if report.warning else ''}{report.overlap.line()}")


def _name_files(
    outputs: ReportOptions,
    task: str,
    cache: str,
    run: "Sequence[Path]",
    control_run: "Sequence[Path] | None",
    languages: "Sequence[str]" = (),
) -> "Sequence[Path]":
    """Return the files that results go to, which are checked before the work; none without `--output`."""
    from embedcache.evaluate.runs import iterate_recipes
    from embedcache.outputs import check_output
    from embedcache.reports.results import result_files

    if outputs.output is None:
        return ()
    recipes = [recipe.run_paths for recipe in iterate_recipes(run, control_run or ())]
    files = result_files(outputs.output, task, cache, recipes, languages)
    for path in files:
        check_output(path)
    return files


def _publish_results(
    outputs: ReportOptions, show: Any, results: "Mapping[str, Any]", files: "Sequence[Path]", write_page: Any
) -> None:
    """Publish reports of one JSON object per run, which may go to one file each."""
    from embedcache.reports.results import write_results

    def record() -> Any:
        return next(iter(results.values())) if len(results) == 1 else list(results.values())

    outputs.publish(show, record, write_page, write_output=lambda _: write_results(files, results))


@with_settings(settings=ProbeSettings)
def probe(
    cache: CacheArgument,
    as_json: Json = False,
    output: Output = None,
    html: Html = None,
    *,
    settings: ProbeSettings,
) -> None:
    """Train classifiers on a frozen feature.

    These are nearest neighbors and linear probes, also on few examples per class, with the chance level. A JSON report
    has the format of CLIP_benchmark.

    Example: embedcache evaluate probe labeled/ --feature resnet18/pooled --shots 1,2,4,8
    """
    from embedcache.cli.console import open_progress, print_lines, print_table, publish
    from embedcache.evaluate.probe import evaluate_probe
    from embedcache.reports.probe import few_shot_table, probe_json, probe_table, write_probe_page

    report = evaluate_probe(cache, settings, progress=open_progress())

    def show() -> None:
        print_lines([report.line(), *report.warnings()])
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


@with_settings(
    settings=PairsSettings, build={"settings": pairs_settings}, skip=("resamples", "test_fraction", "max_test")
)
def pairs(
    cache: CacheArgument,
    feature: Features = None,
    as_json: Json = False,
    output: Output = None,
    html: Html = None,
    *,
    settings: PairsSettings,
) -> None:
    """Compare encoder pairs before any training.

    Print CKA, mutual kNN and a closed-form probe of every pair of features of two modalities, such as images and texts.

    Example: embedcache evaluate pairs cache/ --html pairs.html
    """
    from embedcache.cli.console import open_progress, print_line, print_table, publish
    from embedcache.evaluate.encoder_pairs import evaluate_pairs
    from embedcache.reports.encoder_pairs import encoder_pairs_json, encoder_pairs_table, write_encoder_pairs_page

    report = evaluate_pairs(cache, settings, feature=feature, progress=open_progress())

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


add_command(app, "retrieval", retrieval, reads_items=True)
add_command(app, "zero-shot", zero_shot, reads_items=True)
add_command(app, "probe", probe, plugins=("methods",))
add_command(app, "pairs", pairs)
