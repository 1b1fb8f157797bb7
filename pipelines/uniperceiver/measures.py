"""Measurements of the runs: tasks of pre-training, downstream data, linear probes, blind answers.

Every result is a file. It is reused as long as its runs are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from embedcache.arrays import Bools, Floats, Ints, normalize
from embedcache.dataset.inputs import to_unit_vectors
from embedcache.evaluate import classifiers
from embedcache.metrics import MetricValues
from embedcache.progress import Progress
from embedcache.runs import Run
from pipelines.results import Measures, Result, keep_result
from pipelines.uniperceiver.evaluation import BLIND, SHUFFLED, answer_blindly, evaluate_task
from pipelines.uniperceiver.examples import TaskExamples
from pipelines.uniperceiver.runs import (
    ADAPTERS,
    NEVER,
    PRETRAINED,
    TUNINGS,
    Runs,
    adapted_run,
    question_name,
    run_alone,
    tuned_run,
)
from pipelines.uniperceiver.tables import EASY_VQA, EMOJI, FASHION, LETTERS
from pipelines.uniperceiver.tasks import ExampleTask
from pipelines.uniperceiver.words import NUM_SPECIAL
from pipelines.worlds.shapes import check_caption

ZERO_SHOT = "pre-trained, not tuned"
PROBE = "linear probe, cached features"
BLIND_ANSWERS = "blind, all training answers"
MODELS: Mapping[str, Sequence[str]] = {
    EASY_VQA: (*TUNINGS, PROBE, BLIND_ANSWERS),
    EMOJI: (*TUNINGS,),
    FASHION: (*TUNINGS, PROBE),
    LETTERS: (*ADAPTERS, PROBE),
}
"""Downstream data -> models that are measured on it, besides the untuned pre-trained run."""
_NUM_CAPTIONS = 8  # captions that a result keeps


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All measurements of the runs of one seed."""

    runs: Runs

    @property
    def folder(self) -> Path:
        """Folder of the runs."""
        return self.runs.folder

    def measure(self, name: str, run: str = PRETRAINED, *, progress: Progress | None = None) -> Result:
        """Measure a run by a name of `MEASURED`."""
        compute = MEASURED[name].compute
        return self._keep(run, name, [run, NEVER], lambda: compute(self, run), progress)

    def test(self, model: str, data: str, fraction: float, *, progress: Progress | None = None) -> Result:
        """Test a model on easy-VQA, Fashion-MNIST or OpenMoji after tuning on a fraction (`ZERO_SHOT` is not tuned)."""
        run = tuned_run(model, data, fraction) if model in TUNINGS else PRETRAINED
        compute = self._retrieve_and_caption if data == EMOJI else self._answer
        tasks = self.runs.tables.tuning(data, fraction or None, seed=self.runs.seed)
        num_trained = len(tasks[0].train) if fraction else 0

        def answer() -> Result:
            return replace(compute(model, run, data, tasks), num_trained=num_trained)

        return self._keep(model, question_name(data, fraction), [run], answer, progress)

    def test_letters(self, model: str, *, progress: Progress | None = None) -> Result:
        """Classify the recorded letters of each speaker by a model that was trained on the other speakers."""
        speakers = self.runs.tables.speakers()
        runs = [adapted_run(model, speaker) for speaker in speakers] if model in ADAPTERS else []

        def compute() -> Result:
            return _join([self._test_speaker(model, name) for name in speakers])

        return self._keep(model, question_name(LETTERS, 1), runs, compute, progress)

    def classify(self, run: str, split: str) -> Result:
        """Classify a split of the shapes among all 40 classes."""
        task = self.runs.tables.classes(split)
        return self._evaluate(run, task, task.train, [SHUFFLED])

    def retrieve(self, run: str) -> Result:
        """Retrieve one caption per image and one image per caption; the control has shuffled pairs."""
        return self._evaluate(run, self._pretraining("retrieve"), self.runs.tables.captions(is_listed=True), [SHUFFLED])

    def caption(self, run: str) -> Result:
        """Predict the words of captions, and write and check captions. The control has the objects of other images."""
        result = self._evaluate(run, self._pretraining("caption"), self.runs.tables.captions(), [SHUFFLED])

        objects = self.runs.tables.objects()
        rows_I = result.measures["caption accuracy"].clusters_M
        keys = list(result.captions)

        # A cycle in a random order gives every image the objects of another one.
        order = np.random.default_rng(0).permutation(len(keys))
        shuffled_keys = {}
        for place, next_place in zip(order, np.roll(order, 1), strict=True):
            shuffled_keys[keys[place]] = keys[next_place]

        def judge(word_accuracy: MetricValues, judged_keys: Mapping[str, str]) -> Measures:
            verdicts = [check_caption(result.captions[key], objects[judged_keys[key]]) for key in keys]
            is_true = np.array([verdict.is_true for verdict in verdicts])
            is_whole = is_true & np.array([verdict.is_complete for verdict in verdicts])
            return {
                "word accuracy": word_accuracy,
                "true captions": MetricValues(is_true, rows_I),
                "true and complete captions": MetricValues(is_whole, rows_I),
            }

        measures = judge(result.measures["word accuracy"], {key: key for key in keys})
        control = judge(result.controls[SHUFFLED]["word accuracy"], shuffled_keys)
        return replace(result, measures=measures, controls={SHUFFLED: control})

    def fill_in(self, run: str) -> Result:
        """Predict masked words of captions."""
        return self._evaluate(run, self._pretraining("masked"), self.runs.tables.captions(), [SHUFFLED, BLIND])

    def complete(self, run: str) -> Result:
        """Predict the words that make statements true."""
        examples = self.runs.tables.open(self.runs.tables.test("shapes-statements"), "shapes")
        return self._evaluate(run, self._pretraining("statements"), examples, [SHUFFLED, BLIND])

    def describe(self, run: str) -> Result:
        """Classify texts. They have no items to shuffle, so the control is the network that was never pre-trained."""
        task = self._pretraining("describe")
        examples = self.runs.tables.open(self.runs.tables.test("descriptions"), None)
        control = self._evaluate(NEVER, task, examples)
        return replace(self._evaluate(run, task, examples), controls={NEVER: control.measures})

    def _pretraining(self, name: str) -> ExampleTask:
        return next(task for task in self.runs.tables.pretraining() if task.name == name)

    def _evaluate(
        self,
        run: str,
        task: ExampleTask,
        examples: TaskExamples,
        controls: Sequence[str] = (),
        groups: Mapping[str, Bools] | None = None,
    ) -> Result:
        path = self.runs.path(run)
        seed = self.runs.seed
        return evaluate_task(path, task, examples, seed=seed, controls=controls, groups=groups)

    def _retrieve_and_caption(self, _: str, run: str, data: str, tasks: Sequence[ExampleTask]) -> Result:
        examples, _groups = self.runs.tables.test_of(data)
        retrieval, captions = [self._evaluate(run, task, examples, [SHUFFLED]) for task in tasks]
        return replace(
            captions,
            measures={**retrieval.measures, **captions.measures},
            controls={SHUFFLED: {**retrieval.controls[SHUFFLED], **captions.controls[SHUFFLED]}},
            chance={**retrieval.chance, **captions.chance},
        )

    def _answer(self, model: str, run: str, data: str, tasks: Sequence[ExampleTask]) -> Result:
        (task,) = tasks
        examples, groups = self.runs.tables.test_of(data)

        if model in TUNINGS or model == ZERO_SHOT:
            controls = [SHUFFLED, BLIND] if task.kind == "answer" else [SHUFFLED]
            return self._evaluate(run, task, examples, controls, groups)

        # Models without a run: their answers come from counts or from a linear probe.
        if model == BLIND_ANSWERS:
            (all_answers,) = self.runs.tables.tuning(data, 1, seed=self.runs.seed)
            right = {"": answer_blindly(all_answers.train, examples)}
        else:
            right = self._probe(task, {"": examples, SHUFFLED: examples.shuffle_media(seed=0)})
        return self._summarize(right, examples, groups)

    def _test_speaker(self, model: str, speaker: str) -> Result:
        tables = self.runs.tables
        task = tables.letters(*(name for name in tables.speakers() if name != speaker))
        examples = tables.letters(speaker).train

        if model in ADAPTERS:
            result = self._evaluate(adapted_run(model, speaker), task, examples, [SHUFFLED])
        else:
            tests = {"": examples, SHUFFLED: examples.shuffle_media(seed=0)}
            result = self._summarize(self._probe(task, tests), examples, {})
        return replace(result, num_trained=len(task.train))

    def _summarize(self, right: Mapping[str, Bools], examples: TaskExamples, groups: Mapping[str, Bools]) -> Result:
        """Return the result of a model from control -> whether each example is right; "" is without a control."""
        assert examples.rows_N is not None
        metrics = {"accuracy": np.ones(len(examples), bool)}
        metrics |= {f"accuracy: {name}": is_in_N for name, is_in_N in groups.items()}

        controls: dict[str, Measures] = {}
        for control, is_right_N in right.items():
            values = {}
            for name, is_in_N in metrics.items():
                values[name] = MetricValues(is_right_N[is_in_N], examples.rows_N[is_in_N])
            controls[control] = values
        measures = controls.pop("")
        return Result(seed=self.runs.seed, num_examples=len(examples), measures=measures, controls=controls)

    def _probe(self, task: ExampleTask, tests: Mapping[str, TaskExamples]) -> dict[str, Bools]:
        """Fit logistic regression to the training examples, and return which test examples are right."""

        def read(examples: TaskExamples) -> Floats:
            return pool(examples, np.asarray(self.runs.tables.words.vectors_VD, np.float32))

        train = classifiers.Examples(vectors=read(task.train), labels=_labels(task, task.train))
        classifier = classifiers.fit_logistic(train, None, len(task.names))
        is_right = {}
        for control, examples in tests.items():
            is_right[control] = classifier.scores(read(examples)).argmax(axis=1) == _labels(task, examples)
        return is_right

    def _keep(
        self,
        model: str,
        question: str,
        runs: Sequence[str],
        compute: Callable[[], Result],
        progress: Progress | None,
    ) -> Result:
        """Read the result of these runs, or compute and write it."""
        # The digests of the weights say whether a stored result still belongs to the runs.
        weights = "+".join(Run.open(self.runs.path(run)).info.weights for run in runs)

        def compute_and_cut() -> Result:
            result = compute()
            return replace(result, captions=dict(list(result.captions.items())[:_NUM_CAPTIONS]))

        return keep_result(self.folder, model, question, weights, compute_and_cut, progress)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A measurement of a task of pre-training."""

    task: str
    compute: Callable[[Evaluation, str], Result]


MEASURED: Mapping[str, Measure] = {
    "classes of training": Measure(task="classify", compute=lambda evaluation, run: evaluation.classify(run, "test")),
    "pairs that are never in training": Measure(
        task="classify", compute=lambda evaluation, run: evaluation.classify(run, "unseen")
    ),
    "retrieval": Measure(task="retrieve", compute=Evaluation.retrieve),
    "captions": Measure(task="caption", compute=Evaluation.caption),
    "masked words": Measure(task="masked", compute=Evaluation.fill_in),
    "statements": Measure(task="statements", compute=Evaluation.complete),
    "descriptions": Measure(task="describe", compute=Evaluation.describe),
}
"""Name -> measurement of the pre-trained run and of the runs of one task."""


def pool(examples: TaskExamples, vectors_VD: Floats) -> Floats:
    """Return the mean token of each item, joined with the mean vector of the words of its text, each of length 1.

    Words without a vector are left out. Memory: the tokens of all distinct items.
    """
    assert examples.media is not None
    assert examples.rows_N is not None
    rows_I, item_N = np.unique(examples.rows_N, return_inverse=True)
    items_ND = to_unit_vectors(examples.media.read(rows_I))[item_N]
    if examples.text_words is None:
        return items_ND

    padded_NL, lengths_N = examples.text_words.padded()
    is_word_NL = (np.arange(padded_NL.shape[1]) < lengths_N[:, None]) & (padded_NL >= NUM_SPECIAL)

    # Many questions are the same text, so each text is averaged once.
    texts, text_N = np.unique(np.where(is_word_NL, padded_NL, -1), axis=0, return_inverse=True)
    means = [vectors_VD[row[row >= 0] - NUM_SPECIAL].mean(axis=0) for row in texts]
    return np.concatenate([items_ND, normalize(np.stack(means))[text_N.ravel()]], axis=1)


def _labels(task: ExampleTask, examples: TaskExamples) -> Ints:
    places = {name: number for number, name in enumerate(task.names)}
    place_F: Ints = np.array([places[name] for name in examples.targets.to_pylist()], np.int64)
    return place_F[examples.target_N]


def _join(parts: Sequence[Result]) -> Result:
    """Return the result of several folds on all of their examples."""

    def join(folds: Sequence[Measures]) -> Measures:
        joined = {}
        for name in folds[0]:
            values, clusters = zip(*(fold[name] for fold in folds), strict=True)
            joined[name] = MetricValues(np.concatenate(values), np.concatenate(clusters))
        return joined

    controls = {name: join([part.controls[name] for part in parts]) for name in parts[0].controls}
    num_examples = sum(part.num_examples for part in parts)
    measures = join([part.measures for part in parts])
    return replace(parts[0], num_examples=num_examples, measures=measures, controls=controls)


def evaluation_steps(
    seed_runs: Sequence[Runs], fractions: Sequence[float], tasks_alone: Sequence[str] = ()
) -> list[tuple[object, ...]]:
    """Return all measurements as steps of `run_parallel`.

    Args:
        seed_runs: the runs of each seed.
        fractions: fractions of the answers of easy-VQA.
        tasks_alone: tasks of pre-training whose separate runs are measured, with the first seed.
    """
    steps: list[tuple[object, ...]] = []
    for evaluation in (Evaluation(runs=runs) for runs in seed_runs):
        other_fractions = evaluation.runs.size.other_fractions
        steps += [(evaluation.measure, name) for name in MEASURED]
        steps += [(evaluation.test, ZERO_SHOT, data, 0) for data in (EASY_VQA, *other_fractions)]

        questions = [*((EASY_VQA, fraction) for fraction in fractions), *other_fractions.items()]
        steps += [(evaluation.test, model, *question) for question in questions for model in MODELS[question[0]]]
        steps += [(evaluation.test_letters, model) for model in MODELS[LETTERS]]

    # Runs of one task exist only for the first seed.
    first = Evaluation(runs=seed_runs[0])
    return steps + [
        (first.measure, name, run_alone(measure.task))
        for name, measure in MEASURED.items()
        if measure.task in tasks_alone
    ]
