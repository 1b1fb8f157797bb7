"""Tasks on the tables of `make_data`: tasks of pre-training, and tasks on downstream data.

Pre-training has seen neither items nor texts of downstream data:

| downstream data | task | trained |
| --- | --- | --- |
| `EASY_VQA` | questions about images | prompts, or all weights |
| `FASHION` | a new set of labels | prompts, or all weights |
| `EMOJI` | retrieval and captions of drawings | prompts, or all weights |
| `LETTERS` | letters as audio, by their names | the adapter of a new modality |
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Bools
from embedcache.store.cache import Cache
from pipelines.uniperceiver.data import AUDIO_TOKENS, IMAGE_TOKENS, TINY_DATA, WORD_VECTORS, Data, DataSize
from pipelines.uniperceiver.examples import Media, TaskExamples, WordTable, open_examples, open_media, open_word_table
from pipelines.uniperceiver.tasks import ExampleTask, Kind
from pipelines.uniperceiver.words import list_words
from pipelines.worlds import easy_vqa, shapes
from pipelines.worlds.examples import draw_examples, in_split
from pipelines.worlds.label_sets import draw_labels

EASY_VQA = "easy-VQA"
FASHION = "Fashion-MNIST"
EMOJI = "OpenMoji"
LETTERS = "letters"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of data, network, training and tests.

    Args:
        data: sizes of the data.
        model: sizes of the network, see `SharedNetwork`.
        steps: steps of pre-training.
        tuning_steps: data -> steps of each tuning on it.
        steps_per_epoch: steps between two validations; the best one is kept.
        lr: peak learning rate of pre-training.
        tuning_lr: trained weights (`prompts`, `all` or `adapter`) -> peak learning rate.
        num_prompts: prompts per layer.
        batch_size: task -> examples per batch.
        num_items: images of the tests of retrieval and captions of shapes.
        num_shown: images of shapes, and of easy-VQA, that the page shows.
        fractions: fractions of the answers of easy-VQA to tune on, by default.
        other_fractions: other data -> fraction of its labels or captions to tune on.
    """

    data: DataSize = field(default_factory=DataSize)
    model: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 3000
    tuning_steps: Mapping[str, int] = field(
        default_factory=lambda: {EASY_VQA: 800, FASHION: 300, EMOJI: 400, LETTERS: 200}
    )
    steps_per_epoch: int = 100
    lr: float = 2e-3
    tuning_lr: Mapping[str, float] = field(default_factory=lambda: {"prompts": 5e-3, "all": 1e-3, "adapter": 3e-3})
    num_prompts: int = 10
    batch_size: Mapping[str, int] = field(
        default_factory=lambda: {
            "classify": 128,
            "retrieve": 128,
            "caption": 64,
            "masked": 96,
            "statements": 128,
            "describe": 64,
            "answer": 128,
            "label": 128,
            "letters": 64,
        }
    )
    num_items: int = 400
    num_shown: tuple[int, int] = (5, 10)
    fractions: tuple[float, ...] = (0.01,)
    other_fractions: Mapping[str, float] = field(default_factory=lambda: {FASHION: 0.01, EMOJI: 1.0})


_TASKS = ("classify", "retrieve", "caption", "masked", "statements", "describe", "answer", "label", "letters")

