"""What a task of one likelihood is, its batches on the device, and what the network makes of them and of tables."""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from embedcache.arrays import Ints, blocks, distinct
from embedcache.metrics.ranking import best_ranks
from embedcache.networks.sequence import valid_frames
from embedcache.networks.shared import ReadOut, SharedNetwork, Tokens, Words
from embedcache.networks.words import BLANK, WordLists
from embedcache.train.batches import to_device
from embedcache.train.examples import Media, TaskExamples

BLOCK_ROWS = 256
_BLOCK_WORDS = 2048


class TaskBatch(NamedTuple):
    """A batch of one task on the device.

    Args:
        family: name of the likelihood that is used, which has a scale of its own.
        tokens: modality -> tokens of the inputs.
        words: words of the inputs; None: none.
        read: where inputs are read; `next`: after each word, in two streams.
        is_read: of `next`, (B, L + 1) bool, which blanks have a target.
        candidates: words of the candidates.
        positives: two (E,) int64, positions of inputs that were read, and of candidates, that belong together.
        log_weights_C: (C,) log-weights of the candidates, None: 0.
        head: name of the closed set of the candidates, if they have a `LabelHead`.
        is_symmetric: whether candidates are also compared with inputs, as in retrieval.
        rows: rows of the feature, to name them.
    """

    family: str
    tokens: Mapping[str, Tokens]
    words: Words | None
    read: ReadOut | Literal["next"]
    candidates: Words
    positives: tuple[Tensor, Tensor]
    is_read: Tensor | None = None
    log_weights_C: Tensor | None = None
    head: str | None = None
    is_symmetric: bool = False
    rows: Ints | None = None


class Subtask(Protocol):
    """What `train_likelihood` trains together with others."""

    @property
    def name(self) -> str:
        """Its name, which no other task of the run has."""
        ...

    @property
    def family(self) -> str:
        """Name of the likelihood that it uses, with its scale; tasks of one family share both."""
        ...

    @property
    def weight(self) -> float:
        """How often it is drawn, relative to the others."""
        ...

    @property
    def loss_weight(self) -> float:
        """Factor of its loss."""
        ...

    @property
    def smoothing(self) -> float:
        """Label smoothing."""
        ...

    @property
    def batch_size(self) -> int:
        """Examples per batch."""
        ...

    @property
    def train(self) -> TaskExamples:
        """What it learns from."""
        ...

    @property
    def validation(self) -> TaskExamples:
        """What it is measured on after each epoch."""
        ...

    @property
    def heads(self) -> Mapping[str, int]:
        """Closed sets of candidates with a `LabelHead` -> their sizes."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Return what decides its batches, as JSON values, for the config of the run."""
        ...

    def draw(self, rng: np.random.Generator, *, device: str) -> TaskBatch:
        """Draw a batch: a function of the generator alone."""
        ...

    def measure(self, network: SharedNetwork, *, device: str) -> Mapping[str, float]:
        """Compute its validation metrics, each from 0 to 1 and better if higher."""
        ...


def read_tokens(media: Media | None, rows_B: Ints | None, *, device: str) -> dict[str, Tokens]:
    """Read the tokens of some rows; a pooled vector is one token."""
    if media is None:
        return {}
    assert rows_B is not None
    inputs = media.read(rows_B)
    values = inputs.values[:, None] if inputs.values.ndim == 2 else inputs.values
    lengths = None if inputs.lengths is None else to_device(inputs.lengths, device)
    return {media.modality: Tokens(to_device(values, device), lengths)}


def load_words(texts: WordLists, *, device: str) -> Words:
    """Return padded texts on the device."""
    return Words(*(to_device(array, device) for array in texts.padded()))


def read_inputs(network: SharedNetwork, batch: TaskBatch) -> Tensor:
    """Compute the representations of the inputs of a batch that have targets: (M, P)."""
    if batch.read != "next":
        return network.encode(batch.tokens, batch.words, read=batch.read)
    assert batch.words is not None
    assert batch.is_read is not None
    return network.predict_words(batch.tokens, batch.words)[batch.is_read]


def examples_of(batch: TaskBatch) -> Ints:
    """Return the number in its batch of the example of each input that was read."""
    of_input_E, _ = batch.positives
    if batch.words is None:
        return np.arange(len(of_input_E))
    where = batch.is_read
    if where is None:
        where = (batch.words.numbers_BL == BLANK) & valid_frames(batch.words.lengths_B, batch.words.numbers_BL.shape[1])
    examples_M: Ints = torch.nonzero(where)[:, 0].cpu().numpy()
    return examples_M


@torch.no_grad()
def encode_texts(network: SharedNetwork, texts: WordLists, *, device: str = "cpu") -> Tensor:
    """Encode texts as candidates, in blocks: (N, P)."""
    parts = [
        network.encode(words=load_words(texts.take(np.arange(rows.start, rows.stop)), device=device), side="target")
        for rows in blocks(texts.num_texts, _BLOCK_WORDS)
    ]
    return torch.cat(parts)


@torch.no_grad()
def encode_items(network: SharedNetwork, media: Media, rows_N: Ints, *, device: str = "cpu") -> Iterator[Tensor]:
    """Encode items in their order, in blocks: (B, P) each."""
    for rows in blocks(len(rows_N), BLOCK_ROWS):
        yield network.encode(read_tokens(media, rows_N[rows], device=device))


@torch.no_grad()
def retrieval_ranks(
    network: SharedNetwork, examples: TaskExamples, *, family: str = "retrieve", device: str = "cpu"
) -> dict[str, Ints]:
    """Compute the rank of the best positive of each item among all distinct texts, and of each text among the items.

    Texts of several items count once, and belong to all of them.

    Returns:
        `item to text` and `text to item` -> (Q,) ranks, 1 is the best.
    """
    network.eval()
    assert examples.media is not None
    assert examples.rows_N is not None
    rows_I, which_row_N = np.unique(examples.rows_N, return_inverse=True)
    targets_T, which_target_N = np.unique(examples.target_N, return_inverse=True)
    texts = encode_texts(network, examples.target_words.take(targets_T), device=device)
    items = torch.cat(list(encode_items(network, examples.media, rows_I, device=device)))
    likelihood = network.likelihood(family)
    scaled_items, scaled_texts = (values.cpu().numpy() for values in likelihood.scaled(items, texts))
    pairs_E = distinct(which_row_N * len(targets_T) + which_target_N)
    of_item_E, of_text_E = np.divmod(pairs_E, len(targets_T))
    return {
        "item to text": best_ranks(scaled_items, scaled_texts, (of_item_E, of_text_E)),
        "text to item": best_ranks(scaled_texts, scaled_items, (of_text_E, of_item_E)),
    }
