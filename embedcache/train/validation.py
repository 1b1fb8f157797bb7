"""Validation recall during training, and the weights with the best one."""

import copy
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np

from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Pairs
from embedcache.metrics.ranking import best_ranks, recall_at
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import project

KS = (1, 5, 10)
MAX_SAMPLES = 5000


class Validation:
    """Retrieval in both directions on the validation part.

    Args:
        pairs: validation pairs; of more than 5,000 samples, 5,000 evenly spaced ones are used.
        image: reads rows of the image feature.
        text: reads rows of the text feature.
        device: device of the pair.
    """

    def __init__(self, pairs: Pairs, image: Reader, text: Reader, *, device: str) -> None:
        samples = pairs.samples
        if len(samples) > MAX_SAMPLES:
            samples = samples[np.linspace(0, len(samples) - 1, MAX_SAMPLES).astype(np.int64)]
        pairs = pairs.select(samples)
        self._images, self._texts = image(pairs.image.rows), text(pairs.text.rows)
        self._positives = pairs.positives()
        self._device = device

    def recalls(self, pair: AlignedPair) -> dict[str, float]:
        """Compute validation recall, `i2t r@1` to `t2i r@10`, each from 0 to 1."""
        pair.eval()
        images = project(pair.image, self._images, device=self._device)
        texts = project(pair.text, self._texts, device=self._device)
        image, text = self._positives
        ranks = {
            "i2t": best_ranks(images, texts, (image, text)),
            "t2i": best_ranks(texts, images, (text, image)),
        }
        return {f"{direction} r@{k}": recall_at(ranks[direction], k) for direction in ranks for k in KS}


class BestWeights:
    """The weights with the highest validation recall: the mean of R@1, R@5 and R@10 over both directions."""

    def __init__(self) -> None:
        self.epoch, self.score = 0, -1.0
        self.recalls: dict[str, float] = {}
        self._weights: dict[str, Any] = {}

    def update(self, epoch: int, recalls: Mapping[str, float], pair: AlignedPair) -> None:
        """Copy the weights after an epoch if they are better than all before."""
        if fmean(recalls.values()) > self.score:
            self.epoch, self.score, self.recalls = epoch, fmean(recalls.values()), dict(recalls)
            self._weights = copy.deepcopy(pair.state_dict())

    def restore(self, pair: AlignedPair) -> None:
        """Load the best weights into a pair."""
        pair.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"epoch": self.epoch, "score": self.score, "recalls": self.recalls, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.epoch, self.score, self.recalls = state["epoch"], state["score"], state["recalls"]
        self._weights = state["weights"]
