"""The runs that are evaluated, and the samples they are evaluated on. Seeds of one recipe are averaged."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Ints
from embedcache.dataset.inputs import InputFeature, open_input
from embedcache.dataset.selections import read_selection_table
from embedcache.dataset.splits import Split, column_parts, read_split
from embedcache.devices import AUTO, torch_device
from embedcache.errors import DataError, FingerprintError, SettingError, UnknownNameError
from embedcache.files import AnyPath, one_or_many
from embedcache.provenance import check_same, digest
from embedcache.runs import PAIR, SPLIT, Run
from embedcache.samples import IMPORTED_SOURCE
from embedcache.sources.open import IMPORT_TOGETHER
from embedcache.store.cache import Cache

RunPaths: TypeAlias = AnyPath | Sequence[AnyPath]
"""One run, or seeds of one recipe."""

_CONTROL = "shuffled pairs"
_NO_RUN = "expected at least one run to evaluate, got none"


def load_runs(run_paths: RunPaths, *, is_control: bool = False, device: str = AUTO) -> list[Run]:
    """Open seeds of one recipe, with their pairs on a device.

    Raises:
        SettingError: no run, two of one seed, a control that was not trained on shuffled pairs, or a missing device.
        FingerprintError: they differ in more than their seeds.
        PathError: a folder is not a finished run.
        CorruptError: weights have other bytes than were written.
    """
    device = str(torch_device(device))
    runs = _open_runs(run_paths, is_control=is_control, device=device)
    if not runs:
        raise SettingError(_NO_RUN)

    first, *others = runs
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise SettingError(f"expected runs of different seeds to average, got seeds {', '.join(map(str, seeds))}")
    for run in others:
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
    """Group runs by recipe: name -> seeds, in the given order.

    Runs of one recipe of which two have the same seed are not averaged: each is a group.

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
    recipes: list[list[Path]] = []
    for group in by_recipe.values():
        is_averaged = len({run.seed for run in group}) == len(group)
        recipes += [[run.path for run in group]] if is_averaged else [[run.path] for run in group]
    return _name_recipes(recipes)


class RecipeRuns(NamedTuple):
    """Runs of one recipe, which differ only in the seed, or the same of a control trained on shuffled pairs."""

    name: str
    run_paths: list[Path]
    is_control: bool


def iterate_recipes(run_paths: RunPaths, control_paths: RunPaths) -> Iterator[RecipeRuns]:
    """Iterate over the recipes of runs, then over those of controls.

    SettingError if there are none.
    """
    run_paths, control_paths = one_or_many(run_paths), one_or_many(control_paths)
    if not (run_paths or control_paths):
        raise SettingError(_NO_RUN)
    runs = group_by_recipe(run_paths)
    controls = group_by_recipe(control_paths, is_control=True)
    for name, paths in runs.items():
        yield RecipeRuns(name, paths, is_control=False)
    for name, paths in controls.items():
        is_clear = len(controls) == 1 and _CONTROL not in runs
        yield RecipeRuns(_CONTROL if is_clear else f"{_CONTROL}, {name}", paths, is_control=True)


def report_line(start: str, seeds: Sequence[int], scores: Sequence[float], name: str, warning: str | None) -> str:
    """Summarize a report in one line: its start, the seeds with the score of each if there are several, a warning."""
    line = f"{start}; {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    if len(seeds) > 1:
        line += f" ({name} {', '.join(f'{score:.3f}' for score in scores)})"
    return "; ".join([f"{line}; 95% intervals over near-duplicate groups", *filter(None, [warning])])


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


def read_eval_split(cache: Cache, run: Run, part: str | None = None) -> EvalSplit:
    """Select the samples of a cache to evaluate a run on.

    For a cache that the run was trained on, the run's split decides; for any other the column `split`, if there is
    one, or else all samples. The part None is `test`, or `all` of another cache without such a part.

    Raises:
        CorruptError: the run's split differs from the one it was trained on.
        DataError: there is no such part.
    """
    if was_trained_on(run, cache):
        split = read_run_split(run, cache)
        rows = np.arange(len(split.parts)) if part == "all" else split.rows(part or "test")
        return EvalSplit(f"part {part or 'test'} of the run's split", rows, np.array(split.groups))
    return read_part(cache, part)


def read_part(cache: Cache, part: str | None = None) -> EvalSplit:
    """Select samples by the column `split`. The part None is `test`, or `all` without such a part.

    Raises:
        DataError: there is no such part.
    """
    names = cache.column("split") if "split" in cache.columns else pa.chunked_array([], pa.string())
    groups = np.arange(cache.info.num_samples)
    rows = np.flatnonzero(pc.equal(column_parts(names), part or "test"))
    if part == "all" or (part is None and not len(rows)):
        return EvalSplit("all samples", np.setdiff1d(groups, cache.removed, assume_unique=True), groups)
    if not len(rows):
        known = sorted(map(str, pc.unique(names.drop_null()).to_pylist()))
        reason = f"its column split holds {', '.join(known)}" if known else "it has no column split"
        raise DataError(f"{cache.path}: expected {part} samples, got none, as {reason}; use --part all")
    return EvalSplit(f"split {part or 'test'} of {cache.path.name}", rows, groups)


def was_trained_on(run: Run, cache: Cache) -> bool:
    """Return whether a cache is one of those that a run was trained on."""
    return any(map(cache.info.has_rows_of, run.info.index_digest.split("+")))


def read_run_split(run: Run, cache: Cache) -> Split:
    """Read the split of a run for one of its caches."""
    return read_split(run.path / SPLIT, [cache])


def read_run_selection(run: Run, cache: Cache) -> Ints | None:
    """Return the samples of a cache that the selection of a run contains; None without a selection."""
    path = run.selection_path
    if path is None:
        return None
    return read_selection_table(path, [cache], can_be_others=True, can_be_removed=True).rows


def _name_recipes(recipes: Sequence[list[Path]]) -> dict[str, list[Path]]:
    """Return the recipes by name: what the names of their folders share, or else these names, or else the paths."""
    # without the number of a seed: `run-0` -> `run`; but `r0` stays, as `r` may be any of several
    stems = [[re.sub(r"[-_.]\d+$", "", path.name) or path.name for path in paths] for paths in recipes]
    names = [", ".join(dict.fromkeys(stem)) for stem in stems]
    if len(set(names)) < len(names):
        folders = [path.name for paths in recipes for path in paths]
        is_unique = len(set(folders)) == len(folders)
        names = [", ".join(path.name if is_unique else str(path) for path in paths) for paths in recipes]
    return dict(zip(names, recipes, strict=True))
