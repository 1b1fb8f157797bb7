"""Runs of one likelihood for every task: pre-training, tuning on easy-VQA, baselines, and what is measured on each.

Every step leaves a file or a run that a second call finds again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedcache.arrays import Bools, Floats, Ints, normalize
from embedcache.evaluate import classifiers
from embedcache.evaluate.likelihood import (
    BLIND,
    SHUFFLED,
    Measured,
    TaskReport,
    answer_blindly,
    evaluate_task,
    represent,
)
from embedcache.networks.words import NUM_SPECIAL
from embedcache.progress import NullProgress, Progress
from embedcache.train.examples import Examples
from embedcache.train.likelihood import LikelihoodRecipe, start_from, train_likelihood
from embedcache.train.likelihood_tasks import ExampleTask
from embedcache.train.settings import FitSettings, MachineSettings, OptimizerSettings, PartSettings
from pipelines.perceiver.results import (
    BLIND_ALL,
    BLIND_DRAW,
    FEATURE_PROBE,
    NETWORK_PROBE,
    PRETRAINED,
    ZERO_SHOT,
    Measures,
    Result,
    answers_name,
    file_name,
)
from pipelines.perceiver.steps import Data
from pipelines.perceiver.tasks import Size, Tables
from pipelines.worlds.shapes import check_caption

NEVER = "never pre-trained"


class Tuning(NamedTuple):
    """How a run is tuned: the run that it starts from, the parts that are trained, and what they are called."""

    start: str
    trainable: str
    weights: str


TUNINGS: Mapping[str, Tuning] = {
    "prompts": Tuning(PRETRAINED, "prompts+norms+scales+heads", "prompts"),
    "all weights": Tuning(PRETRAINED, "shared+image+scales+heads", "all"),
    "prompts, never pre-trained": Tuning(NEVER, "prompts+norms+scales+heads", "prompts"),
}
"""Model -> how it is tuned on answers of easy-VQA."""
PROBES, BLIND_ANSWERS = (FEATURE_PROBE, NETWORK_PROBE), (BLIND_DRAW, BLIND_ALL)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of one seed and what they read.

    Args:
        folder: folder of the runs.
        data: the caches and tables of examples.
        seed: seed of all trainings and of the draws of answers. The items of others are the same for all seeds.
        size: how much of everything.
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

    def pretrain(self, name: str, *, progress: Progress | None = None) -> None:
        """Train all tasks together; for `NEVER`, for no step."""
        recipe = LikelihoodRecipe(model=self.size.model, steps_per_epoch=self.size.steps_per_epoch)
        steps = 0 if name == NEVER else self.size.steps
        settings = self._settings(steps, self.size.lr)
        tasks, path = self.tables.pretraining(), self.path(name)
        train_likelihood(tasks, self.tables.words, path, recipe, settings, progress=progress)

    def tune(self, model: str, fraction: float, *, progress: Progress | None = None) -> None:
        """Tune a run on a fraction of the answers of easy-VQA."""
        tuning = TUNINGS[model]
        recipe, parts = start_from(
            self.path(tuning.start),
            trainable=tuning.trainable,
            num_prompts=self.size.num_prompts if tuning.weights == "prompts" else 0,
            steps_per_epoch=min(self.size.steps_per_epoch, self.size.tuning_steps),
        )
        settings = self._settings(self.size.tuning_steps, self.size.tuning_lr[tuning.weights], parts)
        task, path = self.tables.answers(fraction, seed=self.seed), self._tuned(model, fraction)
        train_likelihood([task], self.tables.words, path, recipe, settings, progress=progress)

    def answer(self, model: str, fraction: float, *, progress: Progress | None = None) -> Result:
        """Answer the test questions of easy-VQA by a tuned run, a probe, blindly, or without any answers."""
        return self._keep(model, answers_name(fraction), lambda: self._answer(model, fraction), progress)

    def measure(self, name: str, *, progress: Progress | None = None) -> Result:
        """Measure the pre-trained run on one of `MEASURED`."""
        return self._keep(PRETRAINED, name, lambda: MEASURED[name](self), progress)

    def classify(self, split: str) -> Result:
        """Classify a split of the shapes among all 40 classes."""
        task = self.tables.classes(split)
        return self._result(evaluate_task(self.path(PRETRAINED), task, task.train, controls=[SHUFFLED]))

    def retrieve(self) -> Result:
        """Retrieve one caption per image and one image per caption; the control has the pairs of others."""
        examples, task = self.tables.captions(), self._pretraining("retrieve")
        report, control = (
            evaluate_task(self.path(PRETRAINED), task, of_images)
            for of_images in (examples, examples.shuffle_media(seed=0))
        )
        return self._result(replace(report, controls={SHUFFLED: control.measures}))

    def caption(self) -> Result:
        """Predict the words of captions, and write whole ones, which are parsed; also against the objects of others."""
        examples, objects = self.tables.captions(), self.tables.objects()
        task = self._pretraining("caption")
        report = evaluate_task(self.path(PRETRAINED), task, examples, controls=[SHUFFLED])
        rows_I = report.measures["caption accuracy"].clusters_M
        keys = list(report.captions)
        order = np.random.default_rng(0).permutation(len(keys))
        others = dict(zip((keys[place] for place in order), (keys[place] for place in np.roll(order, 1)), strict=True))

        def judge(word_accuracy: Measured, shown: Mapping[str, str]) -> dict[str, Measured]:
            verdicts = [check_caption(report.captions[key], objects[shown[key]]) for key in keys]
            is_true = np.array([verdict.is_true for verdict in verdicts])
            is_whole = is_true & np.array([verdict.is_complete for verdict in verdicts])
            return {
                "word accuracy": word_accuracy,
                "true captions": Measured(is_true, rows_I),
                "true and complete captions": Measured(is_whole, rows_I),
            }

        measures = judge(report.measures["word accuracy"], {key: key for key in keys})
        control = judge(report.controls[SHUFFLED]["word accuracy"], others)
        result = self._result(replace(report, measures=measures, controls={SHUFFLED: control}))
        return replace(result, captions=dict(list(report.captions.items())[:8]))

    def fill_in(self) -> Result:
        """Predict masked words of captions."""
        examples, task = self.tables.captions(), self._pretraining("masked")
        controls = [SHUFFLED, BLIND]
        return self._result(evaluate_task(self.path(PRETRAINED), task, examples, controls=controls))

    def describe(self) -> Result:
        """Classify texts; the control has no items, as there are none, but the network that was never pre-trained."""
        task = self._pretraining("describe")
        examples = self.tables.open(self.tables.test("descriptions"), None)
        report, control = (evaluate_task(self.path(name), task, examples) for name in (PRETRAINED, NEVER))
        return self._result(replace(report, controls={NEVER: control.measures}))

    def _answer(self, model: str, fraction: float) -> Result:
        task = self.tables.answers(fraction or None, seed=self.seed, has_head=model in TUNINGS)
        examples, groups = self.tables.questions()
        if model in TUNINGS or model == ZERO_SHOT:
            path = self._tuned(model, fraction) if model in TUNINGS else self.path(PRETRAINED)
            return self._result(evaluate_task(path, task, examples, controls=[SHUFFLED, BLIND], groups=groups))
        assert examples.rows_N is not None
        measures: dict[str, Measures] = {}
        if model in BLIND_ANSWERS:
            known = task.train if model == BLIND_DRAW else self.tables.answers(1, seed=self.seed).train
            right = {"": answer_blindly(known, examples)}
        else:
            right = self._probe(model, task, {"": examples, SHUFFLED: examples.shuffle_media(seed=0)})
        for control, is_right_N in right.items():
            of_groups = {"accuracy": np.ones(len(examples), bool)}
            of_groups |= {f"accuracy: {name}": is_in_N for name, is_in_N in groups.items()}
            measures[control] = {
                name: Measured(is_right_N[is_in_N], examples.rows_N[is_in_N]) for name, is_in_N in of_groups.items()
            }
        own = measures.pop("")
        return Result(
            model="", question="", seed=self.seed, num_examples=len(examples), measures=own, controls=measures
        )

    def _probe(self, model: str, task: ExampleTask, tests: Mapping[str, Examples]) -> dict[str, Bools]:
        """Fit logistic regression to the drawn answers, and return which test answers are right."""

        def read(examples: Examples) -> Floats:
            if model == NETWORK_PROBE:
                return represent(self.path(PRETRAINED), task, examples)
            return pool(examples, np.asarray(self.tables.words.vectors_VD, np.float32))

        train = classifiers.Examples(vectors=read(task.train), labels=_labels(task, task.train))
        classifier = classifiers.fit_logistic(train, None, len(task.names))
        return {
            control: classifier.scores(read(examples)).argmax(axis=1) == _labels(task, examples)
            for control, examples in tests.items()
        }

    def _pretraining(self, name: str) -> ExampleTask:
        return next(task for task in self.tables.pretraining() if task.name == name)

    def _tuned(self, model: str, fraction: float) -> Path:
        return self.path(f"{model} {answers_name(fraction)}")

    def _settings(self, steps: int, lr: float, parts: PartSettings | None = None) -> FitSettings:
        each = min(self.size.steps_per_epoch, steps) or 1
        return FitSettings(
            optimizer=OptimizerSettings(epochs=steps // each, lr=lr),
            parts=parts or PartSettings(),
            seed=self.seed,
            machine=MachineSettings(threads=1),
        )

    def _result(self, report: TaskReport) -> Result:
        return Result(
            model="",
            question="",
            seed=self.seed,
            num_examples=report.num_examples,
            measures=report.measures,
            controls=report.controls,
            chance=report.chance,
        )

    def _keep(self, model: str, question: str, compute: Callable[[], Result], progress: Progress | None) -> Result:
        """Read a result, or compute and write it."""
        path = self.folder / "results" / f"{file_name(f'{question} {model}')}.json"
        if path.is_file():
            return Result.read(path)
        progress = progress or NullProgress()
        progress.start(f"measuring {question}", 1, "results")
        result = replace(compute(), model=model, question=question)
        progress.advance(1)
        progress.finish()
        path.parent.mkdir(parents=True, exist_ok=True)
        result.write(path)
        return result


MEASURED: Mapping[str, Callable[[Runs], Result]] = {
    "classes of training": lambda runs: runs.classify("test"),
    "pairs that are never in training": lambda runs: runs.classify("unseen"),
    "retrieval": Runs.retrieve,
    "captions": Runs.caption,
    "masked words": Runs.fill_in,
    "descriptions": Runs.describe,
}
"""What is measured on the pre-trained run."""


def pool(examples: Examples, vectors_VD: Floats) -> Floats:
    """Return the mean token of each item beside the mean vector of the words of its text, each of length 1.

    Words without a vector are left out. Memory: the tokens of all distinct items.
    """
    assert examples.media is not None
    assert examples.rows_N is not None
    assert examples.text_words is not None
    distinct, which_N = np.unique(examples.rows_N, return_inverse=True)
    tokens_RTD = np.asarray(examples.media.read(distinct).values, np.float32)
    padded_NL, lengths_N = examples.text_words.padded()
    is_word_NL = (np.arange(padded_NL.shape[1]) < lengths_N[:, None]) & (padded_NL >= NUM_SPECIAL)
    texts, which_text_N = np.unique(np.where(is_word_NL, padded_NL, -1), axis=0, return_inverse=True)
    means = [vectors_VD[row[row >= 0] - NUM_SPECIAL].mean(axis=0) for row in texts]
    return np.concatenate(
        [normalize(tokens_RTD.mean(axis=1))[which_N], normalize(np.stack(means))[which_text_N.ravel()]], axis=1
    )


def _labels(task: ExampleTask, examples: Examples) -> Ints:
    places = {name: number for number, name in enumerate(task.names)}
    place_F: Ints = np.array([places[name] for name in examples.targets.to_pylist()], np.int64)
    return place_F[examples.target_N]


def tuning_steps(every: Sequence[Runs], fractions: Sequence[float]) -> list[tuple[object, ...]]:
    """Return all tunings as steps of `run_parallel`."""
    return [(runs.tune, model, fraction) for runs in every for fraction in fractions for model in TUNINGS]


def evaluation_steps(every: Sequence[Runs], fractions: Sequence[float]) -> list[tuple[object, ...]]:
    """Return all that is measured as steps of `run_parallel`."""
    models = (*TUNINGS, *PROBES, *BLIND_ANSWERS)
    return [
        step
        for runs in every
        for step in [
            *((runs.measure, name) for name in MEASURED),
            (runs.answer, ZERO_SHOT, 0),
            *((runs.answer, model, fraction) for fraction in fractions for model in models),
        ]
    ]
