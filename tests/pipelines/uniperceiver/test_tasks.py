"""Tasks and their losses: targets, masks, candidates, and ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from embedcache.errors import DataError
from embedcache.train.losses import InfoNce, MultiPositive
from embedcache.train.losses import Positives as LossPositives
from pipelines.uniperceiver import candidates, tasks
from pipelines.uniperceiver.candidates import CosineClassifier, cross_entropy_over, draw_candidates
from pipelines.uniperceiver.evaluation import load_shared
from pipelines.uniperceiver.network import SharedNetwork, Tokens
from pipelines.uniperceiver.tasks import load_words, predict, read_tokens, retrieval_ranks
from pipelines.uniperceiver.training import MultitaskObjective
from pipelines.uniperceiver.words import BLANK, END, NUM_SPECIAL, WordLists
from tests.pipelines.uniperceiver.cases import MODEL, Squares, colors_of


def test_targets_are_candidates_and_texts_have_one_blank(squares: Squares) -> None:
    task = squares.task("classify", "classify")
    one = squares.task("classify", "classify", candidates=task.train.targets.to_pylist()[1:])
    with pytest.raises(DataError, match="expected targets that are candidates"):
        one.load(one.train, None, device="cpu")
    examples = squares.train["texts"]
    assert examples.text_words is not None
    blanks = np.where(np.arange(len(examples.text_words.numbers_M)) < 2, BLANK, examples.text_words.numbers_M)
    two = replace(examples, text_words=WordLists(blanks, examples.text_words.offsets_N))
    with pytest.raises(DataError, match="at most one blank"):
        squares.task("texts", "answer").load(two, None, device="cpu")
    squares.task("masked", "masked", "texts").load(two, None, device="cpu")  # its texts are not read


@pytest.mark.slow
def test_blocks_do_not_change_predictions(squares: Squares, squares_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = load_shared(squares_run)
    task = squares.task("masked", "masked", "captions")
    whole = predict(task, network, squares.valid["captions"], device="cpu")
    assert whole.example_M.max() == len(squares.valid["captions"]) - 1
    assert (np.diff(whole.example_M) >= 0).all()
    monkeypatch.setattr(tasks, "_BLOCK_ROWS", 30)
    few = predict(task, network, squares.valid["captions"], device="cpu")
    assert len(few.predicted_M) == len(few.target_M) == len(few.example_M)
    assert few.is_correct_M.tolist() == (few.predicted_M == few.target_M).tolist()


def test_pairs_of_a_batch_count_equal_texts_and_items_once(squares: Squares) -> None:
    examples = squares.train["captions"].take(np.array([0, 1, 2, 0, *range(10, 20)]))
    batch = squares.task("retrieve", "retrieve", "captions").load(examples, None, device="cpu")
    assert len(batch.inputs["image"].values) == 13
    assert len(batch.targets.candidates.numbers_BL) == len(np.unique(examples.target_N))
    first, second = (positions.numpy() for positions in batch.targets.positives)
    texts = examples.targets.take(np.unique(examples.target_N)[second]).to_pylist()
    keys = squares.train["captions"].media.cache.samples["key"].take(batch.samples[first]).to_pylist()  # type: ignore[union-attr,index]
    assert texts == [f"a {left} square left of a {right} square" for left, right in map(colors_of, map(int, keys))]


def test_masks_hide_known_words_and_at_least_one(squares: Squares) -> None:
    task = squares.task("masked", "masked", "captions", masked=0.01)
    batch = task.load(squares.train["captions"], np.random.default_rng(0), device="cpu")
    assert batch.targets.words is not None
    assert (batch.targets.words.numbers_BL == BLANK).sum(dim=1).tolist() == [1] * len(squares.train["captions"])
    hidden = batch.targets.candidates.numbers_BL[batch.targets.positives[1], 0]
    assert hidden.min() >= NUM_SPECIAL
    found = batch.targets.words.numbers_BL.clone()
    found[found == BLANK] = hidden
    expected, _ = squares.train["captions"].target_words.take(squares.train["captions"].target_N).padded()
    assert found.numpy().tolist() == expected.tolist()


def test_candidates_of_captions_are_their_words_and_the_end(squares: Squares) -> None:
    examples, vocabulary = squares.train["captions"], squares.words.vocabulary
    batch = squares.task("caption", "caption", "captions").load(examples, None, device="cpu")
    found = batch.targets.candidates.numbers_BL[:, 0]
    assert found[0] == END
    assert {vocabulary.decode(np.array([number])) for number in found[1:].tolist()} == {
        word for text in examples.targets.to_pylist() for word in text.split()
    }
    assert len(found) < len(vocabulary)
    assert (batch.targets.positives[1] == 0).sum() == len(examples)


def test_words_that_are_no_candidates_are_not_trained_and_never_right(squares: Squares, squares_run: Path) -> None:
    examples = squares.valid["captions"]
    task = squares.task("caption", "caption", "captions", candidates=["a", "square", "left", "of", "red", "green"])
    trained = task.load(examples, np.random.default_rng(0), device="cpu")
    measured = task.load(examples, None, device="cpu")
    num_blue = sum(text.split().count("blue") for text in examples.targets.take(examples.target_N).to_pylist())
    assert num_blue
    assert (
        len(measured.targets.positives[1]) - len(trained.targets.positives[1])
        == num_blue
        == (measured.targets.positives[1] == -1).sum()
    )
    found = predict(task, load_shared(squares_run)[0], examples, device="cpu")
    assert not found.is_correct_M[found.target_M < 0].any()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_loss_is_that_of_a_linear_layer() -> None:
    linear, queries, labels = nn.Linear(8, 5), torch.randn(7, 8), torch.randint(5, (7,))
    expected = cross_entropy(linear(queries), labels)
    found = cross_entropy_over(queries, linear.weight, (torch.arange(7), labels), bias_C=linear.bias)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    gradients = [torch.autograd.grad(loss, [linear.weight, linear.bias]) for loss in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_candidates_of_the_batch_are_the_losses_of_pairs() -> None:
    images, texts = torch.randn(6, 4), torch.randn(6, 4)
    classifier = CosineClassifier()
    scale = classifier.scale.detach()
    for contents, loss in ((np.arange(6), InfoNce()), (np.array([0, 1, 0, 2, 1, 0]), MultiPositive())):
        of_images, of_texts = map(torch.from_numpy, np.nonzero(contents[:, None] == contents))
        pairs = LossPositives(first=of_images, second=of_texts)
        expected = loss(normalize(images, dim=1), normalize(texts, dim=1), scale, pairs)
        found = cross_entropy_over(*classifier.scaled(images, texts), (of_images, of_texts))
        found = (found + cross_entropy_over(*classifier.scaled(texts, images), (of_texts, of_images))) / 2
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_blocks_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def values() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        queries, vectors, bias = (torch.randn(*shape).double().requires_grad_() for shape in ((9, 4), (30, 4), (30,)))
        loss = cross_entropy_over(queries, vectors, (torch.arange(9), torch.arange(9)), bias_C=bias)
        return (loss, *torch.autograd.grad(loss, (queries, vectors, bias)))

    whole = values()
    monkeypatch.setattr(candidates, "_BLOCK_LOGITS", 70)
    for found, expected in zip(values(), whole, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_drawn_candidates_stand_for_all_in_the_mean() -> None:
    rng = np.random.default_rng(0)
    logits, positives = rng.standard_normal(40), np.array([3, 39, 3])
    sums = []
    for _ in range(4000):
        numbers, positions, log_weights = draw_candidates(40, positives, limit=8, rng=rng)
        assert len(set(numbers.tolist())) == 8
        assert numbers[positions].tolist() == positives.tolist()
        assert log_weights is not None
        assert not log_weights[positions].any()
        sums.append(np.exp(logits[numbers] + log_weights).sum())
    assert np.mean(sums) == pytest.approx(np.exp(logits).sum(), rel=0.02)


@pytest.fixture
def network(squares: Squares) -> SharedNetwork:
    """A network for the squares that is not trained."""
    media, vocabulary = squares.train["captions"].media, squares.words.vocabulary
    assert media is not None
    torch.manual_seed(0)
    modalities = {"image": {"width": media.feature.width, "axis": media.axis and media.axis.to_json()}}
    words = {"words": vocabulary.words, "word_width": squares.words.feature.width}
    module = SharedNetwork(modalities=modalities, **words, families=["retrieve", "classify"], **MODEL)
    module.set_words(np.asarray(squares.words.vectors_VD, np.float32))
    return module.eval()


def mean_cross_entropy(logits_BC: Tensor, positives: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over queries of the cross-entropy with the mean of their positives."""
    targets_BC = torch.zeros_like(logits_BC)
    targets_BC[positives] = 1
    return -(targets_BC / targets_BC.sum(dim=1, keepdim=True) * logits_BC.log_softmax(dim=1)).sum(dim=1).mean()


