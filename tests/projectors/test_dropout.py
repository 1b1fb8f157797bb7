"""Dropout is torch's in all but the numbers drawn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from embedcache.projectors.heads import Dropout


@pytest.mark.parametrize("share", [0.1, 0.5, 0.6])
def test_share_and_scale(share: float) -> None:
    torch.manual_seed(0)
    dropped = Dropout(share)(torch.ones(1000, 500))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / (1 - share)])
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    is_dropped = dropped == 0
    assert is_dropped.double().mean().item() == pytest.approx(share, abs=0.003)
    for step in range(1, 9):  # neighbors share a random word, and nothing else
        both = (is_dropped[:, step:] & is_dropped[:, :-step]).double().mean().item()
        assert both == pytest.approx(share**2, abs=0.005)


@given(shape=st.lists(st.integers(0, 9), max_size=3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_shape_and_dtype(shape: list[int], dtype: torch.dtype) -> None:
    values = torch.ones(shape, dtype=dtype, requires_grad=True)
    dropped = Dropout(0.5)(values)
    assert dropped.shape == values.shape
    assert dropped.dtype == dtype
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_and_all(share: float) -> None:
    values = torch.randn(5, 7)
    assert torch.equal(Dropout(share)(values), nn.Dropout(share)(values))


def test_nothing_is_dropped_outside_training() -> None:
    values = torch.randn(5, 7)
    assert torch.equal(Dropout(0.5).eval()(values), values)


def test_same_numbers_for_a_seed_whatever_the_threads() -> None:
    before, drawn = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            drawn.append(Dropout(0.5)(torch.ones(600, 512)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*drawn)
