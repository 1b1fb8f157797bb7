"""Networks of points, and their training and adaptation."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Normal, kl_divergence

from embedcache.errors import DataError
from embedcache.runs import Run, RunInput
from embedcache.settings import from_flat
from embedcache.train.batches import Batch, BatchInput
from embedcache.train.settings import FitSettings
from pipelines.summit.networks import (
    RUN_KIND,
    PointNetwork,
    PointNetworks,
    PointObjective,
    adapt_norms,
    class_weights,
    domain_gap,
    imitation_loss,
    labeled_loss,
    norm_gaps,
    predict_points,
    scale_entropy,
    symmetric_kl,
)
from pipelines.summit.pseudo_labels import entropy
from pipelines.summit.training import (
    PointData,
    SegmentationInputs,
    mean_iou_of,
    save_adapted_norms,
    train_adaptation,
    train_source,
)
from tests.train.runs import interrupted_after

C, WIDTHS = 3, {"image": 6, "points": 4}


def make_data(seed: int, *, shift: float = 0.0, num_frames: int = 8) -> PointData:
    """Frames of points of three classes around their means in both modalities; the image's features are moved."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(40, 60, num_frames)
    labels = rng.integers(0, C, lengths.sum())
    features = {}
    for number, (name, width) in enumerate(WIDTHS.items()):
        means = np.random.default_rng(90 + number).normal(size=(C, width)) * 2
        moved = shift * (means[1] - means[0]) if name == "image" else 0.0
        features[name] = (means[labels] + rng.normal(size=(len(labels), width)) + moved).astype(np.float16)
    return PointData(features=features, labels_N=labels, lengths_G=lengths)


def inputs(*names: str) -> SegmentationInputs:
    features = {
        name: RunInput(modality="points", feature=f"{name}/f", spec=f"toy:{name}", fingerprint={}, width=WIDTHS[name])
        for name in names
    }
    return SegmentationInputs(features=features, data_digest="made up")


def settings(**options: Any) -> FitSettings:
    return from_flat(FitSettings, {"epochs": 8, "lr": 0.01, "batch_size": 64, **options})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source run per modality. Not to be changed."""
    folder = tmp_path_factory.mktemp("segmentation")
    for number, name in enumerate(WIDTHS):
        data = make_data(10 + number)
        train_source(data.frames(0, 6), data.frames(6, 8), folder / name, inputs(name), settings(), num_classes=C)
    return {name: folder / name for name in WIDTHS}


def adapt(runs: dict[str, Path], path: Path, **options: Any) -> Path:
    """Adapt the image to moved features, with the labels that are right for 90% of the points."""
    data = make_data(20, shift=1.5)
    labels = np.where(np.random.default_rng(0).random(len(data.labels_N)) < 0.1, -1, data.labels_N)
    words = tuple(f"{name}={run}" for name, run in runs.items())
    train_adaptation(
        data,
        {"image": labels},
        path,
        inputs(*WIDTHS),
        settings(**{"init_from": words, "trainable": "image", **options}),
        num_classes=C,
    )
    return path


def load(path: Path) -> PointNetworks:
    module = Run.open(path).module
    assert isinstance(module, PointNetworks)
    return module


def test_source_run_learns_and_records_its_input(runs: dict[str, Path]) -> None:
    for name, run in runs.items():
        assert mean_iou_of(load(run), name, make_data(30)) > 0.7
        assert Run.open(run, kind=RUN_KIND).modalities == (name,)


@pytest.mark.slow
def test_adaptation_changes_one_modality_only(runs: dict[str, Path], tmp_path: Path) -> None:
    module, target = load(adapt(runs, tmp_path / "run")), make_data(31, shift=1.5)
    assert mean_iou_of(module, "image", target) > mean_iou_of(load(runs["image"]), "image", target) + 0.2
    before, after = load(runs["points"])["points"].state_dict(), module["points"].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert set(Run.open(tmp_path / "run").info.digests) == {"init_from image", "init_from points"}


@pytest.mark.slow
def test_adaptation_keeps_the_last_epoch_and_resumes_to_the_same_bits(runs: dict[str, Path], tmp_path: Path) -> None:
    with interrupted_after(9), pytest.raises(InterruptedError):
        adapt(runs, tmp_path / "run", checkpoint_s=0, epochs=3)
    for name in ("run", "whole"):
        adapt(runs, tmp_path / name, checkpoint_s=0, epochs=3)
    for name in ("model.safetensors", "last.safetensors", "losses.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    best, last = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("model", "last"))
    assert all(torch.equal(value, last[name]) for name, value in best.items())


def test_norm_statistics_are_a_run_that_training_starts_from(runs: dict[str, Path], tmp_path: Path) -> None:
    target = make_data(20, shift=1.5)
    module = save_adapted_norms(runs, target.features, ["image"], tmp_path / "norms")
    stored = load(tmp_path / "norms")
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in module.state_dict().items())
    test = make_data(31, shift=1.5)
    assert mean_iou_of(stored, "image", test) > mean_iou_of(load(runs["image"]), "image", test) + 0.1
    assert mean_iou_of(stored, "points", test) == mean_iou_of(load(runs["points"]), "points", test)
    adapt({"image": tmp_path / "norms", "points": tmp_path / "norms"}, tmp_path / "run", epochs=0)
    start = load(tmp_path / "run")["image"]
    assert torch.equal(start.hidden_norm.running_mean, stored["image"].hidden_norm.running_mean)  # type: ignore[arg-type]


def test_nan_feature_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    data = make_data(10)
    data.features["image"][7, 0] = np.nan
    with pytest.raises(DataError, match="the image feature holds NaN or infinity"):
        train_source(data, data, tmp_path / "run", inputs("image"), settings(), num_classes=C)


WIDTH, C = 6, 3


def make_points(seed: int, num_points: int = 300, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Features of classes around their means, all moved by a fraction of the way from class 0 to class 1; labels."""
    labels = np.random.default_rng(seed).integers(0, C, num_points)
    means = np.random.default_rng(99).normal(size=(C, WIDTH)) * 2
    noise = np.random.default_rng(seed + 1).normal(size=(num_points, WIDTH))
    return (means[labels] + noise + shift * (means[1] - means[0])).astype(np.float32), labels


