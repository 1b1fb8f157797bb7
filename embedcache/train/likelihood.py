"""One likelihood for every task: tasks on images, sounds and texts trained together, and tuned by prompts.

Each step takes a batch of one task, drawn by weight. "Uni-Perceiver: Pre-training Unified Architecture for Generic
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
from embedcache.dataset.splits import Split
from embedcache.devices import autocast
from embedcache.errors import DataError, SettingError
from embedcache.networks.candidates import Candidates, cross_entropy_over
from embedcache.networks.saved import ModuleConfig, ModuleInput, read_module_config
from embedcache.networks.shared import SharedNetwork
from embedcache.progress import Progress
from embedcache.provenance import canonical_json, check_same, digest
from embedcache.train.batches import Loader
from embedcache.train.distributed import num_started
from embedcache.train.examples import Media, TaskExamples, WordTable
from embedcache.train.likelihood_batches import Subtask, TaskBatch, read_inputs
from embedcache.train.modules import ModuleReport, describe_input, describe_origin, fitted_files, train_task
from embedcache.train.parts import parse_sources
from embedcache.train.settings import FitSettings, PartSettings

_NUM_SAMPLED = 256  # items whose tokens standardize the channels of a feature
_SEQUENCE = 40  # positions of a typical input
_SIZES = ("width", "num_layers", "num_heads", "feed_forward", "output_width")


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
        self._seed, self.num_steps = seed, num_steps
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

    def __init__(self, module: SharedNetwork, tasks: Sequence[Subtask], *, precision: str = "float32") -> None:
        super().__init__()
        self.module, self._tasks, self._precision = module, tasks, precision

    def forward(self, loaded: LoadedTask) -> Tensor:
        """Compute the loss of a batch, a scalar."""
        batch, task = loaded.batch, self._tasks[loaded.number]
        device = batch.candidates.numbers_BL.device.type
        with autocast(device, self._precision):
            queries_BP = read_inputs(self.module, batch).float()
            vectors_CP = self.module.encode(words=batch.candidates, side="target").float()
        candidates = Candidates(vectors_CP, batch.log_weights_C)
        loss = self._loss(queries_BP, candidates, batch.positives, task, batch.head)
        if batch.is_symmetric:
            turned = batch.positives[1], batch.positives[0]
            loss = (loss + self._loss(vectors_CP, Candidates(queries_BP), turned, task, None)) / 2
        return task.loss_weight * loss

    def _loss(
        self,
        queries_BP: Tensor,
        candidates: Candidates,
        positives: tuple[Tensor, Tensor],
        task: Subtask,
        head: str | None,
    ) -> Tensor:
        queries_BP, compared = self.module.compare(queries_BP, candidates, family=task.family, head=head)
        return cross_entropy_over(
            queries_BP, compared.vectors_CP, positives, bias_C=compared.bias_C, smoothing=task.smoothing
        )


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
        tasks: Sequence[Subtask],
        settings: FitSettings,
        *,
        num_steps: int,
        device: str = "cpu",
    ) -> None:
        self.module, self._tasks, self._device = module, tasks, device
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
        """Return the scale of each family."""
        families = dict.fromkeys(task.family for task in self._tasks)
        return {f"{name} scale": self.module.likelihood(name).scale.item() for name in families}

    def explain(self, batch: LoadedTask, *, loss: float, step: int) -> DataError:
        """Return an error that names the feature, or else the task and rows, of a bad loss."""
        for name, tokens in batch.batch.tokens.items():
            values = tokens.values_BTD.float().cpu().numpy()
            check_finite(values, f"at step {step}, the {name} feature", rows=batch.batch.rows)
        rows = [] if batch.batch.rows is None else batch.batch.rows[:5].tolist()
        return DataError(
            f"the loss is {loss} at step {step}, in a batch of the task {self._tasks[batch.number].name}, rows {rows} "
            "…; lower the learning rate"
        )


@dataclass(frozen=True, kw_only=True)
class LikelihoodRecipe:
    """Settings of a run beside its tasks and those of the loop.

    Args:
        model: sizes of `SharedNetwork`: width, num_layers, num_heads, feed_forward, dropout, output_width.
        num_prompts: prompts per layer, for prompt tuning.
        steps_per_epoch: steps between two validations.
        modalities: adapters to have besides those of the tasks, as arguments of `SharedNetwork`.
        families: families of tasks to have besides those of the tasks.
        earlier_tasks: descriptions of the tasks of the run that this one starts from, whose candidates `load` offers,
            too; those with words that the word table lacks are left out.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    num_prompts: int = 0
    steps_per_epoch: int = 100
    modalities: Mapping[str, Any] = field(default_factory=dict)
    families: Sequence[str] = ()
    earlier_tasks: Sequence[Mapping[str, Any]] = ()


