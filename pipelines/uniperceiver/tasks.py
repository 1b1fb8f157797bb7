"""Tasks of the shared network: their inputs, candidates and positives, batch by batch.

| kind | input | read at | candidates |
| --- | --- | --- | --- |
| `classify` | items | SPE | class names |
| `answer` | items and a text with a blank, or only a text | the blank | answers, labels of texts |
| `retrieve` | items, and texts in turn | SPE | texts, and items, of the batch |
| `caption` | items and the earlier words | a blank after each word | words of the captions, and the end |
| `masked` | items and a text with words left out, or only a text | these blanks | words of the texts |

Candidates pass the whole network in each step. A word passes it as a text of one word, so that it has the same
representation as an answer and as the next word of a caption. If there are more than `max_candidates`, a step uses the
positives of its batch and random negatives, weighted so that the expected loss equals the loss over all candidates (see
`draw_candidates`). Validation compares with all candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from embedcache.arrays import Bools, Ints, blocks, distinct
from embedcache.errors import DataError
from embedcache.metrics import best_ranks, recall_at
from embedcache.train.batches import Batch, BatchInput, to_device
from pipelines.sequence import valid_frames
from pipelines.uniperceiver.candidates import Positives, draw_candidates
from pipelines.uniperceiver.examples import Media, TaskExamples
from pipelines.uniperceiver.network import ReadOut, SharedNetwork, Tokens, Words
from pipelines.uniperceiver.words import BLANK, END, NUM_SPECIAL, UNKNOWN, WordLists, single_words, with_blanks

Kind: TypeAlias = Literal["classify", "answer", "retrieve", "caption", "masked"]
_BLOCK_ROWS = 256
_BLOCK_WORDS = 2048


class TaskTargets(NamedTuple):
    """Texts, candidates and positives of a batch of one task, on the device. The tokens are its inputs.

    Args:
        kind: kind of the task.
        words: words of the inputs, or None.
        read: positions at which inputs are read. `next` is after each word, in two streams.
        candidates: words of the candidates.
        positives: numbers of read positions and of candidates that belong together.
        is_read: for `next`, (B, L + 1) bool, whether a blank has a target.
        log_weights_C: (C,) log-weights of the candidates (all 0 if None).
        is_symmetric: whether candidates are also compared with inputs, as in retrieval.
    """

    kind: Kind
    words: Words | None
    read: ReadOut | Literal["next"]
    candidates: Words
    positives: Positives
    is_read: Tensor | None = None
    log_weights_C: Tensor | None = None
    is_symmetric: bool = False


class InputTexts(NamedTuple):
    """Texts of inputs, and the candidates of the M positions at which they are read.

    Args:
        words: words of each input, or None.
        targets_M: (M,) int64, number of the candidate; -1 if the right word is not a candidate.
        is_read: for captions, (B, L + 1) bool, whether a word is followed by a read position.
    """

    words: WordLists | None
    targets_M: Ints
    is_read: Bools | None = None


@dataclass(frozen=True, kw_only=True)
class ExampleTask:
    """A task on tables of examples.

    Args:
        name: its name, without spaces and dots.
        kind: see the table of the module. Tasks of one kind share a scale.
        train: examples to learn from.
        validation: examples to validate on. At most `max_validation`, evenly spaced, are used.
        candidates: class names or answers, or the words of `caption` and `masked`. If None, the distinct targets of
            `train` in alphabetical order, or their words.
        weight: frequency of its batches, relative to other tasks.
        batch_size: examples per batch.
        max_candidates: most candidates per step; validation compares with all.
        masked: fraction of the words of a text that are left out, at least one.
        max_validation: most validation examples.
    """

    name: str
    kind: Kind
    train: TaskExamples
    validation: TaskExamples
    candidates: Sequence[str] | None = None
    weight: float = 1.0
    batch_size: int = 128
    max_candidates: int = 1024
    masked: float = 0.15
    max_validation: int = 512

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Class names or answers; empty for other kinds."""
        if self.kind not in ("classify", "answer"):
            return ()
        return tuple(self.candidates or sorted(self.train.targets.to_pylist()))

    @cached_property
    def candidate_words(self) -> WordLists:
        """The words of all candidates: of names, or single words with the end first."""
        vocabulary = self.train.vocabulary
        what = f"{self.name}: candidates"
        if self.names:
            return vocabulary.require_known(self.names, what)

        texts = self.train.target_words if self.candidates is None else vocabulary.require_known(self.candidates, what)
        return single_words(texts.numbers_M[texts.numbers_M >= NUM_SPECIAL])

    @cached_property
    def _place_V(self) -> Ints:
        """The position of each word number among single words that are candidates; -1 for others."""
        place_V = np.full(len(self.train.vocabulary) + NUM_SPECIAL, -1, np.int64)
        place_V[self.candidate_words.numbers_M] = np.arange(self.candidate_words.num_texts)
        return place_V

    def describe(self) -> Mapping[str, object]:
        """Return everything that decides the batches, as JSON values."""
        names = ("name", "kind", "weight", "batch_size", "max_candidates", "masked", "max_validation")
        digests = {"train": self.train.digest, "validation": self.validation.digest}
        settings = {name: getattr(self, name) for name in names}
        return {**settings, **digests, "candidates": list(self.candidates or self.names)}

    def draw(self, rng: np.random.Generator, *, device: str) -> Batch:
        """Draw a batch of distinct examples."""
        count = min(self.batch_size, len(self.train))
        positions_B = rng.choice(len(self.train), size=count, replace=False)
        return self.load(self.train.take(positions_B), rng, device=device)

    def load(self, examples: TaskExamples, rng: np.random.Generator | None, *, device: str) -> Batch:
        """Return examples as a batch; without a generator, all candidates are used and the masks are fixed."""
        if self.kind == "retrieve":
            return self._load_pairs(examples, device)

        draws = rng or np.random.default_rng(0)
        words, targets_M, is_read = self.read_texts(examples, draws, is_training=rng is not None)

        num_candidates = self.candidate_words.num_texts
        limit = num_candidates if rng is None else self.max_candidates
        sample = draw_candidates(num_candidates, targets_M, limit=limit, rng=draws)

        log_weights_C = sample.log_weights_C
        targets = TaskTargets(
            kind=self.kind,
            words=None if words is None else load_words(words, device=device),
            read={"classify": "task", "caption": "next"}.get(self.kind, "blank"),  # type: ignore[arg-type]
            is_read=None if is_read is None else to_device(is_read, device),
            candidates=load_words(self.candidate_words.take(sample.numbers_C), device=device),
            positives=(to_device(np.arange(len(targets_M)), device), to_device(sample.positives_M, device)),
            log_weights_C=None if log_weights_C is None else to_device(log_weights_C, device),
        )
        return _batch(examples, examples.rows_N, targets, device)

    def read_texts(self, examples: TaskExamples, rng: np.random.Generator, *, is_training: bool) -> InputTexts:
        """Return the texts of inputs, and the candidates of the positions at which they are read."""
        if self.kind == "classify":
            return InputTexts(None, self._target_positions(examples))
        if self.kind == "answer":
            assert examples.text_words is not None
            return InputTexts(with_blanks(examples.text_words), self._target_positions(examples))

        words = examples.target_words.take(examples.target_N)
        if self.kind == "caption":
            return InputTexts(words, *self._next_words(words, is_training=is_training))
        return InputTexts(*self._mask(words, rng))

    def _load_pairs(self, examples: TaskExamples, device: str) -> Batch:
        """Return the distinct items and the distinct texts of a batch; their pairs are positives."""
        assert examples.rows_N is not None
        rows_B, item_B = np.unique(examples.rows_N, return_inverse=True)
        targets_C, text_B = np.unique(examples.target_N, return_inverse=True)

        # An item and a text that occur twice together in the batch are one pair.
        pairs_E = distinct(item_B * len(targets_C) + text_B)
        item_E, text_E = np.divmod(pairs_E, len(targets_C))

        targets = TaskTargets(
            kind=self.kind,
            words=None,
            read="task",
            candidates=load_words(examples.target_words.take(targets_C), device=device),
            positives=(to_device(item_E, device), to_device(text_E, device)),
            is_symmetric=True,
        )
        return _batch(examples, rows_B, targets, device)

    def _target_positions(self, examples: TaskExamples) -> Ints:
        """Return the candidate number of each example.

        Raises:
            DataError: a target is not a candidate.
        """
        places = {name: number for number, name in enumerate(self.names)}
        numbers_U, target_N = np.unique(examples.target_N, return_inverse=True)
        targets = examples.targets.take(pa.array(numbers_U)).to_pylist()
        unknown = [target for target in targets if target not in places]
        if unknown:
            raise DataError(f"{self.name}: expected targets that are candidates, got {unknown[0]!r}; pass all of them")

        place_U: Ints = np.array([places[target] for target in targets], np.int64)
        return place_U[target_N]

    def _next_words(self, texts: WordLists, *, is_training: bool) -> tuple[Ints, Bools]:
        """Return the candidate after each prefix, and whether each prefix is read.

        In training, only prefixes before a candidate are read. In validation, words that are not candidates have the
        target -1, so that no prediction of them is correct.
        """
        numbers_NL, lengths_N = texts.padded()
        following_NL = np.concatenate([numbers_NL, np.full((len(lengths_N), 1), END)], axis=1)  # padding is also END
        place_NL = self._place_V[following_NL]

        is_read_NL = np.arange(following_NL.shape[1]) <= lengths_N[:, None]
        if is_training:
            is_read_NL &= place_NL >= 0
        return place_NL[is_read_NL], is_read_NL

    def _mask(self, texts: WordLists, rng: np.random.Generator) -> tuple[WordLists, Ints]:
        """Replace some candidate words of each text by blanks, and return these candidates."""
        # Blanks in the text itself are not to be predicted.
        numbers_M = np.where(texts.numbers_M == BLANK, UNKNOWN, texts.numbers_M)
        place_M = self._place_V[numbers_M]
        text_M = np.repeat(np.arange(texts.num_texts), texts.lengths())

        # At least one word of each text is masked: the one with the lowest draw.
        draws_M = np.where(place_M >= 0, rng.random(len(numbers_M)), np.inf)
        lowest_N = np.full(texts.num_texts, np.inf)
        np.minimum.at(lowest_N, text_M, draws_M)
        is_masked_M = (draws_M < self.masked) | ((draws_M == lowest_N[text_M]) & (draws_M < np.inf))
        return WordLists(np.where(is_masked_M, BLANK, numbers_M), texts.offsets_N), place_M[is_masked_M]

    @torch.no_grad()
    def measure(self, network: SharedNetwork, *, device: str) -> dict[str, float]:
        """Compute the accuracy over all candidates (of words for `caption` and `masked`), or R@1 in both directions."""
        examples = self.validation.spread(self.max_validation)
        if self.kind == "retrieve":
            ranks = retrieval_ranks(network, examples, device=device)
            return {f"{self.name} {name} r@1": recall_at(ranks_Q, 1) for name, ranks_Q in ranks.items()}
        return {f"{self.name} accuracy": float(np.mean(predict(self, network, examples, device=device).is_correct_M))}


