"""How many items show a concept? Estimates of `embedcache curate coverage` compared with labels.

    npm pack @iconify/json@2.2.535 && tar xzf iconify-json-*.tgz
    python -m pipelines.count_concepts work/ --icons package/

OpenMoji's groups, on which the method was chosen, and collections on which it was not: the categories of the family
IconPark, the classes of Fashion-MNIST, and the folders of the Open Clip Art Library (Debian packages
dataset-fashion-mnist and openclipart-svg). Each collection is counted through a run that was trained on its own images
and names, which are no labels; Fashion-MNIST has none, and is counted through the run of OpenMoji.

Prints a table, and writes it as `counts.md` in the folder. Existing caches and runs there are reused.
"""

import argparse
from pathlib import Path

from embedcache.cli.console import print_line, print_table
from embedcache.cli.failures import run_program
from embedcache.reports.base import Table
from pipelines.drawings.clip_art import CLIP_ART, list_clip_art, write_table
from pipelines.drawings.counts import Collection, measure

PACKAGE = Path("node_modules/@iconify/json")
FASHION = "idx:/usr/share/datasets/fashion-mnist"


def run(workdir: Path, icons: Path) -> Table:
    """Measure all collections; return the table."""
    workdir.mkdir(parents=True, exist_ok=True)
    clip_art = write_table(workdir / "clip-art.jsonl", CLIP_ART, list_clip_art)
    collections = [
        Collection(name="emoji groups", source="openmoji:en", run="emoji groups"),
        Collection(name="emoji subgroups", source="openmoji:en", run="emoji groups"),
        Collection(name="icons", source=f"iconify:{icons},families=icon-park", run="icons"),
        Collection(name="clothes", source=FASHION, run="emoji groups", limit=10_000),
        Collection(name="clip art", source=str(clip_art), run="clip art"),
    ]
    rows = [row for collection in collections for row in measure(workdir, collection, icons)]
    return ["", "told", "error of log counts", "in the interval", "precision", "recall"], rows


def main() -> None:
    """Parse the command line, run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="folder for caches and runs; existing results are reused")
    parser.add_argument("--icons", type=Path, default=PACKAGE, help=f"folder of the npm package; default: {PACKAGE}")
    options = parser.parse_args()
    columns, rows = run(options.workdir, options.icons)
    print_table(columns, rows, title="estimated counts")

    lines = [columns, ["---"] * len(columns), *rows]
    path = options.workdir / "counts.md"
    path.write_text("".join(f"| {' | '.join(map(str, line))} |\n" for line in lines))
    print_line(f"wrote {path}")


if __name__ == "__main__":
    run_program(main)
