"""Segmentation of points as a task: source training on labels, and adaptation on pseudo-labels of the target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from embedcache.arrays import Floats, Ints, check_finite
from embedcache.errors import DataError
from embedcache.projectors.modules import ModuleConfig, ModuleInput, load_module, save_module
from embedcache.settings import replace_fields
from embedcache.train.batches import Loader, RowBatches, to_device
from embedcache.train.distributed import own_slice
from embedcache.train.modules import ModuleReport, train_task
from embedcache.train.settings import FitSettings
from pipelines.summit.metrics import count_frames, mean_iou
from pipelines.summit.networks import (
    RUN_KIND,
    PointBatch,
    PointNetworks,
    PointObjective,
    adapt_norms,
    class_weights,
    predict_points,
    scale_entropy,
)

_BATCH_SIZE = 2048


@dataclass(frozen=True, kw_only=True)
class PointData:
    """Points of several frames, one after another, in memory.

    Args:
        features: modality -> (N, D) float16 or float32.
        labels_N: (N,) int, true classes; -1 where unknown.
        lengths_G: (G,) int, number of points of each frame.
    """

    features: Mapping[str, Floats]
    labels_N: Ints
    lengths_G: Ints

    def frames(self, first: int, last: int) -> "PointData":
        """Return some consecutive frames, from `first` to before `last`."""
        ends = np.concatenate([[0], np.cumsum(self.lengths_G)])
        rows = slice(int(ends[first]), int(ends[last]))
        features = {name: values[rows] for name, values in self.features.items()}
        return PointData(features=features, labels_N=self.labels_N[rows], lengths_G=self.lengths_G[first:last])


class LoadedPoints(NamedTuple):
    """This process's part of a batch on the device, its rows, and the number of points of all processes."""

    batch: PointBatch
    rows: Ints
    num_points: int


class _Objective(PointObjective):
    """The loss of a loaded batch."""

    def forward(self, batch: LoadedPoints) -> Tensor:  # type: ignore[override]  # what the loop passes
        return super().forward(batch.batch)


class SegmentationTask:
    """A `Task`: networks on points with labels, or with pseudo-labels per modality.

    With validation frames the epoch with the best mean IoU is kept. Without, as in a target without labels, the last
    one is: nothing there can be compared.

    Args:
        module: the networks.
        data: training points.
        labels: trained modality -> (N,) labels or pseudo-labels.
        settings: batch size and seed; of the machine, the device.
        consistency: weight of the imitation of the other modality; above 0, training starts with equal heads.
        validation: labeled frames.
    """

    unit = "points"

    def __init__(
        self,
        module: PointNetworks,
        data: PointData,
        labels: Mapping[str, Ints],
        settings: FitSettings,
        *,
        device: str = "cpu",
        consistency: float = 0.0,
        validation: PointData | None = None,
    ) -> None:
        self.module = module
        self._data, self._labels, self._device = data, labels, device
        self._consistency, self._validation = consistency, validation
        batch_size = settings.optimizer.batch_size or _BATCH_SIZE
        rows = np.arange(len(data.labels_N))
        self.loader = Loader(RowBatches(rows, batch_size=batch_size, seed=settings.seed), self._load)
        self.forward_flops = 2.0 * batch_size * sum(value.numel() for value in module.parameters())

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """Each modality, and its heads, linear layer and norms."""
        return self.module.parts()

    @cached_property
    def objective(self) -> _Objective:
        """The loss; made after the weights were loaded, so that the second heads can start as copies."""
        if self._consistency:
            for name in self._labels:
                self.module[name].copy_head()
        num_classes = next(self.module[name].num_classes for name in self._labels)
        weights = {name: class_weights(labels_N, num_classes) for name, labels_N in self._labels.items()}
        return _Objective(self.module, weights, consistency=self._consistency)

    def _load(self, rows: Ints) -> LoadedPoints:
        own = rows[own_slice(len(rows))]
        features = {
            name: to_device(np.asarray(self._data.features[name][own], np.float32), self._device)
            for name in self.module.networks
        }
        labels = {name: to_device(labels_N[own], self._device) for name, labels_N in self._labels.items()}
        return LoadedPoints(PointBatch(features, labels), own, len(rows))

    def count(self, batch: LoadedPoints) -> int:
        """Return the number of points of a batch."""
        return batch.num_points

    def measure(self) -> dict[str, float]:
        """Compute the mean IoU on the validation frames; without any, the number of batches that the norms saw."""
        if self._validation is None:
            name = next(iter(self._labels))
            return {"steps": float(self.module.state_dict()[f"networks.{name}.input_norm.num_batches_tracked"])}
        return {f"{name} mIoU": mean_iou_of(self.module, name, self._validation) for name in self._labels}

    def score(self, measures: Mapping[str, float]) -> float:
        """Return the mean over modalities; NaN without validation frames, so that the last epoch is kept."""
        return float("nan") if self._validation is None else float(np.mean(list(measures.values())))

    def watch(self) -> dict[str, float]:
        """Return nothing more to log."""
        return {}

    def explain(self, batch: LoadedPoints, *, loss: float, step: int) -> DataError:
        """Return an error that names the feature, or else the points, of a bad loss."""
        for name, values_ND in batch.batch.features.items():
            check_finite(values_ND.cpu().numpy(), f"at step {step}, the feature of the points' {name}", rows=batch.rows)
        return DataError(
            f"the loss is {loss} at step {step}, in the batch of the points {batch.rows[:5].tolist()} …; lower the "
            "learning rate"
        )