def _batch(examples: TaskExamples, rows_B: Ints | None, targets: TaskTargets, device: str) -> Batch:
    """Return the batch of examples, with the tokens of these rows."""
    tokens = read_tokens(examples.media, rows_B, device=device)
    return Batch(
        samples=np.arange(len(examples)) if rows_B is None else rows_B,
        num_samples=len(examples),
        inputs={name: BatchInput(values, lengths, rows_B) for name, (values, lengths) in tokens.items()},
        targets=targets,
    )


def read_tokens(media: Media | None, rows_B: Ints | None, *, device: str) -> dict[str, Tokens]:
    """Read the tokens of some rows."""
    if media is None:
        return {}
    assert rows_B is not None
    values, lengths_B = media.read(rows_B)
    tokens = Tokens(to_device(values, device), None if lengths_B is None else to_device(lengths_B, device))
    return {media.modality: tokens}


def load_words(texts: WordLists, *, device: str) -> Words:
    """Return padded texts on the device."""
    return Words(*(to_device(array, device) for array in texts.padded()))


def read_inputs(network: SharedNetwork, batch: Batch) -> Tensor:
    """Compute the representations of the inputs of a batch that have targets: (M, P)."""
    targets: TaskTargets = batch.targets
    tokens = {name: Tokens(values, lengths) for name, (values, lengths, _) in batch.inputs.items()}
    if targets.read != "next":
        return network.encode(tokens, targets.words, read=targets.read)
    assert targets.words is not None
    assert targets.is_read is not None
    return network.predict_words(tokens, targets.words)[targets.is_read]