@torch.no_grad()
def test_the_loss_of_retrieval_is_the_mean_of_both_directions(squares: Squares, network: SharedNetwork) -> None:
    tasks = [
        squares.task("classify", "classify", max_candidates=6, batch_size=4),
        squares.task("retrieve", "retrieve", "captions", batch_size=12),
    ]
    objective = MultitaskObjective(network, ["classify", "retrieve"])
    for number, task in enumerate(tasks):
        batch = task.draw(np.random.default_rng(0), device="cpu")
        targets = batch.targets
        tokens = {name: Tokens(values, lengths) for name, (values, lengths, _) in batch.inputs.items()}
        items, texts = network.encode(tokens), network.encode(words=targets.candidates, side="target")
        family, (of_item, of_text) = network.classifier(task.kind), targets.positives
        logits = family.logits(items, texts)
        weighted = logits if targets.log_weights_C is None else logits + targets.log_weights_C
        expected = mean_cross_entropy(weighted, (of_item, of_text))
        if number:
            expected = (expected + mean_cross_entropy(logits.T, (of_text, of_item))) / 2
        else:
            assert targets.log_weights_C is not None
        torch.testing.assert_close(objective.loss(batch), expected)


@torch.no_grad()
def test_ranks_are_those_of_the_best_positive_among_the_negatives(squares: Squares, network: SharedNetwork) -> None:
    captions = squares.valid["captions"]
    _, distinct = np.unique(captions.target_N, return_index=True)
    rows, texts = np.array([0, 0, 1, 2, 2, 3, 5, 4]), np.array([0, 4, 1, 3, 2, 0, 5, 3])
    assert captions.rows_N is not None
    examples = replace(captions, rows_N=captions.rows_N[distinct[rows]], target_N=captions.target_N[distinct[texts]])
    items = network.encode(read_tokens(captions.media, captions.rows_N[distinct[:6]], device="cpu"))
    words = captions.target_words.take(captions.target_N[distinct[:6]])
    vectors = network.encode(words=load_words(words, device="cpu"), side="target")
    logits = network.classifier("retrieve").logits(items, vectors).numpy()
    is_positive = np.zeros((6, 6), bool)
    is_positive[rows, texts] = True

    def ranks(scores: np.ndarray, is_right: np.ndarray) -> list[int]:
        pairs = zip(scores, is_right, strict=True)
        return [1 + int((row[~right] > row[right].max()).sum()) for row, right in pairs]

    order_of_items, order_of_texts = (
        np.argsort(captions.rows_N[distinct[:6]]),
        np.argsort(captions.target_N[distinct[:6]]),
    )
    expected = {
        "item to text": np.array(ranks(logits, is_positive))[order_of_items].tolist(),
        "text to item": np.array(ranks(logits.T, is_positive.T))[order_of_texts].tolist(),
    }
    found = retrieval_ranks(network, examples, device="cpu")
    assert {name: values.tolist() for name, values in found.items()} == expected
    assert {1} < set(expected["item to text"]) & set(expected["text to item"])
    task = squares.task("pairs", "retrieve", "captions", validation=examples)
    measured = {f"pairs {name} r@1": values.count(1) / 6 for name, values in expected.items()}
    assert task.measure(network, device="cpu") == pytest.approx(measured)
