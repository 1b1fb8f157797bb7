"""embedcache curate"""

import typer

from embedcache.cli.curate import coverage, dedup, index, leaks, search

app = typer.Typer(help="Index, search and choose from a cache.", no_args_is_help=True, rich_markup_mode=None)
app.command(name="index")(index.index)
app.command(name="search")(search.search)
app.command(name="coverage")(coverage.coverage)
app.command(name="dedup")(dedup.dedup)
app.command(name="leaks")(leaks.leaks)