def train_likelihood(
    tasks: Sequence[Subtask],
    words: WordTable,
    run_path: Path | str,
    recipe: LikelihoodRecipe | None = None,
    settings: FitSettings | None = None,
    *,
    split: Split | None = None,
    progress: Progress | None = None,
) -> ModuleReport:
    """Train tasks together into a run folder; resumed if interrupted, reused if finished.

    There are `settings.optimizer.epochs` times `recipe.steps_per_epoch` steps. For prompt tuning, or for a new modality
    through a new adapter only, see `start_from`.

    Args:
        tasks: tasks, such as `ExampleTask`.
        words: the word table; of a run that starts from another one, it may have other words, of the same encoder.
        split: split of the samples of the tasks' caches that their examples follow, if one does, to be kept in the run.

    Raises:
        SettingError: no tasks, two of one name, several processes, or a batch size in `settings`.
        DataError: tasks with other words than the table, or features of one modality that differ; or as `train_task`.
        FingerprintError: the folder holds a run with another config, or a feature differs from that of a start run.
    """
    recipe, settings = recipe or LikelihoodRecipe(), settings or FitSettings()
    _check(tasks, words, settings)
    media = _media_of(tasks)
    arguments = {
        "modalities": {**recipe.modalities, **{name: _describe_media(item) for name, item in media.items()}},
        "words": list(words.vocabulary.words),
        "word_width": words.feature.width,
        "families": list(dict.fromkeys([*recipe.families, *(task.family for task in tasks)])),
        "heads": {name: size for task in tasks for name, size in task.heads.items()},
        "num_prompts": recipe.num_prompts,
        **recipe.model,
    }
    sides = {name: describe_origin(item.feature) for name, item in media.items()}
    sides["words"] = describe_input(words.feature)
    _check_start_runs(sides, settings)
    described = [dict(task.describe()) for task in tasks]
    training: dict[str, Any] = {"steps_per_epoch": recipe.steps_per_epoch, "tasks": described}
    earlier = [task for task in recipe.earlier_tasks if words.vocabulary.can_spell(task.get("candidates") or ())]
    training |= {"earlier_tasks": earlier} if earlier else {}
    indexes = [item.cache.info.index_digest for item in _all_media([task.train for task in tasks])]
    config = ModuleConfig(
        kind="shared",
        arguments=arguments,
        sides=sides,
        training=json.loads(canonical_json(training)),
        index_digest="+".join(dict.fromkeys([*indexes, words.index_digest])),
        file_digests={"examples": digest(described)},
    )

    def make_task(device: str) -> MixtureTask:
        module = SharedNetwork(**arguments)
        module.set_words(np.asarray(words.vectors_VD, np.float32))
        for name in media:
            module.standardize(name, sample_tokens(tasks, name))
        return MixtureTask(module, tasks, settings, num_steps=recipe.steps_per_epoch, device=device)

    files = fitted_files(item.feature for item in media.values())
    return train_task(make_task, run_path, config, settings, split=split, files=files, progress=progress)


