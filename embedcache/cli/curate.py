"""embedcache curate"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from embedcache.cli.commands import add_command, new_group
from embedcache.cli.options import (
    SCORES_OUT,
    CacheArgument,
    Features,
    IndexArgument,
    Json,
    Output,
    ReportOptions,
    SelectionArgument,
    SelectionOutput,
    check_new_file,
    output_argument,
    with_settings,
)
from embedcache.curate.settings import (
    CoverageSettings,
    DedupSettings,
    LeakSettings,
    MapSettings,
    NegativesSettings,
    OutlierSettings,
    ScoreSettings,
    SelectSettings,
)
from embedcache.dataset.settings import SELECTION_FORMAT
from embedcache.errors import pluralize
from embedcache.modalities import count_items, noun
from embedcache.search.settings import IndexSettings
from embedcache.units import format_bytes

if TYPE_CHECKING:
    from embedcache.curate.coverage import CoverageReport

app = new_group("Index a cache, measure coverage and select samples.")


@with_settings(settings=IndexSettings, skip=("checkpoint_s",))
def index(
    cache: CacheArgument,
    out: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder to write the index to.")],
    *,
    settings: IndexSettings,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Build a FAISS index and measure its recall.

    Run the same command again to resume an interrupted build, or to add new items.

    Example: embedcache curate index cache/ index/ --run run/ --memory 4GB
    """
    from embedcache.cli.console import open_progress, print_line, publish
    from embedcache.search.card import read_card
    from embedcache.search.index import build_index

    before = read_card(out) if (out / "card.json").is_file() else None
    card = build_index(cache, out, settings, progress=open_progress())

    def show() -> None:
        where = " on disk" if card.lists else ""
        size = f"{format_bytes(card.file_bytes)}{where}, "
        print_line(
            f"{out}: {count_items(card.num_vectors, card.modality)} of {card.feature}, {card.factory}, {size}"
            f"recall@10 {card.recall_at_10:.3f} against exact search on {card.num_queries:,} queries, "
            f"{card.latency_ms:.2f} ms per query"
        )
        if before is not None and before != card:
            print_line(
                f"before: {count_items(before.num_vectors, card.modality)}, recall@10 {before.recall_at_10:.3f}; "
                "not trained again"
            )

    publish(show, lambda: card.to_json(), as_json=as_json, output=output)


