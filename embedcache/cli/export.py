"""embedcache export"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.commands import add_command, new_group
from embedcache.cli.options import (
    CacheArgument,
    Json,
    Output,
    RunArgument,
    check_new_file,
    with_settings,
)
from embedcache.errors import quoted
from embedcache.export.settings import ExportSettings, HubSettings
from embedcache.interop.settings import VectorExportSettings

app = new_group("Write a run, or vectors, for other tools.")

NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.")]
NewParquet = Annotated[Path, typer.Argument(metavar="OUT", help="New .parquet file to write.", callback=check_new_file)]


@with_settings(settings=ExportSettings, skip=("towers",))
def transformers(
    run: RunArgument,
    out: NewFolder,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: ExportSettings,
) -> None:
    """Write a model for transformers.

    AutoModel, AutoProcessor and AutoTokenizer load the folder.

    Example: embedcache export transformers run/ model/
    """
    _export_model("transformers", run, out, settings, as_json=as_json, output=output)


@with_settings(settings=ExportSettings, skip=("towers",))
def open_clip(
    run: RunArgument,
    out: NewFolder,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: ExportSettings,
) -> None:
    """Write a model for open_clip.

    open_clip loads the folder as local-dir:OUT.

    Example: embedcache export open-clip run/ model/
    """
    _export_model("open-clip", run, out, settings, as_json=as_json, output=output)


@with_settings(settings=ExportSettings, skip=("towers",))
def sentence_transformers(
    run: RunArgument,
    out: NewFolder,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: ExportSettings,
) -> None:
    """Write the text tower for sentence-transformers.

    Example: embedcache export sentence-transformers run/ model/
    """
    _export_model("sentence-transformers", run, out, settings, as_json=as_json, output=output)


@with_settings(settings=ExportSettings)
def onnx(
    run: RunArgument,
    out: NewFolder,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: ExportSettings,
) -> None:
    """Write ONNX graphs of the projectors or the towers.

    Example: embedcache export onnx run/ model/ --towers
    """
    _export_model("onnx", run, out, settings, as_json=as_json, output=output)


def _export_model(
    format_name: str, run: Path, out: Path, settings: ExportSettings, *, as_json: bool, output: Path | None
) -> None:
    from embedcache.cli.console import print_line, publish, to_plain
    from embedcache.export.export import export_run

    report = export_run(format_name, run, out, settings)

    def show() -> None:
        print_line(f"{out}: written")
        for modality, difference in report.differences.items():
            print_line(f"  {modality}: differs from the run by at most {difference:.1e}")
        if report.url is not None:
            print_line(f"  {report.url}")

    publish(
        show,
        lambda: {"path": str(out), "format": format_name, **to_plain(report)},
        as_json=as_json,
        output=output,
    )


@with_settings(settings=VectorExportSettings)
def clip_retrieval(
    cache: CacheArgument,
    out: NewFolder,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: VectorExportSettings,
) -> None:
    """Write vectors of length 1 for clip-retrieval.

    Write the folders img_emb, text_emb and metadata, from which `clip-retrieval index` builds an index.

    Example: embedcache export clip-retrieval cache/ tree/ --run run/
    """
    _export_vectors("clip-retrieval", cache, out, settings, as_json=as_json, output=output)


@with_settings(settings=VectorExportSettings)
def parquet(
    cache: CacheArgument,
    out: NewParquet,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: VectorExportSettings,
) -> None:
    """Write vectors, keys and captions to Parquet.

    The columns are key, caption, those of the source, and image_vector, text_vector and so on as lists of fixed length.

    Example: embedcache export parquet cache/ vectors.parquet --run run/
    """
    _export_vectors("parquet", cache, out, settings, as_json=as_json, output=output)


@with_settings(settings=VectorExportSettings)
def npy(
    cache: CacheArgument,
    out: NewFolder,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: VectorExportSettings,
) -> None:
    """Write vectors as NumPy arrays.

    Write image.npy, text.npy and so on, and rows.parquet, into a new folder.

    Example: embedcache export npy cache/ arrays/ --feature resnet18/pooled
    """
    _export_vectors("npy", cache, out, settings, as_json=as_json, output=output)


@with_settings(settings=HubSettings)
def hub(
    cache: CacheArgument,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Dataset of the Hub: OWNER/NAME.")],
    *,
    settings: HubSettings,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Upload a cache to the Hugging Face Hub.

    The URL hf://datasets/OWNER/NAME then opens it. Run the same command again to resume an interrupted upload, or to
    update the dataset.

    Example: embedcache export hub cache/ me/my-embeddings
    """
    from embedcache.cli.console import print_line, publish, to_plain
    from embedcache.export.hub import push_cache

    report = push_cache(cache, repository, settings)

    def show() -> None:
        print_line(report.url)
        print_line(f"read it with: embedcache inspect {quoted(report.location)}")

    publish(show, lambda: to_plain(report), as_json=as_json, output=output)


def _export_vectors(
    format_name: str,
    cache: str,
    out: Path,
    settings: VectorExportSettings,
    *,
    as_json: bool,
    output: Path | None,
) -> None:
    from embedcache.cli.console import open_progress, print_line, publish, to_plain
    from embedcache.interop.formats import export_vectors

    report = export_vectors(format_name, cache, out, settings, progress=open_progress())
    publish(
        lambda: print_line(report.line()),
        lambda: {**to_plain(report), "format": format_name},
        as_json=as_json,
        output=output,
    )


add_command(app, "transformers", transformers)
add_command(app, "open-clip", open_clip)
add_command(app, "sentence-transformers", sentence_transformers)
add_command(app, "onnx", onnx)
add_command(app, "clip-retrieval", clip_retrieval)
add_command(app, "parquet", parquet)
add_command(app, "npy", npy)
add_command(app, "hub", hub, runs_named_code=False)
