"""Selecting samples of a cache: by a named method, or from other selections."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa

from embedcache.curate.keep import choose_modality
from embedcache.curate.select.pool import Pool
from embedcache.curate.select.settings import SelectSettings
from embedcache.dataset.selections import Selection, read_selection_table, write_selection
from embedcache.errors import DataError, SettingError
from embedcache.files import AnyPath
from embedcache.outputs import check_table_output
from embedcache.progress import AnyProgress, to_progress
from embedcache.registry import Registry
from embedcache.runs import PAIR, Run
from embedcache.settings import merge_settings, replace_fields
from embedcache.store.cache import Cache

SELECTORS = Registry(
    "method of selection",
    {
        "clip-score": "embedcache.curate.select.baselines:ClipScoreSelector",
        "hierarchical": "embedcache.curate.select.cluster_methods:HierarchicalSelector",
        "image-based": "embedcache.curate.select.cluster_methods:ImageBasedSelector",
        "k-center": "embedcache.curate.select.cluster_methods:KCenterSelector",
        "metaclip": "embedcache.curate.select.concept_methods:MetaclipSelector",
        "random": "embedcache.curate.select.baselines:RandomSelector",
        "rare-first": "embedcache.curate.select.concept_methods:RareFirstSelector",
        "score": "embedcache.curate.select.baselines:ScoreSelector",
        "top-score": "embedcache.curate.select.baselines:TopScoreSelector",
    },
    group="embedcache.selectors",
    arguments=0,
)


class Selector(Protocol):
    """A method of selection.

    Attributes:
        accepts: settings of `METHOD_SETTINGS` that it uses; `seed` is always accepted.
        requires_one_of: settings of which exactly one must be set.
        modality: modality that it compares by default; `image` stands for the first that a cache without images has
            features of. None: none, or both of the run.
        required_inputs: `scores`, `concepts`, `target` and `run`, as far as the pool must have them. With `scores` no
            feature is read.
        uses_seed: whether the seed changes the result.
    """

    accepts: ClassVar[tuple[str, ...]]
    requires_one_of: ClassVar[tuple[str, ...]]
    modality: ClassVar[str | None]
    required_inputs: ClassVar[tuple[str, ...]]
    uses_seed: ClassVar[bool]

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select some samples of a pool, each once, in their order. `settings.budget` is a whole number, or None.

        Raises:
            DataError: no sample passes.
        """
        ...


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
    **options: Any,
) -> SelectReport:
    """Select some samples of a cache and write the selection; the same arguments give the same selection.

    Args:
        cache: path or URL of the cache.
        out: Parquet file to write, or to replace.
        method: a name in `SELECTORS`, or `module:attribute`.
        settings: how much is selected, by what, and from which samples.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in items.

    Raises:
        PathError: the file's name does not end in `.parquet`.
        UnknownNameError: there is no such method or feature.
        SettingError: a setting is missing or not used by the method, or the budget exceeds the pool.
        DataError: no sample passes.
        FingerprintError: the run, the concepts or the target have features of another encoder.
        UnfinishedError: chunks of a feature are missing.
    """
    out, settings = Path(out), merge_settings(SelectSettings, settings, options)
    progress = to_progress(progress)
    check_table_output("selection", out)
    selector: Selector = SELECTORS.load(method)()
    check_method_settings(method, selector, settings)
    modality = settings.modality or _default_modality(Cache(cache), selector, settings)
    pool = Pool(cache, modality, settings, progress=progress)
    num_pool = len(pool.samples)
    settings = replace_fields(settings, budget=_count_budget(settings.budget, num_pool))
    selection = selector.select(pool, settings)
    write_selection(out, pool.cache, selection, _record(method, pool, settings), progress=progress)
    return SelectReport(path=out, num_selected=len(selection.rows), num_pool=num_pool)


def _default_modality(cache: Cache, selector: Selector, settings: SelectSettings) -> str:
    """Return the modality of the pool: the method's, or, of a method that compares pairs, the run's first."""
    names = None if settings.run is None else Run.open(settings.run, kind=PAIR).modalities
    if selector.modality is None and names is not None:
        return names[0]
    modality = selector.modality or "image"
    is_there = modality != "image" or bool(cache.info.num_items.get("image"))
    return modality if is_there and (names is None or modality in names) else choose_modality(cache, None, settings.run)


def _count_budget(budget: int | float | None, num_pool: int) -> int | None:
    """Return a budget as a number of samples, of a fraction one at least; `SettingError` if the pool has fewer."""
    if isinstance(budget, float):
        budget = max(1, round(budget * num_pool))
    if budget is not None and budget > num_pool:
        raise SettingError(f"budget: expected at most the {num_pool:,} samples of the pool, got {budget:,}")
    return budget


def _record(method: str, pool: Pool, settings: SelectSettings) -> dict[str, Any]:
    """Return what was selected by, as the metadata of the selection; with scores no vectors are compared."""
    inputs = settings.inputs()
    return {
        "method": method,
        "settings": settings.method_json(),
        **({"scores": inputs["scores"]} if "scores" in inputs else {}),
        "modality": None if "scores" in inputs else pool.modality,
        "feature": None if "scores" in inputs else pool.feature,
        "within": None if settings.selection is None else str(settings.selection),
        **{name: inputs.get(name) for name in ("concepts", "target", "run")},
    }


_INPUTS = {
    "scores": "--scores FILE, of curate score, curate outliers or another tool",
    "concepts": "--concepts CACHE, made by: embedcache extract prompts:concepts.txt CACHE --text-encoder SPEC",
    "target": "--target CACHE, with the features of the pool's encoder",
    "run": "--run RUN, a run of embedcache train",
}


def check_method_settings(method: str, selector: Selector, settings: SelectSettings) -> None:
    """Check that a method uses all settings that are set and has all that it needs, else raise `SettingError`."""
    unused = [name for name in settings.method_settings if name not in selector.accepts]
    if unused:
        accepted = f"only {_options(selector.accepts)}" if selector.accepts else "no settings of its own"
        raise SettingError(f"--method {method}: expected {accepted}, got {_options(unused)}; leave it out")
    given = [name for name in selector.requires_one_of if name in settings.method_settings]
    if selector.requires_one_of and len(given) != 1:
        got = _options(given) if given else "none"
        raise SettingError(f"--method {method}: expected one of {_options(selector.requires_one_of)}, got {got}")
    inputs = settings.inputs()
    for name in selector.required_inputs:
        if name not in inputs:
            raise SettingError(f"--method {method}: expected {_INPUTS[name]}, got none")
    reads_features = "scores" not in selector.required_inputs
    refused = {name: path for name, path in inputs.items() if name != "run" or not reads_features}
    refused |= {} if settings.feature is None or reads_features else {"feature": settings.feature}
    for name, path in refused.items():
        if name not in selector.required_inputs:
            raise SettingError(f"--method {method}: expected no --{name}, got {path}; leave it out")
    if selector.modality is None and settings.modality is not None:
        compares = "as it compares both of the run's" if reads_features else "as it compares no items"
        raise SettingError(
            f"--method {method}: expected no --modality, {compares}, got {settings.modality}; leave it out"
        )


def _options(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


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
