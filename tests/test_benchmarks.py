"""Every benchmark can be imported; they run on demand, so nothing else would detect a renamed function."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import NAMES, PARTS, load
from benchmarks.speech_training import CASES, make_products, make_step, products_of


@pytest.mark.parametrize("name", [*NAMES, *PARTS])
def test_benchmark_can_be_loaded(name: str) -> None:
    assert callable(load(name))


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
