"""Matrix products of a training step alone: the floor of its time, on matrices of the same shapes."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch


class Product(NamedTuple):
    """Products of pairs of matrices, (rows, inner) · (inner, columns), and of their gradients.

    Args:
        pairs: number of pairs, computed together.
        num_gradients: 2 for those of both factors, 1 for those of the second one, such as weights; 0 if frozen.
    """

    pairs: int
    rows: int
    inner: int
    columns: int
    num_gradients: int = 2

    @property
    def flops(self) -> int:
        """Multiplications and additions of the forward and the backward pass."""
        return 2 * self.pairs * self.rows * self.inner * self.columns * (1 + self.num_gradients)


def attention(items: int, heads: int, queries: int, keys: int, width: int) -> Iterator[Product]:
    """Attention of some queries of each item to its keys: scores, and sums of values."""
    yield Product(items * heads, queries, width // heads, keys)
    yield Product(items * heads, queries, keys, width // heads)


def linears(rows: int, *widths: int) -> Iterator[Product]:
    """Linear layers one after another, on some rows."""
    for inner, columns in pairwise(widths):
        yield Product(1, rows, inner, columns)


def make_products(products: Sequence[Product], dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """Return a function that computes the products and nothing else, into buffers that equal shapes share."""
    calls = {product: _make_product(product, dtype) for product in set(products)}

    def multiply() -> None:
        for product in products:
            calls[product]()

    return multiply


def _make_product(product: Product, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that computes X · Wᵀ, and with G of its shape Gᵀ · X and G · W as far as they are needed."""
    pairs, rows, inner, columns, num_gradients = product
    multiply = torch.mm if pairs == 1 else torch.bmm
    batch = () if pairs == 1 else (pairs,)
    shapes = (rows, inner), (columns, inner), (rows, columns)
    left, right, output = (torch.randn(*batch, *shape).to(dtype) for shape in shapes)
    left_gradient, right_gradient = torch.empty_like(left), torch.empty_like(right)

    def call() -> None:
        multiply(left, right.mT, out=output)
        if num_gradients > 0:
            multiply(output.mT, left, out=right_gradient)
        if num_gradients > 1:
            multiply(output, right, out=left_gradient)

    return call


def cpu_seconds(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that calls another one and returns its CPU seconds."""

    def measure() -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    return measure
