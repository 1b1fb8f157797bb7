"""The page of the pipeline: tables over seeds, curves, and images with predictions of the runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from embedcache.metrics import Estimate
from embedcache.reports.render import Table
from pipelines import results as pages
from pipelines.curves import Curves, estimate_curves
from pipelines.results import Part, Results
from pipelines.uniperceiver.evaluation import BLIND, SHUFFLED
from pipelines.uniperceiver.images import ShownImage, image_figure
from pipelines.uniperceiver.measures import BLIND_ANSWERS, MEASURED, MODELS, ZERO_SHOT
from pipelines.uniperceiver.runs import NEVER, PRETRAINED, TUNINGS, question_name, run_alone
from pipelines.uniperceiver.tables import EASY_VQA, EMOJI, FASHION, LETTERS

TITLE = "One network for every task on cached features"
CREDIT = (
    "Drawings: OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0. Recorded letters: "
    "Allison Smith, from Asterisk's core sounds (Debian package asterisk-core-sounds-en-g722), CC BY-SA 3.0; KLettres "
    "(klettres-data), GPL-2 or later. Images and questions of easy-VQA: Victor Zhou, MIT license. Fashion-MNIST: "
    "Zalando (Debian package dataset-fashion-mnist), MIT license. Descriptions: CuPL (Pratt et al., ICCV 2023), from "
    "the package clip-benchmark, MIT license."
)
NOTES = (
    "Shapes, their captions and statements, and easy-VQA are drawn and written by programs. The descriptions were "
    "written by a language model. No figure of the paper is repeated. The comparison is explained in "
    "`pipelines/uniperceiver/RESULTS.md`.",
)


class Column(NamedTuple):
    """A column of a table of models: a metric, of the model or of a control."""

    title: str
    measure: str
    control: str | None = None


COLUMNS: Mapping[str, Sequence[Column]] = {
    EASY_VQA: (
        Column("all", "accuracy"),
        Column("open", "accuracy: open"),
        Column("yes-no", "accuracy: yes-no"),
        Column("negated", "accuracy: negated"),
        Column(f"open, {SHUFFLED}", "accuracy: open", SHUFFLED),
        Column(f"open, {BLIND}", "accuracy: open", BLIND),
    ),
    EMOJI: (
        *(
            Column(f"{title} R@{k}", f"{side} r@{k}")
            for title, side in (("image to text", "item to text"), ("text to image", "text to item"))
            for k in (1, 10)
        ),
        Column(f"image to text R@10, {SHUFFLED}", "item to text r@10", SHUFFLED),
        Column("words of captions", "word accuracy"),
        Column(f"words, {SHUFFLED}", "word accuracy", SHUFFLED),
        Column("whole captions", "caption accuracy"),
    ),
    FASHION: (Column("accuracy", "accuracy"), Column(f"accuracy, {SHUFFLED}", "accuracy", SHUFFLED)),
    LETTERS: (Column("accuracy", "accuracy"), Column(f"accuracy, {SHUFFLED}", "accuracy", SHUFFLED)),
}
"""Downstream data -> columns of its table."""


def write_pages(
    folder: Path,
    results: Results,
    fractions: Sequence[float],
    other_fractions: Mapping[str, float],
    images: Sequence[ShownImage] = (),
) -> None:
    """Write `uniperceiver.html`, and `uniperceiver.md` with its figures, into the folder.

    Args:
        folder: folder of the pages.
        results: results of all seeds.
        fractions: fractions of the answers of easy-VQA.
        other_fractions: other downstream data -> its fraction.
        images: images with predictions of the runs.
    """
    parts = _parts(results, fractions, other_fractions)
    if images:
        note = (
            "Test images of the world of shapes, then of easy-VQA. Bars are probabilities of classes, all 40 of the "
            "world of shapes; green ones are right. The quoted caption is right if all of it is true and it mentions "
            f"every shape. Questions are answered after tuning prompts on {100 * min(fractions):g} % of the answers."
        )
        parts.append(Part("What the runs say about images", [note], figure=image_figure(images), name="images"))

    pages.write_pages(folder / "uniperceiver", TITLE, parts, notes=NOTES, credit=CREDIT)


def title_of(data: str, fraction: float) -> str:
    """Return the title of the table of models that are tuned on a fraction of downstream data."""
    if data == LETTERS:
        return "Letters of unknown speakers"
    return f"{data} with {100 * fraction:g} % of its training examples"


def novel_table(results: Results, data: str, fraction: float) -> Table:
    """Return the results of all models that are trained on a fraction of downstream data, in percent."""
    return model_table(results, data, fraction, MODELS[data], COLUMNS[data])


def answer_curves(results: Results, fractions: Sequence[float]) -> Figure:
    """Draw the accuracy of each model on easy-VQA, on all and on two kinds of questions, by the fraction of answers.

    At 0 %, models that start from the pre-trained run are that run, and others have no accuracy.
    """
    places = sorted({0, *fractions})

    def line(model: str, measure: str) -> list[Estimate | None]:
        is_pretrained = model in TUNINGS and TUNINGS[model].start == PRETRAINED
        estimates: list[Estimate | None] = []
        for place in places:
            name = ZERO_SHOT if is_pretrained and not place else model
            question = question_name(EASY_VQA, place)
            is_measured = name in results.models(question)
            estimates.append(results.estimate(name, question, measure) if is_measured else None)
        return estimates

    panels = {"all questions": "accuracy", "open": "accuracy: open", "yes-no": "accuracy: yes-no"}
    labels = [f"{100 * place:g} %" for place in places]
    curves = {}
    for title, measure in panels.items():
        curves[title] = Curves(labels, {model: line(model, measure) for model in MODELS[EASY_VQA]})

    controls = [BLIND_ANSWERS, *(model for model, tuning in TUNINGS.items() if tuning.start == NEVER)]
    return estimate_curves(curves, x="fraction of the training answers", y="accuracy", controls=controls)


def _parts(results: Results, fractions: Sequence[float], other_fractions: Mapping[str, float]) -> list[Part]:
    """Return the sections with tables, and the curves."""
    questions = list(MEASURED)
    seeds = [result.seed for result in results.seeds(PRETRAINED, questions[0])]

    seeds_note = (
        f"Seed {seeds[0]} alone, with 95% intervals over items."
        if len(seeds) == 1
        else f"Means over the seeds {', '.join(map(str, seeds))}, with 95% intervals over seeds and items."
    )

    parts = [Part("Tasks of pre-training", [seeds_note], pretraining_table(results, questions))]
    for data, fraction in [*((EASY_VQA, fraction) for fraction in fractions), *other_fractions.items(), (LETTERS, 1)]:
        question = question_name(data, fraction)

        # All models of a data set have the same examples.
        result = results.seeds(MODELS[data][0], question)[0]
        counts = f"{result.num_trained:,} examples to train on, {result.num_examples:,} to test."
        parts.append(Part(title_of(data, fraction), [seeds_note, counts], novel_table(results, data, fraction)))

    curves = answer_curves(results, fractions)
    parts.insert(1, Part("easy-VQA by the fraction of answers", [seeds_note], figure=curves, name="curves"))

    tasks_alone = {name: run_alone(measure.task) for name, measure in MEASURED.items()}
    columns, rows = interference_table(results, tasks_alone)
    if rows:
        note = "The first seed. One task alone has its own batches as often as among all, and no others."
        parts.append(Part("Interference", [note], (columns, rows)))
    return parts


def pretraining_table(results: Results, questions: Sequence[str]) -> Table:
    """Return each metric of the pre-trained run with its controls and chance, in percent."""
    columns = ["in %", PRETRAINED, "control", "chance", "examples"]

    rows = []
    for question in questions:
        first = results.seeds(PRETRAINED, question)[0]
        for measure in first.measures:
            controls = {name: results.estimate(PRETRAINED, question, measure, control=name) for name in first.controls}
            shown = [f"{name}: {100 * value.value:.1f}" for name, value in controls.items() if value is not None]
            chance = first.chance.get(measure)
            rows.append([
                f"{question}: {measure}",
                _percent(results.estimate(PRETRAINED, question, measure)),
                "; ".join(shown),
                "" if chance is None else f"{100 * chance:.1f}",
                f"{first.num_examples:,}",
            ])  # fmt: skip
    return columns, rows


def model_table(
    results: Results, data: str, fraction: float, models: Sequence[str], columns: Sequence[Column]
) -> Table:
    """Return the results of models, in percent, after the untuned pre-trained run in the first row and before chance.

    Models without results are left out.
    """
    rows: list[list[str]] = []
    chance: dict[str, float] = {}
    models_of_rows = [(question_name(data, 0), ZERO_SHOT), *((question_name(data, fraction), name) for name in models)]
    for question, model in models_of_rows:
        if model in results.models(question):
            cells = [results.estimate(model, question, name, control=control) for _, name, control in columns]
            rows.append([model, *map(_percent, cells)])
            chance |= results.seeds(model, question)[0].chance

    values = [chance.get(name) if control is None else None for _, name, control in columns]
    if any(value is not None for value in values):
        rows.append(["chance", *("" if value is None else f"{100 * value:.1f}" for value in values)])
    return ["in %", *(title for title, _, _ in columns)], rows


def interference_table(results: Results, questions: Mapping[str, str]) -> Table:
    """Compare each metric of the run of all tasks with the run of that task only, in percent.

    Args:
        questions: question -> model that was trained only on its task. Models without results are left out.
    """
    rows = []
    for question, model in questions.items():
        if model not in results.models(question):
            continue
        result = results.seeds(model, question)[0]

        # The ablation has one seed, so it is compared with the same seed of the joint run.
        together = next(item for item in results.seeds(PRETRAINED, question) if item.seed == result.seed)

        for measure, values in result.measures.items():
            pair = [metric.estimate() for metric in (together.measures[measure], values)]
            rows.append([f"{question}: {measure}", *map(_percent, pair)])
    return ["in %", "all tasks together", "one task alone"], rows


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
