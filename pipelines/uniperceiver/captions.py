"""Captions word by word: a beam search over a vocabulary that keeps keys and values of all that was seen before.

The words of a vocabulary are candidates like any others: log p(word | input, words before) is that of the likelihood.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from embedcache.arrays import Ints
from pipelines.beam import search_beam
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
    """Search the most probable caption of each of B items, all at once, see `pipelines.beam.search_beam`.

    The log-probability of a caption is the sum over its words and the end.

    Args:
        network: the network, in evaluation mode.
        tokens: what the captions are about.
        likelihood: likelihood of the words.
        vocabulary: (C,) int64 numbers of the words to write, `END` first, and their representations.
        beam: hypotheses kept per item.
        max_length: most words of a caption.
    """
    numbers_C, vectors_CP = vocabulary
    assert int(numbers_C[0]) == END
    end = len(numbers_C)  # its symbol; those of words are their places, and 0 is the symbol of none
    steps = CaptionSteps(network, tokens)

    def next_log_probs(symbols_N: Tensor, parents_N: Tensor) -> Tensor:
        is_first = bool((symbols_N == end).all())
        representations_NP = steps(None if is_first else numbers_C[symbols_N], parents_N)
        log_probs_NC = likelihood.logits(representations_NP, vectors_CP).double().log_softmax(dim=1)
        unused_N1 = torch.full_like(log_probs_NC[:, :1], -torch.inf)
        return torch.cat([unused_N1, log_probs_NC[:, 1:], log_probs_NC[:, :1]], dim=1)

    num_items = len(next(iter(tokens.values())).values_BTD)
    caps_B = torch.full((num_items,), max_length, device=numbers_C.device)
    found = search_beam(next_log_probs, caps_B, num_symbols=end + 1, beam=beam)
    numbers = numbers_C.cpu().numpy()
    return [Caption(numbers[hypothesis.symbols], hypothesis.score) for hypothesis in found]
