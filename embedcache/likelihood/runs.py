"""Runs of one likelihood on the tasks of a file: training, tuning and evaluation, as the command line does them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import Split, check_split, column_parts, read_split
from embedcache.dataset.splitting import split_samples
from embedcache.devices import AUTO
from embedcache.errors import DataError, SettingError
from embedcache.evaluate.likelihood import BLIND, SHUFFLED, TaskReport, evaluate_task, trained_on
from embedcache.evaluate.runs import group_modules_by_recipe
from embedcache.evaluate.settings import LikelihoodEvalSettings
from embedcache.likelihood.tasks import NamedTask, TaskFile, is_about_items, naming, open_task, parts_of
from embedcache.networks.saved import ModuleConfig, read_module_config
from embedcache.networks.words import Vocabulary
from embedcache.progress import NullProgress, Progress
from embedcache.projectors.saved import split_path
from embedcache.store.cache import Cache
from embedcache.store.columns import Column, to_array
from embedcache.train.examples import WordTable, open_word_table
from embedcache.train.likelihood import LikelihoodRecipe, start_from, train_likelihood
from embedcache.train.likelihood_tasks import ExampleTask
from embedcache.train.modules import ModuleReport
from embedcache.train.parts import ALL_PARTS, parse_sources
from embedcache.train.settings import FitSettings, LikelihoodSettings

_SIZES = ("width", "num_layers", "num_heads", "feed_forward")


def train_tasks(
    cache_path: Path | str,
    run_path: Path | str,
    settings: LikelihoodSettings,
    fit: FitSettings | None = None,
    *,
    split: SplitSettings | None = None,
    progress: Progress | None = None,
) -> ModuleReport:
    """Train the tasks of a file together into a run folder; resumed if interrupted, reused if finished.

    `fit.parts.init_from` with a run alone, not `PART=RUN`, starts from all of it, and the network has its sizes.

    Args:
        cache_path: cache of the tasks that name none.
        run_path: folder of the run.
        settings: task file, word table and sizes.
        fit: optimizer, parts, seed and machine.
        split: how samples are split, for examples without a column `split`; None: by the column `split` of the cache,
            or by a hash of the key if it has none. The split is kept in the run.

    Raises:
        SettingError: no task file or word table is named; or a setting does not fit.
        PathError, DataError, UnknownNameError: a file, cache or feature is missing or is not what was expected; errors
            of a task begin with its name.
        FingerprintError: the folder holds a run with other settings or examples.
    """
    fit = fit or FitSettings()
    if settings.task_file is None or settings.words is None:
        name, example = ("task_file", "tasks.toml") if settings.task_file is None else ("words", "words/")
        raise SettingError(f"{name}: expected a path such as {example}, got none; name it to train tasks")
    recipe, fit = _make_recipe(settings, fit)
    words = open_word_table(Cache(settings.words), settings.word_feature)
    file = TaskFile(settings.task_file, Cache(cache_path), memory_bytes=fit.machine.memory)
    splits = _split_caches(file, split)
    tasks = [open_task(file, task, words, splits.get(file.cache_of(task).info.index_digest)) for task in file.tasks]
    _note_unknown(tasks, words, progress or NullProgress())
    return train_likelihood(
        tasks, words, run_path, recipe, fit, split=_join(splits) if splits else None, progress=progress
    )


def _make_recipe(settings: LikelihoodSettings, fit: FitSettings) -> tuple[LikelihoodRecipe, FitSettings]:
    """Return the recipe of a new network, or of the run that it starts from; then all parts of that run are named."""
    sizes = {name: getattr(settings, name) for name in _SIZES}
    whole = parse_sources(fit.parts.init_from).get(ALL_PARTS)
    if whole is None:
        recipe = LikelihoodRecipe(
            model=sizes, num_prompts=settings.num_prompts, steps_per_epoch=settings.steps_per_epoch
        )
        return recipe, fit
    if len(fit.parts.init_from) > 1:
        raise SettingError(f"init_from: expected one run, or PART=RUN words, got {' '.join(fit.parts.init_from)}")
    defaults = LikelihoodSettings()
    changed = [name for name in _SIZES if sizes[name] != getattr(defaults, name)]
    if changed:
        raise SettingError(
            f"{changed[0]}: expected none with --init-from {whole}, whose sizes the network has, got "
            f"{sizes[changed[0]]}; omit it"
        )
    recipe, parts = start_from(
        whole,
        trainable=fit.parts.trainable,
        num_prompts=settings.num_prompts,
        steps_per_epoch=settings.steps_per_epoch,
    )
    return recipe, replace(fit, parts=parts)


def _split_caches(file: TaskFile, settings: SplitSettings | None) -> dict[str, Split]:
    """Split the samples of the caches with examples that do not say their part themselves: index digest -> split."""
    splits: dict[str, Split] = {}
    for task in file.tasks:
        with naming(task):
            table = file.table_of(task, task.table.examples)
            if "split" in table.column_names or not is_about_items(task, table):
                continue
            cache = file.cache_of(task)
            if task.table.validation is not None and settings is None and "split" not in cache.columns:
                continue
            if cache.info.index_digest not in splits:  # which a cache has by all of its paths
                chosen = settings or SplitSettings(kind="column" if "split" in cache.columns else "key")
                samples = np.setdiff1d(np.arange(cache.info.num_samples), cache.removed, assume_unique=True)
                splits[cache.info.index_digest] = split_samples([cache], samples, chosen)
    return splits


def _join(splits: Mapping[str, Split]) -> Split:
    """Return the splits of several caches as one, each sample with the digest of its cache."""
    tables = []
    for index_digest, split in splits.items():
        columns = {"key": to_array(split.keys, pa.string()), "part": to_array(split.parts, pa.string())}
        tables.append(pa.table({**columns, "digest": pa.repeat(index_digest, len(split.keys))}))
    joined = pa.concat_tables(tables)
    return Split(
        keys=Column(joined["key"]),
        parts=Column(joined["part"]),
        groups=Column(pa.array(np.arange(len(joined)))),
        index_digests=Column(joined["digest"]),
    )


def _note_unknown(tasks: Sequence[ExampleTask], words: WordTable, progress: Progress) -> None:
    """Report tasks with words that the word table lacks."""
    for task in tasks:
        fraction = task.train.unknown_fraction
        if fraction:
            progress.note(
                f"{task.name}: {fraction:.1%} of the words of its texts are not among the {len(words.vocabulary):,} of "
                "the word table, and are read as unknown"
            )


def evaluate_tasks(
    cache_path: Path | str,
    run_paths: Sequence[Path | str],
    task_file: Path | str,
    settings: LikelihoodEvalSettings | None = None,
    *,
    device: str = AUTO,
    progress: Progress | None = None,
) -> dict[str, dict[str, list[TaskReport]]]:
    """Evaluate runs on the tasks of a file, which they need not have been trained on.

    Candidates are those of the file, or those that a run was trained with for a task of that name and kind, or else
    the distinct targets of all its examples. A label head is used only for the candidates that it was trained with.

    Args:
        cache_path: cache of the tasks that name none.
        run_paths: runs of `train_likelihood`.
        task_file: the file.
        settings: the part that is read, controls, and how captions are written.
        progress: progress in tasks.

    Returns:
        Recipe -> task -> a report per seed.

    Raises:
        SettingError: there are no runs, or two of one recipe with the same seed.
        CorruptError: the split of a run is missing, or has changed.
        DataError: there are no examples of the part; or as `evaluate_task`. Errors of a task begin with its name.
    """
    settings, progress = settings or LikelihoodEvalSettings(), progress or NullProgress()
    if not run_paths:
        raise SettingError("expected at least one run to evaluate, got none")
    file = TaskFile(task_file, Cache(cache_path))
    progress.start("evaluate", len(file.tasks) * len(run_paths), "tasks")
    reports: dict[str, dict[str, list[TaskReport]]] = {}
    for name, paths in group_modules_by_recipe(run_paths, "shared").items():
        for path in paths:
            for task in file.tasks:
                with naming(task):
                    report = _evaluate(file, task, path, settings, device)
                reports.setdefault(name, {}).setdefault(task.name, []).append(report)
                progress.advance(1)
    progress.finish()
    return reports


def _evaluate(
    file: TaskFile, task: NamedTask, run_path: Path, settings: LikelihoodEvalSettings, device: str
) -> TaskReport:
    config = read_module_config(run_path, kind="shared")
    table = file.table_of(task, task.table.examples)
    has_split = "split" in table.column_names
    split = None if has_split else _split_of_run(file.cache_of(task), run_path, config)
    parts = parts_of(task, table, split)
    is_test = pc.equal(parts, "test")
    part = settings.part or ("test" if pc.any(is_test).as_py() else "all")
    chosen = table if part == "all" else table.filter(pc.equal(parts, part))
    if not len(chosen):
        raise DataError(f"expected {part} examples, got none among {len(table):,}; use --part all")
    vocabulary = Vocabulary(config.arguments["words"])
    examples = file.open(task, chosen, vocabulary)
    candidates = file.candidates_of(task)
    recorded = _recorded_candidates(task, config)
    if candidates is None or (recorded is not None and sorted(candidates) == sorted(recorded)):
        candidates = recorded  # in the order of the label head
    opened = ExampleTask(
        name=task.name,
        kind=task.table.kind,  # type: ignore[arg-type]  # read_task_file has checked it
        train=file.open(task, table, vocabulary) if candidates is None else examples,
        validation=examples,
        candidates=candidates,
        **{**task.options, "has_head": _has_head(task, candidates, config)},
    )
    controls = [SHUFFLED] if settings.shuffle_items and task.table.kind != "retrieve" else []
    if settings.omit_items and task.table.kind in ("answer", "masked"):
        controls.append(BLIND)
    report = evaluate_task(
        run_path,
        opened,
        examples,
        controls=controls if examples.media is not None else (),
        writing=settings.captions,
        seed=settings.seed,
        device=device,
    )
    if part == "all" and not report.was_seen:
        return replace(report, was_seen=_was_trained_on(file, task, table.filter(pc.equal(parts, "train")), config))
    return report


def _was_trained_on(file: TaskFile, task: NamedTask, table: pa.Table, config: ModuleConfig) -> bool:
    """Return whether a run was trained on these examples of a task, no more and no fewer."""
    try:
        return file.open(task, table, Vocabulary(config.arguments["words"])).digest in trained_on(config)
    except DataError:  # there are none, or none with the feature
        return False


def _split_of_run(cache: Cache, run_path: Path, config: ModuleConfig) -> Split | None:
    """Return the split of a cache that a run was trained on, or that of its column `split`; None: there is none."""
    path = split_path(run_path)
    if any(map(cache.info.has_rows_of, config.index_digest.split("+"))):
        check_split(path)
        if path.is_file():
            try:
                return read_split(path, [cache])
            except DataError:  # the run's split is one of its other caches
                return None
    if "split" not in cache.columns:
        return None
    keys, parts = cache.column("key"), column_parts(cache.column("split"))
    return Split(keys=Column(keys), parts=Column(parts), groups=Column(pa.array(np.arange(len(keys)))))


def _recorded_candidates(task: NamedTask, config: ModuleConfig) -> tuple[str, ...] | None:
    """Return the candidates of a task of that name and kind that a run, or one that it starts from, was trained on."""
    for recorded in (*config.training["tasks"], *config.training.get("earlier_tasks", ())):
        if (recorded["name"], recorded.get("kind")) == (task.name, task.table.kind) and recorded["candidates"]:
            return tuple(recorded["candidates"])
    return None


def _has_head(task: NamedTask, candidates: Sequence[str] | None, config: ModuleConfig) -> bool:
    """Return whether a run has a label head for exactly these candidates of a task."""
    if task.name not in config.arguments["heads"] or candidates is None:
        return False
    (trained,) = (recorded for recorded in config.training["tasks"] if recorded["name"] == task.name)
    return bool(trained.get("kind") == task.table.kind and trained["candidates"] == list(candidates))
