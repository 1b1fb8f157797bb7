"""Segmentation of points on frozen features, and its adaptation to a target domain without source data.

All points of a batch are one packed array, one row per point, without padding; frames play no role in the network.
The normalizations keep the moments of the features they were trained on: the only trace of the source domain.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, softmax

from embedcache.arrays import Floats, blocks
from embedcache.errors import SettingError
from embedcache.metrics.divergence import domain_gap
from embedcache.metrics.segmentation import IGNORED

PARTS = ("heads", "norms", "linear")
"""Parts of a `PointNetwork` that adaptation may train."""

_BLOCK = 65_536  # points that are read at once outside training


class PointOutput(NamedTuple):
    """Outputs of a `PointNetwork` for N points.

    Args:
        hidden_NP: features under both heads, the penultimate features.
        logits_NC: of the main head, which predicts.
        mimic_NC: of the second head, which imitates the other modality in adaptation.
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
        self.width, self.num_classes, self.hidden = width, num_classes, hidden
        self.input_norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, hidden)
        self.hidden_norm = nn.BatchNorm1d(hidden)
        self.head = nn.Linear(hidden, num_classes)
        self.mimic_head = nn.Linear(hidden, num_classes)

    def forward(self, features_ND: Tensor) -> PointOutput:
        """Compute both heads' logits of N points: (N, D) any float."""
        hidden_NP = torch.relu(self.hidden_norm(self.linear(self.input_norm(features_ND.float()))))
        return PointOutput(hidden_NP, self.head(hidden_NP), self.mimic_head(hidden_NP))

    def copy_head(self) -> None:
        """Start the second head as a copy of the main head, as adaptation does."""
        self.mimic_head.load_state_dict(self.head.state_dict())

    def parts(self) -> dict[str, list[nn.Module]]:
        """Return the modules of each part that adaptation may train."""
        return {
            "heads": [self.head, self.mimic_head],
            "norms": [self.input_norm, self.hidden_norm],
            "linear": [self.linear],
        }


def set_trainable(network: PointNetwork, parts: Collection[str]) -> list[nn.Parameter]:
    """Let only some parts of a network be trained; return their parameters.

    Raises:
        SettingError: there is no such part.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise SettingError(f"trainable parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    network.requires_grad_(requires_grad=False)
    chosen = [module for name, modules in network.parts().items() if name in parts for module in modules]
    for module in chosen:
        module.requires_grad_(requires_grad=True)
    return [parameter for module in chosen for parameter in module.parameters()]


class SourceObjective(nn.Module):
    """Cross-entropy of the main head with class weights: how a source model is trained on its own modality.

    Args:
        network: the network that is trained.
        weights_C: weight of each class.
    """

    weights_C: Tensor

    def __init__(self, network: PointNetwork, weights_C: Floats) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("weights_C", torch.from_numpy(weights_C))

    def forward(self, features_ND: Tensor, labels_N: Tensor) -> Tensor:
        """Compute the loss of N points; points with the label -1 do not count."""
        return labeled_loss(self.network(features_ND).logits_NC, labels_N, self.weights_C)


class AdaptationObjective(nn.Module):
    """Loss of adaptation: cross-entropy with pseudo-labels, and consistency between the modalities.

    For each adapted modality m with the other modality o:

        CE(head_m, pseudo-label) + consistency · KL(softmax(head_o) ‖ softmax(mimic_head_m))

    No gradient flows into head_o from the second term. A modality that is not adapted stays as it is, to the bit, and
    teaches the other one. SUMMIT (ICCV 2023), without the back-propagation into the encoders.

    Args:
        networks: modality -> network, two of them.
        weights: adapted modality -> class weights, (C,); the other modality, if missing here, is not adapted.
        consistency: weight of the second term.
    """

    def __init__(
        self, networks: Mapping[str, PointNetwork], weights: Mapping[str, Floats], *, consistency: float
    ) -> None:
        super().__init__()
        if len(networks) != 2 or not weights or set(weights) - set(networks):
            raise SettingError(f"expected two modalities and those to adapt, got {list(networks)} and {list(weights)}")
        self.networks = nn.ModuleDict(networks)
        self.adapted = tuple(name for name in networks if name in weights)
        self.consistency = consistency
        for name, weights_C in weights.items():
            self.register_buffer(f"weights_{name}", torch.from_numpy(weights_C))
        self.train()

    def train(self, mode: bool = True) -> "AdaptationObjective":  # noqa: FBT001, FBT002  # the signature of torch
        """Switch the adapted networks to training; the other one stays in evaluation mode."""
        super().train(mode)
        for name, network in self.networks.items():
            network.train(mode and name in self.adapted)
        return self

    def forward(self, features: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of N points: (N, D) features of each modality, (N,) pseudo-labels of each adapted one."""
        outputs: dict[str, PointOutput] = {}
        for name, network in self.networks.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and name in self.adapted):
                outputs[name] = network(features[name])
        losses = []
        for name in self.adapted:
            (other,) = set(outputs) - {name}
            supervised = labeled_loss(outputs[name].logits_NC, labels[name], getattr(self, f"weights_{name}"))
            losses.append(supervised + self.consistency * imitation_loss(outputs[name], outputs[other]))
        return torch.stack(losses).sum()


