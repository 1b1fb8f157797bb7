"""Selecting samples of a cache: by a named method, or from other selections."""

import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
import pyarrow as pa
from pydantic_core import to_jsonable_python

from embedcache.curate.copies import choose_modality
from embedcache.curate.select.pool import Pool
from embedcache.curate.settings import SelectSettings
from embedcache.dataset.selections import Selection, read_selection_table, write_selection
from embedcache.errors import DataError, SettingError
from embedcache.files import AnyPath
from embedcache.outputs import check_table_output
from embedcache.parameters import bind, find_parameters
from embedcache.progress import AnyProgress, to_progress
from embedcache.registry import Registry, plugin_name
from embedcache.runs import PAIR, Run
from embedcache.settings import merge_settings, replace_fields
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import SelectOptions

SELECTORS = Registry(
    "method of selection",
    {
        "clip-score": "embedcache.curate.select.methods:clip_score",
        "hierarchical": "embedcache.curate.select.methods:hierarchical",
        "image-based": "embedcache.curate.select.methods:image_based",
        "k-center": "embedcache.curate.select.methods:k_center",
        "metaclip": "embedcache.curate.select.methods:metaclip",
        "random": "embedcache.curate.select.methods:random_draw",
        "rare-first": "embedcache.curate.select.methods:rare_first",
        "score": "embedcache.curate.select.methods:by_score",
        "top-score": "embedcache.curate.select.methods:top_score",
    },
    group="embedcache.selectors",
    arguments=1,
    has_parameters=True,
)
"""Each is a function `method(pool, **arguments) -> Selection`, whose rows ascend.

It names what it needs as keyword arguments, required ones without a default: `budget`, a whole number; `scores`,
`concepts` and `target`, opened; `run`, a path; `seed` and `device`. All other arguments are parameters of its name.
"""

_NEEDED = {
    "budget": "--budget COUNT",
    "scores": "--scores FILE, of curate score, curate outliers or another tool",
    "concepts": "--concepts CACHE, made by: embedcache extract prompts:concepts.txt CACHE --text-encoder SPEC",
    "target": "--target CACHE, with the features of the pool's encoder",
    "run": "--run RUN, a run of embedcache train",
}
_GIVEN = (*_NEEDED, "seed", "device")


@dataclass(frozen=True, kw_only=True)
class SelectReport:
    """A written selection.

    Args:
        path: path of the selection.
        num_selected: number of selected samples.
        num_pool: number of samples that could have been selected.
    """

    path: Path
    num_selected: int
    num_pool: int

    def line(self) -> str:
        """Describe the selection in one line."""
        fraction = self.num_selected / self.num_pool
        return f"{self.path}: {self.num_selected:,} of {self.num_pool:,} samples ({fraction:.1%})"


def select(
    cache: AnyPath,
    out: AnyPath,
    method: str,
    settings: SelectSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["SelectOptions"],
) -> SelectReport:
    """Select some samples of a cache and write the selection; the same arguments give the same selection.

    Args:
        cache: path or URL of the cache.
        out: Parquet file to write, or to replace.
        method: a name in `SELECTORS` or `module:attribute`, and parameters of it, such as `metaclip:head=100`.
        settings: how much is selected, by what, and from which samples.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in items.

    Raises:
        PathError: the file's name does not end in `.parquet`.
        UnknownNameError: there is no such method, parameter or feature.
        SettingError: a setting is missing or not used by the method, or the budget exceeds the pool.
        DataError: no sample passes.
        FingerprintError: the run, the concepts or the target have features of another encoder.
        UnfinishedError: chunks of a feature are missing.
    """
    out, settings = Path(out), merge_settings(SelectSettings, settings, options)
    progress = to_progress(progress)
    check_table_output("selection", out)
    bound = load_method(method)
    _check_inputs(method, bound, settings)

    modality = settings.modality or _default_modality(Cache(cache), bound, settings)
    pool = Pool(cache, modality, settings, progress=progress)
    num_pool = len(pool.samples)
    if isinstance(settings.budget, float):
        settings = replace_fields(settings, budget=max(1, round(settings.budget * num_pool)))
    if settings.budget is not None and settings.budget > num_pool:
        raise SettingError(f"budget: expected at most the {num_pool:,} samples of the pool, got {settings.budget:,}")
    selection = apply_method(bound, pool, settings)
    write_selection(out, pool.cache, selection, _record(method, bound, pool, settings), progress=progress)
    return SelectReport(path=out, num_selected=len(selection.rows), num_pool=num_pool)


def load_method(method: str) -> partial[Selection]:
    """Load a method of selection and bind the parameters that its text names."""
    return bind(SELECTORS, method, given=_GIVEN)


