"""Selecting samples of a cache by a named method, and writing down which and why."""

from dataclasses import asdict, dataclass
from pathlib import Path

from embedcache.cache.selection import check_selection_path, write_selection
from embedcache.curate.select.contract import SELECTORS, Selector, SelectSettings, check_settings
from embedcache.curate.select.pool import Pool
from embedcache.errors import SettingError
from embedcache.progress import Progress


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
        concepts_path: a cache of prompts, or of labelled examples.
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
        "feature": pool.vectors.side.name,
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
    "concepts": "--concepts CACHE, made by: embedcache extract prompts:concepts.txt CACHE --text ENCODER",
    "target": "--target CACHE, with the features of the pool's encoder",
    "run": "--projected RUN, a run of embedcache train",
}


def _check_inputs(method: str, selector: Selector, given: dict[str, str]) -> None:
    for name in selector.needs:
        if name not in given:
            raise SettingError(f"--method {method} needs {_OPTIONS[name]}")
    for name, path in given.items():
        if name != "run" and name not in selector.needs:
            raise SettingError(f"--method {method} does not look at --{name} {path}; leave it out")