def _examples_of(targets: TaskTargets) -> Ints:
    """Return the example of each position that was read, as a number in its batch."""
    if targets.words is None:
        return np.arange(len(targets.positives[0]))

    is_read = targets.is_read
    if is_read is None:
        numbers_BL, lengths_B = targets.words
        is_read = (numbers_BL == BLANK) & valid_frames(lengths_B, numbers_BL.shape[1])
    examples_M: Ints = torch.nonzero(is_read)[:, 0].cpu().numpy()
    return examples_M


@torch.no_grad()
def encode_texts(network: SharedNetwork, texts: WordLists, *, device: str) -> Tensor:
    """Encode texts as candidates, in blocks: (N, P)."""
    parts = []
    for rows in blocks(texts.num_texts, _BLOCK_WORDS):
        words = load_words(texts.take(np.arange(rows.start, rows.stop)), device=device)
        parts.append(network.encode(words=words, side="target"))
    return torch.cat(parts)


class Prediction(NamedTuple):
    """Predictions for M examples, or for M words of examples.

    Args:
        predicted_M: best candidate.
        target_M: target.
        is_correct_M: whether both are equal.
        example_M: number of the example.
    """

    predicted_M: Ints
    target_M: Ints
    is_correct_M: Bools
    example_M: Ints


