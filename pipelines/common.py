"""Steps shared by the pipelines."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from embedcache.cli.console import open_progress, print_line
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.files import replacing, write_atomic
from embedcache.settings import to_flat
from embedcache.sources import open_source
from embedcache.train.data import TrainData
from embedcache.train.settings import TrainSettings, train_settings
from embedcache.train.train import TrainReport, train_on

IMAGE_ENCODER, TEXT_ENCODER = "lite:efficientnet-lite0", "st:all-MiniLM-L6-v2"
IMAGE_FEATURE, TEXT_FEATURE = "efficientnet-lite0/patch_mean", "all-MiniLM-L6-v2/mean"


def parse_workdir(description: str | None) -> Path:
    """Return the only argument of a pipeline: the folder of its caches and runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="folder for caches and runs; existing results are reused")
    workdir: Path = parser.parse_args().workdir
    return workdir


def extract_source(
    location: str,
    cache_path: Path,
    *,
    images: Sequence[str] = (IMAGE_ENCODER,),
    texts: Sequence[str] = (TEXT_ENCODER,),
    settings: ExtractSettings | None = None,
    kind: str | None = None,
) -> None:
    """Extract the features of a source with image and text encoders, and print a line per encoder."""
    source, progress = open_source(location, kind=kind), open_progress()
    for report in extract(
        source, cache_path, image_encoder=images, text_encoder=texts, settings=settings, progress=progress
    ):
        print_line(report.line())


def with_options(settings: TrainSettings, **options: object) -> TrainSettings:
    """Return training settings with some options replaced, named as on the command line."""
    return train_settings({**to_flat(settings), **options})


def train_seeds(
    data: TrainData, path: Path, settings: TrainSettings, seeds: Sequence[int]
) -> tuple[list[Path], list[TrainReport]]:
    """Train one run per seed at `path` followed by the seed, which also decides the split and fills in `{seed}`."""
    run_paths = [path.with_name(f"{path.name}-{seed}") for seed in seeds]
    reports = [
        train_on(data, run_path, with_options(settings, seed=seed), progress=open_progress())
        for seed, run_path in zip(seeds, run_paths, strict=True)
    ]
    return run_paths, reports


def format_difference(before: Sequence[float], after: Sequence[float]) -> str:
    """Return the mean difference of two results per seed, paired, with its 95% interval over seeds (Student's t)."""
    differences = np.subtract(after, before)
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    low, mean, high = (differences.mean() + shift for shift in (-half, 0, half))
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def write_markdown_page(path: Path, title: str, before: Sequence[str], figure: Figure, after: Sequence[str]) -> None:
    """Write a Markdown page with a title and paragraphs before and after a figure, which is a file beside it."""
    figure_name = save_figure(path.with_suffix(""), figure)
    blocks = [f"# {title}", *before, f"![{title}]({figure_name})", *after]
    write_atomic(path, ("\n\n".join(blocks) + "\n").encode())


def save_figure(path: Path, figure: Figure) -> str:
    """Save a figure beside a Markdown page, as SVG, or as JPEG if it holds images; return the name of its file.

    Args:
        path: its path without a suffix.
        figure: the figure.
    """
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
