"""Draw docs/images/search.png: text queries and the test images that the run of the tutorial finds.

python -m pipelines.search_figure tutorial/      # the folder of docs/tutorial.md, after its search
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image

import embedcache
from embedcache.cli.failures import run_program
from embedcache.dataset.thumbnails import Thumbnails, credit
from embedcache.search.hits import Hit

QUERIES = ("an animal with feathers", "a vehicle on the water", "something sweet to eat", "a broken promise")
K, SIZE_PX = 6, 88
PAGE = Path("docs/images/search.png")


def main() -> None:
    """Search, and draw one row of images per query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    cache = embedcache.Cache(folder / "emoji")
    results = search_test_images(folder)
    thumbnails, figure = Thumbnails(cache), Figure(figsize=(8.4, 6.4), layout="constrained", facecolor="white")
    for axes_K, query, hits in zip(figure.subplots(len(QUERIES), K), QUERIES, results, strict=True):
        axes_K[0].set_title(f"“{query}”", loc="left", fontsize=12, pad=10)
        for axes, hit in zip(axes_K, hits, strict=True):
            axes.imshow(Image.open(io.BytesIO(thumbnails.webp(hit.row, SIZE_PX))).convert("RGB"))
            axes.set_xlabel(f"{hit.captions[0][:22]}\n{hit.score:.2f}", fontsize=8)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    figure.supxlabel(f"Cosine below each name; test images only. {credit(cache)}", fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, dpi=110)
    Image.open(png).convert("RGB").quantize(256).save(PAGE, optimize=True)


def search_test_images(folder: Path) -> Sequence[Sequence[Hit]]:
    """Search the test part only."""
    split = pq.read_table(folder / "run" / "split.parquet", filters=[("part", "=", "test")])
    with TemporaryDirectory() as scratch:
        keys = Path(scratch) / "test.txt"
        keys.write_text("\n".join(split["key"].to_pylist()))
        return embedcache.search_index(
            folder / "index", QUERIES, embedcache.SearchSettings(k=K, filter=embedcache.Filter(selection=keys))
        )


if __name__ == "__main__":
    run_program(main)
