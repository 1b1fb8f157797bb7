"""A text encoder: a tokenizer and a graph for a padded batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from embedcache.arrays import Array, Ints
from embedcache.encoders.contract import EncoderSettings, Fingerprint, Modality
from embedcache.encoders.graph import Graph, batch_size
from embedcache.encoders.image import check_names
from embedcache.encoders.shapes import ItemShape

Tokenize: TypeAlias = Callable[[Sequence[str]], list[Ints]]
"""Texts -> (T,) int64 token ids each, special tokens included, cut at the model's longest input."""

IDS, MASK = "input_ids", "attention_mask"
"""The names of the graph's inputs, both (B, T) int64; the mask is 1 on tokens and 0 on padding."""


class TextEncoder:
    """A frozen model of texts, of any family.

    Args:
        graph: gives the features, each with the batch as first axis; token features still padded.
        tokenize: called from many threads at once.
        features: name -> shape of one item, the default first; `(-1, D)` is cut to each text's own tokens.
        fingerprint: all that decides the output.
        pad_id: the token that fills short texts up.
        settings: how many texts one `encode` call should get.
    """

    modality: Modality = "text"

    def __init__(
        self,
        *,
        graph: Graph,
        tokenize: Tokenize,
        features: Mapping[str, ItemShape],
        fingerprint: Fingerprint,
        pad_id: int,
        settings: EncoderSettings,
    ) -> None:
        self.features = features
        self.fingerprint = fingerprint
        self.batch_size = batch_size(settings, cpu=64, other=512)
        self._graph = graph
        self._tokenize = tokenize
        self._pad_id = pad_id

    def prepare(self, items: Sequence[str]) -> list[Array]:
        """Turn texts into (T,) int64 token ids, cut at the model's longest input."""
        return list(self._tokenize(items)) if items else []

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Give the named features of each text, float32, not normalised; no padding is left in them."""
        check_names(names, self.features)
        if not prepared:
            return {name: [] for name in names}
        outputs = self._graph(pad(prepared, self._pad_id), names)
        return {name: self._items(name, outputs[name], prepared) for name in names}

    def _items(self, name: str, output: Array, prepared: Sequence[Array]) -> list[Array]:
        if self.features[name][0] != -1:
            return list(output)
        return [tokens_TD[: len(ids)] for tokens_TD, ids in zip(output, prepared, strict=True)]


def pad(ids: Sequence[Array], pad_id: int) -> dict[str, Ints]:
    """Put token ids of several lengths, at least one, into one (B, T) array, filled up on the right, and mask it."""
    lengths = np.array([len(row) for row in ids])
    num_tokens = int(lengths.max())
    padded = np.full((len(ids), num_tokens), pad_id, dtype=np.int64)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    mask = np.arange(num_tokens) < lengths[:, None]
    return {IDS: padded, MASK: mask.astype(np.int64)}
