"""Losses, ranks and tokens of tasks against plain references, with a network that is not trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.uniperceiver.network import SharedNetwork, Tokens
from pipelines.uniperceiver.tasks import load_words, read_tokens, retrieval_ranks
from pipelines.uniperceiver.training import LikelihoodObjective
from tests.pipelines.uniperceiver.cases import MODEL, Squares


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


def cross_entropy(logits_BC: Tensor, positives: tuple[Tensor, Tensor]) -> Tensor:
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
    objective = LikelihoodObjective(network, ["classify", "retrieve"])
    for number, task in enumerate(tasks):
        batch = task.draw(np.random.default_rng(0), device="cpu")
        targets = batch.targets
        tokens = {name: Tokens(values, lengths) for name, (values, lengths, _) in batch.inputs.items()}
        items, texts = network.encode(tokens), network.encode(words=targets.candidates, side="target")
        family, (of_item, of_text) = network.likelihood(task.kind), targets.positives
        logits = family.logits(items, texts)
        weighted = logits if targets.log_weights_C is None else logits + targets.log_weights_C
        expected = cross_entropy(weighted, (of_item, of_text))
        if number:
            expected = (expected + cross_entropy(logits.T, (of_text, of_item))) / 2
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
    logits = network.likelihood("retrieve").logits(items, vectors).numpy()
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
