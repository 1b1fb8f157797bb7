"""Training steps relative to their matrix products; width 512.

The floor of a step is the CPU time of its matrix products alone, on one thread and on matrices of the same shapes:
three products per layer, and three of B x 512 x B in the loss. The loss of a batch whose similarities take more than
64 MB computes them again in the backward pass: a fourth product. A step and its products alternate in a process of
their own; medians are shown.
"""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.measure import in_own_process, median_rates
from embedcache.arrays import Inputs
from embedcache.cli.console import print_table
from embedcache.dataset.pairs import Items, Pairs
from embedcache.projectors.pair import AlignedPair
from embedcache.train import losses
from embedcache.train.batches import PairBatches, load_pairs
from embedcache.train.pair import PairObjective
from embedcache.train.settings import LossSettings, OptimizerSettings
from embedcache.train.trainer import keep_freed_memory, make_optimizer, update

WIDTH = 512
PROJECTOR, NUM_LAYERS = "cls_token+token_mlp", 8  # the paper's pair on one vector per item
BATCHES = {256: 101, 1024: 31, 4096: 11, 16_384: 3}  # to the number of measured steps
_ROWS = 1024  # rows of similarities per product of the floor


def main(*, quick: bool) -> None:
    """Print CPU seconds of steps."""
    rows = []
    for precision in ("float32", "bfloat16"):
        for batch_size, repeats in list(BATCHES.items())[: 3 if quick else None]:
            seconds = in_own_process(_measure, batch_size, precision, 1 if quick else repeats)
            ratio = seconds["products"] / seconds["step"]
            costs = [f"{seconds['step']:.3f}", f"{seconds['products']:.3f}", f"{ratio:.2f}"]
            rows.append([precision, f"{batch_size:,}", *costs])
    columns = ["precision", "batch", "step, s", "products alone, s", "ratio"]
    print_table(columns, rows, title="CPU time of a training step")


def _measure(batch_size: int, precision: str, repeats: int) -> dict[str, float]:
    """Alternate the products and a step on one thread of one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # threads of other libraries, too
    torch.set_num_threads(1)
    torch.manual_seed(0)
    calls = {"step": make_step(batch_size, precision), "products": _make_products(batch_size, precision)}
    for call in calls.values():
        for _ in range(3):  # until memory is kept
            call()
    return median_rates({name: _cpu_seconds(call) for name, call in calls.items()}, repeats=repeats)


def _cpu_seconds(call: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    return measure


class Product(NamedTuple):
    """A product of matrices, (rows, inner) · (inner, columns), and of their gradients if they have any."""

    rows: int
    inner: int
    columns: int
    has_gradients: bool = True


def products_of(batch_size: int) -> list[Product]:
    """Return the matrix products of a training step."""
    rows = min(_ROWS, batch_size)
    products = [Product(batch_size, WIDTH, WIDTH)] * NUM_LAYERS
    products += [Product(rows, WIDTH, batch_size)] * (batch_size // rows)
    if 4 * batch_size**2 > losses.KEPT_BYTES:  # similarities are computed again in the backward pass
        products += [Product(rows, WIDTH, batch_size, has_gradients=False)] * (batch_size // rows)
    return products


def _make_products(batch_size: int, precision: str) -> Callable[[], None]:
    """Return a function that computes the products and nothing else, into buffers that equal shapes share."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    products = products_of(batch_size)
    calls = {product: _make_product(product, dtype) for product in set(products)}

    def multiply() -> None:
        for product in products:
            calls[product]()

    return multiply


def _make_product(product: Product, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that computes X · Wᵀ, and with G of its shape Gᵀ · X and G · W."""
    shapes = (product.rows, product.inner), (product.columns, product.inner), (product.rows, product.columns)
    left, right, output = (torch.randn(*shape).to(dtype) for shape in shapes)
    left_gradient, right_gradient = torch.empty_like(left), torch.empty_like(right)

    def multiply() -> None:
        torch.mm(left, right.T, out=output)
        if product.has_gradients:
            torch.mm(output.T, left, out=right_gradient)
            torch.mm(output, right, out=left_gradient)

    return multiply


def make_step(batch_size: int, precision: str = "float32") -> Callable[[], None]:
    """Return a training step on one batch: forward and backward passes, clipping and AdamW, as the training loop."""
    pair = AlignedPair(PROJECTOR, widths={"image": WIDTH, "text": WIDTH}, shared_width=WIDTH, dropout=0.1)
    objective = PairObjective(pair, LossSettings(), precision=precision)
    optimizer = make_optimizer(objective, OptimizerSettings())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    keep_freed_memory()

    rng = np.random.default_rng(0)
    image, text = (rng.standard_normal((batch_size, WIDTH), np.float32).astype(np.float16) for _ in range(2))
    rows = np.arange(batch_size)
    items = Items(rows=rows, samples=rows, contents=rows)
    batches = PairBatches(Pairs(first=items, second=items), batch_size=batch_size, seed=0)
    readers = {"image": lambda rows: Inputs(image[rows]), "text": lambda rows: Inputs(text[rows])}
    batch = load_pairs(next(batches.epoch(0)), readers, "cpu")

    def step() -> None:
        objective.loss(batch).backward()
        update(objective, optimizer, 1e-3, 1.0, scaler)

    return step
