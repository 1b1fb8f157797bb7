"""Segmentation of points on frozen features, and its adaptation to a target domain without source data.

All points of a batch are one packed array, one row per point, without padding; the network does not see frames. The
normalizations keep the moments of the features that they were trained on, which are the only trace of the source
domain.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, softmax

from embedcache.arrays import Array, Floats, Ints, blocks
from embedcache.errors import DataError, SettingError
from embedcache.train.batches import Batch
from pipelines.summit.metrics import IGNORED

RUN_KIND = f"{__name__}:PointNetworks"
"""Kind of the runs, which name it in their config."""
PARTS: Mapping[str, tuple[str, ...]] = {
    "heads": ("head", "mimic_head"),
    "linear": ("linear",),
    "norms": ("input_norm", "hidden_norm"),
}
"""Parts of a `PointNetwork` that can be trained separately -> their submodules."""


_BLOCK = 65_536  # points per block outside training
_NUM_HALVINGS = 20


class PointOutput(NamedTuple):
    """Outputs of a `PointNetwork` for N points.

    Args:
        hidden_NP: features under both heads, the penultimate features.
        logits_NC: logits of the main head, which predicts.
        mimic_NC: logits of the second head, which imitates the other modality in adaptation.
    """

    hidden_NP: Tensor
    logits_NC: Tensor
    mimic_NC: Tensor


class PointNetwork(nn.Module):
    """Batch normalization, a linear layer, batch normalization, ReLU, and two linear heads.

    The two heads follow xMUDA (CVPR 2020), on which SUMMIT builds: one predicts, the other imitates the other modality.

    Args:
        width: width of the features.
        num_classes: number of classes.
        hidden: width of the penultimate features.
    """

    def __init__(self, width: int, num_classes: int, *, hidden: int = 64) -> None:
        super().__init__()
        self.width = width
        self.num_classes = num_classes
        self.hidden = hidden

        self.input_norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, hidden)
        self.hidden_norm = nn.BatchNorm1d(hidden)
        self.head = nn.Linear(hidden, num_classes)
        self.mimic_head = nn.Linear(hidden, num_classes)

    def forward(self, features_ND: Tensor) -> PointOutput:
        """Compute the logits of both heads for N points: (N, D) any float."""
        hidden_NP = torch.relu(self.hidden_norm(self.linear(self.input_norm(features_ND.float()))))
        return PointOutput(hidden_NP, self.head(hidden_NP), self.mimic_head(hidden_NP))

    def copy_head(self) -> None:
        """Start the second head as a copy of the main head, as adaptation does."""
        self.mimic_head.load_state_dict(self.head.state_dict())


class PointNetworks(nn.Module):
    """A `PointNetwork` per modality.

    Args:
        widths: modality -> width of its features.
        num_classes: number of classes.
        hidden: width of the penultimate features.
    """

    def __init__(self, *, widths: Mapping[str, int], num_classes: int, hidden: int = 64) -> None:
        super().__init__()
        networks = {name: PointNetwork(width, num_classes, hidden=hidden) for name, width in widths.items()}
        self.networks = nn.ModuleDict(networks)

    def __getitem__(self, modality: str) -> PointNetwork:
        network = self.networks[modality]
        assert isinstance(network, PointNetwork)
        return network

    def parts(self) -> dict[str, list[str]]:
        """Return the parts that can be loaded or trained separately: each modality and its submodules.

        For the modality `image` these are `image`, `image-heads`, `image-linear` and `image-norms`.
        """
        parts: dict[str, list[str]] = {}
        for name in self.networks:
            parts[name] = [f"networks.{name}"]
            for part, modules in PARTS.items():
                parts[f"{name}-{part}"] = [f"networks.{name}.{module}" for module in modules]
        return parts

    def output_shapes(self, shapes: Sequence[tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
        """Return the outputs that `embedcache derive --run` offers: `image-prob` and `image-hidden` per modality."""
        outputs: dict[str, tuple[int, ...]] = {}
        for name, shape in zip(self.networks, shapes, strict=True):
            outputs[f"{name}-prob"] = (*shape[:-1], self[name].num_classes)
            outputs[f"{name}-hidden"] = (*shape[:-1], self[name].hidden)
        return outputs

    def compute_outputs(self, inputs: Sequence[Any], names: Sequence[str]) -> Mapping[str, Any]:
        """Compute class probabilities or penultimate features of all points of B items.

        Args:
            inputs: one `embedcache.derive.rules.Block` per modality.
            names: outputs.
        """
        outputs = {}
        for name in names:
            modality, _, output = name.rpartition("-")
            block = inputs[list(self.networks).index(modality)]
            prediction = predict_points(self[modality], block.rows())
            outputs[name] = block.with_rows(prediction.prob_NC if output == "prob" else prediction.hidden_NP)
        return outputs


class PointObjective(nn.Module):
    """Loss of one modality with labels, or of two modalities that are adapted with pseudo-labels.

    For each trained modality m, and the other modality o if there is one:

        CE(head_m, label) + consistency · KL(softmax(head_o) ‖ softmax(mimic_head_m))

    No gradient flows into head_o from the second term. A modality without class weights is not trained: it stays the
    same to the bit, and teaches the other one. "SUMMIT: Source-Free Adaptation of Uni-Modal Models to Multi-Modal
    Targets" (ICCV 2023), without back-propagation into the encoders.

    Args:
        network: the networks, of one or two modalities.
        weights: trained modality -> weight of each class, (C,).
        consistency: weight of the second term.
    """

    def __init__(self, network: PointNetworks, weights: Mapping[str, Floats], *, consistency: float = 0.0) -> None:
        super().__init__()
        if not weights or set(weights) - set(network.networks) or len(network.networks) > 2:
            raise SettingError(
                f"expected one or two modalities and those to train, got {list(network.networks)} and {list(weights)}"
            )

        self.network = network
        self.trained = tuple(name for name in network.networks if name in weights)
        self.consistency = consistency

        if len(network.networks) == 1:
            # There is nothing to imitate, and `DistributedDataParallel` rejects parameters without a gradient.
            (name,) = network.networks
            network[name].mimic_head.requires_grad_(requires_grad=False)

        for name, weights_C in weights.items():
            self.register_buffer(f"weights_{name}", torch.from_numpy(weights_C))

    def loss(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch: points of each modality, and labels (or -1) of each trained modality."""
        outputs: dict[str, PointOutput] = {}
        for name in self.network.networks:
            with torch.set_grad_enabled(torch.is_grad_enabled() and name in self.trained):
                outputs[name] = self.network[name](batch.inputs[name].values)

        losses = []
        for name in self.trained:
            weights_C: Tensor = getattr(self, f"weights_{name}")
            losses.append(labeled_loss(outputs[name].logits_NC, batch.targets[name], weights_C))
            for other, output in outputs.items():
                if other != name:
                    losses.append(self.consistency * imitation_loss(outputs[name], output))
        return torch.stack(losses).sum()


