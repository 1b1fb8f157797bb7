"""Train several tasks together, or tune a run by prompts, in all weights, or by a new adapter.

Each step uses a batch of one task, drawn by weight. "Uni-Perceiver: Pre-training Unified Architecture for Generic
Perception for Zero-shot and Few-shot Tasks" (CVPR 2022) on features of frozen encoders.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from embedcache.arrays import Floats, distinct
from embedcache.processes import autocast
from embedcache.progress import Progress
from embedcache.provenance import canonical_json, check_same, digest
from embedcache.runs import Run, RunInfo
from embedcache.train.batches import Batch
from embedcache.train.data import describe_input
from embedcache.train.settings import FitSettings, PartSettings
from embedcache.train.train import TrainReport, train_task
from pipelines.uniperceiver.candidates import cross_entropy_over
from pipelines.uniperceiver.examples import Media, TaskExamples, WordTable
from pipelines.uniperceiver.network import SharedNetwork
from pipelines.uniperceiver.tasks import ExampleTask, TaskTargets, read_inputs

KIND = "pipelines.uniperceiver.network:SharedNetwork"
"""Kind of the runs."""
_NUM_SAMPLED = 256  # items whose tokens standardize the channels of a feature
_SIZES = ("width", "num_layers", "num_heads", "feed_forward")


class DrawnTask(NamedTuple):
    """The task of a step, and the generator of its batch."""

    number: int
    rng: np.random.Generator


class TaskMixture:
    """Steps of an epoch, each with one task. Seed, epoch and step decide the task and its batch.

    Args:
        weights: frequency of each task.
        num_steps: steps per epoch.
        seed: seed of the run.
    """

    def __init__(self, weights: Sequence[float], *, num_steps: int, seed: int) -> None:
        self._chances = np.array(weights) / np.sum(weights)
        self._seed = seed
        self.num_steps = num_steps

    def epoch(self, number: int, *, first_step: int = 0) -> Iterator[DrawnTask]:
        """Iterate over the steps of one epoch, starting at a step."""
        for step in range(first_step, self.num_steps):
            # A generator per step, so that a resumed run draws the same batches.
            rng = np.random.default_rng([self._seed, number, step])
            yield DrawnTask(int(rng.choice(len(self._chances), p=self._chances)), rng)


class MultitaskObjective(nn.Module):
    """The cross-entropy over the candidates of a batch, in both directions for retrieval."""

    def __init__(self, network: SharedNetwork, families: Sequence[str], *, precision: str = "float32") -> None:
        super().__init__()
        self.network = network
        self._families = families
        self._precision = precision

    def scalars(self) -> dict[str, float]:
        """Return the scale of each family of tasks, to be logged."""
        return {f"{name} scale": self.network.classifier(name).scale.item() for name in self._families}

    def loss(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch of one task, a scalar."""
        targets: TaskTargets = batch.targets
        with autocast(targets.candidates.numbers_BL.device.type, self._precision):
            queries_BP = read_inputs(self.network, batch).float()
            vectors_CP = self.network.encode(words=targets.candidates, side="target").float()

        classifier = self.network.classifier(targets.kind)
        scaled = classifier.scaled(queries_BP, vectors_CP)
        loss = cross_entropy_over(*scaled, targets.positives, bias_C=targets.log_weights_C)

        if targets.is_symmetric:
            reverse = targets.positives[1], targets.positives[0]
            loss = (loss + cross_entropy_over(*classifier.scaled(vectors_CP, queries_BP), reverse)) / 2
        return loss


