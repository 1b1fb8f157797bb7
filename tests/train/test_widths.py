"""Matryoshka: the loss is a sum over prefixes of the shared space, whose recall is measured by width."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from embedcache.arrays import normalize as to_unit
from embedcache.errors import SettingError
from embedcache.evaluate.ranking import rank
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.evaluate.runs import load_runs
from embedcache.evaluate.settings import RetrievalSettings
from embedcache.metrics.ranking import best_ranks
from embedcache.projectors.pair import AlignedPair
from embedcache.reports.retrieval import retrieval_json, width_table
from embedcache.store.cache import Cache
from embedcache.train.losses import LOSSES, Positives
from embedcache.train.pair import Objective, unit_rows
from embedcache.train.pair_batches import Batch, LoadedBatch, LoadedInputs
from embedcache.train.settings import LossSettings
from tests.train.runs import run

WIDTH = 6


def batch(size: int, seed: int) -> LoadedBatch:
    """Draw a batch in which some items belong to several others."""
    generator = torch.Generator().manual_seed(seed)
    contents = torch.randint(size, (size,), generator=generator)
    rows, columns = (contents[:, None] == contents).nonzero(as_tuple=True)
    numbers = np.arange(size)
    inputs = [
        LoadedInputs(values=torch.randn(size, WIDTH, generator=generator), lengths=None, rows=numbers, num_items=size)
        for _ in "it"
    ]
    described = Batch(
        samples=numbers, first_rows=numbers, second_rows=numbers, positives=(rows.numpy(), columns.numpy()), num_hard=0
    )
    return LoadedBatch(
        batch=described, first=inputs[0], second=inputs[1], positives=Positives(first=rows, second=columns)
    )


def truncated_loss(objective: Objective, loaded: LoadedBatch, width: int) -> Tensor:
    """Compute the loss of the first components of both projections."""
    pair = objective.pair
    sides = [tower(inputs.values) for tower, inputs in zip(pair.towers, (loaded.first, loaded.second), strict=True)]
    images, texts = (normalize(side[:, :width], dim=1) for side in sides)
    value: Tensor = objective.loss(images, texts, pair.scale, loaded.positives)
    return value


@pytest.mark.slow
@given(
    st.sampled_from(sorted(LOSSES.paths)),
    st.integers(2, 9),
    st.integers(0, 100),
    st.lists(st.integers(1, 8), max_size=3),
)
def test_loss_is_the_sum_over_truncated_vectors(name: str, size: int, seed: int, widths: list[int]) -> None:
    torch.manual_seed(seed)
    pair = AlignedPair("linear", widths={"image": WIDTH, "text": WIDTH}, shared_width=8)
    objective = Objective(pair, LossSettings(name=name, widths=tuple(widths)), precision="float32")
    loaded, parameters = batch(size, seed), list(pair.parameters())
    expected = sum((truncated_loss(objective, loaded, width) for width in {*widths, 8}), torch.zeros(()))
    ours = objective(loaded)
    torch.testing.assert_close(ours, expected)
    for one, other in zip(*(torch.autograd.grad(value, parameters) for value in (ours, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 600), st.integers(1, 40), st.integers(0, 100))
def test_unit_rows_are_normalized_ones_to_the_bit(num: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors, gradient = torch.randn(num, 2 * width, generator=generator), torch.randn(num, width, generator=generator)
    vectors[::7], vectors[1::7] = 0, 1e-14  # shorter than 1e-12, by which `normalize` divides them
    found = []
    for function in (unit_rows, partial(normalize, dim=-1)):
        whole = vectors.clone().requires_grad_()
        unit = function(whole[:, :width])
        unit.backward(gradient)
        found.append((unit, whole.grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_recall_by_width_is_that_of_truncated_vectors(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "run", epochs=1, widths=(2, 6))
    assert json.loads((tmp_path / "run/config.json").read_text())["training"]["loss"]["widths"] == [2, 6]
    settings = RetrievalSettings(check_overlap=False)
    report = evaluate_retrieval(cache_path, [tmp_path / "run"], settings)
    assert list(report.by_width) == [2, 6, 16]
    assert report.by_width[16] == report.recalls
    ranking = rank(Cache(cache_path), load_runs([tmp_path / "run"])[0], settings)
    first, second = to_unit(ranking.first[:, :2]), to_unit(ranking.second[:, :2])
    ranks = best_ranks(first, second, ranking.positives)
    assert report.by_width[2]["i2t"]["r@5"].value == pytest.approx(np.mean(ranks <= 5))
    assert report.by_width[2]["i2t"]["r@10"].value < report.by_width[16]["i2t"]["r@10"].value
    assert list(retrieval_json(report)["widths"]) == ["2", "6", "16"]
    assert [row[:2] for row in width_table({"a": report})[1]] == [["a", "2"], ["a", "6"], ["a", "16"]]
    other = evaluate_retrieval(cache_path, [tmp_path / "run"], RetrievalSettings(check_overlap=False, widths=(3, 16)))
    assert list(other.by_width) == [3, 16]
    with pytest.raises(SettingError, match="17"):
        evaluate_retrieval(cache_path, [tmp_path / "run"], RetrievalSettings(widths=(17,)))
