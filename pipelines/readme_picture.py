"""Four questions in words, and the held-out pictures that the tutorial's run finds: docs/pictures/search.png.

python -m pipelines.readme_picture tutorial/      # a folder in which docs/tutorial.md was followed to its search
"""

import argparse
import base64
import io
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image

import embedcache
from embedcache.reports.thumbnails import Thumbnails, credit
from embedcache.search.search import Hit

QUESTIONS = ("an animal with feathers", "a vehicle on the water", "something sweet to eat", "a broken promise")
K = 6
PAGE = Path("docs/pictures/search.png")


def main() -> None:
    """Ask, and draw a row of pictures a question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    cache = embedcache.Cache(folder / "emoji")
    answers = held_out_answers(folder)
    pictures, figure = Thumbnails(cache), Figure(figsize=(8.4, 6.4), layout="constrained", facecolor="white")
    for axes_K, question, hits in zip(figure.subplots(len(QUESTIONS), K), QUESTIONS, answers, strict=True):
        axes_K[0].set_title(f"“{question}”", loc="left", fontsize=12, pad=10)
        for axes, hit in zip(axes_K, hits, strict=True):
            axes.imshow(decode(pictures.data_url(hit.row)))
            axes.set_xlabel(f"{hit.captions[0][:22]}\n{hit.score:.2f}", fontsize=8)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    figure.supxlabel(f"cosine below each name; held-out pictures only. {credit(cache)}", fontsize=7)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(256).save(PAGE, optimize=True)


def held_out_answers(folder: Path) -> list[list[Hit]]:
    """Search among the test part alone."""
    split = pq.read_table(folder / "run" / "split.parquet", filters=[("part", "=", "test")])
    with TemporaryDirectory() as scratch:
        keys = Path(scratch) / "test.txt"
        keys.write_text("\n".join(split["key"].to_pylist()))
        return embedcache.search_index(folder / "index", QUESTIONS, k=K, keep=embedcache.Filter(selection=keys))


def decode(url: str) -> Image.Image:
    """Open a picture that a page would hold, on white."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


if __name__ == "__main__":
    main()
