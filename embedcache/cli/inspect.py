"""embedcache inspect and verify"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from embedcache.cli.options import Json, Output, with_settings
from embedcache.errors import SettingError
from embedcache.extract.settings import VerifySettings


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


def repaired(parameters: Mapping[str, Any]) -> str:
    """Return what a check that ends early keeps."""
    return "repaired chunks are kept" if parameters["repair"] else ""


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
        line = "equal their checksums" if card.checksums else "were not compared: early versions wrote no checksums"
        publish(
            lambda: print_line(f"{cache}: all bytes {line}"),
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
