"""A run of one likelihood with its frozen encoders: classes, answers, captions and retrieval of raw items."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from embedcache.arrays import Floats, blocks
from embedcache.devices import AUTO, torch_device
from embedcache.errors import DataError, SettingError
from embedcache.evaluate.likelihood import load_shared
from embedcache.likelihood.items import Batches, ItemReader, ItemsLike, OpenItems, open_cache
from embedcache.modalities import list_distinct, list_texts
from embedcache.networks.candidates import Candidates
from embedcache.networks.captions import write_captions
from embedcache.networks.saved import ModuleConfig
from embedcache.networks.shared import SharedNetwork
from embedcache.networks.words import UNKNOWN, WordLists, single_words
from embedcache.store.cache import Cache
from embedcache.train.batches import to_device
from embedcache.train.examples import with_blanks
from embedcache.train.likelihood_batches import encode_texts, load_words

_BLOCK_TEXTS = 64
_NUM_SETS = 8  # sets of candidates that are kept encoded


@dataclass(frozen=True)
class Scores:
    """Probabilities of candidates.

    Args:
        names: the C candidates.
        probs_NC: (N, C) float32, of each item; rows sum to 1.
    """

    names: tuple[str, ...]
    probs_NC: Floats

    @property
    def best(self) -> list[str]:
        """The most probable candidate of each item."""
        return [self.names[number] for number in self.probs_NC.argmax(axis=1).tolist()]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return the k most probable candidates of each item with their probabilities, or all if there are fewer.

        SettingError if k is below 1.
        """
        if k < 1:
            raise SettingError(f"k: expected a whole number of at least 1, got {k}")
        order_NC = np.argsort(-self.probs_NC, axis=1, kind="stable")[:, :k]
        return [
            [(self.names[number], float(probs_C[number])) for number in numbers.tolist()]
            for numbers, probs_C in zip(order_NC, self.probs_NC, strict=True)
        ]


class Hit(NamedTuple):
    """An item or a text that was found.

    Args:
        position: its number among those that were searched.
        name: the text; the path of a file; the key of a sample; or else its modality and position.
        score: cosine similarity.
    """

    position: int
    name: str
    score: float


def load_likelihood(run_path: Path | str, *, device: str = AUTO) -> "LikelihoodModel":
    """Load a run of `train_likelihood`.

    Args:
        run_path: folder of the run.
        device: torch device of encoders and network.

    Raises:
        PathError: the folder is not a finished run.
        DataError: the run is of something else.
        CorruptError: the weights do not match the config.
        SettingError: the device does not exist.
    """
    device = str(torch_device(device, needs_float64=True))
    network, config = load_shared(run_path, device=device)
    return LikelihoodModel(network, config, run_path=Path(run_path), device=device)


