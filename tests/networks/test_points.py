import copy

import numpy as np
import pytest
import torch
from torch import nn

from embedcache.errors import SettingError
from embedcache.metrics.divergence import domain_gap
from embedcache.networks.points import (
    PARTS,
    AdaptationObjective,
    Moments,
    PointNetwork,
    SourceObjective,
    adapt_norms,
    imitation_loss,
    labeled_loss,
    norm_gaps,
    predict_points,
    set_trainable,
)

WIDTH, C = 6, 3


def make_points(seed: int, num_points: int = 300, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Features of classes around their means, all moved by a fraction of the way from class 0 to class 1; labels."""
    labels = np.random.default_rng(seed).integers(0, C, num_points)
    means = np.random.default_rng(99).normal(size=(C, WIDTH)) * 2
    noise = np.random.default_rng(seed + 1).normal(size=(num_points, WIDTH))
    return (means[labels] + noise + shift * (means[1] - means[0])).astype(np.float32), labels


def train(objective: nn.Module, *inputs: object, steps: int = 60) -> None:
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(*inputs).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def source() -> PointNetwork:
    """Network trained on unshifted points."""
    torch.manual_seed(0)
    network, (features, labels) = PointNetwork(WIDTH, C, hidden=16), make_points(0)
    train(SourceObjective(network, np.ones(C, np.float32)), torch.from_numpy(features), torch.from_numpy(labels))
    return network.eval()


def accuracy(network: PointNetwork, seed: int, shift: float = 0.0) -> float:
    features, labels = make_points(seed, shift=shift)
    return float((predict_points(network, features).prob_NC.argmax(axis=1) == labels).mean())


def test_source_training_learns(source: PointNetwork) -> None:
    assert accuracy(source, 5) > 0.9


def test_points_do_not_depend_on_each_other_in_evaluation(source: PointNetwork) -> None:
    features, _ = make_points(7)
    whole, part = predict_points(source, features), predict_points(source, features[40:50])
    assert part.prob_NC == pytest.approx(whole.prob_NC[40:50], abs=1e-6)
    assert part.hidden_NP == pytest.approx(whole.hidden_NP[40:50], abs=1e-5)


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
    networks = {"image": copy.deepcopy(source), "points": copy.deepcopy(source)}
    features = {name: torch.from_numpy(make_points(3, shift=0.5)[0]) for name in networks}
    unlabeled = {name: torch.full((300,), -1) for name in networks}
    weights = dict.fromkeys(networks, np.ones(C, np.float32))
    AdaptationObjective(networks, weights, consistency=1.0)(features, unlabeled).backward()
    for network in networks.values():
        assert network.head.weight.grad is None or not network.head.weight.grad.any()
        assert network.mimic_head.weight.grad is not None
        assert network.mimic_head.weight.grad.any()


def test_adaptation_leaves_the_other_modality_alone(source: PointNetwork) -> None:
    networks = {"image": copy.deepcopy(source), "points": copy.deepcopy(source)}
    features = {"image": torch.from_numpy(make_points(3, shift=1.0)[0]), "points": torch.from_numpy(make_points(3)[0])}
    labels = torch.from_numpy(make_points(3)[1])
    objective = AdaptationObjective(networks, {"image": np.ones(C, np.float32)}, consistency=0.1)
    train(objective, features, {"image": labels}, steps=20)
    for name, value in networks["points"].state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    before = source.state_dict()
    changed = {name for name, value in networks["image"].state_dict().items() if not torch.equal(value, before[name])}
    assert {"input_norm.running_mean", "head.weight", "mimic_head.weight"} <= changed
    assert accuracy(networks["image"], 8, shift=1.0) > accuracy(source, 8, shift=1.0) + 0.2


@pytest.mark.parametrize("part", PARTS)
def test_only_the_chosen_part_is_trained(source: PointNetwork, part: str) -> None:
    network = copy.deepcopy(source)
    set_trainable(network, [part])
    features, labels = make_points(4, shift=0.3)
    network.train()
    objective = SourceObjective(network, np.ones(C, np.float32))
    train(objective, torch.from_numpy(features), torch.from_numpy(labels), steps=3)
    before = source.state_dict()
    chosen = {f"{name}." for name, module in network.named_modules() if module in network.parts()[part]}
    for name, value in network.named_parameters():
        is_chosen = any(name.startswith(prefix) for prefix in chosen) and "mimic" not in name
        assert torch.equal(value, before[name]) != is_chosen, name


def test_unknown_parts_are_refused(source: PointNetwork) -> None:
    with pytest.raises(SettingError, match="expected some of heads, norms, linear, got head"):
        set_trainable(copy.deepcopy(source), ["head"])
    with pytest.raises(SettingError, match="two modalities"):
        AdaptationObjective({"image": source}, {}, consistency=0.1)


def test_moments_of_blocks_match_numpy() -> None:
    rows = (np.random.default_rng(0).normal(size=(1000, 4)) + 1e4).astype(np.float32)
    moments = Moments()
    for start, stop in ((0, 1), (1, 1), (1, 700), (700, 1000)):
        moments.add(rows[start:stop])
    assert moments.mean == pytest.approx(rows.mean(axis=0, dtype=np.float64), rel=1e-12)
    assert moments.variance == pytest.approx(rows.astype(np.float64).var(axis=0), rel=1e-9)


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
