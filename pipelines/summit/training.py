"""Segmentation of points as a task: source training on labels, and adaptation on pseudo-labels of the target."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from embedcache.arrays import Floats, Ints
from embedcache.runs import Run, RunInfo, RunInput
from embedcache.train.batches import Batch, BatchInput, RowBatches, to_device
from embedcache.train.distributed import own_slice
from embedcache.train.settings import FitSettings
from embedcache.train.train import TrainReport, train_task
from pipelines.summit.metrics import count_frames, mean_iou
from pipelines.summit.networks import (
    RUN_KIND,
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
        labels_N: (N,) int, true classes; -1 if unknown.
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


class SegmentationTask:
    """A `Task`: networks on points with labels, or with pseudo-labels per modality.

    With validation frames the epoch with the best mean IoU is kept. An unlabeled target has none, so the last epoch is
    kept: there is nothing to compare.

    Args:
        network: the networks.
        data: training points.
        labels: trained modality -> (N,) labels or pseudo-labels.
        settings: batch size and seed.
        consistency: weight of the imitation of the other modality; if above 0, training starts with equal heads.
        validation: labeled frames.
    """

    def __init__(
        self,
        network: PointNetworks,
        data: PointData,
        labels: Mapping[str, Ints],
        settings: FitSettings,
        *,
        device: str = "cpu",
        consistency: float = 0.0,
        validation: PointData | None = None,
    ) -> None:
        self.network = network
        self._data = data
        self._labels = labels
        self._device = device
        self._consistency = consistency
        self._validation = validation

        batch_size = settings.optimizer.batch_size or _BATCH_SIZE
        self._plan = RowBatches(np.arange(len(data.labels_N)), batch_size=batch_size, seed=settings.seed)
        self.num_steps = self._plan.num_steps

    @cached_property
    def module(self) -> PointObjective:
        """The networks with their loss, made after the weights were loaded so that the second heads are copies."""
        if self._consistency:
            for name in self._labels:
                self.network[name].copy_head()
        num_classes = next(self.network[name].num_classes for name in self._labels)
        weights = {name: class_weights(labels_N, num_classes) for name, labels_N in self._labels.items()}
        return PointObjective(self.network, weights, consistency=self._consistency)

    def batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, starting at a step."""
        for rows in self._plan.epoch(epoch, first_step=first_step):
            samples = rows[own_slice(len(rows))]

            inputs = {}
            for name in self.network.networks:
                values = np.asarray(self._data.features[name][samples], np.float32)
                inputs[name] = BatchInput(to_device(values, self._device), rows=samples)

            targets = {name: to_device(labels_N[samples], self._device) for name, labels_N in self._labels.items()}
            yield Batch(samples=samples, num_samples=len(rows), inputs=inputs, targets=targets)

    def measure(self) -> dict[str, float]:
        """Compute the mean IoU on the validation frames; the score is their mean over modalities.

        Without validation frames, count the batches that the norms saw; the last epoch is kept.
        """
        if self._validation is None:
            name = next(iter(self._labels))
            steps = float(self.network.state_dict()[f"networks.{name}.input_norm.num_batches_tracked"])
            return {"steps": steps, "score": float("nan")}
        measures = {f"{name} mIoU": mean_iou_of(self.network, name, self._validation) for name in self._labels}
        return {**measures, "score": float(np.mean(list(measures.values())))}


def mean_iou_of(module: PointNetworks, modality: str, data: PointData) -> float:
    """Compute the mean IoU of one modality's predictions over all frames together."""
    network = module[modality]
    prob_NC = predict_points(network, np.asarray(data.features[modality], np.float32)).prob_NC
    counts = count_frames(data.labels_N, prob_NC.argmax(axis=1), data.lengths_G, network.num_classes)
    return mean_iou(counts.sum(axis=0))


@dataclass(frozen=True, kw_only=True)
class SegmentationInputs:
    """The training data of a segmentation run, for its config.

    Args:
        features: modality -> feature.
        data_digest: digest of everything besides the features that decides the points and their labels.
    """

    features: Mapping[str, RunInput]
    data_digest: str


