"""Fitting the closed form that training starts from."""

import numpy as np
import torch

from embedcache.arrays import Array, blocks, normalize
from embedcache.cache.pairs import Pairs
from embedcache.errors import SettingError
from embedcache.projectors.closed_form import Matrix, Moments, solve
from embedcache.projectors.contract import Startable
from embedcache.projectors.pair import AlignedPair, Tower
from embedcache.train.batches import Reader
from embedcache.train.settings import ModelSettings

_BLOCK = 8192


def start(pair: AlignedPair, pairs: Pairs, image: Reader, text: Reader, settings: ModelSettings) -> None:
    """Centre both towers on the training pairs, and set their projectors to the closed form.

    One pass over all pairs of an image and a caption of its sample. Memory: a block of rows.

    Args:
        pair: changed in place.
        pairs: the training pairs.
        image: gathers rows of the image feature.
        text: gathers rows of the text feature.
        settings: which closed form; `random` keeps the initialisation.

    Raises:
        SettingError: a projector that cannot start from a closed form.
    """
    moments = _moments(pairs, image, text, pair.image.mean.numel(), pair.text.mean.numel())
    image_cov, text_cov, _ = moments.covariances()
    _centre(pair.image, moments.image_mean)
    _centre(pair.text, moments.text_mean)
    kind = settings.start or ("cca" if _can_start(pair) else "random")
    if kind == "random":
        return
    weights = solve(kind, moments, settings.shared_width, shrinkage=settings.shrinkage)
    for tower, weights_DP, covariance in zip((pair.image, pair.text), weights, (image_cov, text_cov), strict=True):
        if not isinstance(tower.projector, Startable):
            raise SettingError(
                f"a projector of {settings.projector} has no linear branch that --start {kind} could set; "
                "use --start random"
            )
        tower.projector.start_from(torch.from_numpy(weights_DP / _rms_length(weights_DP, covariance)))


def _can_start(pair: AlignedPair) -> bool:
    return all(isinstance(tower.projector, Startable) for tower in (pair.image, pair.text))


def _moments(pairs: Pairs, image: Reader, text: Reader, image_width: int, text_width: int) -> Moments:
    moments = Moments(image_width, text_width)
    image_positions, text_positions = pairs.joined()
    for block in blocks(len(image_positions), _BLOCK):
        moments.add(
            normalize(image(pairs.image.rows[image_positions[block]])),
            normalize(text(pairs.text.rows[text_positions[block]])),
        )
    return moments


def _centre(tower: Tower, mean: Matrix) -> None:
    tower.mean.copy_(torch.from_numpy(mean))


def _rms_length(weights_DP: Array, covariance: Matrix) -> float:
    """Root mean square length of the projected training rows: a learned branch adds to vectors of length about 1."""
    return float(np.sqrt(np.trace(weights_DP.T @ covariance @ weights_DP)) + np.finfo(np.float64).tiny)
