"""Losses compared with their plain formulas on (B, B) matrices."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize
from torch.utils.flop_counter import FlopCounterMode

from embedcache.testing.losses import LossContract
from embedcache.train import losses
from embedcache.train.losses import LOSSES, Positives, _log_sum_exp

WIDTH = 5
TILE_ROWS = 3


def plain_info_nce(logits_BB: Tensor, positives_BB: Tensor) -> Tensor:
    others = positives_BB & ~torch.eye(len(logits_BB), dtype=torch.bool)
    logits_BB = logits_BB.masked_fill(others, -torch.inf)
    labels = torch.arange(len(logits_BB))
    return (cross_entropy(logits_BB, labels) + cross_entropy(logits_BB.T, labels)) / 2


def plain_multi_positive(logits_BB: Tensor, positives_BB: Tensor) -> Tensor:
    def one_way(logits_BB: Tensor, positives_BB: Tensor) -> Tensor:
        return cross_entropy(logits_BB, positives_BB.double() / positives_BB.sum(dim=1, keepdim=True))

    return (one_way(logits_BB, positives_BB) + one_way(logits_BB.T, positives_BB.T)) / 2


def plain_siglip(logits_BB: Tensor, positives_BB: Tensor) -> Tensor:
    return -logsigmoid(torch.where(positives_BB, logits_BB, -logits_BB)).sum() / len(logits_BB)


def plain_sail(logits_BB: Tensor, positives_BB: Tensor) -> Tensor:
    return -logsigmoid(torch.where(positives_BB, logits_BB, -logits_BB)).mean()


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "info_nce": plain_info_nce,
    "multi_positive": plain_multi_positive,
    "sail": plain_sail,
    "siglip": plain_siglip,
}
every_loss = pytest.mark.parametrize("name", PLAIN)


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "TILE_ROWS", TILE_ROWS)
        patch.setattr(losses, "TILE_COLUMNS", TILE_ROWS + 1)
        yield


def draw(size: int, seed: int, *, num_contents: int | None = None) -> tuple[Tensor, Tensor, Positives]:
    """Draw a batch of float64 unit rows; with few contents many items are equal and belong together."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = (
        normalize(torch.randn(size, WIDTH, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
        for _ in "it"
    )
    contents = torch.randint(num_contents, (size,), generator=generator) if num_contents else torch.arange(size)
    rows, columns = (contents[:, None] == contents).nonzero(as_tuple=True)
    return images, texts, Positives(first=rows, second=columns)


def dense(positives: Positives, size: int) -> Tensor:
    """Return the pairs as a (B, B) bool matrix."""
    matrix = torch.zeros(size, size, dtype=torch.bool)
    matrix[positives.first, positives.second] = True
    return matrix


class TestInfoNce(LossContract):
    name = "info_nce"


class TestMultiPositive(LossContract):
    name = "multi_positive"


class TestSail(LossContract):
    name = "sail"


class TestSigLip(LossContract):
    name = "siglip"


class TestPlugIn(LossContract):
    name = "embedcache.train.losses:SigLip"


def test_every_loss_has_a_plain_formula() -> None:
    assert set(PLAIN) == set(LOSSES.paths) <= {kind.name for kind in LossContract.__subclasses__()}


@pytest.mark.slow
@every_loss
@given(st.integers(1, 11), st.integers(0, 1000), st.sampled_from([None, 2, 5]), st.floats(0.5, 1000), st.booleans())
def test_value_and_gradients_match_the_plain_formula(
    name: str, size: int, seed: int, num_contents: int | None, scale: float, excludes: bool
) -> None:
    """Excluded pairs are in no sum."""
    loss = LOSSES.load(name)().double()
    images, texts, positives = draw(size, seed, num_contents=num_contents)
    together = dense(positives, size)
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.rand(size, size, generator=generator) < 0.4 * excludes) & ~together
    if excludes:
        positives = replace(positives, excluded=hidden.nonzero(as_tuple=True))
    factor = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    ours = loss(images, texts, factor, positives)
    logits = factor * images @ texts.T + next(loss.parameters(), torch.zeros(()))
    plain = PLAIN[name](torch.where(hidden, torch.full_like(logits, -1e9), logits), together)
    torch.testing.assert_close(ours, plain)
    inputs = [images, texts, factor, *loss.parameters()]
    for one, other in zip(*(torch.autograd.grad(value, inputs) for value in (ours, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def plain_captions(name: str, logits_BM: Tensor, positives_BM: Tensor) -> Tensor:
    """Compute the formulas for more texts than images."""
    if name != "multi_positive":
        total = -logsigmoid(torch.where(positives_BM, logits_BM, -logits_BM)).sum()
        return total / (len(logits_BM) if name == "siglip" else logits_BM.numel())
    weights = [positives.double() / positives.sum(dim=1, keepdim=True) for positives in (positives_BM, positives_BM.T)]
    return (cross_entropy(logits_BM, weights[0]) + cross_entropy(logits_BM.T, weights[1])) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi_positive", "sail", "siglip"])
@given(st.integers(1, 9), st.integers(0, 100), st.sampled_from([2.0, 90.0]))
def test_several_captions_match_the_plain_formula(name: str, size: int, seed: int, scale: float) -> None:
    images, texts, _ = draw(size, seed)
    more = torch.cat([texts, draw(size, seed + 1)[1][: seed % (size + 1)]]).detach().requires_grad_()
    positives = torch.arange(len(more)) % size == torch.arange(size)[:, None]
    loss, factor = LOSSES.load(name)().double(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    rows, columns = positives.nonzero(as_tuple=True)
    bias = next(loss.parameters(), torch.zeros(()))
    ours = loss(images, more, factor, Positives(first=rows, second=columns))
    plain = plain_captions(name, factor * images @ more.T + bias, positives)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(
        *(torch.autograd.grad(value, [images, more, factor]) for value in (ours, plain)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@every_loss
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_products_in_bfloat16_are_close(name: str, scale: float) -> None:
    loss, (images, texts, positives) = LOSSES.load(name)(), draw(9, 4, num_contents=5)
    found = []
    for enabled in (False, True):
        rows = [side.detach().float().requires_grad_() for side in (images, texts)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = loss(*rows, torch.tensor(scale), positives)
        assert value.dtype == torch.float32
        found.append([value, *torch.autograd.grad(value, rows)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.02 * one.norm()
        assert not torch.equal(one, other)


@every_loss
@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("is_lower", [False, True])
def test_held_tiles_change_no_bit(name: str, scale: float, is_lower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, (images, texts, positives) = LOSSES.load(name)(), draw(9, 4, num_contents=5)
    positives = replace(positives, excluded=(torch.tensor([0, 4, 8]), torch.tensor([3, 0, 1])))
    found, num_products = [], []
    for held_bytes in (4 * 9 * 9, 4 * 9 * 9 - 1):
        monkeypatch.setattr(losses, "HELD_BYTES", held_bytes)
        rows = [side.detach().float().requires_grad_() for side in (images, texts)]
        factor = torch.tensor(scale, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_lower), FlopCounterMode(display=False) as counter:
            value = loss(*rows, factor, positives)
            for _ in range(2):  # the first backward pass leaves the tiles as they are
                value.backward(retain_graph=True)
        found.append([value, *(side.grad for side in (*rows, factor))])
        num_products.append(counter.get_total_flops() // (2 * 9 * 9 * WIDTH))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert num_products[1] - num_products[0] == 2  # each backward pass computes them again


@pytest.mark.parametrize(("scale", "are_powers"), [(40.0, True), (-40.0, True), (41.0, False), (-41.0, False)])
def test_powers_are_summed_where_no_logit_overflows(
    scale: float, are_powers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "TILE_ROWS", 500)
    monkeypatch.setattr(losses, "TILE_COLUMNS", 500)
    images, texts = (side.detach().float() for side in draw(500, 4)[:2])
    logits = (images * scale) @ texts.T
    by_powers, by_logs = logits.exp().sum(dim=1).log(), logits.logsumexp(dim=1)
    assert not torch.equal(by_powers, by_logs)
    over_rows, _ = _log_sum_exp(images, texts, torch.tensor(scale))
    assert torch.equal(over_rows, by_powers if are_powers else by_logs)
