"""Tasks of one likelihood on the tables of `make_data`: those of pre-training, and what is measured on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Bools
from embedcache.store.cache import Cache
from embedcache.train.examples import Examples, Media, WordTable, open_examples, open_media, open_word_table
from embedcache.train.likelihood_tasks import ExampleTask, Kind
from pipelines.perceiver.steps import IMAGE_TOKENS, TINY_DATA, WORD_VECTORS, Data, DataSize
from pipelines.worlds import easy_vqa, shapes
from pipelines.worlds.examples import in_split

CACHES = ("shapes", "vqa")
"""Caches of items that the tasks read."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything.

    Args:
        data: how much data.
        model: sizes of the network, see `SharedNetwork`.
        steps: steps of pre-training.
        tuning_steps: steps of each tuning on easy-VQA.
        steps_per_epoch: steps between two validations; the best one is kept.
        lr: peak learning rate of pre-training.
        tuning_lr: trained weights (`prompts` or `all`) -> peak learning rate.
        num_prompts: prompts per layer.
        batch_size: task -> examples per batch.
        num_items: images of the tests of retrieval and captions.
        fractions: fractions of the answers of easy-VQA to tune on, unless others are asked for.
    """

    data: DataSize = field(default_factory=DataSize)
    model: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 2000
    tuning_steps: int = 800
    steps_per_epoch: int = 100
    lr: float = 2e-3
    tuning_lr: Mapping[str, float] = field(default_factory=lambda: {"prompts": 5e-3, "all": 1e-3})
    num_prompts: int = 10
    batch_size: Mapping[str, int] = field(
        default_factory=lambda: {
            "classify": 128,
            "retrieve": 128,
            "caption": 64,
            "masked": 96,
            "absences": 96,
            "describe": 64,
            "answer": 128,
        }
    )
    num_items: int = 400
    fractions: tuple[float, ...] = (0.01,)


TINY = Size(
    data=TINY_DATA,
    model={"width": 32, "num_layers": 1, "num_heads": 2, "feed_forward": 64},
    steps=12,
    tuning_steps=2,
    steps_per_epoch=6,
    num_prompts=2,
    batch_size=dict.fromkeys(("classify", "retrieve", "caption", "masked", "absences", "describe", "answer"), 8),
    num_items=10,
    fractions=(0.5,),
)
"""For tests: everything runs, nothing is learned."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables of examples with the items and words that they are about.

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
    def _media(self) -> dict[str, Media]:
        return {name: open_media(Cache(self.data.cache(name)), "image", IMAGE_TOKENS) for name in CACHES}

    def open(self, table: pa.Table, cache_name: str | None) -> Examples:
        """Open a table about the images of a cache; None: about texts alone."""
        media = None if cache_name is None else self._media[cache_name]
        return open_examples(table, self.words.vocabulary, media=media)

    def pretraining(self) -> list[ExampleTask]:
        """Return the tasks that train together.

        Statements of what an image lacks are learned as masked words: no caption has a negation. As texts of retrieval
        they would be wrong negatives, since each of them is true of most images.
        """
        seen = sorted(set(shapes.class_names()) - set(shapes.unseen_class_names()))
        return [
            self._task("classify", "classify", "shapes-classes", weight=1.0, candidates=tuple(seen)),
            self._task("retrieve", "retrieve", "shapes-captions", weight=1.0),
            self._task("caption", "caption", "shapes-captions", weight=2.0),
            self._task("masked", "masked", "shapes-captions", weight=1.0),
            self._task("absences", "masked", "shapes-absences", weight=0.5),
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

    def answers(self, fraction: float | None, *, seed: int, has_head: bool = True) -> ExampleTask:
        """Return the task of answering easy-VQA, with a draw of its training answers.

        Args:
            fraction: fraction of the published training answers, or None for those of validation, where none are used.
            seed: seed of the draw.
            has_head: whether tuning adds a head.
        """
        questions = self.data.examples("vqa")
        valid = in_split(questions, "valid")
        train = valid if fraction is None else easy_vqa.draw_answers(questions, fraction, seed=seed)
        return ExampleTask(
            name="easy-vqa",
            kind="answer",
            train=self.open(train, "vqa"),
            validation=self.open(valid, "vqa"),
            batch_size=self.size.batch_size["answer"],
            candidates=tuple(self.data.distinct("vqa")),
            has_head=has_head,
        )

    def questions(self) -> tuple[Examples, dict[str, Bools]]:
        """Return the test questions of easy-VQA, and kind -> (N,) bool; `open`: answered by a color or shape."""
        table = in_split(self.data.examples("vqa"), "test")
        kinds = np.array(table["kind"].to_pylist())
        groups = {
            "open": np.isin(kinds, easy_vqa.OPEN_KINDS),
            "yes-no": kinds == "yes-no",
            "negated": kinds == "negated",
        }
        return self.open(table, "vqa"), {name: is_in_N for name, is_in_N in groups.items() if is_in_N.any()}

    def classes(self, split: str) -> ExampleTask:
        """Return the classification of a split of the shapes among all 40 classes, as validation examples."""
        examples = self.open(in_split(self.data.examples("shapes-classes"), split), "shapes")
        names = tuple(shapes.class_names())
        return ExampleTask(name="classify", kind="classify", train=examples, validation=examples, candidates=names)

    def captions(self) -> Examples:
        """Return the first test images of shapes, each with one of its captions."""
        table = in_split(self.data.examples("shapes-captions"), "test")
        order = np.random.default_rng(0).permutation(len(table))
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
