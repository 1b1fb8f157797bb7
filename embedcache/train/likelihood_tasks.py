"""Tasks of one likelihood: what is read, what it is compared with, and which of that is right, batch by batch.

| kind | input | read at | candidates |
| --- | --- | --- | --- |
| `classify` | items | SPE | class names |
| `answer` | items and a text with a blank, or a text alone | the blank | answers, labels of texts |
| `retrieve` | items, and texts in turn | SPE | texts, and items, of the batch |
| `caption` | items and the words before | a blank after each word | words of the captions, and the end |
| `masked` | items and a text with words left out, or a text alone | these blanks | words of the texts |

Another task is an object with what `Subtask` names.

Candidates pass the whole network in each step, words too, each as a text of one word: so a word as an answer has the
representation that it has as the next word of a caption. Where there are more than `max_candidates`, a step takes those
of its batch and others at random, weighted such that the loss is that of all in the mean, see
`embedcache.networks.candidates.draw_candidates`; validation compares with all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from embedcache.arrays import Bools, Ints, blocks
from embedcache.errors import DataError, SettingError
from embedcache.metrics.ranking import recall_at
from embedcache.networks.candidates import Candidates, draw_candidates
from embedcache.networks.shared import SharedNetwork
from embedcache.networks.words import BLANK, END, NUM_SPECIAL, UNKNOWN, WordLists
from embedcache.train.batches import to_device
from embedcache.train.examples import Examples, with_blanks
from embedcache.train.likelihood_batches import (
    TaskBatch,
    encode_texts,
    examples_of,
    load_words,
    read_inputs,
    read_tokens,
    retrieval_ranks,
)

Kind: TypeAlias = Literal["classify", "answer", "retrieve", "caption", "masked"]
KINDS: tuple[Kind, ...] = ("classify", "answer", "retrieve", "caption", "masked")

_BLOCK_ROWS = 256


class Subtask(Protocol):
    """What `train_likelihood` trains together with others."""

    @property
    def name(self) -> str:
        """Its name, which no other task of the run has."""
        ...

    @property
    def family(self) -> str:
        """The likelihood, and its scale, that it uses."""
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
    def train(self) -> Examples:
        """What it learns from."""
        ...

    @property
    def validation(self) -> Examples:
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


@dataclass(frozen=True, kw_only=True)
class ExampleTask:
    """A task of one of the built-in kinds on tables of examples.

    Args:
        name: its name.
        kind: see the table of the module.
        train: examples to learn from.
        validation: examples to be measured on, of which at most `max_validation` are used.
        weight: how often it is drawn, relative to other tasks.
        loss_weight: factor of its loss.
        batch_size: examples per batch.
        smoothing: label smoothing.
        candidates: class names or answers, or the words of `caption` and `masked`; None: the distinct targets of
            `train`, in alphabetical order, or their words.
        max_candidates: most candidates per step.
        has_head: whether prompt tuning adds a `LabelHead`; only of a closed set that fits into `max_candidates`.
        masked: fraction of the words of a text that are left out, at least one.
    """

    name: str
    kind: Kind
    train: Examples
    validation: Examples
    weight: float = 1.0
    loss_weight: float = 1.0
    batch_size: int = 128
    smoothing: float = 0.0
    candidates: Sequence[str] | None = None
    max_candidates: int = 1024
    has_head: bool = False
    masked: float = 0.15
    max_validation: int = 512

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"{self.name}: expected a kind of {', '.join(KINDS)}, got {self.kind!r}")
        if not (self.weight > 0 and self.batch_size > 0 and 0 < self.masked < 1):
            raise SettingError(f"{self.name}: expected weight and batch_size above 0, and masked between 0 and 1")
        if self.kind in ("classify", "retrieve", "caption") and self.train.media is None:
            raise SettingError(f"{self.name}: expected examples about items to {self.kind}, got texts alone")
        if self.kind == "answer" and self.train.text_words is None:
            raise SettingError(f"{self.name}: expected examples with texts to answer, got none; use kind=classify")
        if self.has_head and (self.kind not in ("classify", "answer") or len(self.names) > self.max_candidates):
            raise SettingError(
                f"{self.name}: has_head: expected a closed set of at most {self.max_candidates:,} classes or answers, "
                f"got the candidates of {self.kind}"
            )

    @property
    def family(self) -> str:
        """The kind."""
        return self.kind

    @property
    def heads(self) -> Mapping[str, int]:
        """The closed set with a head, under the name of the task."""
        return {self.name: len(self.names)} if self.has_head else {}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Class names or answers; empty for other kinds."""
        if self.kind not in ("classify", "answer"):
            return ()
        return tuple(self.candidates or sorted(self.train.targets.to_pylist()))

    @cached_property
    def candidate_words(self) -> WordLists:
        """The words of all candidates: of names, or single ones, the end first."""
        if self.names:
            return self.train.vocabulary.require_known(self.names, f"{self.name}: candidates")
        if self.candidates is None:
            words = self.train.target_words.numbers_M
        else:
            words = self.train.vocabulary.require_known(self.candidates, f"{self.name}: candidates").numbers_M
        numbers_C = np.unique(np.concatenate([[END], words[words >= NUM_SPECIAL]])).astype(np.int32)
        return WordLists(numbers_C, np.arange(len(numbers_C) + 1))

    @cached_property
    def _place_V(self) -> Ints:
        """The position of each word number among single words that are candidates; -1: it is none."""
        place_V = np.full(len(self.train.vocabulary) + NUM_SPECIAL, -1, np.int64)
        place_V[self.candidate_words.numbers_M] = np.arange(self.candidate_words.num_texts)
        return place_V

    def describe(self) -> Mapping[str, object]:
        """Return what decides the batches, as JSON values."""
        names = ("name", "kind", "weight", "loss_weight", "batch_size", "smoothing", "max_candidates", "has_head")
        values = {name: getattr(self, name) for name in (*names, "masked", "max_validation")}
        digests = {"train": self.train.digest, "validation": self.validation.digest}
        return {**values, **digests, "candidates": list(self.candidates or self.names or self._caption_words())}

    def _caption_words(self) -> list[str]:
        """Return the words of captions, which are all that a caption may have; none for other kinds."""
        numbers_C = self.candidate_words.numbers_M if self.kind == "caption" else ()
        return [self.train.vocabulary.words[number - NUM_SPECIAL] for number in numbers_C if number != END]

    def draw(self, rng: np.random.Generator, *, device: str) -> TaskBatch:
        """Draw a batch of different examples."""
        count = min(self.batch_size, len(self.train))
        positions_B = rng.choice(len(self.train), size=count, replace=False)
        return self.load(self.train.take(positions_B), rng, device=device)

    def load(self, examples: Examples, rng: np.random.Generator | None, *, device: str) -> TaskBatch:
        """Return examples as a batch; without a generator all candidates are used, and masks are always the same."""
        if self.kind == "retrieve":
            return self._load_pairs(examples, device)
        draws = rng or np.random.default_rng(0)
        is_read: Bools | None = None
        if self.kind in ("classify", "answer"):
            words = None if examples.text_words is None else with_blanks(examples.text_words)
            words = None if self.kind == "classify" else words
            targets_M = self._target_positions(examples)
        else:
            words = examples.target_words.take(examples.target_N)
            if self.kind == "caption":
                targets_M, is_read = self._next_words(words, is_training=rng is not None)
            else:
                words, targets_M = self._mask(words, draws)
        limit = self.max_candidates if rng is not None else len(self.candidate_words.offsets_N)
        chosen_C, positives_M, log_weights_C = draw_candidates(
            self.candidate_words.num_texts, targets_M, limit=limit, rng=draws
        )
        return TaskBatch(
            family=self.family,
            tokens=read_tokens(examples.media, examples.rows_N, device=device),
            words=None if words is None else load_words(words, device=device),
            read={"classify": "task", "caption": "next"}.get(self.kind, "blank"),  # type: ignore[arg-type]
            is_read=None if is_read is None else to_device(is_read, device),
            candidates=load_words(self.candidate_words.take(chosen_C), device=device),
            positives=(to_device(np.arange(len(positives_M)), device), to_device(positives_M, device)),
            log_weights_C=None if log_weights_C is None else to_device(log_weights_C, device),
            head=self.name if self.has_head else None,
            rows=examples.rows_N,
        )

    def _load_pairs(self, examples: Examples, device: str) -> TaskBatch:
        """Return the distinct items and the distinct texts of a batch; pairs of both are positives."""
        assert examples.rows_N is not None
        rows_B, which_row_B = np.unique(examples.rows_N, return_inverse=True)
        targets_C, which_target_B = np.unique(examples.target_N, return_inverse=True)
        pairs_E = np.unique(which_row_B * len(targets_C) + which_target_B)
        first_E, second_E = np.divmod(pairs_E, len(targets_C))
        return TaskBatch(
            family=self.family,
            tokens=read_tokens(examples.media, rows_B, device=device),
            words=None,
            read="task",
            candidates=load_words(examples.target_words.take(targets_C), device=device),
            positives=(to_device(first_E, device), to_device(second_E, device)),
            is_symmetric=True,
            rows=rows_B,
        )

    def _target_positions(self, examples: Examples) -> Ints:
        """Return the number of the candidate of each example."""
        places = {name: number for number, name in enumerate(self.names)}
        distinct = examples.targets.to_pylist()
        used = np.unique(examples.target_N)
        missing = [distinct[number] for number in used.tolist() if distinct[number] not in places]
        if missing:
            raise DataError(
                f"{self.name}: expected targets that are candidates, got {missing[0]!r}; pass all of them as candidates"
            )
        place_F: Ints = np.array([places.get(name, -1) for name in distinct], np.int64)
        return place_F[examples.target_N]

    def _next_words(self, texts: WordLists, *, is_training: bool) -> tuple[Ints, Bools]:
        """Return the candidate after each prefix, and where there is one; in training, only where it is one.

        In validation, words that are no candidates have the target -1, so that no prediction of them is right.
        """
        numbers_NL, lengths_N = texts.padded()
        following_NL = np.concatenate([numbers_NL, np.full((len(lengths_N), 1), END)], axis=1)  # padding is END, too
        place_NL = self._place_V[following_NL]
        is_read_NL = np.arange(following_NL.shape[1]) <= lengths_N[:, None]
        if is_training:
            is_read_NL &= place_NL >= 0
        return place_NL[is_read_NL], is_read_NL

    def _mask(self, texts: WordLists, rng: np.random.Generator) -> tuple[WordLists, Ints]:
        """Replace some words of each text, which are candidates, by blanks, and return the candidates."""
        numbers_M = np.where(texts.numbers_M == BLANK, UNKNOWN, texts.numbers_M)
        place_M = self._place_V[numbers_M]
        of_text_M = np.repeat(np.arange(texts.num_texts), texts.lengths())
        draws_M = np.where(place_M >= 0, rng.random(len(numbers_M)), np.inf)
        lowest_N = np.full(texts.num_texts, np.inf)
        np.minimum.at(lowest_N, of_text_M, draws_M)
        is_masked_M = (draws_M < self.masked) | ((draws_M == lowest_N[of_text_M]) & (draws_M < np.inf))
        return WordLists(np.where(is_masked_M, BLANK, numbers_M), texts.offsets_N), place_M[is_masked_M]

    @torch.no_grad()
    def measure(self, network: SharedNetwork, *, device: str) -> dict[str, float]:
        """Compute accuracy over all candidates, of words for `caption` and `masked`; or R@1 in both directions."""
        examples = self.validation.spread(self.max_validation)
        if self.kind == "retrieve":
            ranks = retrieval_ranks(network, examples, device=device)
            return {f"{self.name} {name} r@1": recall_at(ranks_Q, 1) for name, ranks_Q in ranks.items()}
        return {f"{self.name} accuracy": float(np.mean(predict(self, network, examples, device=device).is_correct_M))}