def class_weights(labels_N: Ints, num_classes: int) -> Floats:
    """Compute weights of a loss: log(5 n / n_c), divided by the smallest, (C,) float32.

    A class without a label gets the weight of a class with a single label. Frequent classes count least. The 5 keeps
    the weight of a class that has all labels above 0.

    Raises:
        DataError: there are no labels.
    """
    count_C = np.bincount(labels_N[labels_N != IGNORED], minlength=num_classes)
    if not count_C.sum():
        raise DataError("class weights: expected at least one labeled point, got none")
    weights_C = np.log(5 * count_C.sum() / np.maximum(count_C, 1))
    relative_C: Floats = (weights_C / weights_C.min()).astype(np.float32)
    return relative_C


def labeled_loss(logits_NC: Tensor, labels_N: Tensor, weights_C: Tensor) -> Tensor:
    """Compute the weighted mean cross-entropy over points with a label (0 if there are none)."""
    losses_N = cross_entropy(logits_NC, labels_N, weight=weights_C, ignore_index=IGNORED, reduction="none")
    total = weights_C[labels_N[labels_N != IGNORED]].sum()
    return losses_N.sum() / total.clamp(min=torch.finfo(total.dtype).tiny)


def imitation_loss(output: PointOutput, other: PointOutput) -> Tensor:
    """Compute the mean over points of KL(other's main head ‖ this second head), with no gradient for the other."""
    target_NC = softmax(other.logits_NC.detach(), dim=1)
    log_target_NC = log_softmax(other.logits_NC.detach(), dim=1)
    return (target_NC * (log_target_NC - log_softmax(output.mimic_NC, dim=1))).sum(dim=1).mean()


class PointPrediction(NamedTuple):
    """Class probabilities and penultimate features of N points, float32."""

    prob_NC: Floats
    hidden_NP: Floats


@torch.no_grad()
def predict_points(network: PointNetwork, features_ND: Floats) -> PointPrediction:
    """Compute the class probabilities and the penultimate features of N points, in evaluation mode.

    Blocks are computed on the network's device.
    """
    network.eval()
    logits = [torch.empty(0, network.num_classes)]
    hidden = [torch.empty(0, network.hidden)]
    for part in _run_blocks(network, features_ND):
        logits.append(part.logits_NC.cpu())
        hidden.append(part.hidden_NP.cpu())
    return PointPrediction(softmax(torch.cat(logits), dim=1).numpy(), torch.cat(hidden).numpy())


def _run_blocks(network: PointNetwork, features_ND: Floats) -> Iterator[PointOutput]:
    for rows in blocks(len(features_ND), _BLOCK):
        yield network(torch.from_numpy(features_ND[rows]).to(network.linear.weight.device))


