"""Runs of the pipeline: pre-training, tuning on downstream data, and audio adapters.

Finished runs are reused.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from embedcache.progress import Progress
from embedcache.train.settings import FitSettings, MachineSettings, OptimizerSettings, PartSettings
from pipelines.results import file_name
from pipelines.uniperceiver.data import Data
from pipelines.uniperceiver.tables import EASY_VQA, LETTERS, Size, Tables
from pipelines.uniperceiver.tasks import ExampleTask
from pipelines.uniperceiver.training import Recipe, TaskMixture, start_from, train_multitask

PRETRAINED = "pre-trained"
NEVER = "never pre-trained"


class Tuning(NamedTuple):
    """A tuning: the run that it starts from, the parts that are trained, and the name of their settings."""

    start: str
    trainable: str
    weights: str


TUNINGS: Mapping[str, Tuning] = {
    "prompts": Tuning(PRETRAINED, "prompts+norms+scales", "prompts"),
    "all weights": Tuning(PRETRAINED, "shared+image+scales", "all"),
    "prompts, never pre-trained": Tuning(NEVER, "prompts+norms+scales", "prompts"),
}
"""Model -> its tuning on images."""
ADAPTERS: Mapping[str, Tuning] = {
    "new adapter": Tuning(PRETRAINED, "audio+scale-classify", "adapter"),
    "new adapter, never pre-trained": Tuning(NEVER, "audio+scale-classify", "adapter"),
}
"""Model -> its tuning on audio, a modality that pre-training has never seen."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of one seed and their data.

    Args:
        folder: folder of the runs.
        data: the caches and tables of examples.
        seed: seed of all trainings and of the draws of examples. The shuffled items are the same for all seeds.
        size: sizes of data, network and training.
    """

    folder: Path
    data: Data
    seed: int
    size: Size

    @cached_property
    def tables(self) -> Tables:
        """The tables of examples, opened once per process."""
        return Tables(data=self.data, size=self.size)

    def path(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.folder / file_name(name)

    def pretrain(self, *, progress: Progress | None = None) -> None:
        """Train all tasks together."""
        self._pretrain(PRETRAINED, self.tables.pretraining(), self.size.steps, progress)

    def count_steps(self) -> dict[str, int]:
        """Return how often each task is drawn in pre-training."""
        tasks = self.tables.pretraining()
        steps_per_epoch = self.size.steps_per_epoch

        # Drawn as in training, so that the count is exact.
        mixture = TaskMixture([task.weight for task in tasks], num_steps=steps_per_epoch, seed=self.seed)
        counts = Counter(
            step.number for epoch in range(self.size.steps // steps_per_epoch) for step in mixture.epoch(epoch)
        )
        return {task.name: counts[number] for number, task in enumerate(tasks)}

    def pretrain_alone(self, name: str, *, progress: Progress | None = None) -> None:
        """Train one task only, on as many of its batches as in pre-training."""
        tasks = [task for task in self.tables.pretraining() if task.name == name]
        self._pretrain(run_alone(name), tasks, self.count_steps()[name], progress)

    def train_controls(self, fractions: Sequence[float], *, progress: Progress | None = None) -> None:
        """Tune the network that was never pre-trained, which does not have to wait for pre-training."""
        self._pretrain(NEVER, self.tables.pretraining(), 0, progress)
        for step, *arguments in tuning_steps([self], fractions, start=NEVER):
            step(*arguments, progress=progress)  # type: ignore[operator]

    def tune(self, model: str, data: str, fraction: float, *, progress: Progress | None = None) -> None:
        """Tune a run on a fraction of easy-VQA, Fashion-MNIST or OpenMoji."""
        tasks = self.tables.tuning(data, fraction, seed=self.seed)
        self._tune(TUNINGS[model], tasks, tuned_run(model, data, fraction), self.size.tuning_steps[data], progress)

    def adapt(self, model: str, speaker: str, *, progress: Progress | None = None) -> None:
        """Train the audio adapter on the letters of all speakers but one. The last epoch is kept."""
        speakers = [name for name in self.tables.speakers() if name != speaker]
        name = adapted_run(model, speaker)
        steps = self.size.tuning_steps[LETTERS]
        self._tune(ADAPTERS[model], [self.tables.letters(*speakers)], name, steps, progress, num_epochs=1)

    def _pretrain(self, name: str, tasks: Sequence[ExampleTask], steps: int, progress: Progress | None) -> None:
        # Whole epochs, as the best of them is chosen by validation.
        epochs = max(1, round(steps / self.size.steps_per_epoch)) if steps else 0
        steps_per_epoch = round(steps / epochs) if epochs else self.size.steps_per_epoch

        recipe = Recipe(model=self.size.model, steps_per_epoch=steps_per_epoch)
        settings = self._settings(epochs, self.size.lr)
        train_multitask(tasks, self.tables.words, self.path(name), recipe, settings, progress=progress)

    def _tune(
        self,
        tuning: Tuning,
        tasks: Sequence[ExampleTask],
        name: str,
        steps: int,
        progress: Progress | None,
        *,
        num_epochs: int | None = None,
    ) -> None:
        epochs = num_epochs or max(1, steps // self.size.steps_per_epoch)

        recipe, parts = start_from(
            self.path(tuning.start),
            trainable=tuning.trainable,
            num_prompts=self.size.num_prompts if tuning.weights == "prompts" else 0,
            steps_per_epoch=steps // epochs,
        )

        settings = self._settings(epochs, self.size.tuning_lr[tuning.weights], parts)
        train_multitask(tasks, self.tables.words, self.path(name), recipe, settings, progress=progress)

    def _settings(self, epochs: int, lr: float, parts: PartSettings | None = None) -> FitSettings:
        return FitSettings(
            optimizer=OptimizerSettings(epochs=epochs, lr=lr),
            parts=parts or PartSettings(),
            seed=self.seed,
            machine=MachineSettings(threads=1),
        )


def question_name(data: str, fraction: float) -> str:
    """Return the name of a question about downstream data, given a fraction of its training examples."""
    return f"{data} {100 * fraction:g} %"


def tuned_run(model: str, data: str, fraction: float) -> str:
    """Return the name of the run of a model that was tuned on a fraction of downstream data."""
    return f"{model} {question_name(data, fraction)}"


def adapted_run(model: str, speaker: str) -> str:
    """Return the name of the run of a model whose adapter was trained without a speaker."""
    return f"{model} without {speaker}"


def run_alone(task: str) -> str:
    """Return the name of the run of one task of pre-training."""
    return f"{task} alone"


def tuning_steps(
    seed_runs: Sequence[Runs], fractions: Sequence[float], *, start: str = PRETRAINED
) -> list[tuple[object, ...]]:
    """Return all tunings of the run `start` of each seed as steps of `run_parallel`.

    Args:
        seed_runs: the runs of each seed.
        fractions: fractions of the answers of easy-VQA.
        start: name of the run that is tuned.
    """
    steps: list[tuple[object, ...]] = []
    for runs in seed_runs:
        questions = [*((EASY_VQA, fraction) for fraction in fractions), *runs.size.other_fractions.items()]
        models = [model for model, tuning in TUNINGS.items() if tuning.start == start]
        adapters = [model for model, tuning in ADAPTERS.items() if tuning.start == start]

        steps += [(runs.tune, model, *question) for question in questions for model in models]
        steps += [(runs.adapt, model, speaker) for model in adapters for speaker in runs.tables.speakers()]
    return steps
