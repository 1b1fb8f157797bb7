"""Train tasks of one likelihood together, or tune a run by prompts, in all weights, or by a new adapter.

Each step uses a batch of one task, drawn by weight. "Uni-Perceiver: Pre-training Unified Architecture for Generic
Perception for Zero-shot and Few-shot Tasks" (CVPR 2022) on features of frozen encoders.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from embedcache.arrays import Floats, check_finite, distinct
from embedcache.devices import autocast
from embedcache.errors import DataError
from embedcache.progress import Progress
from embedcache.projectors.modules import ModuleConfig, read_module_config
from embedcache.provenance import canonical_json, check_same, digest
from embedcache.train.batches import Loader
from embedcache.train.modules import ModuleReport, describe_input, train_task
from embedcache.train.settings import FitSettings, PartSettings
from pipelines.uniperceiver.candidates import cross_entropy_over
from pipelines.uniperceiver.examples import Media, TaskExamples, WordTable
from pipelines.uniperceiver.network import SharedNetwork
from pipelines.uniperceiver.tasks import ExampleTask, TaskBatch, read_inputs

KIND = "pipelines.uniperceiver.network:SharedNetwork"
"""Kind of the runs."""
_NUM_SAMPLED = 256  # items whose tokens standardize the channels of a feature
_SEQUENCE = 40  # positions of a typical input
_SIZES = ("width", "num_layers", "num_heads", "feed_forward")


class DrawnTask(NamedTuple):
    """The task of a step, and the generator of all that is drawn for its batch."""

    number: int
    rng: np.random.Generator


class TaskMixture:
    """Steps of an epoch, each of one task: which, and what is in its batch, follows from (seed, epoch, step).

    Args:
        weights: how often each task is drawn.
        batch_sizes: examples per batch of each task.
        num_steps: steps per epoch.
        seed: seed of the run.
    """

    def __init__(self, weights: Sequence[float], batch_sizes: Sequence[int], *, num_steps: int, seed: int) -> None:
        self._chances = np.array(weights) / np.sum(weights)
        self._seed = seed
        self.num_steps = num_steps
        self.num_samples = max(1, round(num_steps * float(self._chances @ np.array(batch_sizes))))

    def epoch(self, number: int, *, first_step: int = 0) -> Iterator[DrawnTask]:
        """Iterate over the steps of one epoch, from a step on."""
        for step in range(first_step, self.num_steps):
            rng = np.random.default_rng([self._seed, number, step])
            yield DrawnTask(int(rng.choice(len(self._chances), p=self._chances)), rng)


class LoadedTask(NamedTuple):
    """A batch, and the number of its task."""

    number: int
    batch: TaskBatch


class LikelihoodObjective(nn.Module):
    """The negative log-likelihood of the right candidates of a batch, in both directions for retrieval."""

    def __init__(self, module: SharedNetwork, tasks: Sequence[ExampleTask], *, precision: str = "float32") -> None:
        super().__init__()
        self.module = module
        self._tasks = tasks
        self._precision = precision

    def forward(self, loaded: LoadedTask) -> Tensor:
        """Compute the loss of a batch, a scalar."""
        batch = loaded.batch
        with autocast(batch.candidates.numbers_BL.device.type, self._precision):
            queries_BP = read_inputs(self.module, batch).float()
            vectors_CP = self.module.encode(words=batch.candidates, side="target").float()

        likelihood = self.module.likelihood(self._tasks[loaded.number].kind)
        scaled = likelihood.scaled(queries_BP, vectors_CP)
        loss = cross_entropy_over(*scaled, batch.positives, bias_C=batch.log_weights_C)
        if batch.is_symmetric:
            turned = batch.positives[1], batch.positives[0]
            loss = (loss + cross_entropy_over(*likelihood.scaled(vectors_CP, queries_BP), turned)) / 2
        return loss


class MixtureTask:
    """A `Task` of the training loop: several tasks of one likelihood. The epoch with the best mean score is kept.

    Args:
        module: the network.
        tasks: the tasks.
        settings: seed and machine; batch sizes are those of the tasks.
        num_steps: steps per epoch.
    """

    unit = "examples"

    def __init__(
        self,
        module: SharedNetwork,
        tasks: Sequence[ExampleTask],
        settings: FitSettings,
        *,
        num_steps: int,
        device: str = "cpu",
    ) -> None:
        self.module = module
        self._tasks = tasks
        self._device = device
        self._precision = settings.machine.precision

        sizes = [min(task.batch_size, len(task.train)) for task in tasks]
        mixture = TaskMixture([task.weight for task in tasks], sizes, num_steps=num_steps, seed=settings.seed)
        self.loader = Loader(mixture, self._load)
        num_weights = sum(value.numel() for value in module.layers.parameters())
        self.forward_flops = 2.0 * max(sizes) * _SEQUENCE * num_weights

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """Parts of the network, see `SharedNetwork.parts`."""
        return self.module.parts()

    @cached_property
    def objective(self) -> LikelihoodObjective:
        """The loss."""
        return LikelihoodObjective(self.module, self._tasks, precision=self._precision)

    def _load(self, drawn: DrawnTask) -> LoadedTask:
        return LoadedTask(drawn.number, self._tasks[drawn.number].draw(drawn.rng, device=self._device))

    def count(self, batch: LoadedTask) -> int:
        """Return the number of examples of a batch."""
        task = self._tasks[batch.number]
        return min(task.batch_size, len(task.train))

    def measure(self) -> dict[str, float]:
        """Compute the validation metrics of all tasks."""
        measures: dict[str, float] = {}
        for task in self._tasks:
            measures |= task.measure(self.module, device=self._device)
        return measures

    def score(self, measures: Mapping[str, float]) -> float:
        """Return the mean over tasks of the mean of their metrics."""
        of_task = [
            [value for name, value in measures.items() if name.startswith(f"{task.name} ")] for task in self._tasks
        ]
        return float(np.mean([np.mean(values) for values in of_task]))

    def watch(self) -> dict[str, float]:
        """Return the scale of each kind of tasks."""
        kinds = dict.fromkeys(task.kind for task in self._tasks)
        return {f"{name} scale": self.module.likelihood(name).scale.item() for name in kinds}

    def explain(self, batch: LoadedTask, *, loss: float, step: int) -> DataError:
        """Return an error that names the feature, or else the task, of a bad loss."""
        for name, tokens in batch.batch.tokens.items():
            values = tokens.values_BTD.float().cpu().numpy()
            check_finite(values, f"at step {step}, the {name} feature", rows=batch.batch.rows)
        name = self._tasks[batch.number].name
        return DataError(f"the loss is {loss} at step {step}, in a batch of the task {name}; lower the learning rate")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a run besides its tasks and those of the loop.

    Args:
        model: sizes of `SharedNetwork`: width, num_layers, num_heads, feed_forward.
        num_prompts: prompts per layer, for prompt tuning.
        steps_per_epoch: steps between two validations.
        modalities: adapters to have besides those of the tasks, as arguments of `SharedNetwork`.
        families: families of tasks to have besides those of the tasks.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    num_prompts: int = 0
    steps_per_epoch: int = 100
    modalities: Mapping[str, Any] = field(default_factory=dict)
    families: Sequence[str] = ()


def train_likelihood(
    tasks: Sequence[ExampleTask],
    words: WordTable,
    run_path: Path,
    recipe: Recipe,
    settings: FitSettings,
    *,
    progress: Progress | None = None,
) -> ModuleReport:
    """Train tasks together into a run folder; resumed if interrupted, reused if finished.

    There are `settings.optimizer.epochs` times `recipe.steps_per_epoch` steps. For prompt tuning, or for a new modality
    through a new adapter only, see `start_from`.

    Raises:
        DataError: as `train_task`.
        FingerprintError: the folder contains a run with another config, or features of one modality differ.
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
    sides = {name: describe_input(item.feature) for name, item in media.items()}
    described = [dict(task.describe()) for task in tasks]
    indexes = [item.cache.info.index_digest for item in _all_media([task.train for task in tasks])]
    config = ModuleConfig(
        kind=KIND,
        arguments=arguments,
        sides={**sides, "words": describe_input(words.feature)},
        training=json.loads(canonical_json({"steps_per_epoch": recipe.steps_per_epoch, "tasks": described})),
        index_digest="+".join(dict.fromkeys([*indexes, words.index_digest])),
        file_digests={"examples": digest(described)},
    )

    def make_task(device: str) -> MixtureTask:
        module = SharedNetwork(**arguments)
        module.set_words(np.asarray(words.vectors_VD, np.float32))
        for name in media:
            module.standardize(name, sample_tokens(tasks, name))
        return MixtureTask(module, tasks, settings, num_steps=recipe.steps_per_epoch, device=device)

    return train_task(make_task, run_path, config, settings, progress=progress)


