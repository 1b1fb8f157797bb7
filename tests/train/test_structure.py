"""The STRUCTURE regularizer compared with its plain formula on (B, B) matrices."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import kl_div, softmax

from embedcache.train import pair
from embedcache.train.pair import structure

TILE_ROWS = 3


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair, "TILE_ROWS", TILE_ROWS)
        yield


def plain(inputs_BD: Tensor, outputs_BP: Tensor, temperature: float) -> Tensor:
    def neighbors(vectors: Tensor) -> Tensor:
        vectors = vectors - vectors.mean(dim=0, keepdim=True)
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        return softmax(vectors @ vectors.T / temperature, dim=1)

    before_BB, after_BB = neighbors(inputs_BD), neighbors(outputs_BP)
    middle_BB = (before_BB + after_BB) / 2
    both = [kl_div(middle_BB.log(), side_BB, reduction="batchmean") for side_BB in (before_BB, after_BB)]
    return (both[0] + both[1]) / 2


def draw(size: int, seed: int, *, width: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Draw a batch before and after a projector."""
    generator = torch.Generator().manual_seed(seed)
    inputs_BD = torch.randn(size, 6, generator=generator, dtype=torch.float64) + 1
    outputs_BP = torch.randn(size, width, generator=generator, dtype=torch.float64) * 3
    return inputs_BD.to(dtype), outputs_BP.to(dtype).requires_grad_()


sizes = st.integers(2, 11)
seeds = st.integers(0, 1000)
temperatures = st.floats(0.05, 2)


@pytest.mark.slow
@given(sizes, seeds, st.integers(1, 7), temperatures)
def test_value_and_gradient_match_the_plain_formula(size: int, seed: int, width: int, temperature: float) -> None:
    inputs, outputs = draw(size, seed, width=width)
    ours, expected = structure(inputs, outputs, temperature=temperature), plain(inputs, outputs, temperature)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    gradients = (torch.autograd.grad(value, outputs)[0] for value in (ours, expected))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


@given(sizes, seeds, temperatures)
def test_float32_is_close(size: int, seed: int, temperature: float) -> None:
    exact = structure(*draw(size, seed), temperature=temperature)
    ours = structure(*draw(size, seed, dtype=torch.float32), temperature=temperature)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@given(sizes, seeds, st.floats(0.1, 10))
def test_rotation_scale_and_shift_change_nothing(size: int, seed: int, factor: float) -> None:
    inputs, _ = draw(size, seed)
    rotation, _ = torch.linalg.qr(draw(6, seed, width=6)[1].detach())
    outputs = (factor * inputs @ rotation + 5).requires_grad_()
    value = structure(inputs, outputs)
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(value, outputs)[0].abs().max() < 1e-6


def test_no_gradient_flows_into_the_inputs() -> None:
    inputs, outputs = draw(5, 0)
    inputs.requires_grad_()
    structure(inputs, outputs).backward()
    assert inputs.grad is None
    assert outputs.grad is not None


@pytest.mark.parametrize("size", [1, 2])
def test_one_or_two_items_have_no_geometry(size: int) -> None:
    inputs, outputs = draw(size, 0)
    value = structure(inputs, outputs)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert outputs.grad is not None
    assert outputs.grad.abs().max() < 1e-12