def labeled_loss(logits_NC: Tensor, labels_N: Tensor, weights_C: Tensor) -> Tensor:
    """Compute the weighted mean cross-entropy over points with a label; 0 if there is none."""
    losses_N = cross_entropy(logits_NC, labels_N, weight=weights_C, ignore_index=IGNORED, reduction="none")
    total = weights_C[labels_N[labels_N != IGNORED]].sum()
    return losses_N.sum() / total.clamp(min=torch.finfo(total.dtype).tiny)


def imitation_loss(output: PointOutput, other: PointOutput) -> Tensor:
    """Compute KL(other's main head ‖ own second head), mean over points; no gradient flows into the other modality."""
    target_NC = softmax(other.logits_NC.detach(), dim=1)
    log_target_NC = log_softmax(other.logits_NC.detach(), dim=1)
    return (target_NC * (log_target_NC - log_softmax(output.mimic_NC, dim=1))).sum(dim=1).mean()


class PointPrediction(NamedTuple):
    """What a network says about N points: class probabilities and penultimate features, float32."""

    prob_NC: Floats
    hidden_NP: Floats


@torch.no_grad()
def predict_points(network: PointNetwork, features_ND: Floats) -> PointPrediction:
    """Compute the class probabilities and the penultimate features of N points, in blocks, in evaluation mode."""
    network.eval()
    parts = [network(torch.from_numpy(features_ND[rows])) for rows in blocks(len(features_ND), _BLOCK)]
    logits_NC = torch.cat([part.logits_NC for part in parts])
    return PointPrediction(softmax(logits_NC, dim=1).numpy(), torch.cat([part.hidden_NP for part in parts]).numpy())


class Moments:
    """Mean and variance per channel of rows that are added block by block, in float64.

    Blocks are merged by the sums of squared differences from their own means, which loses no digits if the mean is
    large.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.mean: np.ndarray = np.zeros(0)
        self._squares: np.ndarray = np.zeros(0)

    def add(self, rows_ND: Floats) -> "Moments":
        """Add rows, (N, D); return this object."""
        rows = rows_ND.astype(np.float64)
        if not len(rows):
            return self
        mean_D = rows.mean(axis=0)
        squares_D = ((rows - mean_D) ** 2).sum(axis=0)
        if not self.num_rows:
            self.num_rows, self.mean, self._squares = len(rows), mean_D, squares_D
            return self
        total = self.num_rows + len(rows)
        shift_D = mean_D - self.mean
        self._squares = self._squares + squares_D + shift_D**2 * (self.num_rows * len(rows) / total)
        self.mean = self.mean + shift_D * (len(rows) / total)
        self.num_rows = total
        return self

    @property
    def variance(self) -> np.ndarray:
        """Variance of each channel: (D,) float64, over all rows, not the unbiased estimate."""
        return self._squares / self.num_rows


def norm_gaps(network: PointNetwork, features_ND: Floats) -> list[float]:
    """Compute the gap between source and target at each normalization: stored moments against those of the target.

    The network stays as it is: what a deeper normalization sees is computed with the stored moments of the first.
    """
    gaps = []
    for norm, moments in _norm_inputs(network, features_ND, adapt=False):
        gaps.append(domain_gap(_array(norm.running_mean), _array(norm.running_var), moments.mean, moments.variance))
    return gaps


def adapt_norms(network: PointNetwork, features_ND: Floats) -> None:
    """Replace the stored moments of the normalizations by those of the target; needs no labels and no gradients."""
    for _ in _norm_inputs(network, features_ND, adapt=True):
        pass


@torch.no_grad()
def _norm_inputs(
    network: PointNetwork, features_ND: Floats, *, adapt: bool
) -> Iterable[tuple[nn.BatchNorm1d, Moments]]:
    """Iterate over the normalizations, with the moments of what each sees, storing them on the way if `adapt`."""
    network.eval()

    def hidden(block: Floats) -> Floats:
        with torch.no_grad():
            values: Floats = network.linear(network.input_norm(torch.from_numpy(block).float())).numpy()
        return values

    for norm, transform in ((network.input_norm, None), (network.hidden_norm, hidden)):
        moments = Moments()
        for rows in blocks(len(features_ND), _BLOCK):
            block = features_ND[rows].astype(np.float32)
            moments.add(block if transform is None else transform(block))
        if adapt:
            norm.running_mean = torch.from_numpy(moments.mean.astype(np.float32))
            norm.running_var = torch.from_numpy(moments.variance.astype(np.float32))
        yield norm, moments


def _array(values: Tensor | None) -> Floats:
    assert values is not None  # a batch normalization without stored moments is never made here
    array: Floats = values.numpy()
    return array
