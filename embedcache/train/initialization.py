"""What training starts from: the mean of each feature, and a closed form or anchors from the training pairs."""

from dataclasses import dataclass

import numpy as np
import torch

from embedcache.arrays import Array, Floats, Ints, blocks, check_finite, normalize
from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Pairs
from embedcache.errors import SettingError
from embedcache.projectors.base import HasAnchors, HasLinearBranch
from embedcache.projectors.closed_form import Matrix, Moments, solve
from embedcache.projectors.pair import AlignedPair, AnyTower
from embedcache.projectors.towers import RawTower, Tower
from embedcache.train.settings import ModelSettings

_BLOCK = 8192


def start(pair: AlignedPair, pairs: Pairs, image: Reader, text: Reader, settings: ModelSettings, *, seed: int) -> None:
    """Center both towers on the training pairs, and set their projectors to the closed form, or to anchors.

    One pass over all pairs of an image and a caption of its sample. A tower that takes vectors as they are learns their
    root mean square length, in a pass of its own; one that takes tokens is left as it is, and its feature is not read.
    Memory: a block of rows, and the anchors.

    Args:
        pair: changed in place.
        pairs: the training pairs.
        image: gathers rows of the image feature.
        text: gathers rows of the text feature.
        settings: which closed form; `random` keeps the initialization.
        seed: which pairs are the anchors.

    Raises:
        SettingError: a projector that cannot start from a closed form, or fewer pairs than anchors.
        DataError: a row is no number, or fewer than two pairs.
    """
    image_positions, text_positions = pairs.joined()
    sides = (
        _Side(name="image", tower=pair.image, read=image, rows=pairs.image.rows[image_positions]),
        _Side(name="text", tower=pair.text, read=text, rows=pairs.text.rows[text_positions]),
    )
    kind = settings.initialization or ("cca" if all(side.can_start for side in sides) else "random")
    _check(sides, kind, settings)
    moments = _moments(*sides)
    covariances = moments.covariances()[:2]
    for side in sides:
        if isinstance(side.tower, RawTower):
            side.tower.length.fill_(side.rms_length())
    for side, mean in zip(sides, (moments.image_mean, moments.text_mean), strict=True):
        if isinstance(side.tower, Tower):
            side.tower.mean.copy_(torch.from_numpy(mean))
    if kind != "random":
        weights = solve(kind, moments, settings.shared_width, shrinkage=settings.shrinkage)
        for side, weights_DP, covariance in zip(sides, weights, covariances, strict=True):
            length = _rms_length(weights_DP, covariance)
            side.tower.projector.set_linear_map(torch.from_numpy(weights_DP / length))
    if any(side.is_anchored for side in sides):
        _set_anchors(sides, settings.shared_width, seed)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A tower, and the rows of its feature in all training pairs: (M,) int64, as long as the other side's."""

    name: str
    tower: AnyTower
    read: Reader
    rows: Ints

    @property
    def width(self) -> int:
        """D of the vectors; tokens have none to center, and count as 0 wide."""
        return self.tower.mean.numel() if isinstance(self.tower, Tower) else 0

    @property
    def can_start(self) -> bool:
        return isinstance(self.tower, Tower) and isinstance(self.tower.projector, HasLinearBranch)

    @property
    def is_anchored(self) -> bool:
        return isinstance(self.tower, Tower) and isinstance(self.tower.projector, HasAnchors)

    def rms_length(self) -> float:
        """Root mean square length of the rows as they are, one pass over them."""
        total = 0.0
        for block in blocks(len(self.rows), _BLOCK):
            values = np.asarray(self.read(self.rows[block]).values, np.float64)
            check_finite(values, f"the {self.name} feature", rows=self.rows[block])
            total += float((values**2).sum())
        return float(np.sqrt(total / len(self.rows))) or 1.0

    def vectors(self, which: slice | Ints) -> Floats:
        """Read some of the rows, scaled to length 1: (B, D)."""
        rows = self.rows[which]
        if not self.width:
            return np.empty((len(rows), 0), np.float32)
        values = self.read(rows).values
        check_finite(values, f"the {self.name} feature", rows=rows)
        return normalize(values)


def _check(sides: tuple[_Side, _Side], kind: str, settings: ModelSettings) -> None:
    if kind != "random" and not all(side.can_start for side in sides):
        raise SettingError(
            f"a projector of {settings.projector} has no linear branch that --initialization {kind} could set; "
            "use --initialization random"
        )
    num_pairs = len(sides[0].rows)
    if num_pairs < settings.shared_width and any(side.is_anchored for side in sides):
        raise SettingError(
            f"a projector of {settings.projector} needs as many training pairs as the shared space is wide: "
            f"{settings.shared_width} are asked for, and there are {num_pairs}; use --shared-width {num_pairs} or less"
        )


def _moments(image: _Side, text: _Side) -> Moments:
    moments = Moments(image.width, text.width)
    for block in blocks(len(image.rows), _BLOCK):
        moments.add(image.vectors(block), text.vectors(block))
    return moments


def _rms_length(weights_DP: Array, covariance: Matrix) -> float:
    """Root mean square length of the projected training rows: a learned branch adds to vectors of length about 1."""
    return float(np.sqrt(np.trace(weights_DP.T @ covariance @ weights_DP)) + np.finfo(np.float64).tiny)


def _set_anchors(sides: tuple[_Side, _Side], num_anchors: int, seed: int) -> None:
    """Give both sides the vectors of the same pairs, drawn without replacement, as their projectors see them."""
    drawn = np.sort(np.random.default_rng(seed).choice(len(sides[0].rows), num_anchors, replace=False))
    for side in sides:
        if side.is_anchored and isinstance(side.tower, Tower):
            unit_PD = torch.from_numpy(side.vectors(drawn)).to(side.tower.mean.device)
            side.tower.projector.set_anchors(unit_PD - side.tower.mean)