class MixtureTask:
    """A `Task` of the training loop for several tasks. The epoch with the best mean score is kept.

    Args:
        network: the network.
        tasks: the tasks.
        settings: seed and machine. Batch sizes are set by the tasks.
        num_steps: steps per epoch.
    """

    def __init__(
        self,
        network: SharedNetwork,
        tasks: Sequence[ExampleTask],
        settings: FitSettings,
        *,
        num_steps: int,
        device: str = "cpu",
    ) -> None:
        self.network = network
        self._tasks = tasks
        self._device = device

        families = list(dict.fromkeys(task.kind for task in tasks))
        self.module = MultitaskObjective(network, families, precision=settings.machine.precision)
        self._mixture = TaskMixture([task.weight for task in tasks], num_steps=num_steps, seed=settings.seed)
        self.num_steps = num_steps

    def batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, starting at a step."""
        for number, rng in self._mixture.epoch(epoch, first_step=first_step):
            yield self._tasks[number].draw(rng, device=self._device)

    def measure(self) -> dict[str, float]:
        """Compute the validation metrics of all tasks; the score is the mean over tasks."""
        measures: dict[str, float] = {}
        scores = []
        for task in self._tasks:
            values = task.measure(self.network, device=self._device)
            scores.append(np.mean(list(values.values())))
            measures |= values
        return {**measures, "score": float(np.mean(scores))}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a run besides its tasks and the settings of the loop.

    Args:
        model: sizes of `SharedNetwork`: width, num_layers, num_heads, feed_forward.
        num_prompts: prompts per layer, for prompt tuning.
        steps_per_epoch: steps between two validations.
        modalities: additional adapters besides those of the tasks, as arguments of `SharedNetwork`.
        families: additional families of tasks.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    num_prompts: int = 0
    steps_per_epoch: int = 100
    modalities: Mapping[str, Any] = field(default_factory=dict)
    families: Sequence[str] = ()


def train_multitask(
    tasks: Sequence[ExampleTask],
    words: WordTable,
    run_path: Path,
    recipe: Recipe,
    settings: FitSettings,
    *,
    progress: Progress | None = None,
) -> TrainReport:
    """Train tasks together into a run folder. An interrupted run is resumed, a finished one reused.

    Training has `settings.optimizer.epochs` times `recipe.steps_per_epoch` steps. See `start_from` for prompt tuning
    and for a new modality.

    Raises:
        DataError: as in `train_task`.
        FingerprintError: the folder contains a run with other settings, or features of one modality differ.
    """
    media = _media_of(tasks)
    arguments = {
        "modalities": {**recipe.modalities, **{name: _describe_media(item) for name, item in media.items()}},
        "words": list(words.vocabulary.words),
        "word_width": words.feature.width,
        "families": list(dict.fromkeys([*recipe.families, *(task.kind for task in tasks)])),
        "num_prompts": recipe.num_prompts,
        **recipe.model,
    }

    inputs = {name: describe_input(item.feature) for name, item in media.items()}

    # The tables decide the run as much as the settings do, so their digests are recorded.
    task_records = [dict(task.describe()) for task in tasks]
    train_media = _all_media([task.train for task in tasks])
    indexes = [item.cache.info.index_digest for item in train_media]
    info = RunInfo(
        kind=KIND,
        arguments=arguments,
        inputs={**inputs, "words": describe_input(words.feature)},
        settings=json.loads(canonical_json({"steps_per_epoch": recipe.steps_per_epoch, "tasks": task_records})),
        index_digest="+".join(dict.fromkeys([*indexes, words.index_digest])),
        digests={"examples": digest(task_records)},
    )

    def make_task(device: str) -> MixtureTask:
        network = SharedNetwork(**arguments)
        network.set_words(np.asarray(words.vectors_VD, np.float32))
        for name in media:
            network.standardize(name, sample_tokens(tasks, name))
        return MixtureTask(network, tasks, settings, num_steps=recipe.steps_per_epoch, device=device)

    return train_task(make_task, run_path, info, settings, progress=progress)


def start_from(
    run_path: Path, *, trainable: str, num_prompts: int = 0, steps_per_epoch: int = 100
) -> tuple[Recipe, PartSettings]:
    """Return the recipe and the parts of a run that starts from a finished one.

    For prompt tuning, `trainable` is `prompts+norms+scales`. The transformer and the adapters do not change then. To
    tune all weights, it is `shared+image+scales`. To add a modality by a new adapter only, it is the name of the
    modality, such as `audio`, and `scales` for a new family of tasks.

    Args:
        run_path: a finished run of `train_multitask`.
        trainable: parts to train.
        num_prompts: prompts per layer.
        steps_per_epoch: steps between two validations.
    """
    arguments = Run.open(run_path, kind=KIND).info.arguments
    recipe = Recipe(
        model={name: arguments[name] for name in _SIZES if name in arguments},
        num_prompts=num_prompts,
        steps_per_epoch=steps_per_epoch,
        modalities=arguments["modalities"],
        families=arguments["families"],
    )

    names = ("shared", *recipe.modalities, *(f"scale-{family}" for family in recipe.families))
    return recipe, PartSettings(init_from=tuple(f"{name}={run_path}" for name in names), trainable=trainable)


def sample_tokens(tasks: Sequence[ExampleTask], modality: str) -> Floats:
    """Read the tokens of evenly spaced training items from each cache of a modality: (N, D) float32."""
    parts = []
    for media in _all_media([task.train for task in tasks], modality):
        row_lists = [task.train.rows_N for task in tasks if task.train.media is media]
        rows = distinct(np.concatenate([rows_N for rows_N in row_lists if rows_N is not None]))
        sample = rows[np.unique(np.linspace(0, len(rows) - 1, _NUM_SAMPLED).astype(np.int64))]

        values, lengths = media.read(sample)
        values = np.asarray(values, np.float32)
        is_token = np.arange(values.shape[1]) < lengths[:, None] if lengths is not None else np.True_
        parts.append(values[np.broadcast_to(is_token, values.shape[:-1])])
    return np.concatenate(parts)


def _describe_media(media: Media) -> dict[str, Any]:
    return {"width": media.feature.width, "axis": None if media.axis is None else media.axis.to_json()}


def _all_media(examples: Sequence[TaskExamples], modality: str | None = None) -> list[Media]:
    """Return the distinct media of examples, of one modality or of all."""
    media = {id(item.media): item.media for item in examples if item.media is not None}
    return [item for item in media.values() if modality in (None, item.modality)]


def _media_of(tasks: Sequence[ExampleTask]) -> dict[str, Media]:
    """Return the first media of each modality, after checking that the others have the same feature."""
    media_of: dict[str, Media] = {}
    for media in _all_media([examples for task in tasks for examples in (task.train, task.validation)]):
        first = media_of.setdefault(media.modality, media)
        check_same(
            f"{media.feature.name} of {media.cache.path}",
            media.feature.fingerprint,
            first.feature.fingerprint,
            next_step=f"extract the feature of {first.cache.path} there as well",
        )
    return media_of
