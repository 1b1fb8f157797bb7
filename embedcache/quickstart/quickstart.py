"""The complete workflow on one dataset: extract, train, evaluate, index, search, measure coverage, find duplicates."""

import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Ints
from embedcache.curate.coverage import CoverageReport, measure_coverage
from embedcache.curate.dedup import DedupAnalysis, analyze
from embedcache.curate.map import STOP_WORDS
from embedcache.curate.settings import CoverageSettings
from embedcache.dataset.pairs import ANY_LANGUAGE
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import read_split
from embedcache.errors import DataError, PathError, SettingError, SourceError, pluralize, quoted, summary
from embedcache.evaluate.retrieval import RetrievalReport, evaluate_retrieval, rank
from embedcache.evaluate.runs import load_runs
from embedcache.extract.extract import extract
from embedcache.files import write_atomic
from embedcache.modalities import Source
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import peak_memory_bytes, read_json, recognize, write_record
from embedcache.quickstart import IMAGE_ENCODER, TEXT_ENCODER
from embedcache.reports.coverage import concept_sections, coverage_json
from embedcache.reports.dedup import duplicate_section
from embedcache.reports.figures import COLORS, INK, label, open_axes, svg
from embedcache.reports.items import ItemRenderer, PageItem, QueryExample
from embedcache.reports.render import Presentation, Section, format_fraction, write_page
from embedcache.reports.retrieval import (
    NO_CLASS_NAMED,
    query_sections,
    recall_bars,
    recall_tiles,
    retrieval_json,
    retrieval_table,
)
from embedcache.reports.summary import failure_lines
from embedcache.runs import SPLIT, Run
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import Hit, Hits, search
from embedcache.search.settings import IndexSettings, SearchSettings
from embedcache.settings import replace_fields
from embedcache.sources.files import MEDIA_SUFFIXES, has_suffix, walk_files
from embedcache.sources.open import open_source
from embedcache.store.cache import Cache, caption_error_lines
from embedcache.store.producer import FillReport
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings, command_line
from embedcache.train.train import TrainReport, train

T = TypeVar("T")

LARGER_ENCODERS = ("timm:vit_base_patch14_dinov2.lvd142m", "st:all-roberta-large-v1")
"""Encoders of images and of texts that are downloaded from a hub."""

SOURCE = "openmoji:en+de+es+fr"
SEEDS = (0, 1, 2)
QUERIES = ("an animal with feathers", "something sweet to eat", "a way to travel over water")
NUM_HITS = 7
NUM_QUERIES = 5
NUM_CONCEPTS = 20
RECIPE = TrainSettings(recipe="auto")
CLOSED_FORM = TrainSettings(model=ModelSettings(projector="linear"), optimizer=OptimizerSettings(epochs=0))

_NUM_IMAGES = 24
_NUM_FAILURES = 20
_MIN_IMAGES = 20
"""Held-out images above which R@10 says something."""
_NOUNS = {"image": "image", "text": "caption"}
_SAMPLED_CAPTIONS = 100_000
_TOKEN = re.compile(r"[^\W_]+|[^\w\s]")
_MEDIA = frozenset().union(*MEDIA_SUFFIXES.values())


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One finished stage of the quickstart.

    Args:
        command: the shell command that does the same.
        outcome: the result in one line.
    """

    name: str
    command: str
    seconds: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class QuickstartReport:
    """Results of the quickstart.

    Args:
        data: the location of the data, as the user wrote it.
        missing: stages that were not possible, with the remedy.
        retrieval: recalls of the projectors, which come first, of the closed form and of the shuffled control; empty
            without a run.
        run_paths: runs; the page shows queries of the first. Empty if nothing could be trained.
        hits: query -> hits of the index. Without a run, queries are keys of images.
        coverage: number of images of each concept; None without a run.
        duplicates: images compared with each other.
    """

    data: str
    stages: Sequence[Stage]
    missing: Sequence[str]
    retrieval: Mapping[str, RetrievalReport]
    run_paths: Sequence[Path]
    hits: Mapping[str, Sequence[Hit]]
    coverage: CoverageReport | None
    duplicates: DedupAnalysis
    cache_path: Path
    index_path: Path
    peak_memory_bytes: int
    page_path: Path
    metrics_path: Path

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return the result of each stage."""
        return [f"{stage.name}: {stage.outcome}" for stage in self.stages]