def mean_iou_of(module: PointNetworks, modality: str, data: PointData) -> float:
    """Compute the mean IoU of one modality's predictions over all frames together."""
    network = module[modality]
    prob_NC = predict_points(network, np.asarray(data.features[modality], np.float32)).prob_NC
    counts = count_frames(data.labels_N, prob_NC.argmax(axis=1), data.lengths_G, network.num_classes)
    return mean_iou(counts.sum(axis=0))


@dataclass(frozen=True, kw_only=True)
class SegmentationInputs:
    """What a segmentation run is trained on, for its config.

    Args:
        sides: modality -> feature.
        data_digest: digest of what decides the points and their labels beside the features.
    """

    sides: Mapping[str, ModuleInput]
    data_digest: str


def train_source(
    data: PointData,
    validation: PointData,
    run_path: Path,
    inputs: SegmentationInputs,
    settings: FitSettings,
    *,
    num_classes: int,
) -> ModuleReport:
    """Train a network of one modality on labeled points of its own domain, into a run folder."""
    config = _config(inputs, num_classes=num_classes)
    (modality,) = inputs.sides

    def make_task(device: str) -> SegmentationTask:
        module = PointNetworks(**config.arguments)
        labels = {modality: data.labels_N}
        return SegmentationTask(module, data, labels, settings, device=device, validation=validation)

    return train_task(make_task, run_path, config, settings)


def train_adaptation(
    data: PointData,
    labels: Mapping[str, Ints],
    run_path: Path,
    inputs: SegmentationInputs,
    settings: FitSettings,
    *,
    num_classes: int,
    consistency: float = 0.1,
) -> ModuleReport:
    """Adapt networks to a target on pseudo-labels, into a run folder.

    `settings.parts.init_from` names the source runs, `image=RUN`; only modalities in `labels` change. The true labels
    in `data` are not read.
    """
    config = _config(inputs, num_classes=num_classes, consistency=consistency)

    def make_task(device: str) -> SegmentationTask:
        module = PointNetworks(**config.arguments)
        return SegmentationTask(module, data, labels, settings, device=device, consistency=consistency)

    return train_task(make_task, run_path, config, settings)


def save_adapted_norms(
    run_paths: Mapping[str, Path], features: Mapping[str, Floats], adapted: Sequence[str], run_path: Path
) -> PointNetworks:
    """Join source runs, replace the norm statistics of some modalities by those of the target, and save a run.

    It needs no labels and no gradients; training can start from it.

    Args:
        run_paths: modality -> source run.
        features: modality -> (N, D) features of the target.
        adapted: modalities whose statistics are replaced.
        run_path: folder of the new run.
    """
    loaded = {name: load_module(path) for name, path in run_paths.items()}
    configs = {name: config for name, (_, config) in loaded.items()}
    arguments = [dict(config.arguments) for config in configs.values()]
    widths = {name: width for values in arguments for name, width in values["widths"].items()}
    config = ModuleConfig(
        kind=RUN_KIND,
        arguments={**arguments[0], "widths": widths},
        sides={name: config.sides[name] for name, config in configs.items()},
        training={"norm statistics": list(adapted)},
        init_runs={name: config.weights_digest for name, config in configs.items()},
        index_digest="+".join(dict.fromkeys(config.index_digest for config in configs.values())),
    )
    module = PointNetworks(**config.arguments)
    for name, (source, _) in loaded.items():
        assert isinstance(source, PointNetworks)
        module[name].load_state_dict(source[name].state_dict())
    for name in adapted:
        adapt_norms(module[name], features[name])
    run_path.mkdir(parents=True, exist_ok=True)
    save_module(run_path, module.eval(), config)
    return module


def save_matched_entropy(
    run_path: Path, features: Mapping[str, Floats], entropies: Mapping[str, float], matched_path: Path
) -> PointNetworks:
    """Scale the predictions of a run to given mean entropies on the target, and save the result as another run.

    Args:
        run_path: the run.
        features: modality -> (N, D) features of the target.
        entropies: modality to scale -> mean entropy in nats, see `pipelines.summit.networks.scale_entropy`.
        matched_path: folder of the new run.
    """
    module, config = load_module(run_path)
    assert isinstance(module, PointNetworks)
    temperatures = {
        name: scale_entropy(module[name], np.asarray(features[name], np.float32), nats)
        for name, nats in entropies.items()
    }
    training = {**config.training, "entropy in nats": dict(entropies), "temperature": temperatures}
    matched_path.mkdir(parents=True, exist_ok=True)
    save_module(matched_path, module.eval(), replace_fields(config, training=training))
    return module


def _config(inputs: SegmentationInputs, *, num_classes: int, **training: float) -> ModuleConfig:
    return ModuleConfig(
        kind=RUN_KIND,
        arguments={
            "widths": {name: side.width for name, side in inputs.sides.items()},
            "num_classes": num_classes,
        },
        sides=inputs.sides,
        training={**training, "labels": inputs.data_digest},
    )
