"""Losses, the objective of a batch, and validation, compared with their formulas."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, logsigmoid, normalize, softmax
from torch.utils.flop_counter import FlopCounterMode

from embedcache.arrays import Inputs
from embedcache.arrays import normalize as to_unit
from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Items, Pairs
from embedcache.errors import SettingError
from embedcache.evaluate.retrieval import evaluate_retrieval, rank
from embedcache.evaluate.runs import load_runs
from embedcache.evaluate.settings import RetrievalSettings
from embedcache.metrics import best_ranks
from embedcache.projectors.pair import AlignedPair
from embedcache.reports.retrieval import retrieval_json
from embedcache.store.cache import Cache
from embedcache.testing.losses import LossContract
from embedcache.train import losses
from embedcache.train import pair as pair_module
from embedcache.train.batches import Batch, BatchInput, PairTargets
from embedcache.train.losses import LOSSES, Positives, _log_sum_exp
from embedcache.train.pair import PairObjective, Validation, structure, unit_rows
from embedcache.train.settings import LossSettings
from tests.train.runs import run

WIDTH = 6


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (pair_module, losses):
            patch.setattr(module, "TILE_ROWS", 3)
        yield


def batch(size: int, seed: int) -> Batch:
    """Draw a batch in which some items belong to several others."""
    generator = torch.Generator().manual_seed(seed)
    contents = torch.randint(size, (size,), generator=generator)
    rows, columns = (contents[:, None] == contents).nonzero(as_tuple=True)
    names = ("image", "text")
    return Batch(
        samples=np.arange(size),
        num_samples=size,
        inputs={name: BatchInput(torch.randn(size, WIDTH, generator=generator)) for name in names},
        targets=PairTargets(
            positives=Positives(first=rows, second=columns), mix=None, num_items=dict.fromkeys(names, size)
        ),
    )


def make(shared_width: int = 4, **options: object) -> PairObjective:
    torch.manual_seed(0)
    pair = AlignedPair("linear", widths={"image": WIDTH, "text": WIDTH}, shared_width=shared_width)
    return PairObjective(pair, LossSettings(**options), precision="float32")


def truncated_loss(objective: PairObjective, loaded: Batch, width: int) -> Tensor:
    """Compute the loss of the first components of both projections."""
    pair = objective.pair
    sides = [pair.tower(name)(inputs.values) for name, inputs in loaded.inputs.items()]
    images, texts = (normalize(side[:, :width], dim=1) for side in sides)
    value: Tensor = objective.contrast(images, texts, pair.scale, loaded.targets.positives)
    return value


@pytest.mark.slow
@given(
    st.sampled_from(sorted(LOSSES.paths)),
    st.integers(2, 9),
    st.integers(0, 100),
    st.lists(st.integers(1, 8), max_size=3),
)
def test_loss_is_the_sum_over_truncated_vectors(name: str, size: int, seed: int, widths: list[int]) -> None:
    objective = make(8, name=name, widths=tuple(widths))
    loaded, parameters = batch(size, seed), list(objective.pair.parameters())
    expected = sum((truncated_loss(objective, loaded, width) for width in {*widths, 8}), torch.zeros(()))
    ours = objective.loss(loaded)
    torch.testing.assert_close(ours, expected)
    for one, other in zip(*(torch.autograd.grad(value, parameters) for value in (ours, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_regularizer_is_the_mean_of_both_sides_by_its_weight() -> None:
    plain, regularized = make(), make(structure=0.7)
    loaded = batch(7, 3)
    divergences = [structure(side.values, plain.pair.tower(name)(side.values)) for name, side in loaded.inputs.items()]
    assert divergences[0] != divergences[1]
    torch.testing.assert_close(regularized.loss(loaded), plain.loss(loaded) + 0.7 * sum(divergences) / 2)


def test_mixup_is_of_vectors_of_length_1() -> None:
    objective, loaded = make(mixup=1.0), batch(8, 1)
    half = torch.arange(4)
    mixed = []
    for name, side in loaded.inputs.items():
        unit = normalize(side.values, dim=1)
        mixed.append(normalize(objective.pair.tower(name)(0.3 * unit[:4] + 0.7 * unit[4:]), dim=1))
    positives = Positives(first=half, second=half)
    targets = PairTargets(positives=positives, mix=0.3, num_items={"image": 4, "text": 4})
    found = objective.loss(replace(loaded, targets=targets))
    torch.testing.assert_close(found, objective.contrast(*mixed, objective.pair.scale, positives))


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


@pytest.mark.parametrize(("count", "tokens", "parts"), [(6, 0, [6]), (7, 0, [6, 1]), (4, 3, [2, 2]), (3, 9, [1] * 3)])
def test_a_large_batch_is_projected_in_parts(
    monkeypatch: pytest.MonkeyPatch, count: int, tokens: int, parts: list[int]
) -> None:
    """The backward pass projects the parts again; a batch that is normalized is not divided."""
    monkeypatch.setattr(pair_module, "MAX_VECTORS", 6)
    objective, sizes = make(), list[int]()
    tower = nn.Linear(2, 2)
    tower.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    values = torch.randn((count, tokens, 2) if tokens else (count, 2))
    monkeypatch.setattr(objective, "_project", lambda tower, values, lengths: tower(values))
    found = objective._embed(tower, BatchInput(values))
    assert sizes == parts
    torch.testing.assert_close(found, tower(values))
    sizes.clear()
    found.sum().backward()
    assert sizes == ([] if len(parts) == 1 else parts[::-1])
    sizes.clear()
    normed = nn.Sequential(tower, nn.BatchNorm1d(2))
    if not tokens:
        objective._embed(normed, BatchInput(values))
        assert sizes == [count]


def test_recalls_are_those_of_a_full_ranking() -> None:
    rng, rows = np.random.default_rng(0), np.arange(30)
    images = rng.standard_normal((30, WIDTH)).astype(np.float32)
    texts = images + 1.5 * rng.standard_normal((30, WIDTH)).astype(np.float32)
    pair = make().pair
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


def test_validation_is_of_evenly_spaced_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(9)
    items = Items(rows=rows + 100, samples=rows, contents=rows)
    read: list[list[int]] = []

    def reader(wanted: np.ndarray) -> Inputs:
        read.append(wanted.tolist())
        return Inputs(np.ones((len(wanted), 2), np.float32))

    monkeypatch.setattr(pair_module, "_MAX_SAMPLES", 4)
    Validation(Pairs(first=items, second=items), reader, reader, device="cpu")
    assert read == [[100, 102, 105, 108]] * 2


def reader(values: np.ndarray) -> Reader:
    return lambda rows: Inputs(values[rows])


@pytest.mark.slow
def test_recall_by_width_is_that_of_truncated_vectors(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "run", epochs=1, widths=(2, 6))
    settings = RetrievalSettings(check_overlap=False)
    report = evaluate_retrieval(cache_path, [tmp_path / "run"], settings)
    assert list(report.by_width) == [2, 6, 16]
    assert report.by_width[16] == report.recalls
    ranking = rank(Cache(cache_path), load_runs([tmp_path / "run"])[0], settings)
    first, second = to_unit(ranking.first[:, :2]), to_unit(ranking.second[:, :2])
    ranks = best_ranks(first, second, ranking.positives)
    assert report.by_width[2]["i2t"]["r@5"].value == pytest.approx(np.mean(ranks <= 5))
    assert list(retrieval_json(report)["widths"]) == ["2", "6", "16"]
    other = evaluate_retrieval(cache_path, [tmp_path / "run"], RetrievalSettings(check_overlap=False, widths=(3, 16)))
    assert list(other.by_width) == [3, 16]
    with pytest.raises(SettingError, match="17"):
        evaluate_retrieval(cache_path, [tmp_path / "run"], RetrievalSettings(widths=(17,)))


def plain_structure(inputs_BD: Tensor, outputs_BP: Tensor, temperature: float) -> Tensor:
    def neighbors(vectors: Tensor) -> Tensor:
        vectors = vectors - vectors.mean(dim=0, keepdim=True)
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        return softmax(vectors @ vectors.T / temperature, dim=1)

    before_BB, after_BB = neighbors(inputs_BD), neighbors(outputs_BP)
    middle_BB = (before_BB + after_BB) / 2
    both = [kl_div(middle_BB.log(), side_BB, reduction="batchmean") for side_BB in (before_BB, after_BB)]
    return (both[0] + both[1]) / 2


def draw(size: int, seed: int, *, width: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Draw a batch before and after a projector."""
    generator = torch.Generator().manual_seed(seed)
    inputs_BD = torch.randn(size, 6, generator=generator, dtype=torch.float64) + 1
    outputs_BP = torch.randn(size, width, generator=generator, dtype=torch.float64) * 3
    return inputs_BD.to(dtype).requires_grad_(), outputs_BP.to(dtype).requires_grad_()