def quickstart(
    data: str | Path,
    folder: Path | str,
    *,
    image_encoder: str = IMAGE_ENCODER,
    text_encoder: str = TEXT_ENCODER,
    progress: Progress | None = None,
) -> QuickstartReport:
    """Encode images and captions, align and evaluate them, index them, and write `report.html` and `metrics.json`.

    Features, runs and the index that already exist in the folder are reused. Without captions, or with too few to hold
    some out, there is no run, and the index finds similar images only. The data are never written to.

    Args:
        data: a folder, table or tar with images, or another location that `open_source` accepts.
        folder: folder of all results: a new folder, or the folder of an earlier quickstart of the same data.
        image_encoder: encoder of images; the default is packaged.
        text_encoder: encoder of captions and queries; the default is packaged.
        progress: also receives each command and outcome.

    Raises:
        PathError: the data do not exist, or the folder contains images, lies in the data, or is a cache, a run, an
            index or a study.
        SourceError: the data contain no image.

    Example:
        >>> from embedcache.quickstart.quickstart import quickstart
        >>> report = quickstart("openmoji:en", "embedcache-quickstart")  # doctest: +SKIP
        >>> report.page_path  # doctest: +SKIP
        PosixPath('embedcache-quickstart/report.html')
    """
    data = str(data)
    folder = Path(folder)
    _check_folder(data, folder)
    source = open_source(data)
    has_captions = _has_captions(source, data)
    is_demo = data.startswith("openmoji:")
    stages = _Stages(progress or NullProgress())
    stages.progress.note(
        f"encoders: {image_encoder} and {text_encoder}; the default ones are packaged, larger ones are downloaded: "
        f"--image-encoder {LARGER_ENCODERS[0]} --text-encoder {LARGER_ENCODERS[1]}"
    )

    # A text encoder without texts would be opened, and maybe downloaded, for nothing.
    cache_path = folder / "cache"
    encoders = {"image": image_encoder}
    if has_captions:
        encoders["text"] = text_encoder
    _extract(stages, data, source, cache_path, encoders)
    prototypes = _make_prototypes(stages, folder / "prototypes", image_encoder, text_encoder)

    # Too few captions are no reason to stop: search by image and duplicates need none.
    messages = []
    if not has_captions:
        messages.append(_without_captions(data, prototypes))
    runs: dict[str, list[Path]] = {}
    try:
        runs = _align(stages, cache_path, folder / "runs", prototypes, has_captions=has_captions, is_demo=is_demo)
    except (DataError, SettingError) as error:
        messages.append(
            f"No training, text search or coverage: {data} has too few captions to hold some out for a test. "
            f"embedcache train says: {error}"
        )

    retrieval = _evaluate(stages, cache_path, runs) if has_captions else {}

    # The runs of the projectors come first. Search, coverage and the page use the first of them.
    run_paths = next(iter(runs.values()), [])
    run_path = run_paths[0] if run_paths else None
    cache = Cache(cache_path)
    coverage = None
    queries: Sequence[str] = ()
    if run_path is not None:
        named_by = None if has_captions else prototypes
        coverage, queries = _cover(stages, cache, folder / "names.txt", run_path, named_by)
    index_path = folder / "index"
    hits = _search(stages, cache, index_path, run_path, QUERIES if is_demo else queries)

    duplicates = stages.run(
        "duplicates",
        ["curate", "dedup", cache_path],
        partial(analyze, cache_path, progress=stages.progress),
        DedupAnalysis.line,
    )
    report = QuickstartReport(
        data=data,
        stages=stages.finished,
        missing=messages,
        retrieval=retrieval,
        run_paths=run_paths,
        hits=hits,
        coverage=coverage,
        duplicates=duplicates,
        cache_path=cache_path,
        index_path=index_path,
        peak_memory_bytes=peak_memory_bytes(),
        page_path=folder / "report.html",
        metrics_path=folder / "metrics.json",
    )
    _write(report)
    return report


def _write(report: QuickstartReport) -> None:
    """Write the figures and the page."""
    metrics: dict[str, Any] = {"duplicates": report.duplicates.to_json()}
    if report.retrieval:
        trained, closed_form, shuffled = report.retrieval.values()
        metrics["retrieval"] = retrieval_json(trained, closed_form=closed_form, shuffled=shuffled)

    if report.coverage is not None:
        metrics["coverage"] = {}
        for concept in coverage_json(report.coverage)["concepts"]:
            metrics["coverage"][concept["name"]] = [concept["count"], concept["low"], concept["high"]]

    # The page comes last, because it shows the figures of the other file.
    write_record(report.metrics_path, metrics)
    write_page(report.page_path, present_quickstart(report))


