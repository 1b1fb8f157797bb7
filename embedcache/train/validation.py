"""Recall on the validation part while training goes on, and the weights that reached the best."""

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
_MOST_SAMPLES = 5000


class Validation:
    """Held-out pairs of the training part, ranked both ways.

    Args:
        pairs: the validation pairs; of more than 5,000 samples, 5,000 evenly spaced ones are used.
        image: gathers rows of the image side.
        text: gathers rows of the text side.
        device: where the pair is.
    """

    def __init__(self, pairs: Pairs, image: Reader, text: Reader, *, device: str) -> None:
        samples = pairs.samples
        if len(samples) > _MOST_SAMPLES:
            samples = samples[np.linspace(0, len(samples) - 1, _MOST_SAMPLES).astype(np.int64)]
        pairs = pairs.of(samples)
        self._images, self._texts = image(pairs.image.rows), text(pairs.text.rows)
        self._positives = pairs.positives()
        self._device = device

    def recalls(self, pair: AlignedPair) -> dict[str, float]:
        """Give `i2t r@1` to `t2i r@10`, each 0 to 1."""
        pair.eval()
        images = project(pair.image, self._images, device=self._device)
        texts = project(pair.text, self._texts, device=self._device)
        image, text = self._positives
        ranks = {
            "i2t": best_ranks(images, texts, (image, text)),
            "t2i": best_ranks(texts, images, (text, image)),
        }
        return {f"{way} r@{k}": recall_at(ranks[way], k) for way in ranks for k in KS}


class Best:
    """Keeps the weights of the best validation recall: the mean of R@1, R@5 and R@10 of both directions."""

    def __init__(self) -> None:
        self.epoch, self.score = 0, -1.0
        self.recalls: dict[str, float] = {}
        self._weights: dict[str, Any] = {}

    def offer(self, epoch: int, recalls: Mapping[str, float], pair: AlignedPair) -> None:
        """Keep what a pair is after an epoch, if it is better than all before."""
        if fmean(recalls.values()) > self.score:
            self.epoch, self.score, self.recalls = epoch, fmean(recalls.values()), dict(recalls)
            self._weights = copy.deepcopy(pair.state_dict())

    def restore(self, pair: AlignedPair) -> None:
        """Give a pair the weights that were kept."""
        pair.load_state_dict(self._weights)

    def state(self) -> dict[str, Any]:
        """Give all that a checkpoint must hold."""
        return {"epoch": self.epoch, "score": self.score, "recalls": self.recalls, "weights": self._weights}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.epoch, self.score, self.recalls = state["epoch"], state["score"], state["recalls"]
        self._weights = state["weights"]
