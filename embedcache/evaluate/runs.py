"""Trained runs that are measured together: seeds of one recipe are averaged, recipes stand side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from embedcache.dataset.inputs import InputFeature, open_input
from embedcache.errors import SettingError
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import PairConfig, check_feature, load_pair, read_config
from embedcache.provenance import check_same
from embedcache.store.cache import Cache

RunPaths: TypeAlias = Path | str | Sequence[Path | str]
"""One run, or seeds of one recipe."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trained pair with what it was trained on."""

    path: Path
    pair: AlignedPair
    config: PairConfig

    @property
    def seed(self) -> int:
        """Of its training."""
        return int(self.config.training["seed"])


def load_runs(run_paths: RunPaths, *, is_control: bool = False) -> list[Run]:
    """Load seeds of one recipe.

    Args:
        run_paths: one, or several.
        is_control: they must have been trained on shuffled pairs.

    Raises:
        SettingError: no run, two of one seed, or a control that was not trained on shuffled pairs.
        FingerprintError: they differ in more than their seeds.
        PathError: a folder is no finished run.
        CorruptError: weights are not those that the config was written for.
    """
    run_paths = [run_paths] if isinstance(run_paths, Path | str) else run_paths
    if not run_paths:
        raise SettingError("no run to evaluate; give at least one run folder")
    runs = [Run(path=Path(path), pair=pair, config=config) for path in run_paths for pair, config in [_load(path)]]
    if is_control and not all(run.config.training["shuffle_pairs"] for run in runs):
        raise SettingError("a control must be trained with --shuffle-pairs; one of these runs was not")
    _refuse_mixed(runs)
    return runs


def recipes(run_paths: Sequence[Path | str]) -> dict[str, list[Path]]:
    """Sort runs by recipe: a name -> its seeds, in the order given.

    Raises:
        PathError: a folder is no finished run.
    """
    found: list[tuple[dict[str, Any], list[Path]]] = []
    for path in map(Path, run_paths):
        recipe = _recipe(read_config(path))
        seeds = next((paths for other, paths in found if other == recipe), None)
        if seeds is None:
            found.append((recipe, [path]))
        else:
            seeds.append(path)
    return _named([paths for _, paths in found])


def named_recipes(
    run_paths: Sequence[Path | str], control_paths: Sequence[Path | str]
) -> Iterator[tuple[str, list[Path], bool]]:
    """Go through recipes, then those of controls: a name, its seeds, and whether it is a control."""
    for name, paths in recipes(run_paths).items():
        yield name, paths, False
    controls = recipes(control_paths)
    for name, paths in controls.items():
        yield "shuffled pairs" if len(controls) == 1 else f"shuffled pairs, {name}", paths, True


def seeds_line(seeds: Sequence[int], figures: Sequence[float], name: str) -> str:
    """Name seeds, and what each of several reaches."""
    said = f"seeds {', '.join(map(str, seeds))}"
    reached = ", ".join(f"{figure:.3f}" for figure in figures)
    return f"{said} ({name} {reached})" if len(seeds) > 1 else said


def trained_side(cache: Cache, config: PairConfig, modality: str) -> InputFeature:
    """Get what one side of a run was trained on.

    Raises:
        UnknownNameError: the cache has no feature of that name.
        FingerprintError: another encoder made it.
    """
    side = open_input(cache, modality, config.tower_input(modality).feature)
    check_feature(config, modality, side.name, side.fingerprint)
    return side


def _load(path: Path | str) -> tuple[AlignedPair, PairConfig]:
    return load_pair(Path(path))


def _named(recipes: Sequence[list[Path]]) -> dict[str, list[Path]]:
    """Name each recipe by what its folders' names have in common; by their paths where that is not unique."""
    names = [", ".join(dict.fromkeys(_stem(path) for path in paths)) for paths in recipes]
    if len(set(names)) < len(names):
        names = [", ".join(map(str, paths)) for paths in recipes]
    return dict(zip(names, recipes, strict=True))


def _stem(path: Path) -> str:
    """Take the number of a seed off a folder's name: `run-0` -> `run`."""
    return path.name.rstrip("0123456789").rstrip("-_.") or path.name


def _refuse_mixed(runs: Sequence[Run]) -> None:
    """Refuse to average runs that differ in more than their seeds."""
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise SettingError(f"runs to average must differ in their seed; these have {', '.join(map(str, seeds))}")
    for run in runs[1:]:
        next_step = f"average only seeds of one recipe: evaluate {runs[0].path} and {run.path} one by one"
        check_same(f"run {runs[0].path}", _recipe(runs[0].config), _recipe(run.config), next_step=next_step)


def _recipe(config: PairConfig) -> dict[str, Any]:
    """Give all that decides a run but its seeds. A split that was given as a file is one cut of many, as a seed is."""
    split = {**config.training["split"], "seed": None, **({"kind": "a file"} if "split" in config.file_digests else {})}
    return {
        "image": config.image.feature,
        "text": config.text.feature,
        "spine": config.index_digest,
        "training": {**config.training, "seed": None, "split": split},
    }
