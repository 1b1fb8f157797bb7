"""embedcache export"""

import typer

from embedcache.cli.export import atlas, clip_retrieval, npy, parquet

app = typer.Typer(help="Write what other tools read.", no_args_is_help=True, rich_markup_mode=None)
app.command(name="clip-retrieval")(clip_retrieval.clip_retrieval)
app.command(name="parquet")(parquet.parquet)
app.command(name="npy")(npy.npy)
app.command(name="atlas")(atlas.atlas)
