"""Fitting the closed form that training starts from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from embedcache.arrays import Array, Floats, Ints, blocks, check_finite, normalize
from embedcache.cache.pairs import Pairs
from embedcache.cache.side import Reader, mean_vectors
from embedcache.errors import SettingError
from embedcache.projectors.closed_form import Matrix, Moments, solve
from embedcache.projectors.contract import Anchored, Startable
from embedcache.projectors.pair import AlignedPair, Tower
from embedcache.train.settings import ModelSettings

_BLOCK = 8192


def start(pair: AlignedPair, pairs: Pairs, image: Reader, text: Reader, settings: ModelSettings, *, seed: int) -> None:
    """Centre both towers on the training pairs, and set their projectors to the closed form, or to anchors.

    One pass over all pairs of an image and a caption of its sample. Memory: a block of rows, and the anchors. A tower
    that takes tokens has no closed form.

    Args:
        pair: changed in place.
        pairs: the training pairs.
        image: gathers rows of the image side.
        text: gathers rows of the text side.
        settings: which closed form; `random` keeps the initialisation.
        seed: of the anchors' choice.

    Raises:
        SettingError: a projector that cannot start from a closed form, or more anchors than pairs.
        DataError: a vector is no number.
    """
    towers = (pair.image, pair.text)
    if not any(isinstance(tower, Tower) for tower in towers):
        _refuse_closed_form(settings)
        return
    moments = _moments(pairs, _Vectors(image, "image"), _Vectors(text, "text"), pair)
    for tower, mean in zip(towers, (moments.image_mean, moments.text_mean), strict=True):
        if isinstance(tower, Tower):
            tower.mean.copy_(torch.from_numpy(mean))
    projectors = [tower.projector for tower in towers]
    if all(isinstance(projector, Anchored) for projector in projectors):
        _set_anchors(pair, pairs, (image, text), seed)
    elif any(isinstance(projector, Anchored) for projector in projectors):
        raise SettingError(f"{settings.projector} compares with anchors on one side alone; name it for both")
    elif settings.start == "random":
        return
    elif all(isinstance(projector, Startable) for projector in projectors):
        _set_closed_form(projectors, moments, settings)
    else:
        _refuse_closed_form(settings)


def _refuse_closed_form(settings: ModelSettings) -> None:
    if settings.start not in (None, "random"):
        raise SettingError(
            f"a projector of {settings.projector} has no linear branch that --start {settings.start} could set; "
            "use --start random"
        )


def _set_closed_form(projectors: Sequence[Startable], moments: Moments, settings: ModelSettings) -> None:
    weights = solve(settings.start or "cca", moments, settings.shared_width, shrinkage=settings.shrinkage)
    image_cov, text_cov, _ = moments.covariances()
    for projector, weights_DP, covariance in zip(projectors, weights, (image_cov, text_cov), strict=True):
        projector.start_from(torch.from_numpy(weights_DP / _rms_length(weights_DP, covariance)))


def _set_anchors(pair: AlignedPair, pairs: Pairs, readers: tuple[Reader, Reader], seed: int) -> None:
    positions = pairs.joined()
    asked, num_pairs = pair.image.output_width, len(positions[0])
    if asked > num_pairs:
        raise SettingError(
            f"the shared width of {asked:,} asks for as many anchors, and there are {num_pairs:,} training pairs; "
            f"use --shared-width {num_pairs} or fewer"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(num_pairs)[:asked])
    for tower, read, side, position in zip(
        (pair.image, pair.text), readers, (pairs.image, pairs.text), positions, strict=True
    ):
        assert isinstance(tower, Tower)  # as its projector takes vectors
        vectors = torch.from_numpy(normalize(read(side.rows[position[chosen]]).values))
        tower.projector.set_anchors(vectors.to(tower.mean.device) - tower.mean)


@dataclass(frozen=True)
class _Vectors:
    """Reads vectors of length 1, the mean of an item's tokens where it has several, and refuses what is no number."""

    read: Reader
    name: str

    def __call__(self, rows: Ints) -> Floats:
        vectors = mean_vectors(self.read(rows))
        check_finite(vectors, f"the {self.name} feature", rows=rows)
        return normalize(vectors)


def _moments(pairs: Pairs, image: _Vectors, text: _Vectors, pair: AlignedPair) -> Moments:
    image_positions, text_positions = pairs.joined()
    moments = Moments(pair.image.input_width, pair.text.input_width)
    for block in blocks(len(image_positions), _BLOCK):
        moments.add(image(pairs.image.rows[image_positions[block]]), text(pairs.text.rows[text_positions[block]]))
    return moments


def _rms_length(weights_DP: Array, covariance: Matrix) -> float:
    """Root mean square length of the projected training rows: a learned branch adds to vectors of length about 1."""
    return float(np.sqrt(np.trace(weights_DP.T @ covariance @ weights_DP)) + np.finfo(np.float64).tiny)
