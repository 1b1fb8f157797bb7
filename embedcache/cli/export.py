"""embedcache export"""

from pathlib import Path
from typing import Annotated, Any

import typer

from embedcache.cli.commands import CacheArgument, RunArgument, check_new_file, command, new_group
from embedcache.export.settings import ExportSettings, HubSettings
from embedcache.vectors.settings import VectorExportSettings

app = new_group("Write a run, or vectors, for other tools.")

NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.")]
NewParquet = Annotated[Path, typer.Argument(metavar="OUT", help="New .parquet file to write.", callback=check_new_file)]


@command(app, "transformers", settings=ExportSettings, skip=("towers",))
def transformers(run: RunArgument, out: NewFolder, *, settings: ExportSettings) -> Any:
    """Write a model for transformers.

    AutoModel, AutoProcessor and AutoTokenizer load the folder.

    Example: embedcache export transformers run/ model/
    """
    return _export_model("transformers", run, out, settings)


@command(app, "open-clip", settings=ExportSettings, skip=("towers",))
def open_clip(run: RunArgument, out: NewFolder, *, settings: ExportSettings) -> Any:
    """Write a model for open_clip.

    open_clip loads the folder as local-dir:OUT.

    Example: embedcache export open-clip run/ model/
    """
    return _export_model("open-clip", run, out, settings)


@command(app, "sentence-transformers", settings=ExportSettings, skip=("towers",))
def sentence_transformers(run: RunArgument, out: NewFolder, *, settings: ExportSettings) -> Any:
    """Write the text tower for sentence-transformers.

    Example: embedcache export sentence-transformers run/ model/
    """
    return _export_model("sentence-transformers", run, out, settings)


@command(app, "onnx", settings=ExportSettings)
def onnx(run: RunArgument, out: NewFolder, *, settings: ExportSettings) -> Any:
    """Write ONNX graphs of the projectors or the towers.

    Example: embedcache export onnx run/ model/ --towers
    """
    return _export_model("onnx", run, out, settings)


def _export_model(format_name: str, run: Path, out: Path, settings: ExportSettings) -> Any:
    from embedcache.export.export import export_run
    from embedcache.reports.render import Presentation, to_plain

    report = export_run(format_name, run, out, settings)
    lines = [f"{out}: written", *(f"  {line}" for line in report.lines())]
    return Presentation(lines=lines, record=lambda: {"path": str(out), "format": format_name, **to_plain(report)})


@command(app, "clip-retrieval", settings=VectorExportSettings)
def clip_retrieval(cache: CacheArgument, out: NewFolder, *, settings: VectorExportSettings) -> Any:
    """Write vectors of length 1 for clip-retrieval.

    Write the folders img_emb, text_emb and metadata, from which `clip-retrieval index` builds an index.

    Example: embedcache export clip-retrieval cache/ tree/ --run run/
    """
    return _export_vectors("clip-retrieval", cache, out, settings)


@command(app, "parquet", settings=VectorExportSettings)
def parquet(cache: CacheArgument, out: NewParquet, *, settings: VectorExportSettings) -> Any:
    """Write vectors, keys and captions to Parquet.

    The columns are key, caption, those of the source, and image_vector, text_vector and so on as lists of fixed length.

    Example: embedcache export parquet cache/ vectors.parquet --run run/
    """
    return _export_vectors("parquet", cache, out, settings)


@command(app, "npy", settings=VectorExportSettings)
def npy(cache: CacheArgument, out: NewFolder, *, settings: VectorExportSettings) -> Any:
    """Write vectors as NumPy arrays.

    Write image.npy, text.npy and so on, and rows.parquet, into a new folder.

    Example: embedcache export npy cache/ arrays/ --feature resnet18/pooled
    """
    return _export_vectors("npy", cache, out, settings)


@command(app, "hub", settings=HubSettings, runs_named_code=False)
def hub(
    cache: CacheArgument,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Dataset of the Hub: OWNER/NAME.")],
    *,
    settings: HubSettings,
) -> Any:
    """Upload a cache to the Hugging Face Hub.

    The URL hf://datasets/OWNER/NAME then opens it. Run the same command again to resume an interrupted upload, or to
    update the dataset.

    Example: embedcache export hub cache/ me/my-embeddings
    """
    from embedcache.export.hub import push_cache

    return push_cache(cache, repository, settings)


def _export_vectors(format_name: str, cache: str, out: Path, settings: VectorExportSettings) -> Any:
    from embedcache.cli.console import open_progress
    from embedcache.reports.render import Presentation, to_plain
    from embedcache.vectors.exporting import export_vectors

    report = export_vectors(format_name, cache, out, settings, progress=open_progress())
    return Presentation(lines=[report.line()], record=lambda: {**to_plain(report), "format": format_name})
