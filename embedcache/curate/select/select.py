"""Selecting samples of a cache by a named method, and writing down which and why.

What a method of selection is to the rest of the package.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from embedcache.curate.select.pool import Pool
from embedcache.dataset.selections import Selection, check_selection_path, write_selection
from embedcache.errors import SettingError
from embedcache.progress import Progress
from embedcache.registry import Registry

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
        "top-score": "embedcache.curate.select.baselines:TopScoreSelector",
    },
    group="embedcache.selectors",
)


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """How much to select, and how. A method refuses what it does not look at.

    Args:
        budget: samples to select; None where another setting decides.
        per_concept: samples of each concept, at most.
        threshold: cosine from which on a caption fits its image (`clip-score`) or an item a concept (`metaclip`).
        head: `metaclip`'s t: concepts with more samples are cut to about so many.
        clusters: centroids, finest level first; None is worked out from the number of samples.
        drawn: samples that `k-center` looks at; None is 20,000, or twice the budget where that is more.
        seed: of all that is drawn.
    """

    budget: int | None = None
    per_concept: int | None = None
    threshold: float | None = None
    head: float | None = None
    clusters: tuple[int, ...] | None = None
    drawn: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("budget", "per_concept", "head", "drawn"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise SettingError(f"{name.replace('_', ' ')} is {value}; it must be at least 1")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise SettingError(f"threshold is {self.threshold}; a cosine lies between -1 and 1")
        if self.clusters is not None and (not self.clusters or min(self.clusters) < 1):
            raise SettingError(f"clusters are {self.clusters}; give at least one number, each at least 1")
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"seed is {self.seed}; it must be at least 0 and below 2^32")

    @property
    def given(self) -> list[str]:
        """Names of the settings that were said, without `seed`."""
        names = ("budget", "per_concept", "threshold", "head", "clusters", "drawn")
        return [name for name in names if getattr(self, name) is not None]


class Selector(Protocol):
    """One method.

    Attributes:
        takes: settings that it looks at; `seed` is always allowed.
        needs_one_of: settings of which exactly one must be given.
        modality: `image` or `text`: what it looks at unless told otherwise; None: neither, or both.
        needs: `concepts`, `target` and `run`: what the pool must have.
        draws: whether the seed decides anything.
    """

    accepts: ClassVar[tuple[str, ...]]
    requires_one_of: ClassVar[tuple[str, ...]]
    modality: ClassVar[str | None]
    required_inputs: ClassVar[tuple[str, ...]]
    uses_seed: ClassVar[bool]

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select some samples of a pool, each once.

        Raises:
            DataError: nothing passes.
        """
        ...


def check_settings(method: str, selector: Selector, settings: SelectSettings) -> None:
    """Refuse settings that a method does not look at, and ask for those that it needs.

    Raises:
        SettingError: names the options.
    """
    others = [name for name in settings.given if name not in selector.accepts]
    if others:
        takes = f"it takes {_options(selector.accepts)}" if selector.accepts else "it takes none"
        raise SettingError(f"--method {method} does not look at {_options(others)}; {takes}")
    found = [name for name in selector.requires_one_of if name in settings.given]
    if selector.requires_one_of and len(found) != 1:
        got = _options(found) if found else "none"
        raise SettingError(f"--method {method} needs one of {_options(selector.requires_one_of)}, and got {got}")


def _options(names: "list[str] | tuple[str, ...]") -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


@dataclass(frozen=True, kw_only=True)
class SelectReport:
    """What was selected.

    Args:
        path: of the selection.
        num_selected: samples.
        num_pool: samples that could have been selected.
    """

    path: Path
    num_selected: int
    num_pool: int

    def line(self) -> str:
        """Say it in one line."""
        share = self.num_selected / self.num_pool
        return f"{self.path}: {self.num_selected:,} of {self.num_pool:,} samples ({share:.1%})"


