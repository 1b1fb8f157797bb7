"""Initialization from the training pairs: the mean of each feature, and a closed form or anchors."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from embedcache.arrays import Floats, Ints, blocks, check_finite, normalize
from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Pairs
from embedcache.errors import DataError, SettingError
from embedcache.modeling.heads import AnyTower, RawTower, Tower
from embedcache.progress import NullProgress, Progress
from embedcache.projectors.base import HasAnchors, HasLinearBranch
from embedcache.projectors.closed_form import Matrix, Moments, solve
from embedcache.projectors.pair import AlignedPair
from embedcache.train.settings import Initialization, ModelSettings

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
    progress: Progress | None = None,
) -> None:
    """Center both towers on the training pairs, and set their projectors to a closed form or to anchors.

    Takes one pass over the pairs of items of one sample, a million of them at most, and for a tower with raw input one
    more, for the root mean square length. A token tower is left as it is, and its feature is not read. Memory: a block
    of rows, and the anchors.

    Raises:
        SettingError: a projector that has no linear branch, or fewer pairs than anchors.
        DataError: a value is NaN or infinite, fewer than two pairs, or, with a closed form, one vector in all pairs.
    """
    positions = [_thin_out(positions_M) for positions_M in pairs.all_pairs()]
    first, second = (
        _TowerRows(name=name, tower=pair.tower(name), read=readers[name], rows=items.rows[which])
        for name, items, which in zip(pair.modalities, (pairs.first, pairs.second), positions, strict=True)
    )
    towers = (first, second)
    form = settings.initialization or default_initialization(pair)
    _check(towers, form, settings)
    moments, progress = Moments(first.width, second.width), progress or NullProgress()
    num_passes = 1 + sum(isinstance(rows.tower, RawTower) for rows in towers)
    progress.start("initializing", len(first.rows) * num_passes, "pairs")
    for block in blocks(len(first.rows), _BLOCK):
        moments.add(first.vectors(block), second.vectors(block))
        progress.advance(len(first.rows[block]))
    covariances = moments.covariances()
    for rows, mean in zip(towers, (moments.first_mean, moments.second_mean), strict=True):
        if isinstance(rows.tower, RawTower):
            rows.tower.length.fill_(rows.rms_length(progress))
        elif isinstance(rows.tower, Tower):
            rows.tower.mean.copy_(torch.from_numpy(mean))
    if form != "random":
        for rows, covariance in zip(towers, (covariances.first, covariances.second), strict=True):
            _check_directions(rows, covariance)
        weights = solve(form, moments, settings.shared_width, shrinkage=settings.shrinkage)
        for rows, weights_DP, covariance in zip(towers, weights, (covariances.first, covariances.second), strict=True):
            # the root mean square length of the projected training rows: a learned branch expects about 1
            length = max(float(np.sqrt(np.trace(weights_DP.T @ covariance @ weights_DP))), np.finfo(np.float64).tiny)
            rows.tower.projector.set_linear_map(torch.from_numpy(weights_DP / length))
    if any(tower.supports(HasAnchors) for tower in towers):
        _set_anchors(towers, settings.shared_width, seed)
    progress.finish()


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
