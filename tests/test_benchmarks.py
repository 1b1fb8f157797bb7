"""Every benchmark can be imported; they run on demand, so nothing else would detect a renamed function."""

from dataclasses import replace
from mmap import mmap

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure, train
from benchmarks.__main__ import NAMES, PARTS, load
from benchmarks.products import make_products
from benchmarks.speech_training import CASES, make_step, products_of
from embedcache.train import losses


@pytest.mark.parametrize("name", sorted({*NAMES, *PARTS}))
def test_benchmark_can_be_loaded(name: str) -> None:
    assert callable(load(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_floor_of_a_training_step_has_its_products(name: str) -> None:
    """All floating-point operations that PyTorch counts in a step, with attention as two products, are in the floor."""
    case, is_fast = CASES[name], torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a frozen layer then is operations that are counted
    small = replace(case, batch_size=2, model={**case.model, "width": 32, "num_heads": 2, "feed_forward": 48})
    counts = []
    for call in (make_step(small), make_products(products_of(small))):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
        counts.append(counter.get_total_flops())
    torch.backends.mha.set_fastpath_enabled(is_fast)
    assert counts[0] == counts[1] == sum(product.flops for product in products_of(small))


@pytest.mark.slow
@pytest.mark.parametrize("held_bytes", [0, 4 * 96**2])
def test_floor_of_a_contrastive_step_has_its_products(held_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All operations that PyTorch counts are in the floor, those of similarities that are computed again too.

    In float32 it would count no operations of `addmm_`.
    """
    monkeypatch.setattr(losses, "HELD_BYTES", held_bytes)
    step = train.make_step(96, "bfloat16")
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == sum(product.flops for product in train.products_of(96))


def test_added_peak_is_that_of_the_call() -> None:
    def use(num_bytes: int) -> None:
        np.frombuffer(mmap(-1, num_bytes), np.uint8)[:] = 1  # unlike freed memory, not kept for the next call

    use(80_000_000)  # a higher peak before
    assert 0.03 < measure.added_peak_gb(lambda: use(40_000_000))[1] < 0.06
