"""Commands of `embedcache curate` that choose samples or score them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from embedcache.cli.options import (
    SCORES_OUT,
    CacheArgument,
    Features,
    Json,
    Output,
    ReportOptions,
    SelectionArgument,
    SelectionOutput,
    check_new_file,
    output_argument,
    with_settings,
)
from embedcache.curate.select.settings import SelectSettings
from embedcache.curate.settings import (
    NegativesSettings,
    OutlierSettings,
    ScoreSettings,
)
from embedcache.dataset.settings import SELECTION_FORMAT


@with_settings(settings=SelectSettings)
def select(
    cache: CacheArgument,
    out: SelectionOutput,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Method: random, top-score, clip-score, rare-first (the paper's), metaclip, image-based (DataComp's), "
            "hierarchical, k-center, score (of a table), or module:attribute.",
        ),
    ],
    *,
    settings: SelectSettings,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Select samples to train on, with a reason for each.

    Example: embedcache curate select cache/ selection.parquet --method clip-score --run run/ --budget 25%
    """
    from embedcache.cli.console import open_progress, print_line, publish, to_plain
    from embedcache.curate.select.select import select as run_select

    report = run_select(cache, out, method, settings, progress=open_progress())
    publish(lambda: print_line(report.line()), lambda: to_plain(report), as_json=as_json, output=output)


def combine(
    cache: CacheArgument,
    first: Annotated[Path, typer.Argument(metavar="FIRST", help=f"Selection: {SELECTION_FORMAT}.")],
    operation: Annotated[
        Literal["and", "minus"],
        typer.Argument(metavar="and|minus", help="Keep the samples in both, or those not in the second."),
    ],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Second selection.")],
    out: SelectionOutput,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Intersect two selections, or subtract one from another.

    Example: embedcache curate combine cache/ first.parquet and second.parquet both.parquet
    """
    from embedcache.cli.console import open_progress, publish_size
    from embedcache.curate.select.select import combine_selections

    num_samples = combine_selections(cache, out, first, operation, second, progress=open_progress())
    publish_size(out, num_samples, as_json=as_json, output=output)


def _check_export(context: typer.Context, option: typer.CallbackParam, path: Path) -> Path | None:
    """Check an output as `check_new_file` does; a folder is checked by the format, which is not known yet."""
    return path if path.is_dir() else check_new_file(context, option, path)


def export(
    cache: CacheArgument,
    selection: SelectionArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="New file; for webdataset a new folder.", callback=_check_export),
    ],
    form: Annotated[
        Literal["datacomp", "keys", "webdataset"],
        typer.Option(
            "--format",
            metavar="datacomp|keys|webdataset",
            help="DataComp's uids (.npy), one key per line, or tars with the samples.",
        ),
    ] = "keys",
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Write a selection for other tools.

    Example: embedcache curate export cache/ selection.parquet tars/ --format webdataset
    """
    from embedcache.cli.console import open_progress, publish_size
    from embedcache.curate.select.export import export_selection

    num_samples = export_selection(cache, selection, out, form, progress=open_progress())
    publish_size(out, num_samples, as_json=as_json, output=output)


@with_settings(settings=NegativesSettings)
def negatives(
    cache: CacheArgument,
    out: Annotated[Path, output_argument("Table of hard negatives: a new .parquet file.")],
    feature: Features = None,
    *,
    settings: NegativesSettings,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Find hard negatives of each sample.

    These are the nearest samples that do not belong to it; its copies and near-duplicates are left out. Train with
    them by train --negatives OUT.

    Example: embedcache curate negatives cache/ negatives.parquet --run run/ --relative-margin 0.05
    """
    from embedcache.cli.console import open_progress, print_line, publish
    from embedcache.curate.negatives import mine_negatives

    report = mine_negatives(
        cache,
        out,
        settings,
        feature=feature,
        progress=open_progress(),
    )
    publish(lambda: print_line(f"{out}: {report.line()}"), report.to_json, as_json=as_json, output=output)


@with_settings(settings=OutlierSettings)
def outliers(
    cache: CacheArgument,
    out: Annotated[Path | None, SCORES_OUT] = None,
    *,
    settings: OutlierSettings,
    outputs: ReportOptions,
) -> None:
    """Find odd samples, likely mislabels and wrong captions.

    Each item is compared with its nearest neighbors, and with --run also with the other item of its pair, as an image
    with its caption. OUT is a table of scores for curate select --method score.

    Example: embedcache curate outliers cache/ odd.parquet --html odd.html
    """
    from embedcache.cli.console import open_progress, print_line, print_lines, print_table
    from embedcache.curate.outliers import find_outliers
    from embedcache.reports.scores import outlier_line, outlier_notes, threshold_table, write_outlier_page

    report = find_outliers(cache, out, settings, progress=open_progress())

    def show() -> None:
        print_lines([outlier_line(report), *outlier_notes(report)])
        print_table(*threshold_table(report))
        if out is not None:
            print_line(f"wrote {out}: {', '.join(report.scores)} of {report.num_samples:,} samples")

    outputs.publish(
        show,
        report.to_json,
        lambda path: write_outlier_page(path, report),
    )


@with_settings(settings=ScoreSettings)
def score(
    cache: CacheArgument,
    out: Annotated[Path, SCORES_OUT],
    *,
    settings: ScoreSettings,
    outputs: ReportOptions,
) -> None:
    """Score the samples by a linear head or by texts.

    A head is, for example, LAION's aesthetic predictor on CLIP vectors. OUT is a table of scores for curate select
    --method score.

    Example: embedcache curate score cache/ sharp.parquet --run run/ --prompt "a sharp photo" --negative "a blur"
    """
    from embedcache.cli.console import open_progress, print_line, print_table
    from embedcache.curate.score import score as score_samples
    from embedcache.reports.scores import score_table, write_score_page

    report = score_samples(cache, out, settings, progress=open_progress())

    def show() -> None:
        print_line(report.line())
        print_table(*score_table(report))

    outputs.publish(
        show,
        report.to_json,
        lambda path: write_score_page(path, report),
    )
