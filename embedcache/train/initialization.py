"""What training starts from, and what it changes.

A pair starts from its training pairs, by the mean of each feature and a closed form or anchors. Parts of any module can
start from other runs, and only some may be trained. A part has a name, and the names of its submodules and parameters
in the module: `{"temperature": ["log_scale"]}`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from embedcache.arrays import Floats, Ints, blocks, check_finite, normalize
from embedcache.dataset.inputs import InputFeature, Reader
from embedcache.dataset.pairs import Pairs
from embedcache.errors import DataError, SettingError
from embedcache.modeling.heads import AnyTower, RawTower, Tower
from embedcache.progress import NullProgress, Progress
from embedcache.projectors.base import HasAnchors, HasLinearBranch, Matrix, Moments, solve
from embedcache.projectors.pair import AlignedPair
from embedcache.registry import unknown_name
from embedcache.runs import WEIGHTS, Run
from embedcache.train.prototypes import Prototypes
from embedcache.train.settings import Initialization, ModelSettings

Parts: TypeAlias = Mapping[str, Sequence[str]]
ALL_PARTS = "*"
"""Stands for all parts that are not named."""

_BLOCK = 8192
_SAME_VARIANCE = 1e-12  # of unit vectors that differ by less than float32 resolves
MAX_PAIRS = 2**20
"""Of more pairs, evenly spaced blocks are read; means and covariances of a million pairs are exact to a thousandth."""


def initialize(
    pair: AlignedPair,
    pairs: Pairs,
    readers: Mapping[str, Reader],
    settings: ModelSettings,
    *,
    seed: int,
    prototypes: Prototypes | None = None,
    prototype_weight: float = 1.0,
    progress: Progress | None = None,
) -> None:
    """Center both towers on the training pairs, and set their projectors to a closed form or to anchors.

    Prototypes are pairs of another population: they are centered on their own means and join the closed form only.

    Takes one pass over the pairs of items of one sample, a million of them at most, and for a tower with raw input one
    more, for the root mean square length. A token tower is left as it is, and its feature is not read. Memory: a block
    of rows, and the anchors.

    Raises:
        SettingError: a projector that has no linear branch, or fewer pairs than anchors.
        DataError: a value is NaN or infinite, fewer than two pairs, or, with a closed form, one vector in all pairs.
    """
    towers = _tower_rows(pair, pairs, readers)
    form = settings.initialization or default_initialization(pair)
    _check(towers, form, settings)
    if prototypes is not None and form == "random":
        raise SettingError(
            f"prototypes: expected a closed form, which they join, got projector {settings.projector} with random "
            "weights; use --projector linear or mlp, or omit --prototypes"
        )
    progress = progress or NullProgress()
    num_passes = 1 + sum(isinstance(rows.tower, RawTower) for rows in towers)
    progress.start("initializing", len(towers[0].rows) * num_passes, "pairs")
    moments = _sum_moments(towers, progress)
    covariances = moments.covariances()
    for rows, mean in zip(towers, (moments.first_mean, moments.second_mean), strict=True):
        if isinstance(rows.tower, RawTower):
            rows.tower.length.fill_(rows.rms_length(progress))
        elif isinstance(rows.tower, Tower):
            rows.tower.mean.copy_(torch.from_numpy(mean))
    if form != "random":
        for rows, covariance in zip(towers, (covariances.first, covariances.second), strict=True):
            _check_directions(rows, covariance)
        if prototypes is not None:
            rows_of_classes = _tower_rows(pair, prototypes.pairs, prototypes.readers)
            moments.add_population(_sum_moments(rows_of_classes, NullProgress()), prototype_weight)
        weights = solve(form, moments, settings.shared_width, shrinkage=settings.shrinkage)
        for rows, weights_DP, covariance in zip(towers, weights, (covariances.first, covariances.second), strict=True):
            # the root mean square length of the projected training rows: a learned branch expects about 1
            length = max(float(np.sqrt(np.trace(weights_DP.T @ covariance @ weights_DP))), np.finfo(np.float64).tiny)
            rows.tower.projector.set_linear_map(torch.from_numpy(weights_DP / length))
    if any(tower.supports(HasAnchors) for tower in towers):
        _set_anchors(towers, settings.shared_width, seed)
    progress.finish()


def _tower_rows(pair: AlignedPair, pairs: Pairs, readers: Mapping[str, Reader]) -> tuple["_TowerRows", "_TowerRows"]:
    """Return the rows of both towers in all pairs of items, or in a million of them."""
    positions = [_thin_out(positions_M) for positions_M in pairs.all_pairs()]
    first, second = (
        _TowerRows(name=name, tower=pair.tower(name), read=readers[name], rows=items.rows[which])
        for name, items, which in zip(pair.modalities, (pairs.first, pairs.second), positions, strict=True)
    )
    return first, second


def _sum_moments(towers: tuple["_TowerRows", "_TowerRows"], progress: Progress) -> Moments:
    first, second = towers
    moments = Moments(first.width, second.width)
    for block in blocks(len(first.rows), _BLOCK):
        moments.add(first.vectors(block), second.vectors(block))
        progress.advance(len(first.rows[block]))
    return moments


def center_on(tower: AnyTower, feature: InputFeature) -> None:
    """Center a tower on a feature of other items than it was solved for, a million of them at most."""
    assert isinstance(tower, Tower)  # as all that have a closed form
    valid_rows = _thin_out(np.flatnonzero(feature.valid))
    rows = _TowerRows(name=feature.name, tower=tower, read=feature.read, rows=valid_rows)
    total = np.zeros(rows.width)
    for block in blocks(len(valid_rows), _BLOCK):
        total += rows.vectors(block).sum(axis=0, dtype=np.float64)
    tower.mean.copy_(torch.from_numpy(total / len(valid_rows)))


def default_initialization(pair: AlignedPair) -> Initialization:
    """Return what a pair starts from if no initialization is named: `cca` if both projectors can, else `random`."""
    return "cca" if all(_supports(pair.tower(name), HasLinearBranch) for name in pair.modalities) else "random"


def _supports(tower: AnyTower, interface: type[HasLinearBranch] | type[HasAnchors]) -> bool:
    return isinstance(tower, Tower) and isinstance(tower.projector, interface)


def _thin_out(positions_M: Ints) -> Ints:
    """Keep evenly spaced blocks of at most `MAX_PAIRS` positions."""
    whole = list(blocks(len(positions_M), _BLOCK))
    step = -(-len(positions_M) // MAX_PAIRS)
    return np.concatenate([positions_M[block] for block in whole[::step]]) if step > 1 else positions_M


@dataclass(frozen=True, kw_only=True)
class _TowerRows:
    """A tower, and the (M,) rows of its feature in training pairs; M is that of the other tower."""

    name: str
    tower: AnyTower
    read: Reader
    rows: Ints

    @property
    def width(self) -> int:
        """D of the vectors to center; 0 for other towers."""
        return self.tower.mean.numel() if isinstance(self.tower, Tower) else 0

    def supports(self, interface: type[HasLinearBranch] | type[HasAnchors]) -> bool:
        return _supports(self.tower, interface)

    def rms_length(self, progress: Progress) -> float:
        """Compute the root mean square length of the rows in one pass."""
        total = 0.0
        for block in blocks(len(self.rows), _BLOCK):
            values = np.asarray(self.read(self.rows[block]).values, np.float64)
            check_finite(values, f"the {self.name} feature", rows=self.rows[block])
            total += float((values**2).sum())
            progress.advance(len(values))
        return float(np.sqrt(total / len(self.rows))) or 1.0

    def vectors(self, which: slice | Ints) -> Floats:
        """Read some of the rows, scaled to length 1: (B, D)."""
        rows = self.rows[which]
        if not self.width:
            return np.empty((len(rows), 0), np.float32)
        values = self.read(rows).values
        check_finite(values, f"the {self.name} feature", rows=rows)
        return normalize(values)


def _check(towers: tuple[_TowerRows, _TowerRows], form: str, settings: ModelSettings) -> None:
    if form != "random" and not all(tower.supports(HasLinearBranch) for tower in towers):
        raise SettingError(
            f"initialization: expected random, as projector {settings.projector} has no linear branch, got {form}; "
            "use --initialization random"
        )
    first, _ = towers
    num_pairs = len(first.rows)
    if num_pairs < settings.shared_width and any(tower.supports(HasAnchors) for tower in towers):
        raise SettingError(
            f"projector {settings.projector}: expected at least as many training pairs as the shared width "
            f"{settings.shared_width}, got {num_pairs}; use --shared-width {num_pairs} or less"
        )


def _check_directions(rows: _TowerRows, covariance_DD: Matrix) -> None:
    """Check that the unit vectors of a tower differ, for which a closed form has no solution otherwise."""
    if np.trace(covariance_DD) <= _SAME_VARIANCE:
        raise DataError(
            f"the {rows.name} feature: expected vectors of different directions, got one in all {len(rows.rows):,} "
            "training pairs; name another feature, or use --initialization random"
        )


def _set_anchors(towers: tuple[_TowerRows, _TowerRows], num_anchors: int, seed: int) -> None:
    """Set the anchors of both towers to the same pairs, drawn without replacement, as the projectors see them."""
    first, _ = towers
    anchor_rows = np.sort(np.random.default_rng(seed).choice(len(first.rows), num_anchors, replace=False))
    for rows in towers:
        if rows.supports(HasAnchors) and isinstance(rows.tower, Tower):
            unit_PD = torch.from_numpy(rows.vectors(anchor_rows)).to(rows.tower.mean.device)
            rows.tower.projector.set_anchors(unit_PD - rows.tower.mean)


def parts_of(network: nn.Module) -> Parts:
    """Return the parts of a network: those that its method `parts` names, else each submodule and each parameter."""
    named: Callable[[], Parts] | None = getattr(network, "parts", None)
    if named is not None:
        return named()
    names = [name for name, _ in (*network.named_children(), *network.named_parameters(recurse=False))]
    return {name: [name] for name in names}


def find_sources(words: Sequence[str], parts: Parts) -> dict[str, Path]:
    """Return the run that each part starts from: a word is `PART=RUN`, or `RUN` for all parts that have none.

    Raises:
        UnknownNameError: there is no part of that name.
        SettingError: a part is named twice, or two words name all parts.
    """
    named = _parse_sources(words)
    for name in named:
        if name not in (*parts, ALL_PARTS):
            raise unknown_name("part", name, parts, hint="named in init_from")
    return {name: named.get(name) or named[ALL_PARTS] for name in parts if name in named or ALL_PARTS in named}


def source_digests(words: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of the weights of each run that is named, by part; `*` stands for all parts.

    Raises:
        PathError: a folder is not a finished run.
        SettingError: a part is named twice.
    """
    return {name: Run.open(path).info.weights for name, path in _parse_sources(words).items()}


