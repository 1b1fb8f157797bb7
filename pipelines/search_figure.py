"""Draw docs/images/search.png: text queries and the test images that the run of the tutorial finds.

The queries are chosen to show two that work and two that do not: at least half of the images found are right, or fewer.

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

QUERIES = {
    "fruit": ("green apple", "red apple", "pear", "lemon", "watermelon"),
    "a vehicle on the water": (
        *("man rowing boat", "woman rowing boat", "person rowing boat"),
        *("canoe", "ferry", "motor boat", "sailboat", "speedboat"),
    ),
    "an animal with feathers": ("rooster", "owl", "baby chick", "front-facing baby chick"),
    "a sea creature": ("jellyfish", "octopus", "shark"),
}
"""Query -> the names of all right images of the test part."""
K, SIZE_PX = 6, 88
PAGE = Path("docs/images/search.png")


def main() -> None:
    """Search, and draw one row of images per query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    cache = embedcache.Cache(folder / "emoji")
    results = search_test_images(folder)
    thumbnails = Thumbnails(cache)
    figure = Figure(figsize=(8.4, 6.6), layout="constrained", facecolor="white")
    rows = figure.subfigures(len(QUERIES), 1, squeeze=False)[:, 0]
    for row, (query, names), hits in zip(rows, QUERIES.items(), results, strict=True):
        is_right = [hit.captions[0] in names for hit in hits]
        verdict = "works" if 2 * sum(is_right) >= K else "does not work"
        title = f"“{query}” {verdict}: {sum(is_right)} of {K} right, {len(names)} in the test part"
        row.suptitle(title, x=0.01, ha="left", fontsize=11)
        for axes, hit, right in zip(row.subplots(1, K), hits, is_right, strict=True):
            axes.imshow(Image.open(io.BytesIO(thumbnails.webp(hit.row, SIZE_PX))).convert("RGB"))
            axes.set_xlabel(f"{'✓ ' if right else ''}{hit.captions[0][:22]}\n{hit.score:.2f}", fontsize=8)
            axes.xaxis.label.set_color("green" if right else "black")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    figure.supxlabel(f"✓ right; cosine below each name; test images only. {credit(cache)}", fontsize=7)
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
            folder / "index", list(QUERIES), embedcache.SearchSettings(k=K, filter=embedcache.Filter(selection=keys))
        )


if __name__ == "__main__":
    run_program(main)
