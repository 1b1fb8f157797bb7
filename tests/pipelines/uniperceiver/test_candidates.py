"""Candidate sets and the likelihood: a linear layer, CLIP's loss and a vocabulary are cases of one function."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from embedcache.train.losses import InfoNce, MultiPositive
from embedcache.train.losses import Positives as LossPositives
from pipelines.uniperceiver import candidates
from pipelines.uniperceiver.candidates import Likelihood, cross_entropy_over, draw_candidates


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
    likelihood = Likelihood()
    scale = likelihood.scale.detach()
    for contents, loss in ((np.arange(6), InfoNce()), (np.array([0, 1, 0, 2, 1, 0]), MultiPositive())):
        of_images, of_texts = map(torch.from_numpy, np.nonzero(contents[:, None] == contents))
        pairs = LossPositives(first=of_images, second=of_texts)
        expected = loss(normalize(images, dim=1), normalize(texts, dim=1), scale, pairs)
        found = cross_entropy_over(*likelihood.scaled(images, texts), (of_images, of_texts))
        found = (found + cross_entropy_over(*likelihood.scaled(texts, images), (of_texts, of_images))) / 2
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


def test_a_learned_scale_is_clipped_and_can_fall_again() -> None:
    likelihood = Likelihood()
    with torch.no_grad():
        likelihood.log_scale.fill_(math.log(300))
    assert likelihood.scale.item() == pytest.approx(100)
    loss = cross_entropy_over(*likelihood.scaled(torch.eye(2), torch.eye(2)), (torch.arange(2), torch.tensor([1, 0])))
    loss.backward()
    assert likelihood.log_scale.grad is not None
    assert likelihood.log_scale.grad > 0
