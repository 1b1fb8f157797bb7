"""Candidate sets and the likelihood: a linear layer, CLIP's loss and a vocabulary are cases of one function."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from embedcache.arrays import Floats, Ints
from embedcache.errors import DataError, SettingError
from embedcache.networks import candidates
from embedcache.networks.candidates import (
    Candidates,
    Likelihood,
    MinedNegatives,
    cross_entropy_over,
    draw_candidates,
)
from embedcache.train.losses import InfoNce, MultiPositive
from embedcache.train.losses import Positives as LossPositives


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_learned_candidates_with_dot_products_are_a_linear_layer() -> None:
    linear, weight_CP = nn.Linear(8, 5), nn.Parameter(torch.empty(5, 8))
    weight_CP.data.copy_(linear.weight)
    learned = Candidates(weight_CP, linear.bias)
    likelihood = Likelihood(similarity="dot", scale=1.0, is_learned=False)
    queries, labels = torch.randn(7, 8), torch.randint(5, (7,))
    torch.testing.assert_close(likelihood.logits(queries, learned), linear(queries))
    for smoothing in (0.0, 0.1):
        expected = cross_entropy(linear(queries), labels, label_smoothing=smoothing)
        found = likelihood(queries, learned, labels, smoothing=smoothing)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        found_gradient = torch.autograd.grad(found, weight_CP)[0]
        torch.testing.assert_close(found_gradient, torch.autograd.grad(expected, linear.weight)[0], atol=1e-6, rtol=0)


def test_candidates_of_the_batch_are_the_losses_of_pairs() -> None:
    images, texts = torch.randn(6, 4), torch.randn(6, 4)
    likelihood = Likelihood(scale=20.0)
    for contents, loss in ((np.arange(6), InfoNce()), (np.array([0, 1, 0, 2, 1, 0]), MultiPositive())):
        of_images, of_texts = map(torch.from_numpy, np.nonzero(contents[:, None] == contents))
        pairs = LossPositives(first=of_images, second=of_texts)
        expected = loss(normalize(images, dim=1), normalize(texts, dim=1), torch.tensor(20.0), pairs)
        found = likelihood(images, Candidates(texts), (of_images, of_texts))
        found = (found + likelihood(texts, Candidates(images), (of_texts, of_images))) / 2
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_blocks_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def values() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        queries, vectors, bias = (torch.randn(*shape).double().requires_grad_() for shape in ((9, 4), (30, 4), (30,)))
        loss = cross_entropy_over(queries, vectors, torch.arange(9), bias_C=bias, smoothing=0.1)
        return (loss, *torch.autograd.grad(loss, (queries, vectors, bias)))

    whole = values()
    monkeypatch.setattr(candidates, "_BLOCK_LOGITS", 70)
    for found, expected in zip(values(), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_logits_of_a_candidate_do_not_depend_on_the_others() -> None:
    likelihood, queries, words = Likelihood(), torch.randn(3, 4), torch.randn(11, 4)
    some = torch.tensor([2, 7])
    torch.testing.assert_close(
        likelihood.logits(queries, Candidates(words[some])), likelihood.logits(queries, Candidates(words))[:, some]
    )


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


def test_mined_negatives_stand_for_themselves() -> None:
    rng = np.random.default_rng(0)
    logits, positives, mined = rng.standard_normal(40), np.array([3, 39]), np.array([7, 3])
    logits[7] = 4.0  # hard
    sums = []
    for _ in range(2000):
        numbers, _, log_weights = draw_candidates(40, positives, limit=8, rng=rng, mined=mined)
        assert len(set(numbers.tolist())) == 8
        assert log_weights is not None
        assert numbers[log_weights == 0].tolist() == [3, 7, 39]
        sums.append(np.exp(logits[numbers] + log_weights).sum())
    assert np.mean(sums) == pytest.approx(np.exp(logits).sum(), rel=0.02)
    numbers, _, _ = draw_candidates(40, positives, limit=2, rng=rng, mined=mined)
    assert {3, 7, 39} < set(numbers.tolist())


@pytest.mark.parametrize("limit", [40, 100])
def test_all_candidates_are_used_if_they_fit(limit: int) -> None:
    numbers, positions, log_weights = draw_candidates(40, np.array([7]), limit=limit, rng=np.random.default_rng(0))
    assert (len(numbers), positions.tolist(), log_weights) == (40, [7], None)


def test_more_positives_than_the_limit_are_all_kept() -> None:
    numbers, positions, _ = draw_candidates(40, np.arange(0, 40, 2), limit=8, rng=np.random.default_rng(0))
    assert numbers[positions].tolist() == list(range(0, 40, 2))
    assert len(numbers) == 21


class _Exact:
    """An index by comparison with all vectors."""

    def __init__(self, vectors_CP: Floats) -> None:
        self._vectors_CP = vectors_CP

    def search(self, queries_QP: Floats, k: int, /) -> tuple[Floats, Ints]:
        scores = queries_QP @ self._vectors_CP.T
        order = np.argsort(-scores, axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1), order


def test_mined_negatives_are_the_nearest_candidates() -> None:
    vectors = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.2, 0.8]], np.float32)
    assert MinedNegatives(_Exact(vectors), 1, vectors).find(np.array([3, 0])).tolist() == [[2], [1]]
    with pytest.raises(SettingError, match="at least 1"):
        MinedNegatives(_Exact(vectors), 0, vectors)


def test_a_candidate_is_not_near_itself() -> None:
    vectors = np.array([[1, 0], [1, 0], [0.9, 0.1], [0, 1]], np.float32)  # the first two are equal
    near = MinedNegatives(_Exact(vectors), 2, vectors).find(np.array([0, 1, 3]))
    assert [sorted(row) for row in near.tolist()] == [[1, 2], [0, 2], [0, 2]] or near.tolist()[2][0] == 2
    assert not (near == np.array([[0], [1], [3]])).any()
    assert MinedNegatives(_Exact(vectors), 8, vectors).find(np.array([2])).shape[1] <= 8


def test_a_learned_scale_is_clipped_and_can_fall_again() -> None:
    likelihood = Likelihood()
    with torch.no_grad():
        likelihood.log_scale.fill_(math.log(300))
    assert likelihood.scale.item() == pytest.approx(100)
    loss = likelihood(torch.eye(2), Candidates(torch.eye(2)), torch.tensor([1, 0]))
    loss.backward()
    assert likelihood.log_scale.grad is not None
    assert likelihood.log_scale.grad > 0
    assert Likelihood(is_learned=False).state_dict().keys() == likelihood.state_dict().keys()


def test_bad_values_are_refused() -> None:
    with pytest.raises(SettingError, match="cosine or dot"):
        Likelihood(similarity="l2")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="scale"):
        Likelihood(scale=0)
    with pytest.raises(DataError, match="of 2 queries"):
        cross_entropy_over(torch.eye(2), torch.eye(2), torch.tensor([0]))
