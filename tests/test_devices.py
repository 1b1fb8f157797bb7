"""What `auto` means on machines with and without GPUs. Torch is asked what there is; nothing runs on a GPU."""

from typing import get_args

import pytest
import torch

from embedcache import processes
from embedcache.processes import Precision, all_devices, autocast, torch_device


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(0, False, ["cpu"]), (0, True, ["mps", "cpu"]), (2, False, ["cuda", "cpu"]), (2, True, ["cuda", "mps", "cpu"])],
)
def test_auto_is_the_fastest_device(cuda: int, mps: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert processes._available() == expected
    assert all_devices() == (("cuda:0", "cuda:1") if cuda else tuple(expected[:1]))
    if not cuda:
        assert torch_device(needs_float64=True) == torch.device("cpu")


@pytest.mark.parametrize("precision", get_args(Precision))
def test_products_have_the_precision(precision: Precision) -> None:
    with autocast("cpu", precision):
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == getattr(torch, precision)