def _parse_sources(words: Sequence[str]) -> dict[str, Path]:
    sources: dict[str, Path] = {}
    for word in words:
        name, separator, run = word.partition("=")
        if not separator or Path(word).exists():  # a path may contain a `=`
            name, run = ALL_PARTS, word
        if name in sources:
            raise SettingError(
                f"init_from: expected one run for {name}, got {sources[name]} and {run}; name parts, as in image={run}"
            )
        sources[name] = Path(run)
    return sources


def load_parts(module: nn.Module, parts: Parts, sources: Mapping[str, Path]) -> None:
    """Set whole parts of a module, their buffers included, to the weights of finished runs.

    Raises:
        PathError: a folder is not a finished run.
        CorruptError: the weights have other bytes than were written.
        DataError: a run lacks weights of a part, has others, or has them in other shapes; nothing is set then.
    """
    state = module.state_dict()
    loaded: dict[str, Tensor] = {}
    for name, run_path in sources.items():
        weights = load_file(Run.open(run_path).file(WEIGHTS))
        expected = {key: value.shape for key, value in state.items() if _is_in(key, parts[name])}
        found = {key: value.shape for key, value in weights.items() if _is_in(key, parts[name])}
        wrong = sorted(key for key in {**expected, **found} if expected.get(key) != found.get(key))
        if wrong:
            key = wrong[0]
            raise DataError(
                f"init_from: {len(wrong)} weights of the part {name} of {run_path} do not fit: {key}: expected shape "
                f"{expected.get(key)}, got {found.get(key)}; use a run with the same architecture and widths, or name "
                "the parts to take as PART=RUN"
            )
        loaded |= {key: weights[key] for key in found}
    with torch.no_grad():
        for key, value in loaded.items():
            state[key].copy_(value)


def parse_trainable(names: str | None, parts: Parts) -> tuple[str, ...]:
    """Return the parts that are trained: those of a text such as `text+temperature`; None: all."""
    if names is None:
        return tuple(parts)
    for name in names.split("+"):
        if name not in parts:
            raise unknown_name("part", name, parts, hint=f"named in trainable {names}")
    return tuple(names.split("+"))


def freeze(module: nn.Module, parts: Parts, trainable: Iterable[str]) -> list[nn.Module]:
    """Freeze all parts but some: their parameters get no gradients.

    What belongs to several parts is trained if one of them is, and what belongs to none is.

    Returns:
        The frozen submodules, which must stay in evaluation mode, so that norm statistics do not change.
    """
    trained = [path for name in trainable for path in parts[name]]
    frozen = [path for name in parts if name not in set(trainable) for path in parts[name]]

    def is_frozen(name: str) -> bool:
        return _is_in(name, frozen) and not _is_in(name, trained)

    for name, parameter in module.named_parameters():
        if is_frozen(name):
            parameter.requires_grad = False
    return [submodule for name, submodule in module.named_modules() if is_frozen(name)]


def _is_in(name: str, paths: Iterable[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)
