"""embedcache evaluate"""

import typer

from embedcache.cli.evaluate import pairs, probe, retrieval, zero_shot

app = typer.Typer(help="Measure from the cache alone.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def evaluate() -> None:
    """Measure from the cache alone: no encoder runs."""


app.command(name="pairs")(pairs.pairs)
app.command(name="probe")(probe.probe)
app.command(name="retrieval")(retrieval.retrieval)
app.command(name="zero-shot")(zero_shot.zero_shot)