@torch.no_grad()
def predict(task: ExampleTask, network: SharedNetwork, examples: TaskExamples, *, device: str) -> Prediction:
    """Compare examples of any kind but `retrieve` with all candidates. Words follow the true earlier words."""
    network.eval()
    vectors_CP = encode_texts(network, task.candidate_words, device=device)
    classifier = network.classifier(task.kind)

    predicted: list[Ints] = []
    targets: list[Ints] = []
    positions: list[Ints] = []
    for rows in blocks(len(examples), _BLOCK_ROWS):
        numbers_B = np.arange(rows.start, rows.stop)
        batch = task.load(examples.take(numbers_B), None, device=device)
        queries_MP, candidates_CP = classifier.scaled(read_inputs(network, batch), vectors_CP)

        # In blocks, as a batch of captions has many words, and each has a logit per candidate.
        predicted += [
            (queries_MP[part] @ candidates_CP.T).argmax(dim=1).cpu().numpy()
            for part in blocks(len(queries_MP), _BLOCK_ROWS)
        ]
        targets.append(batch.targets.positives[1].cpu().numpy())
        positions.append(numbers_B[_examples_of(batch.targets)])

    predicted_M = np.concatenate(predicted)
    target_M = np.concatenate(targets)
    example_M = np.concatenate(positions)
    return Prediction(predicted_M, target_M, predicted_M == target_M, example_M)


@torch.no_grad()
def retrieval_ranks(network: SharedNetwork, examples: TaskExamples, *, device: str) -> dict[str, Ints]:
    """Compute the rank of the best positive of each item among all distinct texts, and of each text among all items.

    A text of several items counts once and belongs to all of them.

    Returns:
        `item to text` and `text to item` -> (Q,) ranks, where 1 is the best.
    """
    network.eval()
    assert examples.rows_N is not None
    rows_I, item_N = np.unique(examples.rows_N, return_inverse=True)
    targets_T, text_N = np.unique(examples.target_N, return_inverse=True)

    texts = encode_texts(network, examples.target_words.take(targets_T), device=device)
    item_blocks = [
        network.encode(read_tokens(examples.media, rows_I[rows], device=device))
        for rows in blocks(len(rows_I), _BLOCK_ROWS)
    ]
    scaled = network.classifier("retrieve").scaled(torch.cat(item_blocks), texts)
    items_IP = scaled[0].cpu().numpy()
    texts_TP = scaled[1].cpu().numpy()

    # Equal pairs of several examples count once.
    pairs_E = distinct(item_N * len(targets_T) + text_N)
    item_E, text_E = np.divmod(pairs_E, len(targets_T))
    return {
        "item to text": best_ranks(items_IP, texts_TP, (item_E, text_E)),
        "text to item": best_ranks(texts_TP, items_IP, (text_E, item_E)),
    }