TINY = Size(
    data=TINY_DATA,
    model={"width": 32, "num_layers": 1, "num_heads": 2, "feed_forward": 64},
    steps=12,
    tuning_steps=dict.fromkeys((EASY_VQA, FASHION, EMOJI, LETTERS), 2),
    steps_per_epoch=6,
    num_prompts=2,
    batch_size=dict.fromkeys(_TASKS, 8),
    num_items=10,
    num_shown=(2, 2),
    fractions=(0.5,),
)
"""For tests: everything runs, nothing is learned."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables of examples with their items and words.

    Args:
        data: the caches and tables.
        size: sizes of batches and tests.
    """

    data: Data
    size: Size

    @cached_property
    def words(self) -> WordTable:
        """The word table."""
        return open_word_table(Cache(self.data.cache("words")), WORD_VECTORS)

    @cached_property
    def _opened(self) -> dict[str, Media]:
        return {}

    def media(self, cache_name: str) -> Media:
        """Return the items of a cache with their tokens, which are read once."""
        if cache_name not in self._opened:
            feature = ("audio", AUDIO_TOKENS) if cache_name == "letters" else ("image", IMAGE_TOKENS)
            self._opened[cache_name] = open_media(Cache(self.data.cache(cache_name)), *feature)
        return self._opened[cache_name]

    def open(self, table: pa.Table, cache_name: str | None) -> TaskExamples:
        """Open a table about the items of a cache, or only about texts if `cache_name` is None."""
        media = None if cache_name is None else self.media(cache_name)
        return open_examples(table, self.words.vocabulary, media=media)

    def pretraining(self) -> list[ExampleTask]:
        """Return the tasks that train together.

        Statements about what an image has or lacks teach the network to compare an image with a text: the missing word,
        such as `no`, `lacks` or `true`, depends on whether both agree. No other task teaches that; without statements,
        answers by yes or no ignore the image. Statements have the largest weight because their accuracy stays at chance
        for about a thousand steps.
        """
        class_names = sorted(set(shapes.class_names()) - set(shapes.unseen_class_names()))
        return [
            self._task("classify", "classify", "shapes-classes", weight=1.0, candidates=tuple(class_names)),
            self._task("retrieve", "retrieve", "shapes-captions", weight=1.0),
            self._task("caption", "caption", "shapes-captions", weight=2.0),
            self._task("masked", "masked", "shapes-captions", weight=1.0),
            self._task("statements", "answer", "shapes-statements", weight=3.0),
            self._task("describe", "answer", "descriptions", weight=0.5),
        ]

    def _task(self, name: str, kind: Kind, table: str, *, weight: float, **options: Any) -> ExampleTask:
        examples = self.data.examples(table)
        home = "shapes" if table.startswith("shapes") else None
        return ExampleTask(
            name=name,
            kind=kind,
            train=self.open(in_split(examples, "train"), home),
            validation=self.open(in_split(examples, "valid"), home),
            weight=weight,
            batch_size=self.size.batch_size[name],
            **options,
        )

    def tuning(self, data: str, fraction: float | None, *, seed: int) -> tuple[ExampleTask, ...]:
        """Return the tasks on downstream data, with a draw of its training examples.

        Args:
            data: `EASY_VQA`, `FASHION` or `EMOJI`.
            fraction: fraction of the training answers, labels or captions. If None, the validation examples take their
                place, for callers that need only the candidates.
            seed: seed of the draw.
        """
        source = _DOWNSTREAM[data]
        table = self._table(data)

        valid = in_split(table, "valid")
        train = valid if fraction is None else source.draw(table, fraction, seed=seed)
        make = partial(ExampleTask, train=self.open(train, source.cache), validation=self.open(valid, source.cache))

        if data == EMOJI:
            words = tuple(list_words(table["target"]))  # also words of the test: some are in no other caption
            sizes = self.size.batch_size
            return (
                make(name="retrieve", kind="retrieve", batch_size=sizes["retrieve"]),
                make(name="caption", kind="caption", batch_size=sizes["caption"], candidates=words),
            )

        kind: Kind = "answer" if data == EASY_VQA else "classify"
        size = self.size.batch_size["answer" if data == EASY_VQA else "label"]
        names = tuple(self.data.distinct(source.table))
        return (make(name=data.lower(), kind=kind, batch_size=size, candidates=names),)

    def test_of(self, data: str) -> tuple[TaskExamples, dict[str, Bools]]:
        """Return test examples of `EASY_VQA`, `FASHION` or `EMOJI`, and group of examples -> (N,) bool.

        Groups are kinds of questions; `open` ones are answered by a color or shape.
        """
        table = in_split(self._table(data), "test")
        groups: dict[str, Bools] = {}
        if data == EASY_VQA:
            # Open questions cannot be guessed as well as those by yes or no.
            kinds = np.array(table["kind"].to_pylist())
            groups = {
                "open": np.isin(kinds, easy_vqa.OPEN_KINDS),
                "yes-no": kinds == "yes-no",
                "negated": kinds == "negated",
            }

        examples = self.open(table, _DOWNSTREAM[data].cache)
        return examples, {name: is_in_N for name, is_in_N in groups.items() if is_in_N.any()}

    def _table(self, data: str) -> pa.Table:
        return self.data.emoji_captions() if data == EMOJI else self.data.examples(_DOWNSTREAM[data].table)

    def speakers(self) -> list[str]:
        """Return the speakers of letters."""
        return self.data.distinct("letters-classes", "split")

    def letters(self, *speakers: str) -> ExampleTask:
        """Return the classification of letters that some people recorded.

        Validation has the same examples: there are too few speakers to leave one out.
        """
        examples = self.open(in_split(self.data.examples("letters-classes"), *speakers), "letters")
        return ExampleTask(
            name="letters",
            kind="classify",
            train=examples,
            validation=examples,
            batch_size=self.size.batch_size["letters"],
            candidates=tuple(self.data.distinct("letters-classes")),
        )

    def classes(self, split: str) -> ExampleTask:
        """Return the classification of a split of the shapes among all 40 classes, as validation examples."""
        examples = self.open(in_split(self.data.examples("shapes-classes"), split), "shapes")
        names = tuple(shapes.class_names())
        return ExampleTask(name="classify", kind="classify", train=examples, validation=examples, candidates=names)

    def captions(self, *, is_listed: bool = False) -> TaskExamples:
        """Return the first test images of shapes, each with one of its captions.

        With `is_listed` it is the shortest one, so that images of the same shapes have the same text.
        """
        table = in_split(self.data.examples("shapes-captions"), "test")

        order = np.random.default_rng(0).permutation(len(table))
        if is_listed:
            order = np.array(pc.array_sort_indices(pc.utf8_length(table["target"].combine_chunks())))

        # `unique` keeps the first caption of each image in the order.
        _, first = np.unique(np.array(table["key"].to_pylist())[order], return_index=True)
        return self.open(table.take(pa.array(order[first[: self.size.num_items]])), "shapes")

    def test(self, name: str) -> pa.Table:
        """Return the test examples of a table."""
        return in_split(self.data.examples(name), "test")

    def objects(self) -> dict[str, list[str]]:
        """Return the objects of each image of shapes by its key, from left to right."""
        samples = Cache(self.data.cache("shapes")).samples
        parts = pc.split_pattern(samples["objects"], ",").to_pylist()
        return dict(zip(samples["key"].to_pylist(), parts, strict=True))


def _draw_captions(captions: pa.Table, fraction: float, *, seed: int) -> pa.Table:
    train = in_split(captions, "train")
    return draw_examples(train, max(1, round(fraction * len(train))), seed=seed, by=())


class _Draw(Protocol):
    def __call__(self, table: pa.Table, fraction: float, /, *, seed: int) -> pa.Table: ...


class _Downstream(NamedTuple):
    """Table and cache of downstream data, and the function that draws a fraction of its training examples."""

    table: str
    cache: str
    draw: _Draw


_DOWNSTREAM: Mapping[str, _Downstream] = {
    EASY_VQA: _Downstream("vqa", "vqa", easy_vqa.draw_answers),
    FASHION: _Downstream("fashion-classes", "fashion", draw_labels),
    EMOJI: _Downstream("emoji-captions", "emoji", _draw_captions),
}
