"""Open the runs and the samples of an evaluation, and find samples that were seen in training.

Seeds of one recipe are averaged. An item was seen if training had equal bytes, an equal caption or a near-duplicate.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Bools, Ints, distinct
from embedcache.dataset.inputs import InputFeature, open_input
from embedcache.dataset.matches import ItemSet, find_equal, find_near
from embedcache.dataset.pairs import pair_items
from embedcache.dataset.selections import read_selection, read_selection_table
from embedcache.dataset.splits import Split, column_parts, read_split, read_split_cosines
from embedcache.errors import DataError, FingerprintError, PathError, SettingError, UnknownNameError
from embedcache.evaluate.settings import RetrievalSettings, ZeroShotSettings
from embedcache.files import AnyPath, find_named, one_or_many
from embedcache.modalities import IMPORTED_SOURCE
from embedcache.processes import AUTO, torch_device
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import check_same, digest
from embedcache.runs import PAIR, PROTOTYPES, SPLIT, Run
from embedcache.sources.open import IMPORT_TOGETHER
from embedcache.store.cache import Cache

RunPaths: TypeAlias = AnyPath | Sequence[AnyPath]
"""One run, or seeds of one recipe."""

_MAX_PRODUCTS = 2e10
_MIN_CHECKED = 200
_CONTROL = "shuffled pairs"
_NO_RUN = "expected at least one run to evaluate, got none"


def load_runs(run_paths: RunPaths, *, is_control: bool = False, device: str = AUTO) -> list[Run]:
    """Open seeds of one recipe, with their pairs on a device.

    Raises:
        SettingError: no run, two runs of one seed, a control that was not trained on shuffled pairs, or a missing
            device.
        FingerprintError: they differ in more than their seeds.
        PathError: a folder is not a finished run.
        CorruptError: weights have other bytes than were written.
    """
    device = str(torch_device(device))
    runs = _open_runs(run_paths, is_control=is_control, device=device)
    if not runs:
        raise SettingError(_NO_RUN)

    # Two runs of one seed are the same run, which would make the interval over seeds too small.
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise SettingError(f"expected runs of different seeds to average, got seeds {', '.join(map(str, seeds))}")

    # Averages over different recipes would mean nothing.
    first = runs[0]
    for run in runs[1:]:
        next_step = f"average only seeds of one recipe: evaluate {first.path} and {run.path} one by one"
        check_same(f"run {first.path}", first.recipe, run.recipe, next_step=next_step)
    return runs


def _open_runs(run_paths: RunPaths, *, is_control: bool, device: str = "cpu") -> list[Run]:
    runs = [Run.open(path, kind=PAIR, device=device) for path in one_or_many(run_paths)]
    for run in runs:
        if is_control and not run.is_control:
            raise SettingError(f"{run.path}: expected a control trained with --shuffle-pairs, got another run")
    return runs


def group_by_recipe(run_paths: RunPaths, *, is_control: bool = False) -> dict[str, list[Path]]:
    """Group runs by recipe: name -> paths, in the given order.

    If two runs of one recipe have the same seed, its runs are not averaged. Each is then a group.

    Raises:
        SettingError: a run is named twice.
    """
    runs = _open_runs(run_paths, is_control=is_control)
    paths = [run.path for run in runs]
    if len(set(paths)) < len(paths):
        raise SettingError(f"expected each run once, got {', '.join(map(str, paths))}")

    by_recipe: dict[str, list[Run]] = {}
    for run in runs:
        by_recipe.setdefault(digest(run.recipe), []).append(run)

    # Two runs of the same seed are not independent, so their average would say nothing about seeds.
    recipes: list[list[Path]] = []
    for group in by_recipe.values():
        group_paths = [run.path for run in group]
        seeds = {run.seed for run in group}
        if len(seeds) == len(group):
            recipes.append(group_paths)
        else:
            for path in group_paths:
                recipes.append([path])
    return _name_recipes(recipes)


def _name_recipes(recipes: Sequence[list[Path]]) -> dict[str, list[Path]]:
    """Return the recipes by the common part of their folders' names, else by these names, else by the paths."""
    # The number of a seed is left out: `run-0` -> `run`. But `r0` stays, as `r` may be any of several.
    names = []
    for paths in recipes:
        stems = [re.sub(r"[-_.]\d+$", "", path.name) or path.name for path in paths]
        names.append(", ".join(dict.fromkeys(stems)))

    # Runs of different studies may have the same folder names, so then their paths tell them apart.
    if len(set(names)) < len(names):
        get_name = attrgetter("name")
        folders = list(map(get_name, chain(*recipes)))
        is_unique = len(set(folders)) == len(folders)
        names = []
        for paths in recipes:
            names.append(", ".join(map(get_name if is_unique else str, paths)))
    return dict(zip(names, recipes, strict=True))