@with_settings(settings=MapSettings)
def map_index(
    index: IndexArgument,
    *,
    settings: MapSettings,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Compute the map of an index that serve shows.

    The map is stored in the folder of the index. Without one, serve computes one with PCA when it starts.

    Example: embedcache curate map index/ --projection umap
    """

    from embedcache.cli.console import open_progress, print_line, print_table, publish
    from embedcache.curate.map import FILE, build_map

    computed = build_map(index, settings, progress=open_progress())

    def show() -> None:
        rows = [[cluster.name, f"{cluster.size:,}", cluster.question] for cluster in computed.clusters]
        print_table(["cluster", "items", "caption"], rows)
        print_line(f"wrote {index / FILE}: {pluralize(len(computed.rows), 'item')} by {computed.projection}")

    def to_json() -> dict[str, Any]:
        clusters = [asdict(cluster) for cluster in computed.clusters]
        return {"projection": computed.projection, "num_items": len(computed.rows), "clusters": clusters}

    publish(show, to_json, as_json=as_json, output=output)


@with_settings(settings=CoverageSettings)
def coverage(
    cache: CacheArgument,
    concepts: Annotated[str, typer.Argument(metavar="CONCEPTS", help="Cache of prompts, or of labeled examples.")],
    *,
    settings: CoverageSettings,
    outputs: ReportOptions,
) -> None:
    """Estimate how many items of a cache show each concept.

    Each estimate has a 95% interval; the largest and smallest concepts and the gaps are listed.

    Example: embedcache curate coverage cache/ concepts/ --run run/ --html coverage.html
    """
    from embedcache.cli.console import open_progress
    from embedcache.curate.coverage import measure_coverage_by_modality
    from embedcache.reports.coverage import coverage_json, write_coverage_page

    reports = measure_coverage_by_modality(cache, concepts, settings, progress=open_progress())

    def show() -> None:
        for report in reports.values():
            _show_coverage(report)
        if settings.modality == "both":
            _show_difference(*reports.values())

    def record() -> Any:
        records = {modality: coverage_json(report) for modality, report in reports.items()}
        return records if settings.modality == "both" else records[settings.modality]

    outputs.publish(
        show,
        record,
        lambda path: write_coverage_page(path, *reports.values()),
    )


def _show_coverage(report: "CoverageReport") -> None:
    from embedcache.cli.console import print_line, print_table
    from embedcache.reports.coverage import concept_table, gap_note, largest_first, summary_table

    print_line(report.line())
    for warning in report.warnings():
        print_line(warning)
    print_table(*summary_table(report))
    order = largest_first(report.pool_counts)
    print_table(*concept_table(report, order[:10]), title="largest concepts")
    if len(order) > 10:
        print_table(*concept_table(report, order[10:][-10:]), title="smallest concepts")
    if len(report.all_counts[-1].gaps(report.settings.min_count)):
        print_line(gap_note(report))


def _show_difference(first: "CoverageReport", second: "CoverageReport") -> None:
    from embedcache.cli.console import print_line, print_table
    from embedcache.reports.coverage import modality_line, modality_table, nouns_of

    print_line(modality_line(first, second))
    title = "concepts where {} and {} differ most".format(*nouns_of(first, second))
    print_table(*modality_table(first, second, num_rows=10), title=title)


@with_settings(settings=DedupSettings)
def dedup(
    cache: CacheArgument,
    out: Annotated[Path | None, output_argument("Selection of kept samples: a new .parquet file.")] = None,
    *,
    settings: DedupSettings,
    outputs: ReportOptions,
) -> None:
    """Find copies and near-duplicates.

    Without OUT, report how many samples each cosine would remove; then choose one.

    Example: embedcache curate dedup cache/ kept.parquet --cosine 0.95
    """
    from embedcache.cli.console import open_progress, print_line, print_table
    from embedcache.curate.dedup import analyze as analyze_duplicates
    from embedcache.curate.dedup import dedup as remove_duplicates
    from embedcache.reports.dedup import (
        comparison_line,
        dedup_line,
        threshold_json,
        threshold_table,
        write_dedup_page,
        write_threshold_page,
    )

    if out is None:
        analysis = analyze_duplicates(cache, settings, progress=open_progress())

        def show_levels() -> None:
            print_line(comparison_line(analysis))
            print_table(*threshold_table(analysis))
            print_line("choose a cosine, then: embedcache curate dedup CACHE OUT.parquet --cosine …")

        outputs.publish(
            show_levels,
            lambda: threshold_json(analysis),
            lambda path: write_threshold_page(path, analysis),
        )
        return
    done = remove_duplicates(cache, out, settings, progress=open_progress())

    def show() -> None:
        print_line(comparison_line(done.analysis))
        print_line(dedup_line(done))

    outputs.publish(show, done.to_json, lambda path: write_dedup_page(path, done))


@with_settings(settings=LeakSettings)
def leaks(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Training cache: a folder or a URL.")],
    test: Annotated[str, typer.Argument(metavar="TEST", help="Test cache: a folder or a URL.")],
    out: Annotated[
        Path | None, output_argument("Selection of training samples without leaks: a new .parquet file.")
    ] = None,
    feature: Features = None,
    *,
    settings: LeakSettings,
    outputs: ReportOptions,
) -> None:
    """Find test samples that are in a training cache.

    These are exact copies, and near-duplicates by cosine similarity; of recordings, videos and point clouds with
    --cosine, such as audio=0.995.

    Example: embedcache curate leaks train/ test/ clean.parquet --html leaks.html
    """
    from embedcache.cli.console import open_progress, print_line, print_lines, print_table
    from embedcache.curate.leaks import find_leaks, write_clean_selection
    from embedcache.errors import DataError
    from embedcache.outputs import check_table_output
    from embedcache.reports.leaks import (
        closest_pairs,
        leak_line,
        leak_notes,
        leak_table,
        leaked_pair_table,
        write_leak_page,
    )

    if out is not None:
        check_table_output("selection", out)
    report = find_leaks(train, test, settings, feature=feature, progress=open_progress())

    def show() -> None:
        print_lines([leak_line(report), *leak_notes(report)])
        print_table(*leak_table(report))
        for leak in filter(lambda leak: leak.is_leaked.any(), report.leaks):
            print_table(
                *leaked_pair_table(closest_pairs(report, leak, 10)), title=f"{noun(leak.modality)} that leak most"
            )

    def write_page(path: Path) -> None:
        write_leak_page(path, report)

    num_kept = 0
    try:
        if out is not None:
            num_kept = write_clean_selection(out, report)
    except DataError:  # shown, but not written
        replace(outputs, output=None, html=None).publish(show, report.to_json, write_page)
        raise
    outputs.publish(show, report.to_json, write_page)
    if out is not None and not outputs.as_json:
        print_line(f"wrote {out}: kept {num_kept:,} of {report.num_train_samples:,} samples")


@with_settings(settings=SelectSettings)
def select(
    cache: CacheArgument,
    out: SelectionOutput,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME[:PARAMETER=VALUE,…]",
            help="Method: random, top-score, clip-score, rare-first (the paper's), metaclip, image-based (DataComp's), "
            "hierarchical, k-center, score (of a table), or module:attribute. Parameters follow a colon, as in "
            "metaclip:head=100,threshold=0.3.",
        ),
    ],
    *,
    settings: SelectSettings,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Select samples to train on, with what each was selected for.

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


def _check_export(context: typer.Context, path: Path) -> Path | None:
    """Check an output as `check_new_file` does; a folder is checked by the format, which is not known yet."""
    return path if path.is_dir() else check_new_file(context, path)


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


add_command(app, "index", index)
add_command(app, "map", map_index)
add_command(app, "coverage", coverage, reads_items=True)
add_command(
    app,
    "select",
    select,
    plugins=("selectors",),
    common=(
        "method",
        "budget",
        "run",
        "modality",
        "feature",
        "concepts",
        "label",
        "scores",
        "selection",
        "seed",
        "device",
        "config",
    ),
)
add_command(app, "combine", combine)
add_command(app, "export", export, reads_items=True)
add_command(app, "dedup", dedup, reads_items=True)
add_command(app, "leaks", leaks, reads_items=True)
add_command(app, "negatives", negatives)
add_command(app, "outliers", outliers, reads_items=True)
add_command(app, "score", score, reads_items=True)