def train(objective: PointObjective, batch: Batch, *, steps: int = 60) -> None:
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        objective.loss(batch).backward()
        optimizer.step()


def make_batch(seed: int, shifts: Mapping[str, float], labels: np.ndarray | None = None) -> Batch:
    """Points of several modalities, with labels or, by default, with the true ones."""
    points = {name: make_points(seed, shift=shift) for name, shift in shifts.items()}
    inputs = {name: BatchInput(torch.from_numpy(features)) for name, (features, _) in points.items()}
    targets = {n: torch.from_numpy(true if labels is None else labels) for n, (_, true) in points.items()}
    return Batch(samples=np.arange(300), num_samples=300, inputs=inputs, targets=targets)


ONES = np.ones(C, np.float32)


def networks_of(**networks: PointNetwork) -> PointNetworks:
    """Networks of several modalities with copies of the weights of others."""
    module = PointNetworks(widths=dict.fromkeys(networks, WIDTH), num_classes=C, hidden=16)
    for name, network in networks.items():
        module[name].load_state_dict(network.state_dict())
    return module


@pytest.fixture(scope="module")
def source() -> PointNetwork:
    """Network trained on unshifted points."""
    torch.manual_seed(0)
    module = PointNetworks(widths={"image": WIDTH}, num_classes=C, hidden=16)
    train(PointObjective(module, {"image": ONES}), make_batch(0, {"image": 0.0}))
    return module.eval()["image"]


def accuracy(network: PointNetwork, seed: int, shift: float = 0.0) -> float:
    features, labels = make_points(seed, shift=shift)
    return float((predict_points(network, features).prob_NC.argmax(axis=1) == labels).mean())


def test_labeled_loss_matches_torch_and_ignores() -> None:
    logits, labels = torch.randn(20, C), torch.arange(20) % C
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert labeled_loss(logits, labels, weights) == pytest.approx(nn.CrossEntropyLoss(weights)(logits, labels).item())
    labels[4:] = -1
    expected = nn.CrossEntropyLoss(weights)(logits[:4], labels[:4]).item()
    assert labeled_loss(logits, labels, weights).item() == pytest.approx(expected)
    assert labeled_loss(logits, torch.full((20,), -1), weights).item() == 0  # torch's own mean is NaN


def test_imitation_matches_kl_divergence(source: PointNetwork) -> None:
    torch.manual_seed(1)
    network, features = PointNetwork(WIDTH, C, hidden=16), torch.from_numpy(make_points(2)[0])
    output, other = network(features), source(features)
    expected = nn.KLDivLoss(reduction="batchmean")(output.mimic_NC.log_softmax(1), other.logits_NC.softmax(1))
    assert imitation_loss(output, other).item() == pytest.approx(expected.item(), rel=1e-4)
    network.copy_head()
    same = network(features)
    assert imitation_loss(same, same).item() == pytest.approx(0, abs=1e-6)


