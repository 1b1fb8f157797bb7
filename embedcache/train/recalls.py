"""Recall on the validation part while training goes on."""

import numpy as np

from embedcache.cache.pairs import Pairs
from embedcache.metrics import best_ranks, recall_at
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import project
from embedcache.train.batches import Reader

KS = (1, 5, 10)
_MOST_SAMPLES = 5000


class Validation:
    """Held-out pairs of the training part, ranked both ways.

    Args:
        pairs: the validation pairs; of more than 5,000 samples, 5,000 evenly spaced ones are used.
        image: gathers rows of the image feature.
        text: gathers rows of the text feature.
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