class RecipeRuns(NamedTuple):
    """Runs of one recipe, which differ only in the seed. A control was trained on shuffled pairs."""

    name: str
    run_paths: list[Path]
    is_control: bool


def iterate_recipes(run_paths: RunPaths, control_paths: RunPaths) -> Iterator[RecipeRuns]:
    """Iterate over the recipes of runs, then over the recipes of controls.

    Raises `SettingError` if there are none.
    """
    run_paths = one_or_many(run_paths)
    control_paths = one_or_many(control_paths)
    if not (run_paths or control_paths):
        raise SettingError(_NO_RUN)

    runs = group_by_recipe(run_paths)
    controls = group_by_recipe(control_paths, is_control=True)
    for name, paths in runs.items():
        yield RecipeRuns(name, paths, is_control=False)

    # A single control needs no name of its recipe.
    for name, paths in controls.items():
        is_clear = len(controls) == 1 and _CONTROL not in runs
        yield RecipeRuns(_CONTROL if is_clear else f"{_CONTROL}, {name}", paths, is_control=True)


def report_line(start: str, seeds: Sequence[int], scores: Sequence[float], name: str, warning: str | None) -> str:
    """Summarize a report in one line: its start, the seeds, the score of each if there are several, and a warning."""
    line = f"{start}; {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    if len(seeds) > 1:
        line += f" ({name} {', '.join(map('{:.3f}'.format, scores))})"
    line += "; 95% intervals over near-duplicate groups"
    return f"{line}; WARNING: {warning}" if warning else line


def run_input(cache: Cache, run: Run, modality: str) -> InputFeature:
    """Open the feature of a cache that a tower of a run was trained on, made by the same encoder."""
    expected = run.input(modality)
    try:
        feature = open_input(cache, modality, expected.feature)
        run.check_feature(modality, feature.name, feature.fingerprint)
    except (UnknownNameError, FingerprintError) as error:
        if expected.fingerprint.get("family") == cache.info.source.get("type") == IMPORTED_SOURCE:
            raise type(error)(f"{error}; {IMPORT_TOGETHER}") from None
        raise
    return feature


class EvalSplit(NamedTuple):
    """The samples that a run is evaluated on.

    Args:
        part: description of the part and its split.
        samples: (M,) rows of the sample table, ascending.
        groups: (S,) int64 number of the near-duplicate group of each sample of the cache.
    """

    part: str
    samples: Ints
    groups: Ints


def read_eval_split(cache: Cache, run: Run, part: str | None = None, selection: Path | str | None = None) -> EvalSplit:
    """Select the samples of a cache to evaluate a run on, only samples of a selection if one is given.

    For a cache that the run was trained on, the run's split decides. For any other cache, the column `split` decides.
    If there is no such column, all samples are used. If the part is None, it is `test`, or `all` of another cache
    without such a part.

    Raises:
        CorruptError: the run's split differs from the one it was trained on.
        DataError: there is no such part, or none of its samples is in the selection.
        PathError: there is no such selection.
    """
    # The run's split keeps training samples out. The column of the cache may divide them in another way.
    if was_trained_on(run, cache):
        split = read_run_split(run, cache)
        rows = np.arange(len(split.parts)) if part == "all" else split.rows(part or "test")
        how = f" ({split.line()})" if split.line() else ""
        evaluated = EvalSplit(f"part {part or 'test'} of the run's split{how}", rows, np.array(split.groups))
    else:
        evaluated = read_part(cache, part)
    if selection is None:
        return evaluated

    rows = np.intersect1d(evaluated.samples, read_selection(selection, [cache]), assume_unique=True)
    if not len(rows):
        raise DataError(
            f"selection {selection}: expected samples of {evaluated.part}, got none; check --part, or select others"
        )
    return evaluated._replace(part=f"{evaluated.part}, within {selection}", samples=rows)


def read_part(cache: Cache, part: str | None = None) -> EvalSplit:
    """Select samples by the column `split`. If the part is None, it is `test`, or `all` without such a part.

    Raises:
        DataError: there is no such part.
    """
    names = cache.column("split") if "split" in cache.columns else pa.chunked_array([], pa.string())
    groups = np.arange(cache.info.num_samples)
    rows = np.flatnonzero(pc.equal(column_parts(names), part or "test"))

    # A cache that was collected only for evaluation has no parts.
    if part == "all" or (part is None and not len(rows)):
        return EvalSplit("all samples", np.setdiff1d(groups, cache.removed, assume_unique=True), groups)

    if not len(rows):
        values = sorted(map(str, pc.unique(names.drop_null()).to_pylist()))
        reason = f"its column split holds {', '.join(values)}" if values else "it has no column split"
        raise DataError(f"{cache.path}: expected {part} samples, got none, as {reason}; use --part all")
    return EvalSplit(f"split {part or 'test'} of {cache.path.name}", rows, groups)


