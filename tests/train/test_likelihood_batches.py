"""Losses, ranks and tokens of tasks against plain references, with a network that is not trained."""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embedcache.arrays import Inputs
from embedcache.errors import DataError, SettingError
from embedcache.networks.candidates import Candidates
from embedcache.networks.shared import SharedNetwork
from embedcache.networks.words import NUM_SPECIAL, WordLists
from embedcache.train.likelihood import (
    LikelihoodObjective,
    LikelihoodRecipe,
    LoadedTask,
    MixtureTask,
    TaskMixture,
    sample_tokens,
    train_likelihood,
)
from embedcache.train.likelihood_batches import encode_items, encode_texts, load_words, read_tokens, retrieval_ranks
from tests.train.likelihood_cases import MODEL, Squares, fit_settings


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
        squares.task("classify", "classify", loss_weight=0.5, max_candidates=6, batch_size=4),
        squares.task("retrieve", "retrieve", "captions", loss_weight=3.0, batch_size=12),
    ]
    objective = LikelihoodObjective(network, tasks)
    for number, task in enumerate(tasks):
        batch = task.draw(np.random.default_rng(0), device="cpu")
        items, texts = network.encode(batch.tokens), network.encode(words=batch.candidates, side="target")
        family, (of_item, of_text) = network.likelihood(task.kind), batch.positives
        expected = cross_entropy(family.logits(items, Candidates(texts, batch.log_weights_C)), (of_item, of_text))
        if number:
            expected = (expected + cross_entropy(family.logits(texts, Candidates(items)), (of_text, of_item))) / 2
        torch.testing.assert_close(objective(LoadedTask(number, batch)), task.loss_weight * expected)


def test_cost_of_a_step_grows_with_its_largest_batch(squares: Squares, network: SharedNetwork) -> None:
    def cost(*sizes: int) -> float:
        tasks = [squares.task(f"task{size}", "classify", "classify", batch_size=size) for size in sizes]
        return MixtureTask(network, tasks, fit_settings(), num_steps=1).forward_flops

    assert cost(8, 16) == cost(16) == 2 * 16 * 40 * sum(value.numel() for value in network.layers.parameters())


def test_an_epoch_has_at_least_the_examples_of_its_steps() -> None:
    assert TaskMixture([1.0], [1], num_steps=1, seed=0).num_samples == 1
    assert TaskMixture([1.0, 2.0], [4, 8], num_steps=9, seed=0).num_samples == 60
    assert len(list(TaskMixture([1.0], [1], num_steps=3, seed=0).epoch(0))) == 3


def test_bad_losses_name_the_feature_or_five_rows(squares: Squares, network: SharedNetwork) -> None:
    tasks = [squares.task("classify", "classify"), squares.task("texts", "answer")]
    mixture = MixtureTask(network, tasks, fit_settings(), num_steps=1)
    loaded = [LoadedTask(n, task.draw(np.random.default_rng(0), device="cpu")) for n, task in enumerate(tasks)]
    rows = loaded[0].batch.rows
    assert rows is not None
    for item, name, shown in zip(loaded, ("classify", "texts"), (rows[:5].tolist(), []), strict=True):
        assert str(mixture.explain(item, loss=float("nan"), step=7)) == (
            f"the loss is nan at step 7, in a batch of the task {name}, rows {shown} …; lower the learning rate"
        )
    loaded[0].batch.tokens["image"].values_BTD[2, 0, 0] = torch.nan
    with pytest.raises(DataError, match=f"at step 7, the image feature holds NaN or infinity.*{rows[2]}"):
        mixture.explain(loaded[0], loss=float("nan"), step=7)


def test_defaults_of_a_recipe() -> None:
    expected: Mapping[str, Any] = {"model": {}, "num_prompts": 0, "steps_per_epoch": 100, "modalities": {}}
    assert vars(LikelihoodRecipe()) == {**expected, "families": (), "earlier_tasks": ()}