class Prediction(NamedTuple):
    """What was predicted for M examples, or for M words of examples.

    Args:
        predicted_M: the best candidate.
        target_M: the right one.
        is_correct_M: whether both are the same.
        example_M: number of the example.
    """

    predicted_M: Ints
    target_M: Ints
    is_correct_M: Bools
    example_M: Ints


@torch.no_grad()
def predict(task: ExampleTask, network: SharedNetwork, examples: Examples, *, device: str = "cpu") -> Prediction:
    """Compare examples of any kind but `retrieve` with all candidates; words are predicted after the true ones."""
    network.eval()
    vectors_CP = encode_texts(network, task.candidate_words, device=device)
    parts: list[tuple[Ints, Ints, Ints]] = []
    for rows in blocks(len(examples), _BLOCK_ROWS):
        numbers_B = np.arange(rows.start, rows.stop)
        batch = task.load(examples.take(numbers_B), None, device=device)
        queries, candidates = network.compare(
            read_inputs(network, batch), Candidates(vectors_CP), family=task.family, head=batch.head
        )
        best = [
            _logits(queries[part], candidates).argmax(dim=1).cpu().numpy() for part in blocks(len(queries), _BLOCK_ROWS)
        ]
        parts.append((np.concatenate(best), batch.positives[1].cpu().numpy(), numbers_B[examples_of(batch)]))
    predicted_M, target_M, example_M = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Prediction(predicted_M, target_M, predicted_M == target_M, example_M)


def _logits(queries_BP: Tensor, candidates: Candidates) -> Tensor:
    logits_BC = queries_BP @ candidates.vectors_CP.T
    return logits_BC if candidates.bias_C is None else logits_BC + candidates.bias_C
