"""Training steps relative to their matrix products, a plain loop, and a loader of one tensor per row; width 512.

The floor of a step is the CPU time of its matrix products alone, on one thread and on matrices of the same shapes:
three products per layer, and three of B x 512 x B in the loss. The loss of a batch whose similarities take more than
64 MB computes them again in the backward pass: a fourth product. The ratio with four for all batches is printed too.
A step and its products alternate in a process of their own; medians are shown.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import added_peak_gb, in_own_process, median_rates, use_one_core, warmed_up
from benchmarks.products import Product, cpu_seconds, make_products
from embedcache.arrays import Array, Inputs
from embedcache.cli.console import print_line, print_table
from embedcache.dataset.pairs import Items, Pairs
from embedcache.projectors.pair import AlignedPair
from embedcache.train import losses
from embedcache.train.batches import Loader
from embedcache.train.pair import Objective
from embedcache.train.pair_batches import LoadedBatch, PairBatches, PairLoader
from embedcache.train.settings import LossSettings, OptimizerSettings
from embedcache.train.trainer import keep_freed_memory, make_optimizer, update

WIDTH = 512
PROJECTOR, NUM_LAYERS = "cls_token+token_mlp", 8  # the paper's pair on one vector per item
BATCHES = {256: 101, 1024: 31, 4096: 11, 16_384: 3}  # to the number of measured steps
PRECISIONS = ("float32", "bfloat16")
_ROWS = 1024  # rows of similarities per product of the floor


def main(*, quick: bool) -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("image", "text"):
            values = np.random.default_rng(len(name)).standard_normal((65_536, WIDTH), np.float32)
            np.save(Path(folder) / f"{name}.npy", values.astype(np.float16))
        steps(quick=quick)
        _loops(folder, quick=quick)


def steps(*, quick: bool) -> None:
    """Print the table of training steps."""
    rows = []
    for precision in PRECISIONS:
        for batch_size, repeats in list(BATCHES.items())[: 3 if quick else None]:
            costs: Costs = in_own_process(_measure, batch_size, precision, 1 if quick else repeats)[0]
            rows.append(
                [
                    precision,
                    f"{batch_size:,}",
                    f"{costs.step:.3f}",
                    f"{costs.products:.3f}",
                    f"{costs.products / costs.step:.2f}",
                    f"{(costs.products + costs.fourth) / costs.step:.2f}",
                    f"{costs.peak_gb:.2f}",
                ]
            )
    columns = ["step, s", "products alone, s", "ratio", "four in the loss", "added peak, GB"]
    print_table(["precision", "batch", *columns], rows, title="CPU time of a training step")


class Costs(NamedTuple):
    """CPU seconds of a step, of its products, and of a fourth one in the loss if it has three; added memory."""

    step: float
    products: float
    fourth: float
    peak_gb: float


def _measure(batch_size: int, precision: str, repeats: int) -> Costs:
    """Alternate the products and a step on one core; call it in a process of its own."""
    use_one_core()
    step, peak_gb = added_peak_gb(lambda: warmed_up(make_step(batch_size, precision)))
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    calls = {
        "step": step,
        "products": make_products(products_of(batch_size), dtype),
        "fourth": make_products([] if _has_fourth(batch_size) else _similarities(batch_size, num_gradients=0), dtype),
    }
    for call in calls.values():
        call()
    return Costs(
        **median_rates({name: cpu_seconds(call) for name, call in calls.items()}, repeats=repeats), peak_gb=peak_gb
    )


def products_of(batch_size: int) -> list[Product]:
    """Return the matrix products of a training step."""
    layers = [Product(1, batch_size, WIDTH, WIDTH)] * NUM_LAYERS
    again = _similarities(batch_size, num_gradients=0) if _has_fourth(batch_size) else []
    return [*layers, *_similarities(batch_size, num_gradients=2), *again]


def _has_fourth(batch_size: int) -> bool:
    """Return whether the loss computes similarities again in the backward pass."""
    return 4 * batch_size**2 > losses.HELD_BYTES


def _similarities(batch_size: int, *, num_gradients: int) -> list[Product]:
    rows = min(_ROWS, batch_size)
    return [Product(1, rows, WIDTH, batch_size, num_gradients)] * (batch_size // rows)


def make_step(batch_size: int, precision: str = "float32") -> Callable[[], None]:
    """Return a training step on one batch: forward and backward passes, clipping and AdamW, as the training loop."""
    pair = AlignedPair(PROJECTOR, widths={"image": WIDTH, "text": WIDTH}, shared_width=WIDTH, dropout=0.1)
    objective = Objective(pair, LossSettings(), precision=precision)
    optimizer = make_optimizer(objective, OptimizerSettings())
    keep_freed_memory()
    rng = np.random.default_rng(0)
    sides = [rng.standard_normal((batch_size, WIDTH), np.float32).astype(np.float16) for _ in "it"]
    batch = next(iter(_batches(sides, batch_size).epoch(0)))

    def step() -> None:
        objective(batch).backward()
        update(objective, optimizer, 1e-3, 1.0, torch.amp.GradScaler("cpu", enabled=False))

    return step


def _loader(folder: str, batch_size: int) -> Loader:
    return _batches([np.load(Path(folder) / f"{name}.npy") for name in ("image", "text")], batch_size)


def _batches(sides: Sequence[Array], batch_size: int) -> Loader:
    image, text = sides
    rows = np.arange(len(image))
    items = Items(rows=rows, samples=rows, contents=rows)
    batches = PairBatches(Pairs(first=items, second=items), batch_size=batch_size, seed=0)
    return Loader(batches, PairLoader(lambda rows: Inputs(image[rows]), lambda rows: Inputs(text[rows]), device="cpu"))


def _loops(folder: str, *, quick: bool) -> None:
    """Print pairs per second and added memory of whole loops from disk, each in its own process."""
    loops = {
        "embedcache": _ours,
        "DataLoader, cross-entropies": _obvious,
        "one tensor per row, padded": _tensor_per_row,
    }
    for batch_size in (2048,) if quick else (4096, 8192):
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
        for _ in range(1 if quick else 3):
            for name, loop in loops.items():
                rates[name].append(in_own_process(loop, folder, batch_size))
        medians = {name: np.median(values, axis=0) for name, values in rates.items()}
        ours = medians["embedcache"][0]
        rows = [[name, f"{rate:,.0f}", f"{ours / rate:.2f}", f"{peak:.2f}"] for name, (rate, peak) in medians.items()]
        print_table([f"batch {batch_size:,}", "pairs/s", "speedup of embedcache", "added peak, GB"], rows)
    print_line("mlp projectors, float32, 65,536 pairs of float16 on disk, two epochs' steps or 20 s, loading included")


def _ours(folder: str, batch_size: int) -> float:
    objective = Objective(_pair(), LossSettings(), precision="float32")
    optimizer = make_optimizer(objective, OptimizerSettings())
    loader = _loader(folder, batch_size)
    keep_freed_memory()

    def batches() -> Iterator[LoadedBatch]:
        yield from loader.epoch(0)
        yield from loader.epoch(1)

    def step(batch: LoadedBatch) -> None:
        objective(batch).backward()
        update(objective, optimizer, 1e-3, 1.0, torch.amp.GradScaler("cpu", enabled=False))

    return _rate(batches(), step, batch_size)


def _obvious(folder: str, batch_size: int) -> float:
    """Run the plain loop: `DataLoader` and two cross-entropies."""
    sides = [np.load(Path(folder) / f"{name}.npy", mmap_mode="c") for name in ("image", "text")]
    return _plain(DataLoader(_Rows(sides), batch_size=batch_size, shuffle=True, drop_last=True), batch_size)


def _tensor_per_row(folder: str, batch_size: int) -> float:
    """Run a loop with SAIL's loader: a list of one tensor per row, padded to equal length by the collate function."""
    sides = [list(torch.from_numpy(np.load(Path(folder) / f"{name}.npy"))) for name in ("image", "text")]

    def collate(rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [pad_sequence(list(side), batch_first=True) for side in zip(*rows, strict=True)]

    loader = DataLoader(_Rows(sides), batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    return _plain(loader, batch_size)


class _Rows(Dataset):  # type: ignore[type-arg]
    def __init__(self, sides: list) -> None:  # type: ignore[type-arg]
        self._sides = sides

    def __len__(self) -> int:
        return len(self._sides[0])

    def __getitem__(self, row: int) -> list:  # type: ignore[type-arg]
        return [side[row] for side in self._sides]


def _plain(loader: DataLoader, batch_size: int) -> float:  # type: ignore[type-arg]
    pair = _pair()
    optimizer = torch.optim.AdamW(pair.parameters(), lr=1e-3)
    labels = torch.arange(batch_size)

    def batches() -> Iterator[list[Tensor]]:
        for _ in range(2):
            yield from loader

    def step(batch: list[Tensor]) -> None:
        images, texts = pair.tower("image")(batch[0]), pair.tower("text")(batch[1])
        logits = pair.scale * normalize(images, dim=-1) @ normalize(texts, dim=-1).T
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()

    return _rate(batches(), step, batch_size)


def _pair() -> AlignedPair:
    return AlignedPair("mlp", widths={"image": WIDTH, "text": WIDTH}, shared_width=WIDTH, dropout=0.1)


def _rate(batches: Iterator, step: Callable, batch_size: int) -> float:  # type: ignore[type-arg]
    """Return pairs per second after a first step, for at most 20 s."""
    step(next(batches))
    started, count = time.perf_counter(), 0
    for batch in batches:
        step(batch)
        count += batch_size
        if time.perf_counter() - started > 20:
            break
    return count / (time.perf_counter() - started)
