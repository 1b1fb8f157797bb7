"""Data of the pipeline of icons: caches, held-out icons, the split of each seed, and reports of curation.

A step is reused if its output exists for the same samples and settings.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Bools, Ints, blocks
from embedcache.cli.console import open_progress, print_line
from embedcache.curate.coverage import measure_coverage
from embedcache.curate.dedup import analyze
from embedcache.curate.leaks import find_leaks, write_clean_selection
from embedcache.curate.settings import CoverageSettings
from embedcache.dataset.inputs import open_input, to_unit_vectors
from embedcache.dataset.pairs import Items, read_items, shared_samples
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import Split, draw_groups, write_split
from embedcache.extract.settings import ExtractSettings
from embedcache.files import write_atomic
from embedcache.maintain.copy import cut_cache
from embedcache.neighbors.knn import knn
from embedcache.reports.coverage import coverage_json, present_coverage
from embedcache.reports.dedup import present_thresholds
from embedcache.reports.leaks import present_leaks
from embedcache.reports.render import write_page
from embedcache.store.cache import Cache
from embedcache.train.data import open_data
from pipelines.common import IMAGE_FEATURE, TEXT_FEATURE, extract_source
from pipelines.icons.source import KIND
from pipelines.results import read_step, write_step
from pipelines.worlds.label_sets import FASHION_FOLDER, FASHION_KIND, FASHION_LABELS

PACKAGE = Path("node_modules/@iconify/json")
FEATURES = {"image": IMAGE_FEATURE, "text": TEXT_FEATURE}
_FASHION_TEST = 10_000
_EMOJI_PER_ICON = 4  # icons per emoji, if there is a limit
_FEWEST_CONCEPTS = 50


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """Names and whole families that are held out of training.

    Args:
        test_fraction: fraction of the samples whose names are tested, at most `max_test`.
        val_fraction: fraction of the samples whose names are for validation, at most `max_val`.
        family_fraction: fraction of the samples of each palette whose families are tested, at most `max_family`. If the
            smallest family of a palette is larger, it is held out.
        image_cosine: images above it are near-duplicates.
        text_cosine: names above it are near-duplicates.
        min_families: a name in so many families is a concept. If there are too few, the names in most families are.
    """

    test_fraction: float = 0.15
    max_test: int = 4_000
    val_fraction: float = 0.05
    max_val: int = 1_000
    family_fraction: float = 0.1
    max_family: int = 2_500
    image_cosine: float = SplitSettings().cosines["image"]
    text_cosine: float = SplitSettings().cosines["text"]
    min_families: int = 5


class Data:
    """Caches of icons, emoji and clothes; the splits and reports of each number of icons are in a separate folder.

    Args:
        workdir: folder of everything.
        icons: folder of the npm package `@iconify/json`.
        limit: number of icons; If None, all. An interrupted extraction resumes, a larger limit appends.
        holdout: names and families that are held out of training.
    """

    def __init__(self, workdir: Path, icons: Path, limit: int | None = None, holdout: Holdout | None = None) -> None:
        self.workdir = workdir
        self.icons_path = icons
        self.holdout = holdout or Holdout()
        self._limit = limit

    def prepare(self) -> None:
        """Extract all caches, and hold out families and emoji for all seeds."""
        for step in (self.extract, self.find_leaks, self.hold_out_families, self.cut_emoji):
            step()

    def extract(self) -> None:
        """Extract icons and emoji, and clothes if Fashion-MNIST is installed."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        settings = ExtractSettings(limit=self._limit, extend=True)
        extract_source(str(self.icons_path), self.workdir / "icons", settings=settings, kind=KIND)

        num_emoji = None if self._limit is None else -(-self._limit // _EMOJI_PER_ICON)
        settings = ExtractSettings(limit=num_emoji, extend=True)
        extract_source("openmoji:en", self.workdir / "emoji", settings=settings)

        if self.has_clothes:
            clothes = _FASHION_TEST if num_emoji is None else min(num_emoji, _FASHION_TEST)
            names = self._write_prompts("clothes", FASHION_LABELS)
            extract_source(f"0+{clothes}", self.folder / "clothes", texts=[], kind=FASHION_KIND)
            extract_source(names, self.folder / "clothes-names", images=[])

    @cached_property
    def icons(self) -> Cache:
        """The icons."""
        return Cache(self.workdir / "icons")

    @cached_property
    def folder(self) -> Path:
        """Folder of everything that depends on the number of icons."""
        path = self.workdir / f"{self.icons.info.num_samples}-icons"
        path.mkdir(exist_ok=True)
        return path

    @property
    def has_clothes(self) -> bool:
        """Whether Fashion-MNIST is installed."""
        return FASHION_FOLDER.is_dir()

    def step(self, name: str, settings: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the values of a step, from `NAME.json` if it was computed for the same samples and settings."""
        path = self.folder / f"{name}.json"
        request = {"icons": self.icons.info.index_digest, **settings}
        stored = read_step(path, request)
        if stored is not None:
            print_line(f"{name}: reused")
            return stored

        values = dict(compute())
        write_step(path, request, values)
        return values

    def report_duplicates(self) -> dict[str, Any]:
        """Report the icons that deduplication would remove at each cosine, and write a page."""

        def compute() -> Mapping[str, Any]:
            analysis = analyze(self.icons.path, progress=open_progress())
            report = present_thresholds(analysis)
            write_page(self.folder / "duplicates.html", report)
            print_line(f"duplicates: {report.lines[0]}")
            return dict(report.record())

        return self.step("duplicates", {}, compute)

    def find_leaks(self) -> dict[str, Any]:
        """Write the selection `clean` of the icons that are not an emoji by drawing or name, and write a page."""

        def compute() -> Mapping[str, Any]:
            report = find_leaks(self.icons.path, self.workdir / "emoji", progress=open_progress())
            write_clean_selection(self.folder / "clean.parquet", report)
            presentation = present_leaks(report)
            write_page(self.folder / "leaks.html", presentation)
            print_line(f"leaks: {presentation.lines[0]}")
            return report.to_json()

        return self.step("leaks", {"emoji": Cache(self.workdir / "emoji").info.index_digest}, compute)

    def hold_out_families(self) -> dict[str, Any]:
        """Draw families of each palette for the test of styles, and cut the cache `families` with their icons."""

        def compute() -> Mapping[str, Any]:
            rows = draw_families(self.icons, self.holdout)
            families = self.icons.column("family").take(rows).to_pylist()
            selection = Selection(rows=rows, columns={"family": families})
            write_selection(self.folder / "families.parquet", self.icons, selection, asdict(self.holdout))
            names = sorted(set(families))
            print_line(f"families: {len(rows):,} icons of {len(names)} families are held out: {', '.join(names)}")
            return {"num_samples": len(rows), "families": names}

        values = self.step("families", asdict(self.holdout), compute)
        cut_cache(self.icons.path, self.folder / "families.parquet", self.folder / "families")
        return values

    def cut_emoji(self) -> dict[str, Any]:
        """Cut the cache `emoji` with the test part of OpenMoji's strict split."""
        emoji = Cache(self.workdir / "emoji")

        def compute() -> Mapping[str, Any]:
            data = open_data(emoji.path, FEATURES, memory_bytes=2**30)
            rows = data.split(data.pairs(None), SplitSettings()).rows("test")
            write_selection(self.folder / "emoji.parquet", emoji, Selection(rows=rows), {})
            return {"num_samples": len(rows)}

        values = self.step("emoji", {"emoji": emoji.info.index_digest}, compute)
        cut_cache(emoji.path, self.folder / "emoji.parquet", self.folder / "emoji")
        return values

    def cut_target(self) -> None:
        """Cut the cache `target` with the other parts of OpenMoji, which selections may resemble: no test has them."""
        emoji = Cache(self.workdir / "emoji")
        path = self.folder / "target.parquet"

        def compute() -> Mapping[str, Any]:
            test = read_selection(self.folder / "emoji.parquet", [emoji])
            rows = np.setdiff1d(np.arange(emoji.info.num_samples), test)
            write_selection(path, emoji, Selection(rows=rows), {})
            return {"num_samples": len(rows)}

        self.step("target", {"emoji": emoji.info.index_digest}, compute)
        cut_cache(emoji.path, path, self.folder / "target")

    def measure_coverage(self) -> dict[str, Any]:
        """Estimate the number of captions of each name that many families share, and write a page."""

        def compute() -> Mapping[str, Any]:
            names = find_concepts(self.icons, self.holdout.min_families)
            extract_source(self._write_prompts("concepts", names), self.folder / "concepts", images=[])

            settings = CoverageSettings(modality="text")
            report = measure_coverage(self.icons.path, self.folder / "concepts", settings, progress=open_progress())

            write_page(self.folder / "coverage.html", present_coverage({settings.modality: report}))
            num_gaps = len(report.pool_counts.gaps(settings.min_count))
            print_line(f"coverage: {report.line()}; {num_gaps:,} gaps")
            return coverage_json(report)

        return self.step("coverage", asdict(self.holdout), compute)

    def split(self, seed: int) -> dict[str, Any]:
        """Write the split of a seed, `split-SEED.parquet`, and return the number of icons in each part and outside."""

        def compute() -> Mapping[str, Any]:
            clean = read_selection(self.folder / "clean.parquet", [self.icons])
            families = read_selection(self.folder / "families.parquet", [self.icons])
            split, counts = strict_split(self.icons, clean=clean, families=families, holdout=self.holdout, seed=seed)
            write_split(self.folder / f"split-{seed}.parquet", [self.icons], split)
            print_line(f"split {seed}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
            return counts

        return self.step(f"split-{seed}", {**asdict(self.holdout), "seed": seed}, compute)

    def _write_prompts(self, name: str, names: Iterable[str]) -> str:
        """Write class names and a template of the bare name, and return the location of the source of prompts."""
        texts = {f"{name}.txt": "\n".join(names), "name.txt": "{c}"}
        for file, text in texts.items():
            write_atomic(self.folder / file, text.encode())
        return "prompts:" + "+".join(str(self.folder / file) for file in texts)


def draw_families(cache: Cache, holdout: Holdout, *, seed: int = 0) -> Ints:
    """Draw whole families of each palette until a fraction of its icons is held out: (M,) ascending sample rows.

    A palette of a single family has none to hold out.
    """
    keys = cache.column("key")
    palettes = np.array(cache.column("palette").to_pylist())
    families = np.array(cache.column("family").to_pylist())

    parts = []
    for palette in sorted(set(palettes.tolist())):
        rows = np.flatnonzero(palettes == palette)
        _, numbers, sizes = np.unique(families[rows], return_inverse=True, return_counts=True)

        # At least one family is held out, even if the smallest is larger than the fraction.
        quota = max(min(round(holdout.family_fraction * len(rows)), holdout.max_family), int(sizes.min()))
        if len(sizes) > 1:
            parts.append(rows[draw_groups(keys.take(rows), numbers, [quota], seed) >= 0])

    return np.sort(np.concatenate(parts))


def first_names(cache: Cache) -> Array:
    """Return the first caption of each sample: (S,)."""
    texts = cache.items("text", columns=["sample", "text"])
    _, first = np.unique(texts["sample"].to_numpy(), return_index=True)
    return np.array(texts["text"].take(first).to_pylist(), dtype=object)


def find_concepts(cache: Cache, min_families: int) -> list[str]:
    """Return the names in at least so many families, or else the 50 most shared names, sorted."""
    pairs = set(zip(first_names(cache).tolist(), cache.column("family").to_pylist(), strict=True))
    names, counts = np.unique(np.array([name for name, _ in pairs], dtype=str), return_counts=True)

    # A small collection has few shared names; the 50 most shared ones then stand in.
    order = np.argsort(-counts, kind="stable")
    count = max(int((counts >= min_families).sum()), min(_FEWEST_CONCEPTS, len(names)))
    return sorted(names[order[:count]].tolist())


def strict_split(
    cache: Cache, *, clean: Ints, families: Ints, holdout: Holdout, seed: int
) -> tuple[Split, dict[str, int]]:
    """Split icons so that no name of the test, and no style of a held-out family, is in training.

    All icons of a name are in one part. Icons near the test part are dropped from the other parts, rather than moved to
    it: near-duplicates form chains, and at this size most icons would be one group. The same applies to validation, and
    to drawings like those of a held-out family.

    Args:
        cache: the icons.
        clean: samples that may be used.
        families: samples of held-out families.
        holdout: fractions and cosines.
        seed: random seed.

    Returns:
        The split, whose groups are names, and the number of samples of each part and each reason to drop samples.
    """
    features = {modality: open_input(cache, modality, name) for modality, name in FEATURES.items()}
    items = {modality: read_items([cache], [feature]) for modality, feature in features.items()}

    usable = shared_samples(items["image"], items["text"])
    pool = np.setdiff1d(np.intersect1d(usable, clean), families)

    name_S = np.unique(first_names(cache).astype(str), return_inverse=True)[1]

    def draw(rows: Ints, fraction: float, largest: int) -> Bools:
        numbers = np.unique(name_S[rows], return_inverse=True)[1]
        quota = min(round(fraction * len(pool)), largest)
        return draw_groups(cache.column("key").take(rows), numbers, [quota], seed) >= 0

    def near(rows: Ints, held_out: Ints, modalities: Sequence[str]) -> Ints:
        cosines = {"image": holdout.image_cosine, "text": holdout.text_cosine}
        parts = [_near(features[name], items[name], rows, held_out, cosines[name]) for name in modalities]
        return np.unique(np.concatenate(parts))

    is_test = draw(pool, holdout.test_fraction, holdout.max_test)
    test = pool[is_test]
    rest = pool[~is_test]

    # Names may repeat those of a held-out family, as it tests new styles; only its drawings must be new.
    near_test = near(rest, test, ["image", "text"])
    near_families = np.setdiff1d(near(rest, np.intersect1d(families, usable), ["image"]), near_test)
    rest = np.setdiff1d(rest, np.union1d(near_test, near_families))

    is_val = draw(rest, holdout.val_fraction, holdout.max_val)
    val = rest[is_val]
    near_val = near(rest[~is_val], val, ["image", "text"])
    train = np.setdiff1d(rest[~is_val], near_val)

    part_S = np.full(cache.info.num_samples, "", dtype=object)
    for part, rows in (("train", train), ("val", val), ("test", test)):
        part_S[rows] = part

    split = Split(parts=part_S.tolist(), groups=name_S.tolist())
    dropped_parts = {"near the test": near_test, "like held-out families": near_families, "near validation": near_val}
    parts = {"train": train, "val": val, "test": test, "held-out families": families, **dropped_parts}
    return split, {name: len(rows) for name, rows in parts.items()}


def _near(feature: Any, items: Items, rows: Ints, held_out: Ints, cosine: float) -> Ints:
    """Return the samples among `rows` with an item above a cosine to one of `held_out`, ascending."""
    queries = items.select(rows)
    candidates_CP = to_unit_vectors(feature.read(items.select(held_out).rows))
    parts = []
    for block in blocks(len(queries.rows), 4096):
        _, closest_B1 = knn(to_unit_vectors(feature.read(queries.rows[block])), candidates_CP, 1)
        parts.append(queries.samples[block][closest_B1[:, 0] > cosine])

    return np.unique(np.concatenate(parts))
