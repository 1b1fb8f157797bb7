"""Captions word by word: a beam search over a vocabulary that keeps keys and values of the tokens and words so far.

The words of a vocabulary are candidates like any others: the classifier gives log p(word | input, earlier words).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from embedcache.arrays import Ints
from pipelines.beam import search_beam
from pipelines.uniperceiver.candidates import CosineClassifier
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
    """Captions of B items that grow by one word per call, with the keys and values of their words so far.

    A call returns the output of `SharedNetwork.predict_words` for the last blank. Memory: keys and values of the tokens
    and words, per layer and caption.
    """

    def __init__(self, network: SharedNetwork, tokens: Mapping[str, Tokens]) -> None:
        self._network = network
        self._num_words = 0
        self._layers = [layer for layer in network.layers if isinstance(layer, SharedLayer)]
        self._prompts = [network.prompt_keys(number, "input") for number in range(len(self._layers))]

        hidden_BSD, self._is_valid_NS = network.embed_context(tokens)
        mask = self._is_valid_NS[:, None, None]
        # Each layer keeps the keys and values of its inputs. Nothing reads the outputs of the last layer.
        self._cached: list[KeysValues] = []
        for layer, prompts in zip(self._layers, self._prompts, strict=True):
            self._cached.append(layer.key_values(hidden_BSD))
            if len(self._cached) < len(self._layers):
                hidden_BSD = layer(hidden_BSD, self._cached[-1], mask, prompts=prompts)

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
            cached_keys, cached_values = self._cached[number]
            new_keys, new_values = layer.key_values(hidden_NLD)
            keys = torch.cat([cached_keys[parents_N], new_keys], dim=2)
            values = torch.cat([cached_values[parents_N], new_values], dim=2)
            hidden_NLD = layer(hidden_NLD, (keys, values), mask, prompts=prompts)
            self._cached[number] = keys[:, :, :-1], values[:, :, :-1]  # no later position sees this blank
        return self._network.read(hidden_NLD[:, -1])

    def _mask(self, num_new: int) -> Tensor:
        """Return the keys that the word and the blank see: all valid ones, and the blank also sees itself."""
        sees_NLS = self._is_valid_NS[:, None].expand(-1, num_new, -1)
        sees_blank_NL1 = torch.zeros_like(sees_NLS[:, :, :1])
        sees_blank_NL1[:, -1] = True
        return torch.cat([sees_NLS, sees_blank_NL1], dim=2)[:, None]


@torch.no_grad()
def write_captions(
    network: SharedNetwork,
    tokens: Mapping[str, Tokens],
    classifier: CosineClassifier,
    vocabulary: tuple[Tensor, Tensor],
    *,
    beam: int = 5,
    max_length: int = 20,
) -> list[Caption]:
    """Search the most probable caption of each of B items together, see `pipelines.beam.search_beam`.

    The log-probability of a caption is the sum over its words and the end.

    Args:
        network: the network, in evaluation mode.
        tokens: tokens of the items.
        classifier: likelihood of the words.
        vocabulary: (C,) int64 numbers of the words to write, `END` first, and their representations.
        beam: hypotheses kept per item.
        max_length: most words of a caption.
    """
    numbers_C, vectors_CP = vocabulary
    assert int(numbers_C[0]) == END
    end = len(numbers_C)  # symbol of the end. Words have their positions as symbols, and 0 is unused

    steps = CaptionSteps(network, tokens)

    def next_log_probs(symbols_N: Tensor, parents_N: Tensor) -> Tensor:
        # The search starts from the end symbol; the network starts from the tokens, without a word.
        is_first = bool((symbols_N == end).all())
        representations_NP = steps(None if is_first else numbers_C[symbols_N], parents_N)
        log_probs_NC = classifier.logits(representations_NP, vectors_CP).double().log_softmax(dim=1)
        unused_N1 = torch.full_like(log_probs_NC[:, :1], -torch.inf)

        # The end comes first among the candidates and is the last symbol of the search.
        return torch.cat([unused_N1, log_probs_NC[:, 1:], log_probs_NC[:, :1]], dim=1)

    num_items = len(next(iter(tokens.values())).values_BTD)
    caps_B = torch.full((num_items,), max_length, device=numbers_C.device)
    hypotheses = search_beam(next_log_probs, caps_B, num_symbols=end + 1, beam=beam)

    numbers = numbers_C.cpu().numpy()
    return [Caption(numbers[hypothesis.symbols], hypothesis.score) for hypothesis in hypotheses]