def _check_folder(data: str, folder: Path) -> None:
    """Check that results do not lie among the data, or replace those of a study or another artifact."""
    # A single path on the command line is the folder, but the user may have meant the data.
    location = data if data != SOURCE else folder
    new = f"embedcache quickstart {quoted(location)} {quoted('embedcache-quickstart')}"
    if folder.is_dir():
        image = next((name for name in walk_files(folder) if has_suffix(name, _MEDIA)), None)
        if image is not None:
            raise PathError(
                f"{folder}: expected a folder for results, got one with images, such as {image}; name the data first, "
                f"then a new folder: {new}"
            )

    if folder.is_file() or folder.resolve().is_relative_to(Path(data).resolve()):
        raise PathError(f"{folder}: expected a folder for results outside the data, which stay as they are; use: {new}")

    try:
        kind = recognize(folder)
    except PathError:  # a new folder, or the folder of an earlier quickstart
        return
    raise PathError(
        f"{folder}: expected a new folder, or that of an earlier quickstart, got a finished {kind}; give the path of "
        "another folder"
    )


def _has_captions(source: Source, data: str) -> bool:
    """Return whether a sample has a caption, reading no further. Raise a SourceError if no sample has an image."""
    has_images = False
    has_captions = False
    for sample in source.samples():
        has_images = has_images or bool(sample.images)
        has_captions = has_captions or bool(sample.texts)
        # A source may have millions of samples, or be behind a network.
        if has_images and has_captions:
            break

    if not has_images:
        raise SourceError(f"{data}: expected images, got none; embedcache extract encodes other items")
    return has_captions


