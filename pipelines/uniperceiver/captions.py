"""Captions word by word: a beam search over a vocabulary that keeps keys and values of all that was seen before.

The words of a vocabulary are candidates like any others: log p(word | input, words before) is that of the likelihood.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from embedcache.arrays import Ints
from pipelines.uniperceiver.candidates import Likelihood
from pipelines.uniperceiver.layers import KeysValues, SharedLayer
from pipelines.uniperceiver.network import SharedNetwork, Tokens
from pipelines.uniperceiver.words import BLANK, END


class Caption(NamedTuple):
    """A caption and its score.

    Args:
        numbers: (L,) int64, numbers of its words, without the end.
        log_prob: log-probability of its words and of the end after them.
    """

    numbers: Ints
    log_prob: float


class CaptionSteps:
    """Captions of B items that grow by one word per call, on the keys and values of what they contain so far.

    A call gives what `SharedNetwork.predict_words` gives for the last blank. Memory: keys and values of the tokens and
    the words, per layer and caption.
    """

    def __init__(self, network: SharedNetwork, tokens: Mapping[str, Tokens]) -> None:
        self._network, self._num_words = network, 0
        self._layers = [layer for layer in network.layers if isinstance(layer, SharedLayer)]
        self._prompts = [network.prompt_keys(number, "input") for number in range(len(self._layers))]
        hidden_BSD, self._is_valid_NS = network.embed_context(tokens)
        mask = self._is_valid_NS[:, None, None]
        self._seen: list[KeysValues] = []
        for layer, prompts in zip(self._layers, self._prompts, strict=True):
            self._seen.append(layer.key_values(hidden_BSD))
            if len(self._seen) < len(self._layers):
                hidden_BSD = layer(hidden_BSD, self._seen[-1], mask, prompts=prompts)

    def __call__(self, numbers_N: Tensor | None, parents_N: Tensor) -> Tensor:
        """Append a word to N captions, and return the representations of the blank after it: (N, P).

        Args:
            numbers_N: (N,) int64, the words; None in the first call.
            parents_N: (N,) int64, the caption of the previous call that each one extends; at first, its item.
        """
        self._is_valid_NS = self._is_valid_NS[parents_N]
        blanks_N1 = torch.full_like(parents_N, BLANK)[:, None]
        hidden_NLD = self._network.embed_words(blanks_N1, self._num_words + (numbers_N is not None))
        if numbers_N is not None:
            word_N1D = self._network.embed_words(numbers_N[:, None], self._num_words)
            hidden_NLD = torch.cat([word_N1D, hidden_NLD], dim=1)
            self._is_valid_NS = torch.cat([self._is_valid_NS, self._is_valid_NS.new_ones(len(parents_N), 1)], dim=1)
            self._num_words += 1
        mask = self._mask(hidden_NLD.shape[1])
        for number, (layer, prompts) in enumerate(zip(self._layers, self._prompts, strict=True)):
            keys, values = (
                torch.cat([seen[parents_N], new], dim=2)
                for seen, new in zip(self._seen[number], layer.key_values(hidden_NLD), strict=True)
            )
            hidden_NLD = layer(hidden_NLD, (keys, values), mask, prompts=prompts)
            self._seen[number] = keys[:, :, :-1], values[:, :, :-1]  # no later position sees this blank
        return self._network.read(hidden_NLD[:, -1])

    def _mask(self, num_new: int) -> Tensor:
        """Return which keys the word and the blank see: all that is valid, and the blank itself besides."""
        sees_NLS = self._is_valid_NS[:, None].expand(-1, num_new, -1)
        sees_blank_NL1 = torch.zeros_like(sees_NLS[:, :, :1])
        sees_blank_NL1[:, -1] = True
        return torch.cat([sees_NLS, sees_blank_NL1], dim=2)[:, None]


@torch.no_grad()
def write_captions(
    network: SharedNetwork,
    tokens: Mapping[str, Tokens],
    likelihood: Likelihood,
    vocabulary: tuple[Tensor, Tensor],
    *,
    beam: int = 5,
    max_length: int = 20,
) -> list[Caption]:
    """Search the most probable caption of each of B items, all at once.

    The log-probability of a caption is the sum over its words and the end. At every length, each hypothesis is also
    considered complete. The others are dropped once they are less probable than the best complete one, so that a wide
    enough beam is an exact search.

    Args:
        network: the network, in evaluation mode.
        tokens: what the captions are about.
        likelihood: likelihood of the words.
        vocabulary: (C,) int64 numbers of the words to write, with `END` among them, and their representations.
        beam: hypotheses kept per item.
        max_length: most words of a caption.
    """
    numbers_C, vectors_CP = vocabulary
    steps = CaptionSteps(network, tokens)

    def log_probs(numbers_N: Tensor | None, parents_N: Tensor) -> Tensor:
        logits_NC = likelihood.logits(steps(numbers_N, parents_N), vectors_CP)
        return logits_NC.double().log_softmax(dim=1)

    num_items = len(next(iter(tokens.values())).values_BTD)
    search = _CaptionSearch(log_probs, numbers_C, num_items, beam, max_length)
    while search.is_running:
        search.step()
    return search.results()


class _CaptionSearch:
    """State of the search: N hypotheses of one length, sorted by item, and the best captions so far."""

    def __init__(
        self,
        log_probs: Callable[[Tensor | None, Tensor], Tensor],
        numbers_C: Tensor,
        num_items: int,
        beam: int,
        max_length: int,
    ) -> None:
        device = numbers_C.device
        self._next = log_probs
        self._numbers_C = numbers_C
        self._end = int(torch.nonzero(numbers_C == END)[0, 0])
        self._beam = beam
        self._max_length = max_length

        self._items_N = torch.arange(num_items, device=device)
        self._parents_N = self._items_N
        self._words_NL = torch.empty((num_items, 0), dtype=torch.int64, device=device)
        self._log_prob_N = torch.zeros(num_items, dtype=torch.float64, device=device)
        self._best_log_prob_B = torch.full((num_items,), -torch.inf, dtype=torch.float64, device=device)
        self._best_BL = torch.full((num_items, max_length), END, device=device)

    @property
    def is_running(self) -> bool:
        return len(self._items_N) > 0

    @property
    def _length(self) -> int:
        return self._words_NL.shape[1]

    def step(self) -> None:
        """Consider each hypothesis complete, then replace all by their best extensions that can still win."""
        last_words_N = self._words_NL[:, -1] if self._length else None
        log_prob_NC = self._log_prob_N[:, None] + self._next(last_words_N, self._parents_N)
        self._complete(log_prob_NC[:, self._end])

        log_prob_NC[:, self._end] = -torch.inf
        self._extend(log_prob_NC)

    def _complete(self, log_prob_N: Tensor) -> None:
        first_B = self._by_item(self._items_N, log_prob_N, 1)
        better_B = first_B[log_prob_N[first_B] > self._best_log_prob_B[self._items_N[first_B]]]
        items_B = self._items_N[better_B]

        self._best_log_prob_B[items_B] = log_prob_N[better_B]
        self._best_BL[items_B, : self._length] = self._words_NL[better_B]  # a later one is longer

    def _extend(self, log_prob_NC: Tensor) -> None:
        top_NK, index_NK = log_prob_NC.topk(min(self._beam, log_prob_NC.shape[1]), dim=1)
        is_live_NK = top_NK > self._best_log_prob_B[self._items_N][:, None]
        if self._length == self._max_length:
            is_live_NK = torch.zeros_like(is_live_NK)

        parents_M, ranks_M = torch.nonzero(is_live_NK, as_tuple=True)
        items_M = self._items_N[parents_M]
        log_prob_M = top_NK[parents_M, ranks_M]
        kept = self._by_item(items_M, log_prob_M, self._beam)

        self._parents_N = parents_M[kept]
        self._items_N = items_M[kept]
        self._log_prob_N = log_prob_M[kept]
        words_N1 = self._numbers_C[index_NK[parents_M, ranks_M][kept]][:, None]
        self._words_NL = torch.cat([self._words_NL[self._parents_N], words_N1], dim=1)

    def _by_item(self, items_M: Tensor, scores_M: Tensor, count: int) -> Tensor:
        """Return the positions of the best `count` hypotheses of each item, by item, then the best first."""
        order_M = torch.argsort(scores_M, descending=True, stable=True)
        order_M = order_M[torch.argsort(items_M[order_M], stable=True)]
        counts_B = torch.bincount(items_M, minlength=len(self._best_log_prob_B))
        starts_M = (counts_B.cumsum(0) - counts_B)[items_M[order_M]]
        return order_M[torch.arange(len(order_M), device=order_M.device) - starts_M < count]

    def results(self) -> list[Caption]:
        lengths_B = (self._best_BL != END).sum(dim=1).tolist()
        rows = self._best_BL.cpu().numpy()
        found = zip(rows, lengths_B, self._best_log_prob_B.tolist(), strict=True)
        return [Caption(row[:length].copy(), log_prob) for row, length, log_prob in found]
