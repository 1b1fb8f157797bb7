"""Tasks of one likelihood: what is read, what it is compared with, and which of that is right, batch by batch.

| kind | input | read at | candidates |
| --- | --- | --- | --- |
| `classify` | items | SPE | class names |
| `answer` | items and a text with a blank, or a text alone | the blank | answers, labels of texts |
| `retrieve` | items, and texts in turn | SPE | texts, and items, of the batch |
| `caption` | items and the words before | a blank after each word | words of the captions, and the end |
| `masked` | items and a text with words left out, or a text alone | these blanks | words of the texts |

Another task is an object with what `embedcache.train.likelihood_batches.Subtask` names.

Candidates pass the whole network in each step, words too, each as a text of one word: so a word as an answer has the
representation that it has as the next word of a caption. Where there are more than `max_candidates`, a step takes those
of its batch and others at random, weighted such that the loss is that of all in the mean, see
`embedcache.networks.candidates.draw_candidates`; validation compares with all. With `mined`, those nearest to the
positives of the batch are among them; the batch of `retrieve` then has examples of the nearest texts.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from embedcache.arrays import Bools, Ints, blocks, distinct
from embedcache.errors import DataError, SettingError
from embedcache.metrics.ranking import recall_at
from embedcache.networks.candidates import Candidates, MinedNegatives, draw_candidates
from embedcache.networks.shared import SharedNetwork
from embedcache.networks.words import BLANK, END, NUM_SPECIAL, UNKNOWN, WordLists, single_words
from embedcache.provenance import digest
from embedcache.settings import check_settings, setting
from embedcache.train.batches import to_device
from embedcache.train.examples import TaskExamples, with_blanks
from embedcache.train.likelihood_batches import (
    BLOCK_ROWS,
    TaskBatch,
    encode_texts,
    examples_of,
    load_words,
    read_inputs,
    read_tokens,
    retrieval_ranks,
)

Kind: TypeAlias = Literal["classify", "answer", "retrieve", "caption", "masked"]
AnswerLoader: TypeAlias = Callable[[TaskExamples, np.random.Generator], tuple[WordLists, Ints]]
"""Returns the input text of each example, and the number of its candidate: (B,) int64."""
KINDS: tuple[Kind, ...] = ("classify", "answer", "retrieve", "caption", "masked")


@dataclass(frozen=True, kw_only=True)
class ExampleTask:
    """A task of one of the built-in kinds on tables of examples.

    Args:
        name: its name.
        kind: see the table of the module.
        train: examples to learn from.
        validation: examples to be measured on, of which at most `max_validation` are used.
        candidates: class names or answers, or the words of `caption` and `masked`; None: the distinct targets of
            `train`, in alphabetical order, or their words.
        mined: hard negatives of training: neighbors of the positives among the candidates, or of a text among the
            distinct targets of `train` for `retrieve`; see `embedcache.likelihood.tasks.mine_candidates`. None: none.
        loader: of the kind `answer` with `candidates`, a function that makes the texts and the answers of examples, in
            place of their own ones.

    The arguments from `weight` on are described beside their defaults, below.

    Raises:
        SettingError: an unknown kind, a value outside its bounds, or examples or options that the kind cannot have.
    """

    name: str
    kind: Kind
    train: TaskExamples
    validation: TaskExamples
    candidates: Sequence[str] | None = None
    mined: MinedNegatives | None = None
    loader: AnswerLoader | None = None
    weight: float = setting(1.0, "How often it is drawn, relative to other tasks.", gt=0)
    loss_weight: float = setting(1.0, "Factor of its loss.", gt=0)
    batch_size: int = setting(128, "Examples per batch.", ge=1)
    smoothing: float = setting(0.0, "Label smoothing.", ge=0, lt=1)
    max_candidates: int = setting(1024, "Most candidates per step; validation compares with all.", ge=2)
    has_head: bool = setting(
        False, "Whether tuning adds a label head; only of a closed set of at most max_candidates classes or answers."
    )
    masked: float = setting(0.15, "Fraction of the words of a text that are left out, at least one.", gt=0, lt=1)
    max_validation: int = setting(512, "Most validation examples, evenly spaced.", ge=1)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"{self.name}: expected a kind of {', '.join(KINDS)}, got {self.kind!r}")
        try:
            check_settings(self)
        except SettingError as error:
            raise SettingError(f"{self.name}: {error}") from error
        if self.loader is not None and (self.kind != "answer" or self.candidates is None):
            raise SettingError(f"{self.name}: loader: expected the kind answer with candidates, got {self.kind}")
        for examples in (self.train, self.validation):
            if self.kind in ("classify", "retrieve", "caption") and examples.media is None:
                raise SettingError(f"{self.name}: expected examples about items to {self.kind}, got texts alone")
            if self.kind == "answer" and self.loader is None and examples.text_words is None:
                raise SettingError(f"{self.name}: expected examples with texts to answer, got none; use kind=classify")
        if self.has_head and (self.kind not in ("classify", "answer") or len(self.names) > self.max_candidates):
            raise SettingError(
                f"{self.name}: has_head: expected a closed set of at most {self.max_candidates:,} classes or answers, "
                f"got the candidates of {self.kind}"
            )
        if self.mined is not None and len(self.mined.vectors_CP) != self.mined_texts.num_texts:
            raise SettingError(
                f"{self.name}: mined: expected vectors of {self.mined_texts.num_texts:,} candidates, got "
                f"{len(self.mined.vectors_CP):,}"
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
            return self.train.vocabulary.require_distinct(self.names, f"{self.name}: candidates")
        if self.candidates is None:
            numbers_M = self.train.target_words.numbers_M
        else:
            numbers_M = self.train.vocabulary.require_known(self.candidates, f"{self.name}: candidates").numbers_M
        return single_words(numbers_M[numbers_M >= NUM_SPECIAL])

    @property
    def mined_texts(self) -> WordLists:
        """The words of what `mined` numbers: of all candidates, or of the distinct targets for `retrieve`."""
        return self.train.target_words if self.kind == "retrieve" else self.candidate_words

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
        described = {**values, **digests, "candidates": list(self.candidates or self.names or self._caption_words())}
        if self.mined is not None:
            vectors_CP = np.ascontiguousarray(self.mined.vectors_CP)
            described["mined"] = {"k": self.mined.k, "vectors": hashlib.sha256(vectors_CP.tobytes()).hexdigest()}
        if self.loader is not None:
            described["loader"] = _describe_loader(self.loader)
        return described

    def _caption_words(self) -> list[str]:
        """Return the words of captions, which are all that a caption may have; none for other kinds."""
        numbers_C = self.candidate_words.numbers_M if self.kind == "caption" else ()
        return [self.train.vocabulary.words[number - NUM_SPECIAL] for number in numbers_C if number != END]

    def draw(self, rng: np.random.Generator, *, device: str) -> TaskBatch:
        """Draw a batch of different examples."""
        count = min(self.batch_size, len(self.train))
        positions_B = rng.choice(len(self.train), size=count, replace=False)
        if self.kind == "retrieve" and self.mined is not None:
            positions_B = self._with_neighbors(positions_B, self.mined, rng)
        return self.load(self.train.take(positions_B), rng, device=device)

    def _with_neighbors(self, positions_B: Ints, mined: MinedNegatives, rng: np.random.Generator) -> Ints:
        """Replace the last examples of a batch by examples of the texts nearest to those of the first ones."""
        order_N, starts_F = self._examples_by_target
        seeds = positions_B[: max(1, len(positions_B) // (mined.k + 1))]
        near = mined.find(self.train.target_N[seeds]).ravel()
        near = near[starts_F[near + 1] > starts_F[near]]  # false for -1, too
        found = order_N[starts_F[near] + rng.integers(starts_F[near + 1] - starts_F[near])]
        unique, first = np.unique(np.concatenate([seeds, found, positions_B[len(seeds) :]]), return_index=True)
        return unique[np.argsort(first)][: len(positions_B)]

    @cached_property
    def _examples_by_target(self) -> tuple[Ints, Ints]:
        """The training examples sorted by target, (N,), and where those of each target begin, (F + 1,)."""
        counts_F = np.bincount(self.train.target_N, minlength=len(self.train.targets))
        return np.argsort(self.train.target_N, kind="stable"), np.concatenate([[0], np.cumsum(counts_F)])

    def load(self, examples: TaskExamples, rng: np.random.Generator | None, *, device: str) -> TaskBatch:
        """Return examples as a batch; without a generator all candidates are used, and masks are always the same."""
        if self.kind == "retrieve":
            return self._load_pairs(examples, device)
        draws, num_candidates = rng or np.random.default_rng(0), self.candidate_words.num_texts
        words, targets_M, is_read = self._read_texts(examples, draws, is_training=rng is not None)
        limit = num_candidates if rng is None else self.max_candidates
        mined = None
        if self.mined is not None and limit < num_candidates:
            near = self.mined.find(distinct(targets_M))
            mined = near[near >= 0]
        sample = draw_candidates(num_candidates, targets_M, limit=limit, rng=draws, mined=mined)
        log_weights_C = sample.log_weights_C
        return TaskBatch(
            family=self.family,
            tokens=read_tokens(examples.media, examples.rows_N, device=device),
            words=None if words is None else load_words(words, device=device),
            read={"classify": "task", "caption": "next"}.get(self.kind, "blank"),  # type: ignore[arg-type]
            is_read=None if is_read is None else to_device(is_read, device),
            candidates=load_words(self.candidate_words.take(sample.numbers_C), device=device),
            positives=(to_device(np.arange(len(targets_M)), device), to_device(sample.positives_M, device)),
            log_weights_C=None if log_weights_C is None else to_device(log_weights_C, device),
            head=self.name if self.has_head else None,
            rows=examples.rows_N,
        )

    def _read_texts(self, examples: TaskExamples, rng: np.random.Generator, *, is_training: bool) -> "_InputTexts":
        """Return the texts of inputs, and the candidates that belong to what is read of them."""
        if self.kind == "classify":
            return _InputTexts(None, self._target_positions(examples))
        if self.kind == "answer":
            if self.loader is not None:
                texts, targets_B = self.loader(examples, rng)
                return _InputTexts(with_blanks(texts), targets_B)
            assert examples.text_words is not None
            return _InputTexts(with_blanks(examples.text_words), self._target_positions(examples))
        words = examples.target_words.take(examples.target_N)
        if self.kind == "caption":
            return _InputTexts(words, *self._next_words(words, is_training=is_training))
        return _InputTexts(*self._mask(words, rng))

    def _load_pairs(self, examples: TaskExamples, device: str) -> TaskBatch:
        """Return the distinct items and the distinct texts of a batch; pairs of both are positives."""
        assert examples.rows_N is not None
        rows_B, which_row_B = np.unique(examples.rows_N, return_inverse=True)
        targets_C, which_target_B = np.unique(examples.target_N, return_inverse=True)
        pairs_E = distinct(which_row_B * len(targets_C) + which_target_B)
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

    def check(self) -> None:
        """Check, before any step, that all words of candidates are listed and all targets are candidates.

        Raises:
            DataError: a candidate has a word that the word table lacks, or the words of another one; a target is no
                candidate, or a text has several blanks.
        """
        if self.kind == "retrieve":
            return
        _ = self.candidate_words
        if self.loader is not None:
            return
        for examples in (self.train, self.validation):
            if self.kind in ("classify", "answer"):
                self._target_positions(examples)
            if self.kind == "answer" and examples.text_words is not None:
                with_blanks(examples.text_words)

    def _target_positions(self, examples: TaskExamples) -> Ints:
        """Return the number of the candidate of each example."""
        places = {name: number for number, name in enumerate(self.names)}
        numbers_U, which_N = np.unique(examples.target_N, return_inverse=True)
        used = examples.targets.take(pa.array(numbers_U)).to_pylist()
        missing = [target for target in used if target not in places]
        if missing:
            raise DataError(
                f"{self.name}: expected targets that are candidates, got {missing[0]!r}; pass all of them as candidates"
            )
        place_U: Ints = np.array([places[target] for target in used], np.int64)
        return place_U[which_N]

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


class _InputTexts(NamedTuple):
    """Texts of inputs, and the candidates that belong to the M places where they are read.

    Args:
        words: words of each input; None: they have none.
        targets_M: (M,) int64, number of the candidate; -1 where the right word is none.
        is_read: of captions, (B, L + 1) bool, after which words they are read.
    """

    words: WordLists | None
    targets_M: Ints
    is_read: Bools | None = None


def _describe_loader(loader: AnswerLoader) -> dict[str, str | None]:
    """Return the name of a function, and the digest of its code, if that can be read."""
    name = f"{loader.__module__}:{getattr(loader, '__qualname__', type(loader).__name__)}"
    try:
        return {"name": name, "code": digest(inspect.getsource(loader))}
    except (OSError, TypeError):
        return {"name": name, "code": None}


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
def predict(task: ExampleTask, network: SharedNetwork, examples: TaskExamples, *, device: str = "cpu") -> Prediction:
    """Compare examples of any kind but `retrieve` with all candidates; words are predicted after the true ones."""
    network.eval()
    vectors_CP = encode_texts(network, task.candidate_words, device=device)
    parts: list[tuple[Ints, Ints, Ints]] = []
    for rows in blocks(len(examples), BLOCK_ROWS):
        numbers_B = np.arange(rows.start, rows.stop)
        batch = task.load(examples.take(numbers_B), None, device=device)
        queries, candidates = network.compare(
            read_inputs(network, batch), Candidates(vectors_CP), family=task.family, head=batch.head
        )
        best = [
            candidates.logits(queries[part]).argmax(dim=1).cpu().numpy() for part in blocks(len(queries), BLOCK_ROWS)
        ]
        parts.append((np.concatenate(best), batch.positives[1].cpu().numpy(), numbers_B[examples_of(batch)]))
    predicted_M, target_M, example_M = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Prediction(predicted_M, target_M, predicted_M == target_M, example_M)
