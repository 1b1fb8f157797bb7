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
from embedcache.evaluate.retrieval import Ranking, RetrievalReport, evaluate_retrieval, rank
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
from embedcache.search.search import Hit, search
from embedcache.search.settings import IndexSettings, SearchSettings
from embedcache.settings import replace_fields
from embedcache.sources.files import MEDIA_SUFFIXES, has_suffix, walk_files
from embedcache.sources.open import open_source
from embedcache.store.cache import Cache, caption_error_lines
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
    """One finished stage of the quickstart, the shell command that does the same, and its result in one line."""

    name: str
    command: str
    seconds: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class QuickstartReport:
    """Results of the quickstart.

    Args:
        data: what was encoded, as it was named.
        missing: what could not be done, and what to do about it.
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
        folder: where everything is written: a new folder, or that of an earlier quickstart of the same data.
        image_encoder: encoder of images; the default is packaged, as is that of texts.
        text_encoder: encoder of captions and queries.
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
    data, folder = str(data), Path(folder)
    _check_folder(data, folder)
    source = open_source(data)
    has_captions = _has_captions(source, data)
    is_demo = data.startswith("openmoji:")
    stages = _Stages(progress or NullProgress())
    stages.progress.note(
        f"encoders: {image_encoder} and {text_encoder}; the default ones are packaged, larger ones are downloaded: "
        f"--image-encoder {LARGER_ENCODERS[0]} --text-encoder {LARGER_ENCODERS[1]}"
    )
    cache_path = folder / "cache"
    encoders = {"image": image_encoder, **({"text": text_encoder} if has_captions else {})}
    _extract(stages, data, source, cache_path, encoders)

    prototypes = _make_prototypes(stages, folder / "prototypes", image_encoder, text_encoder)
    missing = [] if has_captions else [_without_captions(data, prototypes)]
    runs: dict[str, list[Path]] = {}
    try:
        if has_captions:
            runs = _train_all(stages, cache_path, folder / "runs", prototypes, is_demo=is_demo)
        elif prototypes is not None:
            settings = replace_fields(CLOSED_FORM, prototypes=prototypes)
            runs = {"prototypes": _train(stages, cache_path, folder / "runs" / "seed", settings, SEEDS[:1])}
    except (DataError, SettingError) as error:
        missing.append(
            f"No training, text search or coverage: {data} has too few captions to hold some out for a test. What "
            f"embedcache train says: {error}"
        )
    retrieval = {
        name: stages.run(
            f"evaluate {name}",
            ["evaluate", "retrieval", cache_path, *run_paths],
            partial(evaluate_retrieval, cache_path, run_paths),
            RetrievalReport.line,
        )
        for name, run_paths in runs.items()
        if has_captions
    }

    run_paths = next(iter(runs.values()), [])
    run_path = run_paths[0] if run_paths else None
    cache = Cache(cache_path)
    coverage = None
    queries: Sequence[str] = ()
    if run_path is not None:
        coverage, queries = _cover(stages, cache, folder / "names.txt", run_path, None if has_captions else prototypes)
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
        missing=missing,
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
        concepts = coverage_json(report.coverage)["concepts"]
        metrics["coverage"] = {each["name"]: [each["count"], each["low"], each["high"]] for each in concepts}
    write_record(report.metrics_path, metrics)
    write_page(report.page_path, present_quickstart(report))


def _check_folder(data: str, folder: Path) -> None:
    """Check that results do not lie among the data, or replace those of a study or another artifact."""
    new = f"embedcache quickstart {quoted(data if data != SOURCE else folder)} {quoted('embedcache-quickstart')}"
    image = next((name for name in walk_files(folder) if has_suffix(name, _MEDIA)), None) if folder.is_dir() else None
    if image is not None:
        raise PathError(
            f"{folder}: expected a folder for results, got one with images, such as {image}; name the data first, then "
            f"a new folder: {new}"
        )
    if folder.is_file() or folder.resolve().is_relative_to(Path(data).resolve()):
        raise PathError(f"{folder}: expected a folder for results outside the data, which stay as they are; use: {new}")
    try:
        kind = recognize(folder)
    except PathError:  # of anything else
        return
    raise PathError(
        f"{folder}: expected a new folder, or that of an earlier quickstart, got a finished {kind}; give the path of "
        "another folder"
    )


def _has_captions(source: Source, data: str) -> bool:
    """Return whether a sample has a caption, reading no further; raise a SourceError if no sample has an image."""
    has_images = has_captions = False
    for sample in source.samples():
        has_images = has_images or bool(sample.images)
        has_captions = has_captions or bool(sample.texts)
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
        command = shlex.join(["embedcache", *map(str, words)])
        self.progress.note(f"$ {command}")
        started = time.perf_counter()
        result = call()
        stage = Stage(name=name, command=command, seconds=time.perf_counter() - started, outcome=summarize(result))
        self.finished.append(stage)
        self.progress.note(f"  {stage.outcome} ({stage.seconds:.1f} s)")
        return result


def _extract(
    stages: _Stages, data: str, source: Source, cache_path: Path, encoders: Mapping[str, str], *, name: str = "extract"
) -> None:
    words = [word for modality, spec in encoders.items() for word in (f"--{modality}-encoder", spec)]
    stages.run(
        name,
        ["extract", data, cache_path, *words],
        lambda: extract(source, cache_path, encoder=encoders, progress=stages.progress),
        lambda reports: "; ".join(report.line() for report in reports),
    )


def _make_prototypes(stages: _Stages, path: Path, image_encoder: str, text_encoder: str) -> Path | None:
    """Store the classes of the image encoder as pairs; return None if it is no classifier."""
    location = f"prototypes:{image_encoder}"
    try:
        _extract(stages, location, open_source(location), path, {"text": text_encoder}, name="extract prototypes")
    except SettingError as error:
        stages.progress.note(f"  no prototypes: {error}")
        return None
    return path


def _without_captions(data: str, prototypes: Path | None) -> str:
    """Return what cannot be done without captions."""
    lacking = "training, text search, recall or coverage" if prototypes is None else "recall"
    return (
        f"No {lacking}: {data} has no captions. Put a .txt file with a caption beside images, such as dog.txt beside "
        "dog.jpg, and name a new folder."
    )


def _train_all(
    stages: _Stages, cache_path: Path, folder: Path, prototypes: Path | None, *, is_demo: bool
) -> dict[str, list[Path]]:
    """Train by the recipe, a closed form of the pairs alone, and the control; return the runs of each."""
    # Only what is set appears in the printed commands.
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
    """Train once per seed and return the runs: `path` followed by the seed."""
    run_paths = [path.with_name(f"{path.name}-{seed}") for seed in seeds]
    for seed, run_path in zip(seeds, run_paths, strict=True):
        seeded = replace_fields(settings, split=SplitSettings(seed=seed), seed=seed)
        stages.run(
            f"train {run_path.name}",
            ["train", cache_path, run_path, *command_line(seeded)],
            partial(train, cache_path, run_path, settings=seeded, progress=stages.progress),
            partial(TrainReport.line, run_path=run_path),
        )
    return run_paths


def _search(
    stages: _Stages, cache: Cache, index_path: Path, run_path: Path | None, queries: Sequence[str]
) -> dict[str, list[Hit]]:
    """Build the index, and search it with queries, or without any with images."""
    of_run = [] if run_path is None else ["--run", run_path]
    card = stages.run(
        "index",
        ["curate", "index", cache.path, index_path, *of_run],
        lambda: build_index(cache.path, index_path, IndexSettings(run=run_path), progress=stages.progress),
        lambda card: f"{pluralize(card.num_vectors, 'image')}, recall@10 {card.recall_at_10:.3f} against exact search",
    )
    k = min(NUM_HITS, card.num_vectors)
    if queries:
        asked, words = Queries(texts=queries), list(queries)
    else:
        samples_N = cache.items("image", columns=["sample"])["sample"].to_numpy()[_image_rows(cache)]
        keys = [cache.key(sample) for sample in _draw(samples_N.tolist(), NUM_QUERIES)]
        asked, words = Queries(keys=keys), [word for key in keys for word in ("--query-key", key)]
    results = stages.run(
        "search",
        ["search", index_path, *words, "-k", k],
        lambda: search(index_path, asked, SearchSettings(k=k)),
        lambda results: "; ".join(f"{hits.query}: {(*hits[0].captions, hits[0].name)[0]}" for hits in results),
    )
    return {hits.query: list(hits) for hits in results}


def _image_rows(cache: Cache) -> Ints:
    """Return the rows of all encoded images, ascending."""
    (feature, *_) = cache.features("image")
    return np.flatnonzero(feature.valid)


def _draw(values: Sequence[T], num: int) -> list[T]:
    """Draw values at random, the same in every process."""
    chosen = np.random.default_rng(0).permutation(len(values))[:num]
    return [values[int(position)] for position in chosen]


def _draw_captions(cache: Cache, run_path: Path, num: int, *, part: str | None = None) -> list[str]:
    """Draw different captions of a run's language, of all samples or of one part of its split."""
    texts = cache.items("text", columns=["sample", "text", "language"])
    is_used = pc.not_equal(pc.utf8_trim_whitespace(texts["text"]), "")
    language = Run.open(run_path).info.settings.get("language")
    if language not in (None, ANY_LANGUAGE):
        is_used = pc.and_(is_used, pc.equal(texts["language"], language))
    if part is not None:
        is_in_part_S = read_split(run_path / SPLIT, [cache]).mask(part)
        is_used = pc.and_(is_used, pa.array(is_in_part_S[texts["sample"].to_numpy()]))
    captions = texts["text"].filter(is_used).unique()
    drawn: list[str] = captions.take(pa.array(_draw(range(len(captions)), num))).to_pylist()
    return drawn