@pytest.mark.parametrize("name", ["", "a b", "a.b"])
def test_names_of_tasks_are_words(squares: Squares, name: str) -> None:
    tasks = [squares.task(name, "classify", "classify"), squares.task("b", "classify", "classify")]
    message = f"tasks: expected different names without spaces and dots, got ['{name}', 'b']"
    with pytest.raises(SettingError) as caught:
        train_likelihood(tasks, squares.words, "never")
    assert str(caught.value) == message


def media_of(*, is_ragged: bool, first: int = 0) -> SimpleNamespace:
    """Items whose token t has the values 10 · (first + row) + t and its negative; of 1 to 3 tokens if ragged."""

    def read(rows: np.ndarray) -> Inputs:
        tokens = (10 * (first + rows[:, None]) + np.arange(3)).astype(np.float16)
        values = np.stack([tokens, -tokens], axis=2)
        return Inputs(values, 1 + rows % 3) if is_ragged else Inputs(values[:, 0])

    return SimpleNamespace(modality="image", read=read)


def test_tokens_of_256_spread_items_of_each_cache_are_sampled() -> None:
    ragged, vectors = media_of(is_ragged=True), media_of(is_ragged=False, first=100)
    other = SimpleNamespace(modality="audio")
    parts = [(ragged, np.arange(100, 600)), (vectors, np.array([7, 5])), (ragged, np.arange(1000)), (other, None)]
    tasks: Any = [SimpleNamespace(train=SimpleNamespace(media=media, rows_N=rows)) for media, rows in parts]
    rows = np.linspace(0, 999, 256).astype(int)
    first = [10 * row + token for row in rows.tolist() for token in range(1 + row % 3)]
    found = sample_tokens(tasks, "image")
    assert found.dtype == np.float32
    expected = np.array([*first, 1050, 1070], np.float16).astype(np.float32)
    assert found.tolist() == np.stack([expected, -expected], axis=1).tolist()


def test_vectors_are_one_token_and_lengths_are_kept() -> None:
    rows = np.array([4, 2])
    vectors = read_tokens(media_of(is_ragged=False), rows, device="cpu")["image"]  # type: ignore[arg-type]
    assert vectors.values_BTD.tolist() == [[[40, -40]], [[20, -20]]]
    assert vectors.lengths_B is None
    tokens = read_tokens(media_of(is_ragged=True), rows, device="cpu")["image"]  # type: ignore[arg-type]
    assert tokens.values_BTD[1].tolist() == [[20, -20], [21, -21], [22, -22]]
    assert tokens.lengths_B is not None
    assert tokens.lengths_B.tolist() == [2, 3]
    assert read_tokens(None, None, device="cpu") == {}


def test_texts_and_items_are_encoded_in_blocks() -> None:
    sizes: list[int] = []

    def encode(tokens: Any = None, words: Any = None, side: str = "input") -> Tensor:
        sizes.append(len(words.numbers_BL if tokens is None else tokens["image"].values_BTD))
        return torch.full((sizes[-1], 1), float(len(sizes)))

    stand_in: Any = SimpleNamespace(encode=encode)
    texts = WordLists(np.full(2100, NUM_SPECIAL, np.int32), np.arange(2101))
    assert encode_texts(stand_in, texts).sum() == 2048 + 2 * 52
    media: Any = media_of(is_ragged=True)
    assert [len(block) for block in encode_items(stand_in, media, np.arange(300))] == [256, 44]
    assert sizes == [2048, 52, 256, 44]


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
    logits = network.likelihood("retrieve").logits(items, Candidates(vectors)).numpy()
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
    found = retrieval_ranks(network, examples)
    assert {name: values.tolist() for name, values in found.items()} == expected
    assert {1} < set(expected["item to text"]) & set(expected["text to item"])
    task = squares.task("pairs", "retrieve", "captions", validation=examples)
    measured = {f"pairs {name} r@1": values.count(1) / 6 for name, values in expected.items()}
    assert task.measure(network, device="cpu") == pytest.approx(measured)