def start_from(
    run_path: Path | str, *, trainable: str | None, num_prompts: int = 0, steps_per_epoch: int = 100
) -> tuple[LikelihoodRecipe, PartSettings]:
    """Return the recipe and the parts of a run that starts from a finished one.

    Prompt tuning: `trainable="prompts+norms+scales"`, and `+heads` if a task has one; the transformer and the adapters
    stay as they are. All weights: `shared+image+scales`. A new modality through a new adapter only: its name, such as
    `audio`, and `scales` for a new family of tasks.

    Args:
        run_path: the finished run, of `train_likelihood`.
        trainable: parts to train; None: all.
        num_prompts: prompts per layer.

    Raises:
        PathError: the folder is not a finished run.
        DataError: it is a run of something else.
    """
    config = read_module_config(Path(run_path), kind="shared")
    modalities, families = config.arguments["modalities"], config.arguments["families"]
    recipe = LikelihoodRecipe(
        model={name: config.arguments[name] for name in _SIZES if name in config.arguments},
        num_prompts=num_prompts,
        steps_per_epoch=steps_per_epoch,
        modalities=modalities,
        families=families,
        earlier_tasks=[*config.training["tasks"], *config.training.get("earlier_tasks", ())],
    )
    names = ("shared", *modalities, *(f"scale-{family}" for family in families))
    return recipe, PartSettings(init_from=tuple(f"{name}={run_path}" for name in names), trainable=trainable)


def _describe_media(media: Media) -> dict[str, Any]:
    return {"width": media.feature.width, "axis": None if media.axis is None else media.axis.to_json()}


def sample_tokens(tasks: Sequence[Subtask], modality: str) -> Floats:
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


def _all_media(examples: Sequence[TaskExamples], modality: str | None = None) -> list[Media]:
    """Return the different media of examples, of one modality or of all."""
    media = {id(item.media): item.media for item in examples if item.media is not None}
    return [item for item in media.values() if modality in (None, item.modality)]


def _check(tasks: Sequence[Subtask], words: WordTable, settings: FitSettings) -> None:
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names) or any(not name or set(name) & {" ", "."} for name in names):
        raise SettingError(f"tasks: expected different names without spaces and dots, got {names}")
    if settings.optimizer.batch_size is not None:
        raise SettingError(
            f"batch_size: expected none, as each task has its own, got {settings.optimizer.batch_size}; pass it to "
            "the tasks"
        )
    if num_started() > 1:
        raise SettingError(
            f"expected one process for tasks of one likelihood, got {num_started()}; start it without torchrun"
        )
    for task in tasks:
        for examples in (task.train, task.validation):
            if examples.vocabulary.words != words.vocabulary.words:
                raise DataError(
                    f"{task.name}: expected examples with the {len(words.vocabulary):,} words of the word table, got "
                    f"{len(examples.vocabulary):,} words; open them with its vocabulary"
                )


def _media_of(tasks: Sequence[Subtask]) -> dict[str, Media]:
    """Return the first media of each modality, after checking that the others have the same feature."""
    found: dict[str, Media] = {}
    for media in _all_media([examples for task in tasks for examples in (task.train, task.validation)]):
        first = found.setdefault(media.modality, media)
        check_same(
            f"{media.feature.name} of {media.cache.path}",
            media.feature.fingerprint,
            first.feature.fingerprint,
            next_step=f"extract the feature of {first.cache.path} there, too",
        )
    return found


def _check_start_runs(sides: Mapping[str, ModuleInput], settings: FitSettings) -> None:
    for path in dict.fromkeys(parse_sources(settings.parts.init_from).values()):
        for name, side in read_module_config(path).sides.items():
            if name in sides:
                check_same(
                    f"the {name} feature of the run {path}",
                    side.fingerprint,
                    sides[name].fingerprint,
                    next_step="use features of the encoder that the run was trained on",
                )
