"""Training steps relative to their matrix products, a plain loop, and a loader of one tensor per row; width 512.

The floor of a step is the time of its matrix products, measured on products of the same shapes: three products per
layer, and four of B x 512 x B in the loss, which computes the similarities again in the backward pass so that no B x B
matrix is stored. The ratio with three products, as if the matrix were stored, is printed as well.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import in_own_process
from embedcache.arrays import Inputs
from embedcache.cli.console import print_line, print_table
from embedcache.dataset.pairs import Items, Pairs
from embedcache.projectors.pair import AlignedPair
from embedcache.train.batches import Batches, LoadedBatch, Loader, PairLoader
from embedcache.train.pair import Objective
from embedcache.train.settings import LossSettings, OptimizerSettings
from embedcache.train.trainer import keep_freed_memory, make_optimizer, update

WIDTH = 512
PROJECTOR, NUM_LAYERS = "cls_token+token_mlp", 8  # the paper's pair on one vector per item
BATCHES = (4096, 16_384)
PRECISIONS = ("float32", "bfloat16")


def main(*, quick: bool) -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("image", "text"):
            values = np.random.default_rng(len(name)).standard_normal((65_536, WIDTH), np.float32)
            np.save(Path(folder) / f"{name}.npy", values.astype(np.float16))
        _floors(folder, quick=quick)
        _loops(folder, quick=quick)


def _floors(folder: str, *, quick: bool) -> None:
    rows = []
    for precision in PRECISIONS:
        for batch_size in BATCHES[:1] if quick else BATCHES:
            repeats = 1 if quick else 5 if batch_size < 10_000 else 3
            floor, lower, ours = in_own_process(_step_against_floor, folder, batch_size, precision, repeats)[0]
            rows.append(
                [
                    precision,
                    f"{batch_size:,}",
                    f"{ours:.3f}",
                    f"{floor:.3f}",
                    f"{floor / ours:.2f}",
                    f"{lower / ours:.2f}",
                ]
            )
    print_table(["precision", "batch", "step, s", "products alone, s", "ratio", "ratio, three in the loss"], rows)


def _step_against_floor(folder: str, batch_size: int, precision: str, repeats: int) -> tuple[float, float, float]:
    """Alternate the products and a step; return median seconds of both floors and of a step."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    layer = _product(batch_size, WIDTH, WIDTH, dtype)
    tile = _product(1024, WIDTH, batch_size, dtype)
    step = _step(folder, batch_size, precision)
    calls = {"layer": layer, "tile": tile, "step": step}
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(statistics.median(_time(call) for _ in range(1 if name == "step" else 5)))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    layers, loss = 3 * NUM_LAYERS * median["layer"], median["tile"] * batch_size / 1024
    return layers + 4 * loss, layers + 3 * loss, median["step"]


def _product(rows: int, inner: int, columns: int, dtype: torch.dtype) -> Callable[[], object]:
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    return lambda: torch.mm(left, right.T, out=out)


def _step(folder: str, batch_size: int, precision: str) -> Callable[[], None]:
    pair = AlignedPair(PROJECTOR, widths={"image": WIDTH, "text": WIDTH}, shared_width=WIDTH, dropout=0.1)
    objective = Objective(pair, LossSettings(), precision=precision)
    optimizer = make_optimizer(objective, OptimizerSettings())
    keep_freed_memory()
    batch = next(iter(_loader(folder, batch_size).epoch(0)))

    def step() -> None:
        objective(batch).backward()
        update(objective, optimizer, 1e-3, 1.0, torch.amp.GradScaler("cpu", enabled=False))

    return step


def _loader(folder: str, batch_size: int) -> Loader:
    image, text = (np.load(Path(folder) / f"{name}.npy") for name in ("image", "text"))
    rows = np.arange(len(image))
    items = Items(rows=rows, samples=rows, contents=rows)
    batches = Batches(Pairs(first=items, second=items), batch_size=batch_size, seed=0)
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


def _time(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