def start_from(
    run_path: Path, *, trainable: str, num_prompts: int = 0, steps_per_epoch: int = 100
) -> tuple[Recipe, PartSettings]:
    """Return the recipe and the parts of a run that starts from a finished one.

    Prompt tuning: `trainable="prompts+norms+scales"`; the transformer and the adapters stay as they are. All weights:
    `shared+image+scales`. A new modality through a new adapter only: its name, such as `audio`, and `scales` for a new
    family of tasks.

    Args:
        run_path: the finished run, of `train_likelihood`.
        trainable: parts to train.
        num_prompts: prompts per layer.
        steps_per_epoch: steps between two validations.
    """
    arguments = read_module_config(run_path, kind=KIND).arguments
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
    """Read the tokens of some evenly spaced training items of a modality, of each of its caches: (N, D) float32."""
    parts = []
    for media in _all_media([task.train for task in tasks], modality):
        rows_of = [task.train.rows_N for task in tasks if task.train.media is media]
        rows = distinct(np.concatenate([rows_N for rows_N in rows_of if rows_N is not None]))
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, _NUM_SAMPLED).astype(np.int64))]

        values, lengths = media.read(chosen)
        values = np.asarray(values, np.float32)
        is_token = np.arange(values.shape[1]) < lengths[:, None] if lengths is not None else np.True_
        parts.append(values[np.broadcast_to(is_token, values.shape[:-1])])
    return np.concatenate(parts)


def _describe_media(media: Media) -> dict[str, Any]:
    return {"width": media.feature.width, "axis": None if media.axis is None else media.axis.to_json()}


def _all_media(examples: Sequence[TaskExamples], modality: str | None = None) -> list[Media]:
    """Return the different media of examples, of one modality or of all."""
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
            next_step=f"extract the feature of {first.cache.path} there, too",
        )
    return media_of
