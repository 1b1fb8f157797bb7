"""embedcache curate"""

import typer

from embedcache.cli.curate import combine, coverage, dedup, export, index, leaks, search, select

app = typer.Typer(help="Index, search and choose from a cache.", no_args_is_help=True, rich_markup_mode=None)
app.command(name="index")(index.index)
app.command(name="search")(search.search)
app.command(name="coverage")(coverage.coverage)
app.command(name="dedup")(dedup.dedup)
app.command(name="leaks")(leaks.leaks)
app.command(name="select")(select.select)
app.command(name="combine")(combine.combine)
app.command(name="sample")(combine.sample)
app.command(name="export")(export.export)