@pytest.mark.slow
@given(st.integers(2, 11), st.integers(0, 1000), st.integers(1, 7), st.floats(0.05, 2))
def test_structure_matches_the_plain_formula(size: int, seed: int, width: int, temperature: float) -> None:
    inputs, outputs = draw(size, seed, width=width)
    ours, expected = (function(inputs, outputs, temperature=temperature) for function in (structure, plain_structure))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    gradients = (torch.autograd.grad(value, outputs)[0] for value in (ours, expected))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)
    single = structure(*draw(size, seed, width=width, dtype=torch.float32), temperature=temperature)
    torch.testing.assert_close(single.double(), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_structure_is_zero_without_a_change_and_has_no_gradient_of_inputs(size: int) -> None:
    """One or two items have no geometry; a rotation, scale and shift changes none."""
    inputs, outputs = draw(size, 0)
    if size > 2:
        rotation, _ = torch.linalg.qr(draw(6, 1, width=6)[1].detach())
        outputs = (3 * inputs.detach() @ rotation + 5).requires_grad_()
    value = structure(inputs, outputs)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert inputs.grad is None
    assert outputs.grad is not None
    assert outputs.grad.abs().max() < 1e-6


LOSS_WIDTH = 5


def plain_info_nce(logits_BB: Tensor, positives_BB: Tensor) -> Tensor:
    others = positives_BB & ~torch.eye(len(logits_BB), dtype=torch.bool)
    logits_BB = logits_BB.masked_fill(others, -torch.inf)
    labels = torch.arange(len(logits_BB))
    return (cross_entropy(logits_BB, labels) + cross_entropy(logits_BB.T, labels)) / 2


def plain_multi_positive(logits_BM: Tensor, positives_BM: Tensor) -> Tensor:
    def one_way(logits: Tensor, positives: Tensor) -> Tensor:
        return cross_entropy(logits, positives.double() / positives.sum(dim=1, keepdim=True))

    return (one_way(logits_BM, positives_BM) + one_way(logits_BM.T, positives_BM.T)) / 2


def plain_siglip(logits_BM: Tensor, positives_BM: Tensor) -> Tensor:
    return -logsigmoid(torch.where(positives_BM, logits_BM, -logits_BM)).sum() / len(logits_BM)


def plain_sail(logits_BM: Tensor, positives_BM: Tensor) -> Tensor:
    return -logsigmoid(torch.where(positives_BM, logits_BM, -logits_BM)).mean()


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "info_nce": plain_info_nce,
    "multi_positive": plain_multi_positive,
    "sail": plain_sail,
    "siglip": plain_siglip,
}