def was_trained_on(run: Run, cache: Cache) -> bool:
    """Return whether a run was trained on a cache."""
    return any(map(cache.info.has_rows_of, run.info.index_digest.split("+")))


def read_run_split(run: Run, cache: Cache) -> Split:
    """Read the split of a run for one of its caches."""
    return read_split(run.path / SPLIT, [cache])


def read_run_selection(run: Run, cache: Cache) -> Ints | None:
    """Return the samples of a cache that the selection of a run contains, None without a selection."""
    path = run.selection_path
    if path is None:
        return None
    return read_selection_table(path, [cache], can_be_others=True, can_be_removed=True).rows


def read_class_names(run: Run) -> "ClassNames | None":
    """Return the names of the classes that a run was trained with as prototypes, None without prototypes."""
    if PROTOTYPES not in run.info.files:
        return None
    return ClassNames(run.file(PROTOTYPES).read_text(encoding="utf-8").splitlines())


class ClassNames:
    """Names of classes to find in captions, with synonyms separated by commas.

    Example:
        >>> ClassNames(["tabby, tabby cat", "bus"]).are_in(["Two tabby cats.", "a busy street"])
        array([ True, False])
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.num_classes = len(lines)
        self._names: set[tuple[str, ...]] = set()
        for line in lines:
            self._names.update(map(_words, line.split(",")))
        self._names.discard(())

        # Only runs of words of these lengths are looked up, which keeps the search linear in the text.
        self._lengths = sorted(set(map(len, self._names)))

    def are_in(self, texts: Iterable[str]) -> Bools:
        """Return whether each text contains a name as whole words, in any case, singular or plural: (N,) bool."""
        return np.array(list(map(self._is_in, map(_words, texts))), bool)

    def _is_in(self, words: tuple[str, ...]) -> bool:
        for length in self._lengths:
            for start in range(len(words)):
                if words[start : start + length] in self._names:
                    return True
        return False


def _words(text: str) -> tuple[str, ...]:
    # Without a final s, a plural equals its singular.
    return tuple(word.removesuffix("s") for word in re.findall(r"\w+", text.lower()))


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Numbers of evaluated samples that were seen in training.

    Args:
        exact: samples with an item that is in the training part, byte for byte.
        num_checked: samples that were compared by cosine, drawn at random if there are many.
        near: checked samples with an item that equals one of the training part, or is closer to it than `cosines`.
        not_compared: training caches that could not be opened.
        cosines: thresholds by modality.
    """

    num_samples: int
    exact: int
    num_checked: int
    near: int
    not_compared: Sequence[str] = ()
    cosines: Mapping[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """Summarize the overlap in one line."""
        parts = []
        if self.num_checked:
            limits = ", ".join(f"{name} > {cosine}" for name, cosine in self.cosines.items())
            parts.append(
                f"seen in training: {self.exact:,} of {self.num_samples:,} exactly, {self.near:,} of "
                f"{self.num_checked:,} nearly (cosine {limits})"
            )
        if self.not_compared:
            paths = ", ".join(self.not_compared)
            parts.append(f"not compared with missing training caches: {paths}; name their new path with --trained-on")
        return "; ".join(parts)

    @property
    def warning(self) -> str | None:
        """Warning that the results are too high, or None."""
        return self.line() if self.exact or self.near else None


def largest_overlap(overlaps: Iterable[Overlap | None]) -> Overlap | None:
    """Return the largest overlap of several runs, or None."""
    return max(filter(None, overlaps), key=lambda overlap: (overlap.exact, overlap.near), default=None)


def find_overlap(
    run: Run,
    cache: Cache,
    evaluated: Mapping[str, ItemSet],
    settings: RetrievalSettings | ZeroShotSettings,
    *,
    progress: Progress | None = None,
) -> Overlap | None:
    """Compare evaluated items of a cache, by modality, with a run's training items, if the settings enable it.

    Near-duplicates are items above the cosine of the run's split. If there are many samples, some are drawn at random
    (seed 0), so that the comparison lasts seconds. Memory: the compared vectors, and tiles of their cosines. Progress
    is in items of the training part.
    """
    if not settings.check_overlap or (settings.part == "train" and was_trained_on(run, cache)):
        return None

    caches, absent_paths = _open_training_caches(run, cache, settings.trained_on)
    # A run without training pairs has seen no sample.
    if not (caches or absent_paths):
        return None

    # No selected sample of a cache may be in the training part.
    trained = []
    for training_cache in caches:
        items = training_items(run, training_cache)
        if items:
            trained.append(items)
    cosines = read_split_cosines(run.path / SPLIT)
    return measure_overlap(evaluated, trained, cosines, not_compared=absent_paths, progress=progress)


def measure_overlap(
    evaluated: Mapping[str, ItemSet],
    trained: Sequence[Mapping[str, ItemSet]],
    cosines: Mapping[str, float],
    *,
    not_compared: Sequence[str] = (),
    progress: Progress | None = None,
) -> Overlap:
    """Compare evaluated items, by modality, with the training items of each cache. See `find_overlap`."""
    sample_arrays = [item_set.items.samples for item_set in evaluated.values()]
    samples = distinct(np.concatenate(sample_arrays))

    # Cosines of all samples of a large part would take hours, so some are drawn.
    count = min(len(samples), _num_affordable(evaluated, trained) if trained else 0)
    checked = np.sort(np.random.default_rng(0).choice(samples, count, replace=False))
    cosines = {modality: cosines[modality] for modality in evaluated}

    # Copies are searched among all items, as hashes are cheap, and near-duplicates only among the drawn ones.
    exact = set[int]()
    near = set[int]()
    for modality, item_set in evaluated.items():
        part = item_set._replace(items=item_set.items.select(checked))
        for items in trained:
            copies, _ = find_equal(item_set, items[modality])
            exact |= set(item_set.items.samples[copies >= 0].tolist())
            nearest = find_near(
                part, items[modality], cosines[modality], all_pairs=True, progress=progress or NullProgress()
            )
            near |= set(part.items.samples[nearest.sims > cosines[modality]].tolist())

    return Overlap(
        num_samples=len(samples),
        exact=len(exact),
        num_checked=len(checked),
        near=len(near | (exact & set(checked.tolist()))),
        not_compared=list(not_compared),
        cosines=cosines,
    )


def _open_training_caches(run: Run, cache: Cache, paths: Sequence[str]) -> tuple[list[Cache], list[str]]:
    """Open the caches that a run was trained on, and return the paths of the caches that are missing.

    A cache is recognized by its index digest. The evaluated cache is tried first, then `paths`, then the path that was
    recorded when the run was trained.
    """
    moved_caches = list(map(Cache, paths))
    for moved_cache in moved_caches:
        if not was_trained_on(run, moved_cache):
            raise DataError(
                f"{moved_cache.path}: expected a cache that run {run.path} was trained on, got another; name the "
                "caches it was trained on"
            )

    # Caches that grew since have other digests, but still contain the rows.
    index_digests = run.info.index_digest.split("+") if run.info.index_digest else []
    recorded_paths = run.info.caches[: len(index_digests)]
    caches = []
    absent_paths = []
    for index_digest, path in zip_longest(index_digests, recorded_paths, fillvalue="an unnamed cache"):
        for candidate in chain([cache], moved_caches, _open_recorded(run, path)):
            if candidate.info.has_rows_of(index_digest):
                caches.append(candidate)
                break
        else:
            absent_paths.append(path)
    return caches, absent_paths


def _open_recorded(run: Run, path: str) -> Iterator[Cache]:
    """Open a cache at the path that was recorded in training, if it is still there."""
    with suppress(PathError):
        yield Cache(find_named(path, run.path, "cache"))


def training_items(run: Run, cache: Cache) -> Mapping[str, ItemSet]:
    """Return the training items of a run in one of its caches, by modality. Empty if there are none.

    Their contents are not numbered.
    """
    # The split covers all samples of the cache, but only the selected ones were trained on.
    rows = np.flatnonzero(read_run_split(run, cache).mask("train"))
    if (selected := read_run_selection(run, cache)) is not None:
        rows = np.intersect1d(rows, selected, assume_unique=True)
    if not len(rows):
        return {}

    first_modality, second_modality = run.info.inputs
    first = run_input(cache, run, first_modality)
    second = run_input(cache, run, second_modality)
    language = run.info.settings.get("language")
    pairs = pair_items([cache], [first], [second], language=language, is_numbered=False).select(rows)
    return {first.modality: ItemSet(first, pairs.first), second.modality: ItemSet(second, pairs.second)}


def _num_affordable(evaluated: Mapping[str, ItemSet], trained: Sequence[Mapping[str, ItemSet]]) -> int:
    """Return how many samples can be compared within seconds."""
    products_per_sample = 0
    for modality, item_set in evaluated.items():
        for items in trained:
            products_per_sample += item_set.feature.width * len(items[modality].items.rows)
    return max(_MIN_CHECKED, int(_MAX_PRODUCTS / max(1, products_per_sample)))
