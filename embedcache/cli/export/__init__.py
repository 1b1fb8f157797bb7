"""embedcache export"""

import typer

from embedcache.cli.export import (
    atlas,
    clip_retrieval,
    npy,
    onnx,
    open_clip,
    parquet,
    safetensors,
    sentence_transformers,
    transformers,
)

app = typer.Typer(help="Write a run, or vectors, for other tools.", no_args_is_help=True, rich_markup_mode=None)
app.command(name="transformers")(transformers.transformers)
app.command(name="open-clip")(open_clip.open_clip)
app.command(name="sentence-transformers")(sentence_transformers.sentence_transformers)
app.command(name="onnx")(onnx.onnx)
app.command(name="safetensors")(safetensors.safetensors)
app.command(name="clip-retrieval")(clip_retrieval.clip_retrieval)
app.command(name="parquet")(parquet.parquet)
app.command(name="npy")(npy.npy)
app.command(name="atlas")(atlas.atlas)