class LikelihoodModel:
    """A run of one likelihood with its frozen encoders. Create it with `load`.

    Texts are read word by word, by the word table of the run; candidates may have no other words. In questions and
    queries, others count as unknown.
    """

    def __init__(self, network: SharedNetwork, config: ModuleConfig, *, run_path: Path, device: str) -> None:
        self._network, self._run_path, self._device = network, run_path, device
        self._readers: dict[str, ItemReader] = {}
        self._encode_set = lru_cache(maxsize=_NUM_SETS)(self._encode_new_set)
        self.config = config

    def __repr__(self) -> str:
        features = " + ".join(self.config.sides[name].feature for name in self.modalities)
        return f"LikelihoodModel({features}, {len(self._network.vocabulary):,} words)"

    def __fspath__(self) -> str:
        """Return the folder of the run."""
        return str(self._run_path)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities of the items that the run reads, such as `image`."""
        return tuple(name for name in self.config.sides if name != "words")

    @torch.inference_mode()
    def classify(
        self,
        items: ItemsLike,
        names: Sequence[str] | None = None,
        *,
        task: str | None = None,
        modality: str | None = None,
    ) -> Scores:
        """Compute the probability of each class of items.

        Args:
            items: one item, N of them, or a cache.
            names: names of the classes, any that the word table can spell; None: those of a task of the run.
            task: name of that task; None: the only one of its kind. If it has a label head, that decides, too.
            modality: modality of the items; None: `image`, or the only one.

        Raises:
            PathError: a file does not exist.
            DataError: an item cannot be decoded, there is no name, two have the same words, or one has words that the
                word table lacks, raw items cannot be read as the feature of the run, or the cache does not have it.
            SettingError: several tasks, or none, have classes.
            FingerprintError: the encoder or the cache's feature is not what the run was trained on.
            MissingExtraError: a package is not installed.
        """
        queries_NP = self._encode_items(self._open(items, modality))
        return self._score(queries_NP, "classify", names, task)

    @torch.inference_mode()
    def answer(
        self,
        items: ItemsLike | None,
        questions: str | Sequence[str],
        candidates: Sequence[str] | None = None,
        *,
        task: str | None = None,
        modality: str | None = None,
    ) -> Scores:
        """Compute the probability of each answer to questions about items, or of each label of texts.

        Args:
            items: what is asked about, one, N, or a cache; None: the texts stand alone.
            questions: one question for all items, or one per item; `_` in it is where the answer belongs, else its end.
            candidates: the answers; None: those of a task of the run.
            task, modality: as in `classify`, whose errors it raises, too.

        Raises:
            DataError: another number of questions than of items, or a question with several blanks.
        """
        questions = list_texts(questions, "questions")
        words = with_blanks(self._network.vocabulary.encode(questions))
        if items is None:
            batches: Batches = ((rows, {}) for rows in blocks(len(questions), _BLOCK_TEXTS))
            of_item_N = np.arange(len(questions))
        else:
            num_items, _, batches = self._open(items, modality)
            if len(questions) not in (1, num_items):
                raise DataError(
                    f"questions: expected one, or one for each of {num_items:,} items, got {len(questions)}"
                )
            of_item_N = np.arange(num_items) if len(questions) > 1 else np.zeros(num_items, np.int64)
        parts = [
            self._network.encode(tokens, load_words(words.take(of_item_N[rows]), device=self._device), read="blank")
            for rows, tokens in batches
        ]
        return self._score(self._join(parts), "answer", candidates, task)

    @torch.inference_mode()
    def retrieve(
        self, texts: str | Sequence[str], items: ItemsLike, *, k: int = 10, modality: str | None = None
    ) -> list[list[Hit]]:
        """Find the items that are nearest to each text; for the texts nearest to each item, see `retrieve_texts`.

        Memory: a vector per item, and a number per text and item.

        Args:
            texts: one text, or Q.
            items: what is searched, N items or a cache.
            k: items per text.
            modality: as in `classify`, whose errors it raises, too.

        Returns:
            Q lists of hits, the nearest first; of equal scores the first item.

        Raises:
            DataError: a text has no word that the word table has.
        """
        texts_QP = self._encode_queries(texts)
        opened = self._open(items, modality)
        return _nearest(texts_QP, self._encode_items(opened), k, opened.name_of)

    @torch.inference_mode()
    def retrieve_texts(
        self, items: ItemsLike, texts: Sequence[str], *, k: int = 10, modality: str | None = None
    ) -> list[list[Hit]]:
        """Find the texts that are nearest to each item: N lists of hits, the nearest first, of equal scores the first.

        Arguments and errors are those of `retrieve`.
        """
        texts = list_texts(texts)
        texts_QP = self._encode_queries(texts)
        return _nearest(self._encode_items(self._open(items, modality)), texts_QP, k, lambda number: texts[number])

    @torch.inference_mode()
    def caption(
        self,
        items: ItemsLike,
        *,
        words: Sequence[str] | None = None,
        beam: int = 5,
        max_length: int = 20,
        length_power: float = 0.0,
        modality: str | None = None,
    ) -> list[str]:
        """Write a caption of each item by beam search.

        Args:
            items: one item, N of them, or a cache.
            words: words that captions may have; None: those of the caption tasks of the run, or of the run that it
                starts from; without any, all words of the word table, also those of questions and labels.
            beam: hypotheses kept per item.
            max_length: most words.
            length_power: exponent of the length that divides the log-probability.
            modality: as in `classify`, whose errors it raises, too.

        Raises:
            SettingError: a beam or length below 1, or a negative length power.
        """
        if words is None:
            given = [word for task in self._tasks("caption") for word in task["candidates"]]
            words = given or self._network.vocabulary.words
        lists, vectors_CP = self._encode_set(list_texts(words, "words"), is_words=True)
        vocabulary = to_device(lists.numbers_M.astype(np.int64), self._device), Candidates(vectors_CP)
        captions: list[str] = []
        for _, tokens in self._open(items, modality).batches:
            found = write_captions(
                self._network,
                tokens,
                self._network.likelihood("caption"),
                vocabulary,
                beam=beam,
                max_length=max_length,
                length_power=length_power,
            )
            captions += [self._network.vocabulary.decode(caption.numbers) for caption in found]
        return captions

    def _score(self, queries_NP: Tensor, kind: str, names: Sequence[str] | None, task: str | None) -> Scores:
        """Compare what was read out of items with candidates by the likelihood of a kind of tasks."""
        head = None
        if names is None:
            names, head = self._closed_set(kind, task)
        else:
            names = list_distinct(names, "candidates", "texts")
            self._network.vocabulary.require_distinct(names, "candidates")
        _, vectors_CP = self._encode_set(tuple(names), is_words=False)
        queries_NP, compared = self._network.compare(queries_NP, Candidates(vectors_CP), family=kind, head=head)
        return Scores(tuple(names), compared.logits(queries_NP).float().softmax(dim=1).cpu().numpy())

    def _tasks(self, kind: str, name: str | None = None) -> list[Mapping[str, Any]]:
        """Return the run's tasks of a kind with candidates; if it has none, those of the run that it starts from."""
        for tasks in (self.config.training["tasks"], self.config.training.get("earlier_tasks", ())):
            of_kind = [task for task in tasks if task.get("kind") == kind and task.get("candidates")]
            found = [task for task in of_kind if name in (None, task["name"])]
            if found:
                return found
        return []

    def _closed_set(self, kind: str, name: str | None) -> tuple[Sequence[str], str]:
        """Return the candidates and the name of a task of the run."""
        found = self._tasks(kind, name)
        if len(found) != 1:
            known = ", ".join(task["name"] for task in self._tasks(kind)) or "none"
            raise SettingError(
                f"task: expected one of the run's tasks of the kind {kind}, {known}, got {name}; name one, or pass "
                "candidates"
            )
        return found[0]["candidates"], found[0]["name"]

    def _encode_new_set(self, names: tuple[str, ...], *, is_words: bool) -> tuple[WordLists, Tensor]:
        """Encode candidates: texts, or single words and the end."""
        lists = self._network.vocabulary.require_known(names, "candidates")
        if is_words:
            lists = single_words(lists.numbers_M)
        return lists, encode_texts(self._network, lists, device=self._device)

    def _encode_queries(self, texts: str | Sequence[str]) -> Tensor:
        texts = list_texts(texts)
        lists = self._network.vocabulary.encode(texts)
        is_known_M = lists.numbers_M != UNKNOWN
        known_N = np.bincount(np.repeat(np.arange(len(texts)), lists.lengths())[is_known_M], minlength=len(texts))
        if not known_N.all():
            raise DataError(
                f"texts: expected words of the word table, got {texts[int(known_N.argmin())]!r}, which has none"
            )
        return encode_texts(self._network, lists, device=self._device) if texts else self._join([])

    def _encode_items(self, opened: OpenItems) -> Tensor:
        return self._join([self._network.encode(tokens) for _, tokens in opened.batches])

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        empty = torch.empty(0, self._network.output_width, device=self._device)
        return torch.cat([empty, *(part.float() for part in parts)])

    def _open(self, items: ItemsLike, modality: str | None) -> OpenItems:
        name = modality or ("image" if "image" in self.modalities else "")
        if not name and len(self.modalities) == 1:
            (name,) = self.modalities
        if name not in self.modalities:
            raise SettingError(f"modality: expected one of {', '.join(self.modalities)}, got {modality}")
        side = self.config.sides[name]
        if isinstance(items, Cache):
            return open_cache(items, side, device=self._device)
        if name not in self._readers:
            self._readers[name] = ItemReader(side, self._run_path, device=self._device)
        return self._readers[name].open(items)


def _nearest(queries_QP: Tensor, vectors_NP: Tensor, k: int, name_of: Callable[[int], str]) -> list[list[Hit]]:
    if k < 1:
        raise SettingError(f"k: expected at least 1, got {k}")
    k, results = min(k, len(vectors_NP)), []
    for scores_N in normalize(queries_QP, dim=1) @ normalize(vectors_NP, dim=1).T:
        lowest = scores_N.topk(k).values[-1] if k else torch.inf
        found = torch.nonzero(scores_N >= lowest)[:, 0]  # more than k, where scores are equal
        numbers = found[scores_N[found].argsort(descending=True, stable=True)[:k]]
        hits = zip(numbers.tolist(), scores_N[numbers].tolist(), strict=True)
        results.append([Hit(number, name_of(number), score) for number, score in hits])
    return results
