"""Select samples of a cache by a named method, or from other selections."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
import pyarrow as pa
from pydantic_core import to_jsonable_python

from embedcache.arrays import Bools, Floats, Ints, concatenated_ranges
from embedcache.curate.copies import choose_modality
from embedcache.curate.settings import SelectSettings
from embedcache.dataset.selections import (
    Score,
    Selection,
    read_scores,
    read_selection_table,
    write_selection,
)
from embedcache.dataset.vectors import Vectors
from embedcache.dataset.where import samples_within
from embedcache.errors import DataError, SettingError, UnknownNameError, summary
from embedcache.files import AnyPath
from embedcache.modalities import MODALITIES, name_pair, noun, pair_nouns
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress, watch
from embedcache.provenance import check_table_output
from embedcache.registry import Registry, bind, find_parameters, plugin_name
from embedcache.runs import PAIR, Run
from embedcache.search.concepts import Concepts, choose_feature, open_concepts
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

Its keyword arguments name its inputs, and a required input has no default. Inputs are `budget`, a whole number,
`scores`, `concepts` and `target`, which are opened, `run`, a path, `seed` and `device`. All other arguments are
parameters that the method's text can set, as in `metaclip:head=100`.
"""

_NEEDED = {
    "budget": "--budget COUNT",
    "scores": "--scores FILE, of curate score, curate outliers or another tool",
    "concepts": "--concepts FILE.txt, with one name per line",
    "target": "--target CACHE, with the features of the pool's encoder",
    "run": "--run RUN, a run of embedcache train",
}
_GIVEN = (*_NEEDED, "seed", "device")
_TEXTS_PER_BLOCK = 65_536


@dataclass(frozen=True, kw_only=True)
class SelectReport:
    """A written selection.

    Args:
        path: path of the selection.
        num_selected: number of selected samples.
        num_pool: number of samples that could have been selected.

    Example:
        >>> report = embedcache.select_samples("cache", "sixty.parquet", "random", budget=60, modality="text")
        >>> report.num_selected, report.num_pool
        (60, 600)
    """

    path: Path
    num_selected: int
    num_pool: int

    __repr__ = summary

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
    """Select some samples of a cache and write the selection. The same arguments give the same selection.

    Args:
        cache: path or URL of the cache.
        out: Parquet file to write, or to replace.
        method: a name in `SELECTORS` or `module:attribute`, with parameters such as `metaclip:head=100`.
        settings: the budget, the inputs of the method, and the samples to choose from.
        options: settings by their names on the command line, which replace those of `settings`.
        progress: progress in items.

    Raises:
        PathError: the file's name does not end in `.parquet`.
        UnknownNameError: there is no such method, parameter or feature.
        SettingError: a setting is missing or not used by the method, or the budget exceeds the pool.
        DataError: no sample passes.
        FingerprintError: the run, the concepts or the target have features of another encoder.
        UnfinishedError: chunks of a feature are missing.

    Example:
        >>> embedcache.select_samples("cache", "tenth.parquet", "random", budget=0.1, modality="text")
        tenth.parquet: 60 of 600 samples (10.0%)
    """
    out = Path(out)
    settings = merge_settings(SelectSettings, settings, options)
    progress = to_progress(progress)
    check_table_output("selection", out)
    bound = load_method(method)
    _check_inputs(method, bound, settings)

    modality = settings.modality or _default_modality(Cache(cache), bound, settings)
    pool = Pool(cache, modality, settings, progress=progress)
    num_pool = len(pool.samples)

    # A fraction is of the pool, whose size is known only now.
    if isinstance(settings.budget, float):
        settings = replace_fields(settings, budget=max(1, round(settings.budget * num_pool)))
    if settings.budget is not None and settings.budget > num_pool:
        raise SettingError(f"budget: expected at most the {num_pool:,} samples of the pool, got {settings.budget:,}")

    selection = apply_method(bound, pool, settings)
    write_selection(out, pool.cache, selection, _record(method, bound, pool, settings), progress=progress)
    return SelectReport(path=out, num_selected=len(selection.rows), num_pool=num_pool)