class _Stages:
    """The stages of the quickstart: runs each, reports its command, and records how long it took."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.finished: list[Stage] = []

    def run(self, name: str, words: Sequence[Any], call: Callable[[], T], summarize: Callable[[T], str]) -> T:
        command = _command(words)
        self.progress.note(f"$ {command}")

        started = time.perf_counter()
        result = call()

        stage = Stage(name=name, command=command, seconds=time.perf_counter() - started, outcome=summarize(result))
        self.finished.append(stage)
        self.progress.note(f"  {stage.outcome} ({stage.seconds:.1f} s)")
        return result


def _command(words: Sequence[Any]) -> str:
    """Return a command as a user types it in a shell."""
    return shlex.join(["embedcache", *map(str, words)])


def _extract(
    stages: _Stages, data: str, source: Source, cache_path: Path, encoders: Mapping[str, str], *, name: str = "extract"
) -> None:
    words = []
    for modality, spec in encoders.items():
        words += [f"--{modality}-encoder", spec]

    stages.run(
        name,
        ["extract", data, cache_path, *words],
        lambda: extract(source, cache_path, encoder=encoders, progress=stages.progress),
        lambda reports: "; ".join(map(FillReport.line, reports)),
    )


def _make_prototypes(stages: _Stages, path: Path, image_encoder: str, text_encoder: str) -> Path | None:
    """Store the classes of the image encoder as pairs. Return None if the encoder is not a classifier."""
    location = f"prototypes:{image_encoder}"
    try:
        _extract(stages, location, open_source(location), path, {"text": text_encoder}, name="extract prototypes")
    except SettingError as error:
        stages.progress.note(f"  no prototypes: {error}")
        return None
    return path


def _without_captions(data: str, prototypes: Path | None) -> str:
    """Return a message about the stages that need captions."""
    lacking = "training, text search, recall or coverage" if prototypes is None else "recall"
    return (
        f"No {lacking}: {data} has no captions. Put the caption of each image in a .txt file next to it, such as "
        "dog.txt next to dog.jpg, and name a new folder."
    )


def _align(
    stages: _Stages,
    cache_path: Path,
    folder: Path,
    prototypes: Path | None,
    *,
    has_captions: bool,
    is_demo: bool,
) -> dict[str, list[Path]]:
    """Train by the recipe, by a closed form of the pairs, and on shuffled pairs. Return the runs of each.

    Without captions, the only pairs are the prototypes, whose closed form is the one run.
    """
    if not has_captions:
        if prototypes is None:
            return {}
        settings = replace_fields(CLOSED_FORM, prototypes=prototypes)
        return {"prototypes": _train(stages, cache_path, folder / "seed", settings, SEEDS[:1])}

    # Only settings that differ from their defaults appear in the printed commands.
    language = {"language": "en"} if is_demo else {}
    settings = replace_fields(RECIPE, prototypes=prototypes, **language)
    closed_form = replace_fields(CLOSED_FORM, **language)
    shuffled = replace_fields(settings, shuffle_pairs=True)
    seeds = SEEDS if is_demo else SEEDS[:1]
    return {
        "projectors": _train(stages, cache_path, folder / "seed", settings, seeds),
        "closed form": _train(stages, cache_path, folder / "closed-form", closed_form, seeds),
        "shuffled pairs": _train(stages, cache_path, folder / "shuffled", shuffled, seeds),
    }


def _train(stages: _Stages, cache_path: Path, path: Path, settings: TrainSettings, seeds: Sequence[int]) -> list[Path]:
    """Train once per seed. Return the runs, whose names are `path` followed by the seed."""
    run_paths = []
    for seed in seeds:
        run_path = path.with_name(f"{path.name}-{seed}")
        seeded = replace_fields(settings, split=SplitSettings(seed=seed), seed=seed)
        stages.run(
            f"train {run_path.name}",
            ["train", cache_path, run_path, *command_line(seeded)],
            partial(train, cache_path, run_path, settings=seeded, progress=stages.progress),
            partial(TrainReport.line, run_path=run_path),
        )
        run_paths.append(run_path)
    return run_paths


def _evaluate(stages: _Stages, cache_path: Path, runs: Mapping[str, Sequence[Path]]) -> dict[str, RetrievalReport]:
    """Evaluate the runs of each recipe on the captions that were held out."""
    reports = {}
    for name, run_paths in runs.items():
        reports[name] = stages.run(
            f"evaluate {name}",
            ["evaluate", "retrieval", cache_path, *run_paths],
            partial(evaluate_retrieval, cache_path, run_paths),
            RetrievalReport.line,
        )
    return reports


def _search(
    stages: _Stages, cache: Cache, index_path: Path, run_path: Path | None, queries: Sequence[str]
) -> dict[str, list[Hit]]:
    """Build the index, and search it with queries. Without queries, search it with images."""
    card = stages.run(
        "index",
        ["curate", "index", cache.path, index_path, *([] if run_path is None else ["--run", run_path])],
        lambda: build_index(cache.path, index_path, IndexSettings(run=run_path), progress=stages.progress),
        lambda card: f"{pluralize(card.num_vectors, 'image')}, recall@10 {card.recall_at_10:.3f} against exact search",
    )

    # A small folder of images has fewer than the usual number of hits.
    k = min(NUM_HITS, card.num_vectors)
    words = list(queries)
    keys: list[str] = []
    if not queries:
        samples_N = cache.items("image", columns=["sample"])["sample"].to_numpy()[_image_rows(cache)]
        keys = list(map(cache.key, _draw(samples_N.tolist(), NUM_QUERIES)))
        for key in keys:
            words += ["--query-key", key]

    results = stages.run(
        "search",
        ["search", index_path, *words, "-k", k],
        lambda: search(index_path, Queries(texts=queries, keys=keys), SearchSettings(k=k)),
        _summarize_hits,
    )
    return {hits.query: list(hits) for hits in results}


def _summarize_hits(results: Sequence[Hits]) -> str:
    """Return each query with its best hit: the first caption, or the name of an image without captions."""
    outcomes = []
    for hits in results:
        best = hits[0]
        outcomes.append(f"{hits.query}: {best.captions[0] if best.captions else best.name}")
    return "; ".join(outcomes)


def _image_rows(cache: Cache) -> Ints:
    """Return the rows of all encoded images, ascending."""
    (feature, *_) = cache.features("image")
    return np.flatnonzero(feature.valid)


def _draw(values: Sequence[T], num: int) -> list[T]:
    """Draw values at random, the same in every process."""
    positions = np.random.default_rng(0).permutation(len(values))[:num]
    return [values[int(position)] for position in positions]


def _draw_captions(cache: Cache, run_path: Path, num: int, *, part: str | None = None) -> list[str]:
    """Draw different captions of a run's language, of all samples or of one part of its split."""
    texts = cache.items("text", columns=["sample", "text", "language"])
    is_used = pc.not_equal(pc.utf8_trim_whitespace(texts["text"]), "")
    language = Run.open(run_path).info.settings.get("language")
    if language not in (None, ANY_LANGUAGE):
        is_used = pc.and_(is_used, pc.equal(texts["language"], language))

    # Queries come from the test part: captions of training would be found too easily.
    if part is not None:
        is_in_part_S = read_split(run_path / SPLIT, [cache]).mask(part)
        is_used = pc.and_(is_used, pa.array(is_in_part_S[texts["sample"].to_numpy()]))

    # Captions that repeat would be drawn several times.
    captions = texts["text"].filter(is_used).unique()
    sampled: list[str] = captions.take(pa.array(_draw(range(len(captions)), num))).to_pylist()
    return sampled


