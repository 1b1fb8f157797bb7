"""embedcache import"""

import typer

from embedcache.cli.import_ import clip_retrieval, datacomp, npy, parquet, uids

app = typer.Typer(
    help="Make a cache of vectors that other tools computed.", no_args_is_help=True, rich_markup_mode=None
)
app.command(name="clip-retrieval")(clip_retrieval.clip_retrieval)
app.command(name="datacomp")(datacomp.datacomp)
app.command(name="parquet")(parquet.parquet)
app.command(name="npy")(npy.npy)
app.command(name="uids")(uids.uids)