def named_inputs(bound: partial[Selection]) -> list[str]:
    """Return what a method takes of `budget`, `scores`, `concepts`, `target`, `run`, `seed` and `device`."""
    return [name for name in inspect.signature(bound.func).parameters if name in _GIVEN]


def apply_method(bound: partial[Selection], pool: Pool, settings: SelectSettings) -> Selection:
    """Call a method with those of its inputs that are set."""
    inputs = {}
    for name in named_inputs(bound):
        if getattr(settings, name) is not None:
            inputs[name] = getattr(pool if name in ("scores", "concepts", "target") else settings, name)
    return bound(pool, **inputs)


def _check_inputs(method: str, bound: partial[Selection], settings: SelectSettings) -> None:
    """Check that a method has all inputs that it needs, and uses all that are given, else raise `SettingError`."""
    arguments = inspect.signature(bound.func).parameters
    for name, needed in _NEEDED.items():
        is_required = name in arguments and arguments[name].default is inspect.Parameter.empty
        if is_required and getattr(settings, name) is None:
            raise SettingError(f"--method {method}: expected {needed}, got none")

    refused = {"budget", "scores", "concepts", "target"} - set(arguments)
    if "scores" in arguments:  # no features are read
        refused |= {"run", "feature", "modality"}
    for name in sorted(refused):
        value = getattr(settings, name)
        if value is not None:
            raise SettingError(f"--method {method}: expected no --{name}, got {value}; leave it out")


def _default_modality(cache: Cache, bound: partial[Selection], settings: SelectSettings) -> str:
    """Return the modality of the pool: text to compare with concepts, the run's first for its pairs, else images."""
    names = None if settings.run is None else Run.open(settings.run, kind=PAIR).modalities
    inputs = named_inputs(bound)
    if "run" in inputs and names is not None:
        return names[0]

    modality = "text" if "concepts" in inputs else "image"
    is_there = modality != "image" or bool(cache.info.num_items.get("image"))
    return modality if is_there and (names is None or modality in names) else choose_modality(cache, None, settings.run)


def _record(method: str, bound: partial[Selection], pool: Pool, settings: SelectSettings) -> dict[str, Any]:
    """Return what was selected by, as the metadata of the selection; with scores no vectors are compared."""
    known = find_parameters(SELECTORS, bound.func, given=_GIVEN)
    parameters = {name: item.default for name, item in known.items()} | bound.keywords
    has_scores = settings.scores is not None
    values = settings.to_json()
    names = ["budget", "seed"]
    names += ["score"] if has_scores else []
    names += ["label", "join_names"] if settings.concepts is not None else []
    return {
        "method": plugin_name(method),
        "settings": {**{name: values[name] for name in names}, **to_jsonable_python(parameters)},
        **({"scores": values["scores"]} if has_scores else {}),
        "modality": None if has_scores else pool.modality,
        "feature": None if has_scores else pool.feature,
        "within": values["selection"],
        **{name: values[name] for name in ("concepts", "target", "run")},
    }


def combine_selections(
    cache_path: Path | str,
    out_path: Path,
    first: Path,
    operation: Literal["and", "minus"],
    second: Path,
    *,
    progress: AnyProgress = None,
) -> int:
    """Write the samples of one selection that are also in another (`and`) or not (`minus`), and return their number.

    The columns are those of the first and, with `and`, of the second, with a `_2` after a name that both have. Progress
    is in samples.

    Raises `DataError` if a key is not in the cache, or no sample is left.
    """
    cache = Cache(cache_path)
    is_and = operation == "and"
    left = read_selection_table(first, [cache])
    right = read_selection_table(second, [cache], can_be_removed=not is_and)
    is_both_L = np.isin(left.rows, right.rows, assume_unique=True)
    places = np.flatnonzero(is_both_L if is_and else ~is_both_L)
    rows = left.rows[places]
    if not len(rows):
        raise DataError(
            f"{first} {operation} {second}: expected at least one sample, got none: they select {len(left.rows):,} and "
            f"{len(right.rows):,} samples of {cache.path}, {int(is_both_L.sum()):,} of them both"
        )
    table = left.columns.take(pa.array(places))
    columns = dict(zip(table.column_names, table.columns, strict=True))
    if is_and:
        other = right.columns.take(pa.array(np.searchsorted(right.rows, rows)))
        for name, values in zip(other.column_names, other.columns, strict=True):
            while name in columns:
                name += "_2"
            columns[name] = values
    record = {"method": operation, "selections": [str(first), str(second)]}
    selection = Selection(rows=rows, columns=columns)
    write_selection(out_path, cache, selection, record, progress=to_progress(progress))
    return len(rows)