class Pool:
    """Samples of one cache from which a method selects.

    Vectors, captions, concepts and target are read when the method needs them.

    Args:
        cache_path: path or URL of the cache.
        modality: modality of the compared items.
        settings: feature, run, concepts, target, and the selection and the condition that limit the pool.
        progress: progress in items; methods report their own steps to it.

    Raises:
        UnknownNameError: no feature or several features have that name.
        UnfinishedError: chunks of the feature are missing.
        FingerprintError: the run was trained on other features.
        DataError: no sample of the selection has such an item.
    """

    def __init__(
        self,
        cache_path: AnyPath,
        modality: str,
        settings: SelectSettings | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        self.cache = Cache(cache_path)
        self.modality = modality
        self._settings = settings or SelectSettings()
        self.progress = progress or NullProgress()

    @cached_property
    def vectors(self) -> Vectors:
        """Vectors of the compared items. Without a feature in the settings, the feature shared with the concepts."""
        settings = self._settings
        feature = settings.feature
        if feature is None and settings.run is None and settings.concepts is not None:
            feature = choose_feature(self.cache.path, settings.concepts, self.modality, progress=self.progress)
        return Vectors(self.cache.path, self.modality, feature, settings.run, device=settings.device)

    @cached_property
    def feature(self) -> str | None:
        """Name of the feature of the vectors, None if none is set and the cache does not have exactly one.

        A random draw needs no feature.
        """
        try:
            return self.vectors.feature.name
        except UnknownNameError:
            if self._settings.feature is not None or self._settings.run is not None:
                raise
            return None

    @cached_property
    def _is_inside_S(self) -> Bools:
        """Whether each sample of the cache is in the selection and meets the condition of the settings: (S,)."""
        samples = samples_within([self.cache], self._settings.selection, self._settings.where)
        if samples is None:
            return np.ones(len(self.cache), bool)

        is_inside_S = np.zeros(len(self.cache), bool)
        is_inside_S[samples] = True
        return is_inside_S

    @cached_property
    def item_samples(self) -> Ints:
        """Sample of each item row, -1 if it is not in the pool: (N,) int64."""
        samples_N = self._samples_of(self.modality)
        return np.where(self._is_inside_S[samples_N], samples_N, -1)

    @cached_property
    def samples(self) -> Ints:
        """Samples of the pool that have such an item, or a score if there are scores, ascending: (S,) int64.

        Without a feature, any item of the modality counts.
        """
        if self._settings.scores is not None:
            has_value_S = np.isfinite(self.scores.values)
            thing = self.scores.name
        else:
            feature = self.feature  # chosen first, as the choice reports its own progress

            # The total is unknown: nearly all of the time goes into reading the commits.
            self.progress.start("finding samples", 0, "samples")
            rows = ~self.cache.removed_items(self.modality) if feature is None else self.vectors.rows
            has_value_S = np.zeros(len(self.cache), bool)
            has_value_S[self._samples_of(self.modality)[rows]] = True
            thing = noun(self.modality) if feature is None else f"{noun(self.modality)} of {feature}"
            self.progress.finish()

        samples: Ints = np.flatnonzero(has_value_S & self._is_inside_S)
        if not len(samples):
            origin = self._settings.selection or self._settings.scores or self.cache.path
            modalities = [name for name in MODALITIES if name != self.modality and self.cache.features(name)]
            step = f"; choose others with --modality: {', '.join(modalities)}" if modalities else ""
            raise DataError(f"{origin}: expected samples with {thing}, got none{step}")
        return samples

    @cached_property
    def scores(self) -> Score:
        """A score of each sample of the cache."""
        assert self._settings.scores is not None  # which the method requires
        return read_scores(self._settings.scores, self.cache, self._settings.score)

    @cached_property
    def concepts(self) -> Concepts:
        """Concepts in the space of the vectors."""
        settings = self._settings
        assert settings.concepts is not None  # which the method requires
        return open_concepts(
            settings.concepts,
            self.vectors,
            label=settings.label,
            join_names=settings.join_names,
            progress=self.progress,
        )

    @cached_property
    def target(self) -> Vectors:
        """Vectors of the target."""
        settings = self._settings
        assert settings.target is not None  # which the method requires
        name = self.vectors.feature.name
        return Vectors(settings.target, self.modality, name, settings.run, device=settings.device)

    def blocks(self, title: str) -> Iterator[tuple[Ints, Floats]]:
        """Iterate over all items once, chunk by chunk: the sample of each (B,), and its vector (B, P)."""
        for rows, vectors_BP in self.vectors.blocks(title, self.progress):
            samples = self.item_samples[rows]
            is_inside = samples >= 0
            yield samples[is_inside], vectors_BP[is_inside]

    def first_items(self) -> Ints:
        """Return the row of the first item of each of `samples`: (S,) int64."""
        _, first = np.unique(self.item_samples[self._rows], return_index=True)
        return self._rows[first]

    def sample(self, size: int, *, seed: int) -> Floats:
        """Read a random sample of the items, or all items if there are no more: (M, P)."""
        rows = np.random.default_rng(seed).permutation(self._rows)[:size]
        return self.vectors.read(np.sort(rows), self.progress)

    @cached_property
    def _rows(self) -> Ints:
        """Rows of all items, ascending."""
        return self.vectors.rows[self.item_samples[self.vectors.rows] >= 0]

    def texts(self) -> Iterator[tuple[Ints, list[str]]]:
        """Iterate over the captions of the pool: the sample of each (B,), and the captions. Memory: their table."""
        is_inside_S = np.zeros(self.cache.info.num_samples, bool)
        is_inside_S[self.samples] = True
        items = self.cache.items("text", columns=["sample", "text"])
        parts = (items.slice(start, _TEXTS_PER_BLOCK) for start in range(0, len(items), _TEXTS_PER_BLOCK))
        for block in watch(parts, self.progress, "reading captions", len(items), noun("text")):
            is_inside = is_inside_S[block["sample"].to_numpy()]
            captions = block.filter(pa.array(is_inside))
            yield captions["sample"].to_numpy().astype(np.int64), captions["text"].to_pylist()

    @property
    def pair(self) -> tuple[str, str]:
        """Modality of the pool, and the other one of the run, with which `pair_scores` compares it."""
        partner = self.vectors.other_modality
        if partner is None:
            raise SettingError("run: expected a run of two modalities, got none; give --run RUN")
        return self.modality, partner

    def pair_scores(self) -> tuple[Ints, Floats]:
        """Compare each item of the pool with its sample's items of the run's other modality, projected by the run.

        Returns samples with both, ascending, (M,) int64, and the best cosine of each, (M,) float32. Raises `DataError`
        if no sample has both.
        """
        pair = self.pair
        partners = Vectors(self.cache.path, pair[1], run_path=self._settings.run, device=self._settings.device)
        partner_samples = self._samples_of(pair[1])[partners.rows]

        # Items are in the order of their samples, so the partners of an item are a range.
        best = np.full(self.cache.info.num_samples, -np.inf, np.float32)
        for samples, vectors_BP in self.blocks("comparing {} with their {}".format(*pair_nouns(pair))):
            starts = np.searchsorted(partner_samples, samples)
            counts = np.searchsorted(partner_samples, samples, side="right") - starts
            item_M, partner_M = concatenated_ranges(starts, counts)
            if len(partner_M):
                cosines = np.einsum("mp,mp->m", vectors_BP[item_M], partners.read(partners.rows[partner_M]))
                np.maximum.at(best, samples[item_M], cosines)

        paired_samples = np.flatnonzero(np.isfinite(best))
        if not len(paired_samples):
            raise DataError(f"{self.cache.path}: expected samples with both {name_pair(pair)}, got none")
        return paired_samples, best[paired_samples]

    def _samples_of(self, modality: str) -> Ints:
        samples_N: Ints = self.cache.items(modality, columns=["sample"])["sample"].to_numpy()
        return samples_N


def load_method(method: str) -> partial[Selection]:
    """Load a method of selection and bind the parameters that its text names."""
    return bind(SELECTORS, method, given=_GIVEN)


def named_inputs(bound: partial[Selection]) -> list[str]:
    """Return the inputs of a method among `budget`, `scores`, `concepts`, `target`, `run`, `seed` and `device`."""
    return [name for name in inspect.signature(bound.func).parameters if name in _GIVEN]


def apply_method(bound: partial[Selection], pool: Pool, settings: SelectSettings) -> Selection:
    """Call a method with its inputs that are set."""
    inputs = {}
    for name in named_inputs(bound):
        if getattr(settings, name) is not None:
            inputs[name] = getattr(pool if name in ("scores", "concepts", "target") else settings, name)
    return bound(pool, **inputs)


def _check_inputs(method: str, bound: partial[Selection], settings: SelectSettings) -> None:
    """Raise `SettingError` if a method lacks a required input, or does not use one that is given."""
    arguments = inspect.signature(bound.func).parameters
    for name, option in _NEEDED.items():
        is_required = name in arguments and arguments[name].default is inspect.Parameter.empty
        if is_required and getattr(settings, name) is None:
            raise SettingError(f"--method {method}: expected {option}, got none")

    # An input that the method ignores would suggest a result that it does not have.
    refused = {"budget", "scores", "concepts", "target"} - set(arguments)
    if "scores" in arguments:  # no features are read
        refused |= {"run", "feature", "modality"}
    for name in sorted(refused):
        value = getattr(settings, name)
        if value is not None:
            raise SettingError(f"--method {method}: expected no --{name}, got {value}; leave it out")


def _default_modality(cache: Cache, bound: partial[Selection], settings: SelectSettings) -> str:
    """Return the modality of the pool: text for concepts, the run's first for its pairs, images otherwise."""
    names = None if settings.run is None else Run.open(settings.run, kind=PAIR).modalities
    inputs = named_inputs(bound)
    if "run" in inputs and names is not None:
        return names[0]

    modality = "text" if "concepts" in inputs else "image"
    is_there = modality != "image" or bool(cache.info.num_items.get("image"))
    return modality if is_there and (names is None or modality in names) else choose_modality(cache, None, settings.run)


def _record(method: str, bound: partial[Selection], pool: Pool, settings: SelectSettings) -> dict[str, Any]:
    """Return the method, its parameters and the settings, as the metadata of the selection."""
    declared = find_parameters(SELECTORS, bound.func, given=_GIVEN)
    parameters = {name: item.default for name, item in declared.items()} | bound.keywords

    # With scores, no vectors are compared, so there is no modality or feature.
    has_scores = settings.scores is not None
    return {
        "method": plugin_name(method),
        "parameters": to_jsonable_python(parameters),
        "settings": {name: value for name, value in settings.to_json().items() if value is not None},
        "modality": None if has_scores else pool.modality,
        "feature": None if has_scores else pool.feature,
    }


def combine_selections(
    cache: AnyPath,
    out: AnyPath,
    first: AnyPath,
    operation: Literal["and", "minus"],
    second: AnyPath,
    *,
    progress: AnyProgress = None,
) -> int:
    """Write the samples of one selection that are also in another (`and`) or not (`minus`), and return their number.

    The columns of the first selection are written. `and` adds the columns of the second, with `_2` after a name that
    both have.

    Args:
        cache: path or URL of the cache.
        out: a new `.parquet` file.
        first: a selection, or any list of keys that `read_selection` reads.
        operation: `and` keeps the samples of both, `minus` the samples that the second lacks.
        second: another selection.
        progress: progress in samples.

    Raises:
        DataError: a key is not in the cache, or no sample is left.
        PathError, CorruptError: see `read_selection` and `write_selection`.

    Example:
        >>> report = embedcache.select_samples("cache", "random.parquet", "random", budget=100, modality="text")
        >>> embedcache.combine_selections("cache", "both.parquet", "random.parquet", "and", "half.parquet") < 100
        True
    """
    cache = Cache(cache)
    is_and = operation == "and"

    # `minus` may name removed samples, as it leaves them out anyway.
    first_table = read_selection_table(str(first), [cache])
    second_table = read_selection_table(str(second), [cache], can_be_removed=not is_and)
    is_both_S = np.isin(first_table.rows, second_table.rows, assume_unique=True)
    places = np.flatnonzero(is_both_S if is_and else ~is_both_S)
    rows = first_table.rows[places]
    if not len(rows):
        raise DataError(
            f"{first} {operation} {second}: expected at least one sample, got none: they select "
            f"{len(first_table.rows):,} and {len(second_table.rows):,} samples of {cache.path}, "
            f"{int(is_both_S.sum()):,} of them both"
        )

    table = first_table.columns.take(pa.array(places))
    columns = dict(zip(table.column_names, table.columns, strict=True))
    if is_and:
        added = second_table.columns.take(pa.array(np.searchsorted(second_table.rows, rows)))
        for name, values in zip(added.column_names, added.columns, strict=True):
            while name in columns:
                name += "_2"
            columns[name] = values

    record = {"method": operation, "selections": [str(first), str(second)]}
    selection = Selection(rows=rows, columns=columns)
    write_selection(Path(out), cache, selection, record, progress=to_progress(progress))
    return len(rows)
