"""embedcache train and sweep"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from embedcache.cli.options import (
    Features,
    ImageFeature,
    Json,
    Output,
    TextFeature,
    features_by_modality,
    with_settings,
)
from embedcache.dataset.settings import SplitSettings
from embedcache.errors import SettingError
from embedcache.settings import flat_settings, from_flat
from embedcache.sweep.settings import SweepSettings
from embedcache.train.settings import FitSettings, LikelihoodSettings, TrainSettings, train_settings

if TYPE_CHECKING:
    from embedcache.progress import Progress


@with_settings(
    settings=TrainSettings,
    likelihood=LikelihoodSettings,
    build={"settings": dict, "likelihood": dict},
    config_help="Read options from this TOML file, or from a run's config.json; the command line takes precedence.",
)
def train(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="One or more caches: folders or URLs.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder to write the run to.")],
    task: Annotated[
        Literal["pair", "likelihood"],
        typer.Option(
            metavar="NAME",
            help="What is trained: pair, projectors of two modalities; or likelihood, one network for the tasks of "
            "--task-file.",
        ),
    ] = "pair",
    image_feature: ImageFeature = None,
    text_feature: TextFeature = None,
    feature: Features = None,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: Mapping[str, Any],
    likelihood: Mapping[str, Any],
) -> None:
    """Train projectors, or tasks of one likelihood.

    Projectors align the features of two modalities. Run the same command again to resume an interrupted run. Under
    torchrun, training uses all processes.

    With --task likelihood, one network learns the tasks of a TOML file: classes, answers, captions, retrieval. An epoch
    then has --steps-per-epoch steps, samples are split by key or by column, and batch sizes are those of the tasks;
    options of projectors and their loss do not apply.

    Example: embedcache train cache/ run/ --projector mlp --lr 0.001

    Example: embedcache train cache/ run/ --task likelihood --task-file tasks.toml --words words/
    """
    from embedcache.cli.console import open_progress, print_line, publish, to_plain
    from embedcache.progress import NullProgress
    from embedcache.train.distributed import is_first_process

    named = {"image_feature": image_feature, "text_feature": text_feature, "feature": feature}
    prepare = _prepare_pair if task == "pair" else _prepare_likelihood
    start = prepare(caches, run, named, settings, likelihood)
    is_first = is_first_process()
    report = start(open_progress() if is_first else NullProgress())
    if is_first:

        def show() -> None:
            print_line(report.line(run) if task == "pair" else report.line())

        publish(show, lambda: to_plain(report), as_json=as_json, output=output)


@with_settings(settings=SweepSettings)
def sweep(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE", help="One or more caches: folders or URLs.")],
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="TOML file with the tables fixed and space.")],
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder to write the study to.")],
    image_feature: ImageFeature = None,
    text_feature: TextFeature = None,
    feature: Features = None,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: SweepSettings,
) -> None:
    """Search training settings, and report the best.

    SPACE.toml fixes some settings of train in its table fixed, and gives ranges or choices of others in its table
    space, such as lr = {low = 1e-4, high = 1e-2, log = true}. Run the same command again to resume an interrupted
    study, or with more --trials to extend it.

    Example: embedcache sweep cache/ space.toml study/ --trials 50
    """
    from embedcache.cli.console import open_progress, print_line, print_table, publish
    from embedcache.provenance import read_json
    from embedcache.reports.sweep import best_table, test_tables
    from embedcache.sweep.sweep import sweep as run

    report = run(
        caches,
        study,
        space,
        image_feature=image_feature,
        text_feature=text_feature,
        feature=features_by_modality(feature),
        settings=settings,
        progress=open_progress(),
    )

    def show() -> None:
        print_table(*best_table(report.best), title="Best on validation, each trained with several seeds")
        for cache, table in test_tables(report.best).items():
            print_table(*table, title=f"{cache}: held-out retrieval [95% interval]")
        if report.findings.warning:
            print_line(f"WARNING: {report.findings.warning}")
        print_line(f"best run: {report.findings.winner.run_paths[0]}")
        print_line(f"to train it again: {report.findings.command}")
        print_line(f"results: {report.json_path}")
        print_line(f"open {report.page_path} in a browser")

    publish(show, lambda: read_json(report.json_path), as_json=as_json, output=output)


def _prepare_pair(
    caches: list[str], run: Path, named: Mapping[str, Any], settings: Mapping[str, Any], likelihood: Mapping[str, Any]
) -> "Callable[[Progress], Any]":
    from embedcache.train.train import train as run_training

    _refuse(likelihood, "pair")
    features = features_by_modality(named["feature"])
    checked = train_settings(settings)
    return lambda progress: run_training(
        caches,
        run,
        image_feature=named["image_feature"],
        text_feature=named["text_feature"],
        feature=features,
        settings=checked,
        progress=progress,
    )


def _prepare_likelihood(
    caches: list[str], run: Path, named: Mapping[str, Any], settings: Mapping[str, Any], likelihood: Mapping[str, Any]
) -> "Callable[[Progress], Any]":
    from embedcache.likelihood.runs import train_tasks

    kinds = (FitSettings, SplitSettings)
    fit, split = (
        {item.name: settings[item.name] for item in flat_settings(kind) if item.name in settings} for kind in kinds
    )
    _refuse({name: value for name, value in settings.items() if name not in {**fit, **split}}, "likelihood")
    _refuse({name: value for name, value in named.items() if value is not None}, "likelihood")
    if len(caches) > 1:
        raise SettingError(
            f"expected one CACHE with --task likelihood, got {', '.join(caches)}; name others in the task file"
        )
    checked = from_flat(LikelihoodSettings, likelihood), from_flat(FitSettings, fit)
    split_settings = _split_settings(split)
    return lambda progress: train_tasks(caches[0], run, *checked, split=split_settings, progress=progress)


def _split_settings(given: Mapping[str, Any]) -> SplitSettings | None:
    """Return how samples are split; None if no option says it."""
    if not given:
        return None
    settings = from_flat(SplitSettings, {"split": "key", **given})
    if settings.kind == "strict":
        raise SettingError(
            "split: expected key, column or a file with --task likelihood, got strict, which compares pairs of features"
        )
    return settings


def _refuse(given: Mapping[str, Any], task: str) -> None:
    """Raise a `SettingError` for options that a task does not have."""
    for name, value in given.items():
        raise SettingError(f"{name}: expected none with --task {task}, got {value}; omit it, or choose another --task")