def _cover(
    stages: _Stages, cache: Cache, names_path: Path, run_path: Path, prototypes: Path | None
) -> tuple[CoverageReport | None, list[str]]:
    """Measure how many images show each concept: frequent things in captions, or the classes of prototypes.

    Names that the user has written into the file stay. Also return queries: held-out captions, or the classes that most
    images certainly show.
    """
    if prototypes is None:
        names = frequent_things(_draw_captions(cache, run_path, _SAMPLED_CAPTIONS))
        queries = _draw_captions(cache, run_path, NUM_QUERIES, part="test")
    else:
        names = Cache(prototypes).column("class").unique().to_pylist()
        queries = []
    if not names_path.is_file():
        if not names:
            return None, queries
        write_atomic(names_path, "".join(f"{name}\n" for name in names).encode())

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
        tokens = [*_TOKEN.findall(caption.lower()), "."]
        ends = [one for one, following in pairwise(tokens) if _names_thing(one) and not _names_thing(following)]
        counts.update(list(dict.fromkeys(ends)))
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
        queries, query_renderers = query_sections(cache, ("image", "text"), once(lambda: _rank_first(report, cache)))
        sections += [_retrieval_section(report), *_training_sections(report.run_paths), *queries]
        renderers += query_renderers
    if report.coverage is not None:
        edit = f"The concepts are in {report.page_path.with_name('names.txt')}: edit them, and run the command again."
        sections += concept_sections(report.coverage, renderer, num=NUM_CONCEPTS, notes=[edit])
    sections += [duplicate_section(report.duplicates, renderer), *_failure_sections(cache), _next_section(report)]

    stages = [[stage.name, f"{stage.seconds:.1f}", stage.command, stage.outcome] for stage in report.stages]
    sections.append(Section(title="Stages", table=(["stage", "seconds", "command", "outcome"], stages), num_printed=0))
    num_items = cache.info.num_items
    counts = " and ".join(pluralize(num_items[name], word) for name, word in _NOUNS.items() if num_items.get(name))
    return Presentation(
        title="embedcache quickstart",
        lines=_lead(report, counts, trained),
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


def _lead(report: QuickstartReport, counts: str, trained: RetrievalReport | None) -> list[str]:
    """Return what was done, and what the main recall means."""
    if trained is None:
        aligned = ", and aligned with texts by the classes that it knows" if report.run_paths else ""
        return [f"{counts} of {report.data}, encoded once by a frozen encoder{aligned}"]
    num_images = trained.num_items["image"][0]
    k = 10 if num_images > _MIN_IMAGES else 1
    found, chance = (recalls["t2i"][f"r@{k}"] for recalls in (trained.recalls, trained.chance))
    first = "first" if k == 1 else f"among the first {k}"
    return [
        f"{counts} of {report.data}, encoded once by two frozen encoders that never saw each other, and aligned by a "
        "small projector",
        f"For {found.value:.0%} of the captions held out from training (95% interval {found.low:.0%} to "
        f"{found.high:.0%}), their image is {first} of {num_images:,}; by chance {chance.value:.0%}",
    ]


def _image_section(cache: Cache, renderer: ItemRenderer) -> Section:
    rows_N = _image_rows(cache)
    drawn = sorted(_draw(rows_N.tolist(), _NUM_IMAGES))
    return Section(
        title="Images",
        notes=[f"{len(drawn)} of {len(rows_N):,}, drawn at random."],
        items=lambda: [renderer.render(row) for row in drawn],
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
        examples=lambda: [_hits_example(query, hits, renderer) for query, hits in report.hits.items()],
    )


def _hits_example(query: str, hits: Sequence[Hit], renderer: ItemRenderer) -> QueryExample:
    results = [
        replace(renderer.render(hit.row, is_correct=query in hit.captions), text=format_fraction(hit.score))
        for hit in hits
    ]
    return QueryExample(query=PageItem(text=query), outcome="", is_correct=True, results=results)


def _retrieval_section(report: QuickstartReport) -> Section:
    """Return the recalls, with the recipes that were compared and what validation chose."""
    trained, closed_form, shuffled = report.retrieval.values()
    infos = [Run.open(path).info for path in report.run_paths]
    recipes = infos[0].report["recipes"]
    compared = ", ".join(recipe["name"] for recipe in recipes)
    chosen = [next(recipe["name"] for recipe in info.report["recipes"] if recipe["is_chosen"]) for info in infos]
    choice = ", ".join(f"{name} ({chosen.count(name)} of {len(chosen)})" for name in dict.fromkeys(chosen))
    notes = [
        f"Evaluated: {trained.line()}. Near-duplicate groups are never divided between training and test. The control "
        "is trained on shuffled pairs and must score at chance level. In brackets the 95% interval; for chance, the "
        "range that holds 95% of random rankings.",
        f"Compared: {compared}. Validation chose {choice}, each with its own split and seed. The closed form is "
        "regularized CCA of the pairs alone.",
    ]
    if trained.unnamed:
        notes.append(NO_CLASS_NAMED)
    if _is_within_intervals(closed_form, trained):
        num_pairs = infos[0].report["num_samples"]["train"]
        notes.append(
            "No recall of the closed form is outside the interval of the projectors: with "
            f"{pluralize(num_pairs, 'pair')}, this test does not show that they learn more than a linear map."
        )
    table = {f"projectors ({', '.join(dict.fromkeys(chosen))})": trained, "closed form": closed_form}
    recalls = {name: result.recalls for name, result in report.retrieval.items()}
    return Section(
        title="Retrieval on the test split",
        notes=notes,
        table=retrieval_table({**table, "shuffled pairs": shuffled}),
        figures=lambda: [recall_bars({**recalls, "chance": trained.chance})],
    )


def _is_within_intervals(report: RetrievalReport, other: RetrievalReport) -> bool:
    """Return whether no recall of a report is outside the interval of another one."""
    return all(
        interval.low <= report.recalls[direction][name].value <= interval.high
        for direction, intervals in other.recalls.items()
        for name, interval in intervals.items()
    )


def _rank_first(report: QuickstartReport, cache: Cache) -> Ranking:
    return rank(cache, load_runs(report.run_paths[:1])[0])


def _training_sections(run_paths: Sequence[Path]) -> list[Section]:
    """Return the section of the training curves; none of closed forms."""
    logs = {path.name: _read_log(path / "losses.jsonl") for path in run_paths}
    trained_logs = {name: lines for name, lines in logs.items() if any("loss" in line for line in lines)}
    if not trained_logs:
        return []
    return [Section(title="Training", figures=lambda: [_training_curves(trained_logs)])]


def _read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _training_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Draw training loss by step and validation recall by epoch, one line per run, as an SVG element."""
    loss_axes, recall_axes = open_axes(3, ncols=2)
    for (name, lines), color in zip(logs.items(), COLORS, strict=False):
        losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        recalls = [(line["epoch"], fmean(line["validation"].values())) for line in lines if "validation" in line]
        loss_axes.plot(*zip(*losses, strict=True), color=color, label=name)
        recall_axes.plot(*zip(*recalls, strict=True), color=color, marker=".", label=name)
    label(loss_axes, "step", "training loss")
    label(recall_axes, "epoch (0: closed form)", "validation recall, mean of R@1, 5, 10")
    loss_axes.legend(frameon=False, labelcolor=INK)
    return svg(loss_axes.figure)


def _failure_sections(cache: Cache) -> list[Section]:
    """Return the section of what could not be encoded, if anything."""
    features = [feature for modality in cache.info.num_items for feature in cache.features(modality)]
    lines = [line for feature in features for line in failure_lines(cache, feature, num_shown=_NUM_FAILURES)]
    lines += caption_error_lines(cache)
    return [Section(title="Files that could not be read", notes=lines)] if lines else []


def _next_section(report: QuickstartReport) -> Section:
    """Return commands to type next."""
    cache, index, folder = report.cache_path, report.index_path, report.page_path.parent
    query = [] if not report.run_paths else [["search", index, "a dog on a beach"]]
    commands: list[list[Any]] = [
        *query,
        ["serve", index],
        ["curate", "dedup", cache, folder / "kept.parquet", "--cosine", 0.95],
        *([["export", "transformers", report.run_paths[0], folder / "model"]] if report.run_paths else []),
        [
            *("quickstart", report.data, f"{folder}-larger"),
            *("--image-encoder", LARGER_ENCODERS[0], "--text-encoder", LARGER_ENCODERS[1]),
        ],
    ]
    return Section(
        title="What to type next",
        notes=[
            "Search in words, open a search page in the browser, keep one of all near-duplicates, export the model, or "
            "use larger encoders, which are downloaded from a hub."
        ],
        code="\n".join(shlex.join(["embedcache", *map(str, words)]) for words in commands),
    )