every_loss = pytest.mark.parametrize("name", PLAIN)


def draw_batch(size: int, seed: int, *, num_contents: int | None = None) -> tuple[Tensor, Tensor, Positives]:
    """Draw a batch of float64 unit rows; with few contents many items are equal and belong together."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = (
        normalize(torch.randn(size, LOSS_WIDTH, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
        for _ in "it"
    )
    contents = torch.randint(num_contents, (size,), generator=generator) if num_contents else torch.arange(size)
    rows, columns = (contents[:, None] == contents).nonzero(as_tuple=True)
    return images, texts, Positives(first=rows, second=columns)


def dense(positives: Positives, size: int) -> Tensor:
    """Return the pairs as a (B, B) bool matrix."""
    matrix = torch.zeros(size, size, dtype=torch.bool)
    matrix[positives.first, positives.second] = True
    return matrix


class TestInfoNce(LossContract):
    name = "info_nce"


class TestMultiPositive(LossContract):
    name = "multi_positive"


class TestSail(LossContract):
    name = "sail"


class TestSigLip(LossContract):
    name = "siglip"


class TestPlugIn(LossContract):
    name = "embedcache.train.losses:SigLip"


def test_every_loss_has_a_plain_formula() -> None:
    assert set(PLAIN) == set(LOSSES.paths) <= {kind.name for kind in LossContract.__subclasses__()}


@pytest.mark.slow
@every_loss
@given(st.integers(1, 11), st.integers(0, 1000), st.sampled_from([None, 2, 5]), st.floats(0.5, 1000), st.booleans())
def test_value_and_gradients_match_the_plain_formula(
    name: str, size: int, seed: int, num_contents: int | None, scale: float, excludes: bool
) -> None:
    """Excluded pairs are in no sum."""
    loss = LOSSES.load(name)().double()
    images, texts, positives = draw_batch(size, seed, num_contents=num_contents)
    together = dense(positives, size)
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.rand(size, size, generator=generator) < 0.4 * excludes) & ~together
    if excludes:
        positives = replace(positives, excluded=hidden.nonzero(as_tuple=True))
    factor = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    ours = loss(images, texts, factor, positives)
    logits = factor * images @ texts.T + next(loss.parameters(), torch.zeros(()))
    plain = PLAIN[name](torch.where(hidden, torch.full_like(logits, -1e9), logits), together)
    torch.testing.assert_close(ours, plain)
    inputs = [images, texts, factor, *loss.parameters()]
    for one, other in zip(*(torch.autograd.grad(value, inputs) for value in (ours, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi_positive", "sail", "siglip"])
@given(st.integers(1, 9), st.integers(0, 100), st.sampled_from([2.0, 90.0]))
def test_several_captions_match_the_plain_formula(name: str, size: int, seed: int, scale: float) -> None:
    images, texts, _ = draw_batch(size, seed)
    more = torch.cat([texts, draw_batch(size, seed + 1)[1][: seed % (size + 1)]]).detach().requires_grad_()
    positives = torch.arange(len(more)) % size == torch.arange(size)[:, None]
    loss, factor = LOSSES.load(name)().double(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    rows, columns = positives.nonzero(as_tuple=True)
    bias = next(loss.parameters(), torch.zeros(()))
    ours = loss(images, more, factor, Positives(first=rows, second=columns))
    plain = PLAIN[name](factor * images @ more.T + bias, positives)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(
        *(torch.autograd.grad(value, [images, more, factor]) for value in (ours, plain)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@every_loss
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_products_in_bfloat16_are_close(name: str, scale: float) -> None:
    loss, (images, texts, positives) = LOSSES.load(name)(), draw_batch(9, 4, num_contents=5)
    found = []
    for enabled in (False, True):
        rows = [side.detach().float().requires_grad_() for side in (images, texts)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = loss(*rows, torch.tensor(scale), positives)
        assert value.dtype == torch.float32
        found.append([value, *torch.autograd.grad(value, rows)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.02 * one.norm()
        assert not torch.equal(one, other)


@every_loss
@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("is_lower", [False, True])
def test_held_tiles_change_no_bit(name: str, scale: float, is_lower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, (images, texts, positives) = LOSSES.load(name)(), draw_batch(9, 4, num_contents=5)
    positives = replace(positives, excluded=(torch.tensor([0, 4, 8]), torch.tensor([3, 0, 1])))
    found, num_products = [], []
    for held_bytes in (4 * 9 * 9, 4 * 9 * 9 - 1):
        monkeypatch.setattr(losses, "KEPT_BYTES", held_bytes)
        rows = [side.detach().float().requires_grad_() for side in (images, texts)]
        factor = torch.tensor(scale, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_lower), FlopCounterMode(display=False) as counter:
            value = loss(*rows, factor, positives)
            for _ in range(2):  # the first backward pass leaves the tiles as they are
                value.backward(retain_graph=True)
        found.append([value, *(side.grad for side in (*rows, factor))])
        num_products.append(counter.get_total_flops() // (2 * 9 * 9 * LOSS_WIDTH))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert num_products[1] - num_products[0] == 2  # each backward pass computes them again


@pytest.mark.parametrize(("scale", "are_powers"), [(40.0, True), (-40.0, True), (41.0, False), (-41.0, False)])
def test_powers_are_summed_where_no_logit_overflows(
    scale: float, are_powers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "TILE_ROWS", 500)
    images, texts = (side.detach().float() for side in draw_batch(500, 4)[:2])
    logits = (images * scale) @ texts.T
    by_powers, by_logs = logits.exp().sum(dim=1).log(), logits.logsumexp(dim=1)
    assert not torch.equal(by_powers, by_logs)
    over_rows, _ = _log_sum_exp(images, texts, torch.tensor(scale))
    assert torch.equal(over_rows, by_powers if are_powers else by_logs)
