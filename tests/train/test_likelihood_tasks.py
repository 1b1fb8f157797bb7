"""What a batch of a task holds: its candidates, hard negatives, masks and next words; and tasks that are refused."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import DataError, SettingError
from embedcache.likelihood.tasks import mine_candidates
from embedcache.networks.candidates import MinedNegatives
from embedcache.networks.words import BLANK, END, NUM_SPECIAL, WordLists, list_words
from embedcache.train import likelihood_tasks
from embedcache.train.likelihood_tasks import ExampleTask, predict
from tests.train.likelihood_cases import Squares


def has_nearest(task: ExampleTask, squares: Squares, number: int, others: set[int]) -> bool:
    """Whether one of the candidates that are nearest to a candidate is among others."""
    vectors = squares.words.average(task.mined_texts)
    cosines = vectors @ vectors[number]
    cosines[number] = -np.inf
    return max(cosines[other] for other in others) > cosines.max() - 1e-5


def test_candidates_near_the_positives_are_in_each_batch(squares: Squares) -> None:
    names = [f"{left} {right}" for left in ("red", "green", "blue") for right in ("green", "red", "blue", "square")]
    task = squares.task("classify", "classify", candidates=names, max_candidates=4, batch_size=2)
    mined = mine_candidates(task, squares.words, 1)
    words = task.candidate_words.padded()[0].tolist()
    for seed in range(20):
        batch = mined.draw(np.random.default_rng(seed), device="cpu")
        assert batch.log_weights_C is not None
        numbers = [words.index(row) for row in batch.candidates.numbers_BL.tolist()]
        positives = {numbers[place] for place in batch.positives[1].tolist()}
        kept = {number for number, weight in zip(numbers, batch.log_weights_C.tolist(), strict=True) if not weight}
        assert positives <= kept
        assert len(positives) <= len(kept) <= 2 * len(positives)
        assert all(has_nearest(mined, squares, number, kept) for number in positives)
    assert mined.describe()["mined"]["k"] == 1  # type: ignore[index]
    assert "mined" not in task.describe()


def test_a_batch_of_retrieval_has_the_nearest_texts(squares: Squares) -> None:
    task = squares.task("retrieve", "retrieve", "captions", batch_size=8)
    mined = mine_candidates(task, squares.words, 3)
    texts = {tuple(row): number for number, row in enumerate(task.train.target_words.padded()[0].tolist())}
    for seed in range(5):
        batch = mined.draw(np.random.default_rng(seed), device="cpu")
        numbers = {texts[tuple(row)] for row in batch.candidates.numbers_BL.tolist()}
        assert sum(has_nearest(mined, squares, number, numbers) for number in numbers) >= 2
        again = mined.draw(np.random.default_rng(seed), device="cpu")
        assert again.rows is not None
        assert batch.rows is not None
        assert again.rows.tolist() == batch.rows.tolist()
        assert len(batch.positives[0]) <= 8


def test_vectors_of_candidates_are_the_means_of_their_words(squares: Squares) -> None:
    vocabulary = squares.words.vocabulary
    found = squares.words.average(vocabulary.encode(["red", "red blue", "nothing known", "blue red"]))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(found[1], found[3], atol=1e-6)
    unit = squares.words.average(vocabulary.encode(["red", "blue"]))
    np.testing.assert_allclose(found[1], unit.sum(axis=0) / np.linalg.norm(unit.sum(axis=0)), atol=1e-3)
    assert list_words(["red"]) == ["red"]


def test_vectors_of_other_candidates_are_refused(squares: Squares) -> None:
    mined = mine_candidates(squares.task("answer", "answer"), squares.words, 1).mined
    with pytest.raises(SettingError, match="mined: expected vectors of 9 candidates, got 3"):
        squares.task("classify", "classify", mined=mined)


class Nearest:
    """A neighbor list that is given: of each query the k candidates after its first value."""

    def __init__(self, count: int) -> None:
        self.count = count

    def search(self, queries_BP: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = (queries_BP[:, :1].astype(int) + np.arange(k)) % self.count
        return np.zeros(found.shape), found


def test_examples_of_the_nearest_texts_replace_the_last_ones_of_a_batch(squares: Squares) -> None:
    """Check that a batch begins with its seeds, and holds an example of each of their neighbors."""
    task = squares.task("retrieve", "retrieve", "captions", batch_size=12)
    num_texts = task.train.target_words.num_texts
    vectors = np.arange(num_texts, dtype=np.float32)[:, None]
    mined = MinedNegatives(Nearest(num_texts), 2, vectors)  # type: ignore[arg-type]
    task = replace(task, mined=mined)
    positions = np.random.default_rng(0).permutation(len(task.train))[:12]
    found = task._with_neighbors(positions, mined, np.random.default_rng(1))
    assert found[:4].tolist() == positions[:4].tolist()
    assert len(found) == len(set(found.tolist())) <= 12
    texts = task.train.target_N
    near = {int(text) for row in mined.find(texts[positions[:4]]) for text in row if text >= 0}
    assert near <= set(texts[found].tolist())
    few = task._with_neighbors(positions[:2], mined, np.random.default_rng(1))
    assert few[0] == positions[0]
    assert len(few) == 2
    assert texts[few[1]] in mined.find(texts[positions[:1]])


def test_any_example_of_a_near_text_is_drawn(squares: Squares) -> None:
    """Check which examples are drawn beside seeds of the texts 3 and 8, where the text 5 has no examples."""
    whole = squares.train["captions"]
    examples = whole.take(np.flatnonzero(whole.target_N != 5))
    mined = MinedNegatives(Nearest(9), 2, np.arange(9, dtype=np.float32)[:, None])  # type: ignore[arg-type]
    task = squares.task("retrieve", "retrieve", "captions", train=examples, mined=mined)
    assert len(examples.targets) == 9
    seeds = [int(np.flatnonzero(examples.target_N == text)[0]) for text in (3, 8)]
    rest = np.flatnonzero(examples.target_N == 6)[:4].tolist()
    drawn: set[int] = set()
    for seed in range(100):
        found = task._with_neighbors(np.array([*seeds, *rest]), mined, np.random.default_rng(seed)).tolist()
        assert (found[:2], len(found)) == (seeds, 6)
        drawn |= set(found) - {*seeds, *rest}
    assert drawn == set(np.flatnonzero(np.isin(examples.target_N, (4, 0, 1))).tolist())


def test_the_first_candidate_is_mined_like_others(squares: Squares) -> None:
    mined = MinedNegatives(Nearest(9), 1, np.arange(9, dtype=np.float32)[:, None])  # type: ignore[arg-type]
    task = squares.task("classify", "classify", max_candidates=4, mined=mined)
    words = task.candidate_words.padded()[0].tolist()
    last = task.train.take(np.flatnonzero(task._target_positions(task.train) == 8)[:1])
    for seed in range(10):
        batch = task.load(last, np.random.default_rng(seed), device="cpu")
        numbers = [words.index(row) for row in batch.candidates.numbers_BL.tolist()]
        assert batch.log_weights_C is not None
        kept = [number for number, weight in zip(numbers, batch.log_weights_C.tolist(), strict=True) if not weight]
        assert (kept, len(numbers)) == ([0, 8], 4)


def test_masks_of_validation_are_always_the_same(squares: Squares) -> None:
    task = squares.task("masked", "masked", "captions", masked=0.5)
    batches = [task.load(task.train, rng, device="cpu") for rng in (None, None, np.random.default_rng(0))]
    numbers = [batch.words.numbers_BL.tolist() for batch in batches if batch.words is not None]
    assert numbers[0] == numbers[1] == numbers[2]
    other = task.load(task.train, np.random.default_rng(1), device="cpu").words
    assert other is not None
    assert other.numbers_BL.tolist() != numbers[0]


def test_what_decides_the_batches_is_described(squares: Squares) -> None:
    task = squares.task("classify", "classify")
    described = dict(task.describe())
    assert described["candidates"] == sorted(task.train.targets.to_pylist())
    defaults = {"weight": 1.0, "loss_weight": 1.0, "smoothing": 0.0, "max_candidates": 1024, "has_head": False}
    assert defaults.items() <= described.items()
    assert (described["masked"], described["max_validation"], described["batch_size"]) == (0.15, 512, 32)
    assert replace(task, batch_size=ExampleTask.batch_size).batch_size == 128
    assert squares.task("classify", "classify", candidates=["b", "a"]).describe()["candidates"] == ["b", "a"]
    words = squares.task("caption", "caption", "captions").describe()["candidates"]
    assert set(words) == {word for text in task.train.targets.to_pylist() for word in text.split()} | {
        "a", "square", "left", "of"
    }  # fmt: skip
    assert squares.task("masked", "masked", "captions").describe()["candidates"] == []
    assert squares.task("retrieve", "retrieve", "captions").describe()["candidates"] == []
    assert squares.task("answer", "answer", has_head=True).heads == {"answer": 3}
    assert squares.task("answer", "answer").heads == {}


@pytest.mark.parametrize(
    ("name", "kind", "options", "message"),
    [
        (
            "classify",
            "sort",
            {},
            "classify: expected a kind of classify, answer, retrieve, caption, masked, got 'sort'",
        ),
        ("classify", "classify", {"smoothing": 1}, "classify: smoothing: expected .* below 1, got 1"),
        ("classify", "classify", {"smoothing": -0.1}, "smoothing: expected"),
        ("classify", "classify", {"weight": 0}, "weight: expected .* above 0"),
        ("classify", "classify", {"loss_weight": 0}, "loss_weight: expected .* above 0"),
        ("classify", "classify", {"batch_size": 0}, "batch_size: expected .* at least 1"),
        ("classify", "classify", {"max_candidates": 1}, "max_candidates: expected .* at least 2"),
        ("classify", "classify", {"max_validation": 0}, "max_validation: expected .* at least 1"),
        ("masked", "masked", {"masked": 0}, "masked: expected .* above 0"),
        ("masked", "masked", {"masked": 1}, "masked: expected .* below 1"),
        ("classify", "classify", {"has_head": True, "max_candidates": 8}, "a closed set of at most 8 classes"),
        (
            "classify",
            "classify",
            {"mined": MinedNegatives(Nearest(2), 1, np.zeros((8, 1), np.float32))},  # type: ignore[arg-type]
            "mined: expected vectors of 9 candidates, got 8",
        ),
    ],
)
def test_bad_options_are_refused(
    squares: Squares, name: str, kind: str, options: dict[str, object], message: str
) -> None:
    table = "captions" if name == "masked" else name
    with pytest.raises(SettingError, match=message):
        squares.task(name, kind, table, **options)  # type: ignore[arg-type]


def test_options_at_their_bounds_are_accepted(squares: Squares) -> None:
    squares.task("classify", "classify", max_candidates=2, batch_size=1, max_validation=1, smoothing=0)
    squares.task("classify", "classify", has_head=True, max_candidates=9)
    squares.task("masked", "masked", "texts")
    with pytest.raises(SettingError, match="expected examples about items to retrieve, got texts alone"):
        squares.task("texts", "retrieve")


def test_texts_that_cannot_be_read_are_refused_before_any_step(squares: Squares) -> None:
    examples = squares.train["texts"]
    assert examples.text_words is not None
    words = examples.text_words
    blank = np.where(np.arange(len(words.numbers_M)) < 2, BLANK, words.numbers_M)
    two = replace(examples, text_words=WordLists(blank, words.offsets_N))
    task = squares.task("texts", "answer")
    task.check()
    with pytest.raises(DataError):
        replace(task, train=two).check()
    masked = squares.task("masked", "masked", "texts")
    replace(masked, train=two).check()  # its texts are not read
    squares.task("retrieve", "retrieve", "captions").check()


@pytest.mark.parametrize(("names", "got"), [(("red", "red"), "'red' twice"), (("Red", "red!"), "'Red' and 'red!'")])
def test_candidates_of_the_same_words_are_refused(squares: Squares, names: tuple[str, str], got: str) -> None:
    """They have one representation: only the first is ever predicted, so that the others are never right."""
    task = squares.task("answer", "answer", candidates=["blue", *names, "green"])
    with pytest.raises(DataError, match=f"answer: candidates: expected texts that differ in their words, got {got}"):
        task.check()


def test_next_words_follow_each_prefix(squares: Squares) -> None:
    task = squares.task("caption", "caption", "captions")
    texts = task.train.target_words.take(np.array([0, 1]))
    for is_training in (True, False):
        places, is_read = task._next_words(texts, is_training=is_training)
        numbers = task.candidate_words.numbers_M[places].tolist()
        ends = texts.offsets_N.tolist()
        words = [texts.numbers_M[start:stop].tolist() for start, stop in itertools.pairwise(ends)]
        assert numbers == [number for text in words for number in [*text, END]]
        assert is_read.sum(axis=1).tolist() == [len(text) + 1 for text in words]


def test_masks_of_about_a_fraction_of_the_words(squares: Squares) -> None:
    task = squares.task("masked", "masked", "captions", masked=0.5)
    texts = task.train.target_words.take(np.repeat(task.train.target_N, 4))
    masked, places = task._mask(texts, np.random.default_rng(0))
    is_blank = masked.numbers_M == BLANK
    assert 0.4 < is_blank.mean() < 0.6
    assert task.candidate_words.numbers_M[places].tolist() == texts.numbers_M[is_blank].tolist()
    assert (masked.numbers_M[~is_blank] == texts.numbers_M[~is_blank]).all()
    assert masked.offsets_N.tolist() == texts.offsets_N.tolist()
    some = squares.task("masked", "masked", "captions", candidates=["red"])
    hidden, places = some._mask(texts, np.random.default_rng(0))
    red = squares.words.vocabulary.encode(["red"]).numbers_M[0]
    assert set(texts.numbers_M[hidden.numbers_M == BLANK].tolist()) == {red}  # never what is no candidate
    assert red >= NUM_SPECIAL


@pytest.mark.slow
def test_blocks_do_not_change_predictions(squares: Squares, squares_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedcache.networks.saved import load_module

    network = load_module(squares_run)[0]
    task = squares.task("masked", "masked", "captions")
    whole = predict(task, network, squares.valid["captions"])  # type: ignore[arg-type]
    assert whole.example_M.max() == len(squares.valid["captions"]) - 1
    assert (np.diff(whole.example_M) >= 0).all()
    monkeypatch.setattr(likelihood_tasks, "BLOCK_ROWS", 30)
    few = predict(task, network, squares.valid["captions"])  # type: ignore[arg-type]
    assert len(few.predicted_M) == len(few.target_M) == len(few.example_M)
    assert few.is_correct_M.tolist() == (few.predicted_M == few.target_M).tolist()