def _cover(
    stages: _Stages, cache: Cache, names_path: Path, run_path: Path, prototypes: Path | None
) -> tuple[CoverageReport | None, list[str]]:
    """Measure how many images show each concept: frequent things in captions, or the classes of prototypes.

    Also return queries. They are held-out captions, or the classes that most images certainly show.
    """
    if prototypes is None:
        names = frequent_things(_draw_captions(cache, run_path, _SAMPLED_CAPTIONS))
        queries = _draw_captions(cache, run_path, NUM_QUERIES, part="test")
    else:
        names = Cache(prototypes).column("class").unique().to_pylist()
        queries = []

    # Names that the user has written into the file stay.
    if not names_path.is_file():
        if not names:
            return None, queries
        write_atomic(names_path, ("\n".join(names) + "\n").encode())

    k = min(NUM_HITS, len(_image_rows(cache)))
    settings = CoverageSettings(run=run_path, k=k, min_count=1)
    coverage = stages.run(
        "coverage",
        ["curate", "coverage", cache.path, names_path, "--run", run_path, "-k", k, "--min-count", 1],
        lambda: measure_coverage(cache.path, names_path, settings, progress=stages.progress),
        CoverageReport.line,
    )
    return coverage, queries or _most_certain(coverage)


def _most_certain(coverage: CoverageReport) -> list[str]:
    """Return the concepts that most images certainly show."""
    order = np.argsort(-coverage.pool_counts.certain, kind="stable")[:NUM_QUERIES]
    return [coverage.concepts.names[number] for number in order]


