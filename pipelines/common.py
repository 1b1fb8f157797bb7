"""Steps shared by the pipelines."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from embedcache.cli.console import open_progress, print_line
from embedcache.extract.extract import extract, open_source_or_cache
from embedcache.extract.settings import ExtractSettings
from embedcache.files import replacing
from embedcache.settings import to_flat
from embedcache.train.settings import TrainSettings, train_settings

IMAGE_ENCODER = "lite:efficientnet-lite0"
TEXT_ENCODER = "st:all-MiniLM-L6-v2"
IMAGE_FEATURE = "efficientnet-lite0/patch_mean"
TEXT_FEATURE = "all-MiniLM-L6-v2/mean"


def extract_source(
    location: str | Path,
    cache_path: Path,
    *,
    images: Sequence[str] = (IMAGE_ENCODER,),
    texts: Sequence[str] = (TEXT_ENCODER,),
    settings: ExtractSettings | None = None,
    kind: str | None = None,
) -> None:
    """Extract the features of a source, or of a cache itself, with encoders, and print a line per encoder."""
    source = open_source_or_cache(location, cache_path, kind=kind)
    progress = open_progress()
    reports = extract(
        source, cache_path, image_encoder=images, text_encoder=texts, settings=settings, progress=progress
    )
    for report in reports:
        print_line(report.line())


def with_options(settings: TrainSettings, **options: object) -> TrainSettings:
    """Return training settings with some options replaced, named as on the command line."""
    return train_settings({**to_flat(settings), **options})


def save_figure(path: Path, figure: Figure) -> str:
    """Save a figure next to a Markdown page, as JPEG if it contains images or else as SVG, and return its file name.

    Args:
        path: path of the file without a suffix.
        figure: the figure.
    """
    # Images in an SVG would make it larger than a JPEG.
    has_images = any(axes.get_images() for axes in figure.axes)
    path = path.with_name(path.name + (".jpg" if has_images else ".svg"))

    with replacing(path) as temporary:
        if has_images:
            figure.savefig(temporary, format="jpg", dpi=110, facecolor="white", pil_kwargs={"quality": 82})
        else:
            figure.savefig(temporary, format="svg", metadata={"Date": None})

    return path.name


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])
