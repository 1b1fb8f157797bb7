"""embedcache inspect, verify and cache"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.commands import add_command, new_group
from embedcache.cli.options import CacheArgument, Json, Output, SelectionArgument, split_at_commas, with_settings
from embedcache.errors import SettingError
from embedcache.extract.settings import VerifySettings
from embedcache.maintain.settings import PruneSettings, RemoveSettings

app = new_group("Prune, cut and merge caches, and remove samples from them.")

Yes = Annotated[
    bool, typer.Option("--yes", metavar="", help="Do it; without this option, only print what would be done.")
]
NewCache = Annotated[
    str, typer.Argument(metavar="OUT", help="New folder, or one in which the same command was interrupted.")
]
CopiedFeatures = Annotated[
    list[str] | None,
    typer.Option(
        "--feature",
        metavar="NAME",
        help="Feature to copy, as encoder/feature, or encoder for all of its features. May be repeated.",
        show_default="all",
    ),
]


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Cache, run, index, study or selection: a path or a URL.")
    ],
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Show what a cache, run, index, study or selection holds.

    Of a cache: features, their shapes, how complete they are, and why items failed.

    Example: embedcache inspect cache/
    """
    from embedcache.cli.console import print_lines, print_table, publish
    from embedcache.reports.summary import summarize

    summary = summarize(path)

    def show() -> None:
        print_lines(summary.lines)
        if summary.rows:
            print_table(summary.columns, summary.rows)
        print_lines(summary.notes)

    publish(show, lambda: {"kind": summary.kind, **summary.record}, as_json=as_json, output=output)


@with_settings(settings=VerifySettings)
def verify(
    cache: Annotated[str, typer.Argument(metavar="PATH", help="Cache, or index: a folder or a URL.")],
    as_json: Json = False,
    output: Output = None,
    *,
    settings: VerifySettings,
) -> None:
    """Check every chunk of a cache, or all bytes of an index.

    The exit code is 1 if something is damaged, if encoding items again yields other vectors, or if a chunk is still
    missing after --repair.

    Example: embedcache verify cache/ --reencode 0.1%
    """
    from embedcache.cli.console import open_progress, print_line, print_lines, publish, to_plain

    if (Path(cache) / "card.json").is_file():
        from embedcache.search.card import read_card, verify_index

        if settings.repair or settings.reencode is not None:
            raise SettingError(f"--repair, --reencode: expected a cache, got {cache}, an index; leave the option out")
        card = read_card(Path(cache))
        verify_index(Path(cache), card, progress=open_progress())
        publish(
            lambda: print_line(f"{cache}: all bytes equal their checksums"),
            lambda: {"index": cache, "compared": sorted(card.checksums)},
            as_json=as_json,
            output=output,
        )
        return
    from embedcache.extract.repair import verify_cache

    report = verify_cache(cache, settings, progress=open_progress())
    publish(lambda: print_lines(report.lines()), lambda: to_plain(report), as_json=as_json, output=output)
    if not report.is_sound:
        raise typer.Exit(1)


@with_settings(settings=PruneSettings)
def prune(
    cache: CacheArgument,
    yes: Yes = False,
    *,
    settings: PruneSettings,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Delete features and views.

    Without --yes, print what would be deleted, and delete nothing.

    Example: embedcache cache prune cache/ --feature dinov2-large/patches --yes
    """
    from embedcache.cli.console import print_line, print_lines, publish, to_plain
    from embedcache.maintain.prune import plan_prune, prune_cache

    plan = prune_cache(cache, settings) if yes else plan_prune(cache, settings)

    def show() -> None:
        print_lines(plan.lines())
        print_line("deleted" if yes else "nothing is deleted; add --yes to delete this")

    record = {"is_done": yes, **to_plain(plan), "num_bytes": plan.num_bytes}
    publish(show, lambda: record, as_json=as_json, output=output)


@with_settings(settings=RemoveSettings)
def remove(
    cache: CacheArgument,
    keys: Annotated[
        Path,
        typer.Argument(
            metavar="KEYS", help="Samples to remove: a selection (Parquet), or a text file with one key per line."
        ),
    ],
    yes: Yes = False,
    *,
    settings: RemoveSettings,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Remove samples from a cache and its indexes.

    Nothing of their keys, captions, columns and vectors is left in these files; the rows of all other samples stay.
    Selections, runs and exports that name the samples are listed, with exit code 1.
    Without --yes, print what would be done. Run the same command again to finish an interrupted removal.

    Example: embedcache cache remove cache/ keys.txt --index index/ --check run/ --yes
    """
    from embedcache.cli.console import open_progress, print_line, print_lines, publish, to_plain
    from embedcache.dataset.selections import read_selected_keys
    from embedcache.maintain.remove import plan_removal, remove_samples

    names = read_selected_keys(keys).to_pylist()
    report = (
        remove_samples(cache, names, settings, progress=open_progress())
        if yes
        else plan_removal(cache, names, settings)
    )

    def show() -> None:
        print_lines(report.lines())
        if yes:
            print_line(f"removed; {keys} still names the samples, as do backups, snapshots and copies of these files")
        else:
            print_line("nothing is removed; add --yes to remove this")

    publish(show, lambda: {"is_done": yes, **to_plain(report)}, as_json=as_json, output=output)
    if yes and report.named:
        raise typer.Exit(1)


def cut(
    cache: CacheArgument,
    selection: SelectionArgument,
    out: NewCache,
    feature: CopiedFeatures = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Write the samples of a selection into a cache of their own.

    Nothing is encoded. Run the same command again to finish an interrupted one.

    Example: embedcache cache cut cache/ selection.parquet small/
    """
    from embedcache.cli.console import open_progress, print_lines, publish, to_plain
    from embedcache.maintain.copy import cut_cache

    report = cut_cache(cache, selection, out, features=split_at_commas(feature), progress=open_progress())
    publish(lambda: print_lines(report.lines()), lambda: to_plain(report), as_json=as_json, output=output)


def merge(
    caches: Annotated[
        list[str], typer.Argument(metavar="CACHE", help="Two caches or more of the same encoders: folders or URLs.")
    ],
    out: NewCache,
    prefix_keys: Annotated[
        bool,
        typer.Option(
            "--prefix-keys", metavar="", help="Begin each key with the name of its cache's folder and a slash."
        ),
    ] = False,
    feature: CopiedFeatures = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Merge caches of the same encoders into a new one.

    Nothing is encoded. Run the same command again to finish an interrupted one.

    Example: embedcache cache merge first/ second/ both/
    """
    from embedcache.cli.console import open_progress, print_lines, publish, to_plain
    from embedcache.maintain.copy import merge_caches

    if len(caches) < 2:
        raise SettingError(f"expected two caches or more, then a new folder, got {caches[0]} and {out}")
    report = merge_caches(
        caches, out, prefix_keys=prefix_keys, features=split_at_commas(feature), progress=open_progress()
    )
    publish(lambda: print_lines(report.lines()), lambda: to_plain(report), as_json=as_json, output=output)


add_command(app, "prune", prune)
add_command(app, "merge", merge)
add_command(app, "cut", cut)
add_command(app, "remove", remove)