def frequent_things(captions: Sequence[str], num: int = NUM_CONCEPTS) -> list[str]:
    """Return the most frequent things in captions, the most frequent first.

    A thing is the last word of a phrase, which ends at a function word or a punctuation mark: `apple` and `table` in
    "a red apple on the kitchen table".

    Example:
        >>> frequent_things(["A red apple.", "an apple and a brown dog"])
        ['apple', 'dog']
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        # The period ends the last phrase of a caption without punctuation.
        tokens = [*_TOKEN.findall(caption.lower()), "."]
        things: list[str] = []
        for token, following in pairwise(tokens):
            if token not in things and _names_thing(token) and not _names_thing(following):
                things.append(token)
        counts.update(things)
    return [word for word, _ in counts.most_common(num)]


def _names_thing(token: str) -> bool:
    return token.isalpha() and len(token) > 1 and token not in STOP_WORDS


def present_quickstart(report: QuickstartReport) -> Presentation:
    """Return the presentation of the quickstart."""
    cache = Cache(report.cache_path)
    renderer = ItemRenderer(cache, "image")
    renderers = [renderer]
    sections = [_image_section(cache, renderer), _search_section(report, renderer)]

    trained = next(iter(report.retrieval.values()), None)
    if trained is not None:
        # Ranking is repeated for the page only, and only once for all of its sections.
        ranked = once(lambda: rank(cache, load_runs(report.run_paths[:1])[0]))
        queries, query_renderers = query_sections(cache, ("image", "text"), ranked)
        sections += [_retrieval_section(report), *_training_sections(report.run_paths), *queries]
        renderers += query_renderers

    if report.coverage is not None:
        edit = f"The concepts are in {report.page_path.with_name('names.txt')}: edit them, and run the command again."
        sections += concept_sections(report.coverage, renderer, num=NUM_CONCEPTS, notes=[edit])
    sections += [duplicate_section(report.duplicates, renderer), *_failure_sections(cache), _next_section(report)]
    sections.append(_stage_section(report))

    return Presentation(
        title="embedcache quickstart",
        lines=_lead(report, cache, trained),
        warnings=report.missing,
        tiles=[
            (f"{sum(stage.seconds for stage in report.stages):.0f} s", "total time"),
            (f"{report.peak_memory_bytes / 1e9:.2f} GB", "peak memory"),
            *(recall_tiles(trained) if trained else []),
            (f"{len(report.duplicates.removed(None)):,}", "images that are copies of others"),
        ],
        sections=sections,
        record=lambda: read_json(report.metrics_path),
        notes=[f"metrics: {report.metrics_path}", f"open {report.page_path} in a browser"],
        renderers=renderers,
    )


def _lead(report: QuickstartReport, cache: Cache, trained: RetrievalReport | None) -> list[str]:
    """Return sentences about the data, and about the meaning of the main recall."""
    counts = []
    for modality, word in _NOUNS.items():
        if num_items := cache.info.num_items.get(modality):
            counts.append(pluralize(num_items, word))
    items = f"{' and '.join(counts)} of {report.data}"
    if trained is None:
        aligned = ", and aligned with texts by the classes that it knows" if report.run_paths else ""
        return [f"{items}, encoded once by a frozen encoder{aligned}"]

    # Among few images, even a random ranking has the right one in its first ten.
    num_images = trained.num_items["image"][0]
    k = 10 if num_images > _MIN_IMAGES else 1
    recall = trained.recalls["t2i"][f"r@{k}"]
    chance = trained.chance["t2i"][f"r@{k}"]
    first = "first" if k == 1 else f"among the first {k}"
    return [
        f"{items}, encoded once by two frozen encoders that never saw each other, and aligned by a small projector",
        f"For {recall.value:.0%} of the captions held out from training (95% interval {recall.low:.0%} to "
        f"{recall.high:.0%}), their image is {first} of {num_images:,}; by chance {chance.value:.0%}",
    ]


def _image_section(cache: Cache, renderer: ItemRenderer) -> Section:
    rows_N = _image_rows(cache)
    shown_rows = sorted(_draw(rows_N.tolist(), _NUM_IMAGES))
    return Section(
        title="Images",
        notes=[f"{len(shown_rows)} of {len(rows_N):,}, drawn at random."],
        items=lambda: list(map(renderer.render, shown_rows)),
    )


def _search_section(report: QuickstartReport, renderer: ItemRenderer) -> Section:
    if report.retrieval:
        note = (
            "Queries in words and the most similar of all images, with their cosine. Captions that are queries were "
            "held out from training; green: an image with this caption."
        )
    elif report.run_paths:
        note = "Names of classes that the image encoder knows, and the most similar of all images, with their cosine."
    else:
        note = "Images as queries, and the most similar of all images, with their cosine."

    return Section(
        title="Search",
        notes=[note],
        examples=lambda: _hits_examples(report.hits, renderer),
    )


def _hits_examples(hits_by_query: Mapping[str, Sequence[Hit]], renderer: ItemRenderer) -> list[QueryExample]:
    examples = []
    for query, hits in hits_by_query.items():
        items = []
        for hit in hits:
            item = renderer.render(hit.row, is_correct=query in hit.captions)
            items.append(replace(item, text=format_fraction(hit.score)))
        examples.append(QueryExample(query=PageItem(text=query), outcome="", is_correct=True, results=items))
    return examples


def _retrieval_section(report: QuickstartReport) -> Section:
    """Return the recalls, with the recipes that were compared and those that validation chose."""
    trained, closed_form, shuffled = report.retrieval.values()
    run_reports = [Run.open(path).info.report for path in report.run_paths]
    recipe_names = [recipe["name"] for recipe in run_reports[0]["recipes"]]

    # Each run has its own split, so validation may choose another recipe for each.
    choices: Counter[str] = Counter()
    for run_report in run_reports:
        choices.update(recipe["name"] for recipe in run_report["recipes"] if recipe["is_chosen"])
    choice = ", ".join(f"{name} ({count} of {len(run_reports)})" for name, count in choices.items())

    notes = [
        f"Evaluated: {trained.line()}. Near-duplicate groups are never divided between training and test. The control "
        "is trained on shuffled pairs and must score at chance level. In brackets the 95% interval; for chance, the "
        "range that holds 95% of random rankings.",
        f"Compared: {', '.join(recipe_names)}. Validation chose {choice}, each with its own split and seed. The closed "
        "form is regularized CCA of the pairs alone.",
    ]
    if trained.unnamed:
        notes.append(NO_CLASS_NAMED)

    # A reader must not take a difference that chance explains for a merit of training.
    if _is_within_intervals(closed_form, trained):
        num_pairs = run_reports[0]["num_samples"]["train"]
        notes.append(
            "No recall of the closed form is outside the interval of the projectors: with "
            f"{pluralize(num_pairs, 'pair')}, this test does not show that they learn more than a linear map."
        )

    table = {
        f"projectors ({', '.join(choices)})": trained,
        "closed form": closed_form,
        "shuffled pairs": shuffled,
    }
    bars = {
        "projectors": trained.recalls,
        "closed form": closed_form.recalls,
        "shuffled pairs": shuffled.recalls,
        "chance": trained.chance,
    }
    return Section(
        title="Retrieval on the test split",
        notes=notes,
        table=retrieval_table(table),
        figures=lambda: [recall_bars(bars)],
    )


def _is_within_intervals(report: RetrievalReport, other: RetrievalReport) -> bool:
    """Return whether no recall of a report is outside the interval of another one."""
    for direction, intervals in other.recalls.items():
        for name, interval in intervals.items():
            if not interval.low <= report.recalls[direction][name].value <= interval.high:
                return False
    return True


def _training_sections(run_paths: Sequence[Path]) -> list[Section]:
    """Return the section of the training curves. Closed forms have no curve."""
    logs = {}
    for path in run_paths:
        lines = _read_log(path / "losses.jsonl")
        if any("loss" in line for line in lines):
            logs[path.name] = lines
    return [Section(title="Training", figures=lambda: [_training_curves(logs)])] if logs else []


def _read_log(path: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, path.read_text().splitlines())) if path.is_file() else []


def _training_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Draw training loss by step and validation recall by epoch, one line per run, as an SVG element."""
    loss_axes, recall_axes = open_axes(3, ncols=2)
    for (name, lines), color in zip(logs.items(), COLORS, strict=False):
        losses = {}
        recalls = {}
        for line in lines:
            # Steps and validations have lines of their own.
            if "loss" in line:
                losses[line["step"]] = line["loss"]
            if "validation" in line:
                recalls[line["epoch"]] = fmean(line["validation"].values())
        loss_axes.plot(list(losses), list(losses.values()), color=color, label=name)
        recall_axes.plot(list(recalls), list(recalls.values()), color=color, marker=".", label=name)

    label(loss_axes, "step", "training loss")
    label(recall_axes, "epoch (0: closed form)", "validation recall, mean of R@1, 5, 10")
    loss_axes.legend(frameon=False, labelcolor=INK)
    return svg(loss_axes.figure)