def test_consistency_gives_no_gradient_to_the_teacher(source: PointNetwork) -> None:
    module = networks_of(image=source, points=source)
    objective = PointObjective(module, {"image": ONES, "points": ONES}, consistency=1.0)
    objective.loss(make_batch(3, {"image": 0.5, "points": 0.0}, np.full(300, -1))).backward()
    for name in ("image", "points"):
        main, mimic = module[name].head.weight.grad, module[name].mimic_head.weight.grad
        assert main is None or not main.any()
        assert mimic is not None
        assert mimic.any()


def test_modality_without_weights_stays_as_it_is(source: PointNetwork) -> None:
    module = networks_of(image=source, points=source)
    module["image"].train()
    module["points"].eval()  # as the training loop does with what is not trained
    batch = make_batch(3, {"image": 1.0, "points": 0.0})
    train(PointObjective(module, {"image": ONES}, consistency=0.1), batch, steps=20)
    before = source.state_dict()
    for name, value in module["points"].state_dict().items():
        assert torch.equal(value, before[name]), name
    changed = {name for name, value in module["image"].state_dict().items() if not torch.equal(value, before[name])}
    assert {"input_norm.running_mean", "head.weight", "mimic_head.weight"} <= changed
    assert accuracy(module["image"], 8, shift=1.0) > accuracy(source, 8, shift=1.0) + 0.2


def test_entropy_is_scaled_without_changing_predictions(source: PointNetwork) -> None:
    network, features = copy.deepcopy(source), make_points(5)[0]
    before = predict_points(network, features).prob_NC
    for target in (0.5, 0.05):
        temperature = scale_entropy(network, features, target)
        after = predict_points(network, features).prob_NC
        assert entropy(after).mean() == pytest.approx(target, rel=1e-2)
        assert (temperature > 1) == (target == 0.5)
        assert np.array_equal(after.argmax(axis=1), before.argmax(axis=1))


def test_gap_grows_with_the_shift_and_counts_variances(source: PointNetwork) -> None:
    gaps = [norm_gaps(source, make_points(6, 4000, shift=shift)[0]) for shift in (0.0, 1.0, 3.0)]
    for layer in range(2):
        assert gaps[0][layer] < 0.1 < gaps[1][layer] < gaps[2][layer]
    features = make_points(6, 4000)[0]
    mean, variance = (source.state_dict()[f"input_norm.running_{name}"].numpy() for name in ("mean", "var"))
    expected = domain_gap(mean, variance, features.mean(axis=0), features.var(axis=0))
    assert gaps[0][0] == pytest.approx(expected, rel=1e-3)


def test_adapted_norms_close_the_gap_and_undo_a_shift(source: PointNetwork) -> None:
    network, features = copy.deepcopy(source), make_points(6, 4000, shift=3.0)[0]
    adapt_norms(network, features)
    assert norm_gaps(network, features) == pytest.approx([0, 0], abs=1e-5)
    assert accuracy(source, 9, shift=3.0) < 0.6
    assert accuracy(network, 9, shift=3.0) > 0.9
    for name, value in network.named_parameters():
        assert torch.equal(value, dict(source.named_parameters())[name]), name


@given(st.lists(st.integers(-1, C - 1), min_size=1, max_size=200))
def test_class_weights_match_definition(labels: list[int]) -> None:
    assume(max(labels) >= 0)
    counts = [max(labels.count(number), 1) for number in range(C)]
    expected = np.log([5 * sum(label >= 0 for label in labels) / count for count in counts])
    found = class_weights(np.array(labels), C)
    assert found == pytest.approx(expected / expected.min(), rel=1e-5)
    assert found[np.argmax(counts)] == found.min() == 1


def test_divergence_matches_torch() -> None:
    rng = np.random.default_rng(0)
    moments = [(rng.normal(size=8), rng.uniform(0.1, 3, 8)) for _ in range(2)]
    first, second = (Normal(torch.tensor(mean), torch.tensor(variance).sqrt()) for mean, variance in moments)
    expected = kl_divergence(first, second) + kl_divergence(second, first)
    np.testing.assert_allclose(symmetric_kl(*moments[0], *moments[1]), expected, rtol=1e-9)
