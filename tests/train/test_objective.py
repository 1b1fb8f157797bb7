"""The loss of a batch with mixup and the regularizer, and the recalls of validation, compared with their formulas."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from embedcache.arrays import Inputs
from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Items, Pairs
from embedcache.projectors.pair import AlignedPair
from embedcache.train.losses import Positives
from embedcache.train.pair import Objective, Validation, structure, unit_rows
from embedcache.train.settings import LossSettings
from tests.train.test_widths import WIDTH, batch


def make_pair() -> AlignedPair:
    torch.manual_seed(0)
    return AlignedPair("linear", widths={"image": WIDTH, "text": WIDTH}, shared_width=4)


def test_regularizer_is_the_mean_of_both_sides_by_its_weight() -> None:
    pair, loaded = make_pair(), batch(7, 3)
    plain, regularized = (Objective(pair, LossSettings(structure=weight), precision="float32") for weight in (0, 0.7))
    sides = zip(pair.towers, (loaded.first, loaded.second), strict=True)
    divergences = [structure(inputs.values, tower(inputs.values)) for tower, inputs in sides]
    assert divergences[0] != divergences[1]
    torch.testing.assert_close(regularized(loaded), plain(loaded) + 0.7 * sum(divergences) / 2)


def test_mixup_is_of_vectors_of_length_1() -> None:
    pair, loaded = make_pair(), batch(8, 1)
    half = torch.arange(4)
    objective = Objective(pair, LossSettings(mixup=1.0), precision="float32")
    mixed = [
        0.3 * normalize(inputs.values, dim=1)[:4] + 0.7 * normalize(inputs.values, dim=1)[4:]
        for inputs in (loaded.first, loaded.second)
    ]
    images, texts = (normalize(tower(values), dim=1) for tower, values in zip(pair.towers, mixed, strict=True))
    loaded = replace(
        loaded,
        batch=replace(loaded.batch, mix=0.3),
        first=replace(loaded.first, num_items=4),
        second=replace(loaded.second, num_items=4),
        positives=Positives(first=half, second=half),
    )
    torch.testing.assert_close(objective(loaded), objective.loss(images, texts, pair.scale, loaded.positives))


def test_recalls_are_those_of_a_full_ranking() -> None:
    rng, rows = np.random.default_rng(0), np.arange(30)
    images = rng.standard_normal((30, WIDTH)).astype(np.float32)
    texts = images + 1.5 * rng.standard_normal((30, WIDTH)).astype(np.float32)
    pair = make_pair()
    items = Items(rows=rows, samples=rows, contents=rows)
    validation = Validation(Pairs(first=items, second=items), reader(images), reader(texts), device="cpu")
    with torch.inference_mode():
        first, second = (
            normalize(tower(torch.from_numpy(values)), dim=1)
            for tower, values in zip(pair.eval().towers, (images, texts), strict=True)
        )
    cosines = (first @ second.T).numpy()
    expected = {}
    for direction, found in (("i2t", cosines), ("t2i", cosines.T)):
        ranks = (found > np.diag(found)[:, None]).sum(axis=1) + 1
        expected |= {f"{direction} r@{k}": float(np.mean(ranks <= k)) for k in (1, 5, 10)}
    assert len(set(expected.values())) > 3
    assert validation.recalls(pair) == pytest.approx(expected)


def test_rows_are_scaled_in_blocks_on_a_cpu() -> None:
    unit = unit_rows(torch.ones(3, 4, requires_grad=True))
    assert unit.grad_fn is not None
    assert unit.grad_fn.name() == "_UnitRowsBackward"


def reader(values: np.ndarray) -> Reader:
    return lambda rows: Inputs(values[rows])