def _failure_sections(cache: Cache) -> list[Section]:
    """Return the section of items that could not be encoded, if there are any."""
    lines: list[str] = []
    for modality in cache.info.num_items:
        for feature in cache.features(modality):
            lines += failure_lines(cache, feature, num_shown=_NUM_FAILURES)
    lines += caption_error_lines(cache)
    return [Section(title="Files that could not be read", notes=lines)] if lines else []


def _next_section(report: QuickstartReport) -> Section:
    """Return commands to type next."""
    folder = report.page_path.parent
    commands: list[list[Any]] = []

    # Searching in words and exporting need a trained run.
    if report.run_paths:
        commands.append(["search", report.index_path, "a dog on a beach"])
    commands.append(["serve", report.index_path])
    commands.append(["curate", "dedup", report.cache_path, folder / "kept.parquet", "--cosine", 0.95])
    if report.run_paths:
        commands.append(["export", "transformers", report.run_paths[0], folder / "model"])

    image_encoder, text_encoder = LARGER_ENCODERS
    larger = ["quickstart", report.data, f"{folder}-larger"]
    commands.append([*larger, "--image-encoder", image_encoder, "--text-encoder", text_encoder])
    return Section(
        title="What to type next",
        notes=[
            "Search in words, open a search page in the browser, keep one of all near-duplicates, export the model, or "
            "use larger encoders, which are downloaded from a hub."
        ],
        code="\n".join(map(_command, commands)),
    )


def _stage_section(report: QuickstartReport) -> Section:
    """Return the table of the stages, which the terminal has already shown line by line."""
    rows = [[stage.name, f"{stage.seconds:.1f}", stage.command, stage.outcome] for stage in report.stages]
    return Section(title="Stages", table=(["stage", "seconds", "command", "outcome"], rows), num_printed=0)