def train_source(
    data: PointData,
    validation: PointData,
    run_path: Path,
    inputs: SegmentationInputs,
    settings: FitSettings,
    *,
    num_classes: int,
) -> TrainReport:
    """Train a network of one modality on labeled points of its domain, into a run folder."""
    info = _describe(inputs, num_classes=num_classes)
    (modality,) = inputs.features

    def make_task(device: str) -> SegmentationTask:
        network = PointNetworks(**info.arguments)
        labels = {modality: data.labels_N}
        return SegmentationTask(network, data, labels, settings, device=device, validation=validation)

    return train_task(make_task, run_path, info, settings)


def train_adaptation(
    data: PointData,
    labels: Mapping[str, Ints],
    run_path: Path,
    inputs: SegmentationInputs,
    settings: FitSettings,
    *,
    num_classes: int,
    consistency: float = 0.1,
) -> TrainReport:
    """Adapt networks to a target on pseudo-labels, into a run folder.

    `settings.parts.init_from` names the source runs, `image=RUN`. Only modalities in `labels` change. The true labels
    in `data` are not read.
    """
    info = _describe(inputs, num_classes=num_classes, consistency=consistency)

    def make_task(device: str) -> SegmentationTask:
        network = PointNetworks(**info.arguments)
        return SegmentationTask(network, data, labels, settings, device=device, consistency=consistency)

    return train_task(make_task, run_path, info, settings)


def save_adapted_norms(
    run_paths: Mapping[str, Path], features: Mapping[str, Floats], modalities: Sequence[str], run_path: Path
) -> PointNetworks:
    """Join source runs, replace the norm statistics of some modalities by the target's, and save a run.

    It needs no labels and no gradients; training can start from it.

    Args:
        run_paths: modality -> source run.
        features: modality -> (N, D) features of the target.
        modalities: modalities whose statistics are replaced.
        run_path: folder of the new run.
    """
    runs = {name: Run.open(path) for name, path in run_paths.items()}
    arguments = [run.info.arguments for run in runs.values()]

    # Each source run knows one modality; the joined run knows both.
    widths = {name: width for values in arguments for name, width in values["widths"].items()}

    info = RunInfo(
        kind=RUN_KIND,
        arguments={**arguments[0], "widths": widths},
        inputs={name: run.input(name) for name, run in runs.items()},
        settings={"norm statistics": list(modalities)},
        digests={f"init_from {name}": run.info.weights for name, run in runs.items()},
        index_digest="+".join(dict.fromkeys(run.info.index_digest for run in runs.values())),
    )

    network = PointNetworks(**info.arguments)
    for name, run in runs.items():
        source = run.module
        assert isinstance(source, PointNetworks)
        network[name].load_state_dict(source[name].state_dict())

    for name in modalities:
        adapt_norms(network[name], features[name])
    shutil.rmtree(run_path, ignore_errors=True)  # it may be a run of other sources
    Run.create(run_path, info).finish(network.eval(), {})
    return network


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
    run = Run.open(run_path)
    module = run.module
    assert isinstance(module, PointNetworks)

    temperatures = {
        name: scale_entropy(module[name], np.asarray(features[name], np.float32), nats)
        for name, nats in entropies.items()
    }

    settings = {**run.info.settings, "entropy in nats": dict(entropies), "temperature": temperatures}
    info = RunInfo(
        kind=RUN_KIND,
        arguments=run.info.arguments,
        inputs=run.info.inputs,
        settings=settings,
        digests={"scaled": run.info.weights},
        index_digest=run.info.index_digest,
    )
    shutil.rmtree(matched_path, ignore_errors=True)  # it may come from another run
    Run.create(matched_path, info).finish(module.eval(), {})
    return module


def _describe(inputs: SegmentationInputs, *, num_classes: int, **settings: float) -> RunInfo:
    return RunInfo(
        kind=RUN_KIND,
        arguments={
            "widths": {name: feature.width for name, feature in inputs.features.items()},
            "num_classes": num_classes,
        },
        inputs=inputs.features,
        settings={**settings, "labels": inputs.data_digest},
    )