def select(
    cache_path: Path | str,
    out_path: Path | str,
    method: str,
    *,
    settings: SelectSettings | None = None,
    share: float | None = None,
    modality: str | None = None,
    feature: str | None = None,
    run_path: Path | str | None = None,
    concepts_path: Path | str | None = None,
    joins_names: bool = False,
    target_path: Path | str | None = None,
    within: Path | str | None = None,
    progress: Progress | None = None,
) -> SelectReport:
    """Select some samples of a cache.

    Deterministic: the same cache, method and settings give the same selection.

    Args:
        cache_path: the pool.
        out_path: Parquet, in the place of whatever is there.
        method: a name in `SELECTORS`, or `module:attribute`.
        settings: of the method.
        share: the budget as a share of the pool, above 0 and at most 1.
        modality: `image` or `text`; None is the method's.
        feature: `encoder/feature`; None is the run's, or the only one of the modality.
        run_path: project with this run.
        concepts_path: a cache of prompts, or of labeled examples.
        joins_names: take concepts of one name as one; they are refused otherwise.
        target_path: a cache of what is wanted.
        within: a selection, or a text with a key a line: only its samples are selected from.
        progress: told about items.

    Raises:
        PathError: the selection's name does not end in `.parquet`.
        UnknownNameError: there is no such method or feature.
        SettingError: a setting is missing, or one that the method does not look at, or a budget larger than the pool.
        DataError: nothing passes.
        FingerprintError: the run, the concepts or the target have features of another encoder.
        UnfinishedError: a feature has missing chunks.
    """
    out_path = Path(out_path)
    check_selection_path(out_path)
    selector: Selector = SELECTORS.load(method)()
    settings = settings or SelectSettings()
    given = {"concepts": concepts_path, "target": target_path, "run": run_path}
    check_settings(method, selector, settings if share is None else _with_budget(settings, 1))
    _check_inputs(method, selector, {name: str(path) for name, path in given.items() if path is not None})
    if selector.modality is None and modality is not None:
        raise SettingError(f"--method {method} looks at images and captions; leave --modality out")
    pool = Pool(
        cache_path,
        modality or selector.modality or "image",
        feature=feature,
        run_path=None if run_path is None else Path(run_path),
        concepts_path=concepts_path,
        joins_names=joins_names,
        target_path=target_path,
        within=None if within is None else Path(within),
        progress=progress,
    )
    num_pool = len(pool.samples)
    if share is not None:
        settings = _with_budget(settings, _budget(share, num_pool))
    if settings.budget is not None and settings.budget > num_pool:
        raise SettingError(f"the budget is {settings.budget:,}, and the pool has {num_pool:,} samples; lower it")
    selection = selector.select(pool, settings)
    about = {
        "method": method,
        "settings": asdict(settings),
        "modality": pool.modality,
        "feature": pool.vectors.feature.name,
        "within": None if within is None else str(within),
        **{name: None if path is None else str(path) for name, path in given.items()},
    }
    write_selection(out_path, pool.cache, selection, about)
    return SelectReport(path=out_path, num_selected=len(selection.rows), num_pool=num_pool)


def _with_budget(settings: SelectSettings, budget: int) -> SelectSettings:
    if settings.budget is not None:
        raise SettingError("the budget is given as a number and as a share; give one")
    return SelectSettings(**{**asdict(settings), "budget": budget})


def _budget(share: float, num_pool: int) -> int:
    if not 0 < share <= 1:
        raise SettingError(f"the budget is a share of {share}; it must be above 0 and at most 1 (100%)")
    return max(1, round(share * num_pool))


_OPTIONS = {
    "concepts": "--concepts CACHE, made by: embedcache extract prompts:concepts.txt CACHE --text-encoder SPEC",
    "target": "--target CACHE, with the features of the pool's encoder",
    "run": "--run RUN, a run of embedcache train",
}


def _check_inputs(method: str, selector: Selector, given: dict[str, str]) -> None:
    for name in selector.required_inputs:
        if name not in given:
            raise SettingError(f"--method {method} needs {_OPTIONS[name]}")
    for name, path in given.items():
        if name != "run" and name not in selector.required_inputs:
            raise SettingError(f"--method {method} does not look at --{name} {path}; leave it out")