@torch.no_grad()
def scale_entropy(network: PointNetwork, features_ND: Floats, entropy_nats: float) -> float:
    """Divide the main head's logits by a temperature, so that the predictions have the given mean entropy.

    Training on pseudo-labels makes a network more certain than before, so that it would outvote the other modality in a
    sum of probabilities. The temperature is folded into the head.

    Returns:
        The temperature, from 0.1 to 10.
    """
    network.eval()
    logits_NC = torch.cat([part.logits_NC.cpu() for part in _run_blocks(network, features_ND)])

    # A binary search, as the entropy grows with the temperature.
    low = -1.0
    high = 1.0
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        log_NC = log_softmax(logits_NC / 10**middle, dim=1)
        is_below = -(log_NC.exp() * log_NC).sum(dim=1).mean().item() < entropy_nats
        if is_below:
            low = middle
        else:
            high = middle

    temperature = 10 ** ((low + high) / 2)
    for parameter in network.head.parameters():
        parameter.div_(temperature)
    return float(temperature)


def norm_gaps(network: PointNetwork, features_ND: Floats) -> list[float]:
    """Compute the gap between source and target at each normalization: stored moments against the target's moments.

    The network does not change: the inputs of the second normalization are computed with the stored moments of the
    first one.

    Returns:
        The `domain_gap` at `input_norm` and at `hidden_norm`.
    """
    gaps = []
    for norm, moments in (
        (network.input_norm, _moments(features_ND)),
        (network.hidden_norm, _moments(_hidden_inputs(network, features_ND))),
    ):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        stored = norm.running_mean.cpu().numpy(), norm.running_var.cpu().numpy()
        gaps.append(domain_gap(*stored, *moments))
    return gaps


def domain_gap(mean_D: Array, variance_D: Array, other_mean_D: Array, other_variance_D: Array) -> float:
    """Compute the gap between two domains: the median over channels of the symmetric divergence of their moments.

    A trained batch normalization keeps the moments of the source, so no source data are needed. The median is used
    because a few nearly constant channels would dominate a mean.
    """
    return float(np.median(symmetric_kl(mean_D, variance_D, other_mean_D, other_variance_D)))


def symmetric_kl(mean_D: Array, variance_D: Array, other_mean_D: Array, other_variance_D: Array) -> Array:
    """Compute the symmetric Kullback-Leibler divergence of two normal distributions per channel: (D,) float64.

    KL(p, q) + KL(q, p) = (v + d²) / 2w + (w + d²) / 2v - 1, with variances v and w and the difference d of the means.
    The arguments are variances, not standard deviations. A constant channel is infinitely far from a varying one, and
    at distance 0 from an equal constant.
    """
    values = [np.asarray(value, np.float64) for value in (mean_D, variance_D, other_mean_D, other_variance_D)]
    mean_D, variance_D, other_mean_D, other_variance_D = values

    square_D = (mean_D - other_mean_D) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        forward_D = (variance_D + square_D) / other_variance_D
        backward_D = (other_variance_D + square_D) / variance_D
        divergence_D = (forward_D + backward_D) / 2 - 1

    # Equal constants would be 0 / 0.
    both_constant_D = (variance_D == 0) & (other_variance_D == 0)
    divergence_D = np.where(both_constant_D, np.where(square_D > 0, np.inf, 0.0), divergence_D)
    return np.maximum(divergence_D, 0.0)


def adapt_norms(network: PointNetwork, features_ND: Floats) -> None:
    """Replace the stored moments of both normalizations by the target's. This needs no labels and no gradients.

    The second normalization gets the moments of its inputs after the first one was adapted.

    Args:
        network: the network, which changes in place.
        features_ND: (N, D) features of the target.
    """
    _set_moments(network.input_norm, _moments(features_ND))
    _set_moments(network.hidden_norm, _moments(_hidden_inputs(network, features_ND)))


def _moments(rows_ND: Floats) -> tuple[Array, Array]:
    """Compute mean and variance of each channel, two (D,) float64."""
    rows_ND = rows_ND.astype(np.float32).astype(np.float64)
    return rows_ND.mean(axis=0), rows_ND.var(axis=0)


@torch.no_grad()
def _hidden_inputs(network: PointNetwork, features_ND: Floats) -> Floats:
    """Compute the inputs of the second normalization, with the stored moments of the first: (N, P) float32."""
    network.eval()
    device = network.linear.weight.device
    parts = []
    for rows in blocks(len(features_ND), _BLOCK):
        block_ND = torch.from_numpy(features_ND[rows].astype(np.float32)).to(device)
        parts.append(network.linear(network.input_norm(block_ND)).cpu().numpy())
    return np.concatenate(parts)


def _set_moments(norm: nn.BatchNorm1d, moments: tuple[Array, Array]) -> None:
    device = norm.weight.device
    mean_D, variance_D = moments
    norm.running_mean = torch.from_numpy(mean_D.astype(np.float32)).to(device)
    norm.running_var = torch.from_numpy(variance_D.astype(np.float32)).to(device)
