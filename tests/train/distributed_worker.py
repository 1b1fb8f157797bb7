"""Write the gradients of every loss for a fixed batch, with and without mixup and STRUCTURE."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from embedcache.arrays import Inputs, Ints
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.selections import HardNegatives
from embedcache.projectors.pair import AlignedPair
from embedcache.train import losses
from embedcache.train.batches import Batch, PairBatches, load_pairs
from embedcache.train.distributed import process_group, process_rank, sum_over_processes
from embedcache.train.losses import LOSSES
from embedcache.train.pair import PairObjective
from embedcache.train.settings import LossSettings
from embedcache.train.trainer import _Loss

SAMPLES, WIDTH = 23, 6


def main(path: str) -> None:
    """Write a file that maps loss and options -> parameter -> gradient, alone or as one of several processes."""
    with process_group("cpu"):
        _write_gradients(path)


def sum_ranks_twice(path: str) -> None:
    """Write the sum of all ranks, computed in a process group, and again in one that is made after it."""
    sums = []
    for _ in range(2):
        with process_group("cpu"):
            sums.append(sum_over_processes(torch.tensor(process_rank())).item())
    Path(f"{path}-{os.environ['RANK']}").write_text(json.dumps(sums))


def _write_gradients(path: str) -> None:
    torch.manual_seed(0)
    losses.TILE_ROWS = 4
    pair = AlignedPair("linear", widths={"image": WIDTH, "text": WIDTH}, shared_width=4)
    gradients = {}
    for name in LOSSES.paths:
        for mixup in (0.0, 1.0):
            for weight in (0.0, 0.5):
                objective = PairObjective(
                    pair, LossSettings(name=name, mixup=mixup, structure=weight), precision="float32"
                )
                gradients[f"{name} {mixup} {weight}"] = _gradients(objective, mixup)
    for name in [name for name in LOSSES.paths if name != "info_nce"]:  # in one order in all processes
        objective = PairObjective(pair, LossSettings(name=name), precision="float32")
        gradients[f"{name} all captions"] = _gradients(objective, 0.0, captions="all")
    objective = PairObjective(pair, LossSettings(name="info_nce", widths=(2,)), precision="float32")
    gradients["info_nce at two widths"] = _gradients(objective, 0.0)
    for name in LOSSES.paths:
        objective = PairObjective(pair, LossSettings(name=name), precision="float32")
        gradients[f"{name} with hard negatives"] = _gradients(objective, 0.0, negatives=_negatives())
    if process_rank() == 0:
        torch.save(gradients, path)


def _gradients(
    objective: PairObjective, mixup: float, captions: str = "draw", negatives: HardNegatives | None = None
) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    loss = _Loss(objective)
    trained = DistributedDataParallel(loss) if torch.distributed.is_initialized() else loss
    trained(_first_batch(mixup, captions, negatives)).backward()
    return {name: value.grad.clone() for name, value in objective.named_parameters()}


def _negatives() -> HardNegatives:
    numbers = np.random.default_rng(1).integers(SAMPLES, size=(SAMPLES, 2)).astype(np.int32)
    return HardNegatives(negatives_SK=numbers, groups_S=np.arange(SAMPLES) // 3)


def _first_batch(mixup: float, captions: str, negatives: HardNegatives | None = None) -> Batch:
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 2 * SAMPLES, WIDTH))
    text_samples = np.sort(np.concatenate([np.arange(SAMPLES), rng.integers(SAMPLES, size=SAMPLES)]))
    pairs = Pairs(
        first=Items(rows=np.arange(SAMPLES), samples=np.arange(SAMPLES), contents=np.arange(SAMPLES) // 2),
        second=Items(
            rows=np.arange(2 * SAMPLES), samples=text_samples, contents=rng.integers(SAMPLES, size=2 * SAMPLES)
        ),
    )
    options = {"captions": captions, "negatives": negatives}
    batches = PairBatches(pairs, batch_size=SAMPLES, seed=0, mixup=mixup, **options)  # type: ignore[arg-type]

    def reader(values: np.ndarray):
        def read(rows: Ints) -> Inputs:
            return Inputs(values[rows])

        return read

    return load_pairs(next(batches.epoch(0)), {"image": reader(images), "text": reader(texts)}, "cpu")
