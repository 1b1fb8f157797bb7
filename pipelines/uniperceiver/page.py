"""The page of one likelihood for every task: tables over seeds, curves, and images with what runs say about them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from embedcache.metrics.intervals import Estimate
from embedcache.reports.base import Table
from pipelines import results as pages
from pipelines.curves import Curves, estimate_curves
from pipelines.results import Part, Results
from pipelines.uniperceiver.evaluation import BLIND, SHUFFLED
from pipelines.uniperceiver.images import ShownImage, image_figure
from pipelines.uniperceiver.measures import BLIND_ANSWERS, MEASURED, MODELS, ZERO_SHOT
from pipelines.uniperceiver.runs import NEVER, PRETRAINED, TUNINGS, question_name, run_alone
from pipelines.uniperceiver.tables import EASY_VQA, EMOJI, FASHION, LETTERS

TITLE = "One likelihood for every task on cached features"
CREDIT = (
    "Drawings: OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0. Recorded letters: "
    "Allison Smith, from Asterisk's core sounds (Debian package asterisk-core-sounds-en-g722), CC BY-SA 3.0; KLettres "
    "(klettres-data), GPL-2 or later. Images and questions of easy-VQA: Victor Zhou, MIT license. Fashion-MNIST: "
    "Zalando (Debian package dataset-fashion-mnist), MIT license. Descriptions: CuPL (Pratt et al., ICCV 2023), from "
    "the package clip-benchmark, MIT license."
)
NOTES = (
    'One small transformer on features of frozen encoders answers every task by the same likelihood, as in "'
    'Uni-Perceiver: Pre-training Unified Architecture for Generic Perception for Zero-shot and Few-shot Tasks" (CVPR '
    "2022). It is pre-trained on images of shapes (their classes, captions, masked words, and the words that make "
    "statements of what an image has or lacks true) and on descriptions whose classes are to be found, all together. "
    "Then it meets what pre-training has not, neither items nor texts: questions about the images of easy-VQA, the "
    "drawings of OpenMoji with their names, the classes of Fashion-MNIST, and recorded letters, a modality without an "
    "adapter so far.",
    "What is synthetic: the images of shapes are drawn, and their captions and statements written, by a program; so "
    "are the images and questions of easy-VQA, by another one. The descriptions were written by a language model. "
    "Drawings and names of OpenMoji are people's work, Fashion-MNIST consists of photographs, and the letters are "
    "recorded speech of three people.",
    "Tuning trains on a draw of the training examples, of answers stratified by kind and answer, of labels by class. "
    "Prompts are on keys and values, and LayerNorms and scales are trained with them; the transformer stays as it is. "
    "The epoch is chosen on validation images, whose answers, labels and captions are not in the draw. A new adapter "
    "is trained with a scale and nothing else, for a fixed number of steps. Linear probes are logistic regression with "
    "fixed regularization. Blind: the most frequent answer of each question. Items of others: each example with the "
    "image or recording of another one.",
    "What cannot be concluded: no figure of the paper is repeated. A network that was never pre-trained, tuned in the "
    "same way, is the control of what prompts and norms, or an adapter, learn by themselves.",
)


class Column(NamedTuple):
    """A column of a table of models: a metric, or that of a control."""

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
_ABOUT: Mapping[str, str] = {
    EASY_VQA: "{trained:,} answers to train on, {count:,} to test. Open questions are answered by a color or a shape; "
    "negated ones by yes or no. The control of open questions has the image of another question, or none.",
    EMOJI: "{trained:,} captions to train on. Retrieval is among {count:,} test captions and their images; equal "
    "captions are correct. Captions are tested word by word after the true words, among all words of names, and "
    "written whole. Parts are divided by captions that are near-duplicates (cosine above 0.7): what a test caption "
    "says, no training caption says in other words.",
    FASHION: "{trained:,} labels to train on, {count:,} images to test, and 10 classes by their names, such as `ankle "
    "boot`. The fraction is of the 60,000 published training labels.",
    LETTERS: "{count} recordings and 26 letters by their names. Each speaker in turn is the test, and is not in "
    "training: {trained} recordings of the others are.",
}


def write_pages(
    folder: Path,
    results: Results,
    fractions: Sequence[float],
    others: Mapping[str, float],
    images: Sequence[ShownImage] = (),
) -> None:
    """Write `uniperceiver.html`, and `uniperceiver.md` with its figures, into the folder.

    Args:
        folder: folder of the pages.
        results: results of all seeds.
        fractions: fractions of the answers of easy-VQA.
        others: other downstream data -> its fraction.
        images: images with what runs say about them.
    """
    parts = _parts(results, fractions, others)
    if images:
        note = (
            "Test images of the world of shapes, then of easy-VQA. Bars are probabilities of classes, all 40 of the "
            "world of shapes; green ones are right. The quoted caption is right if all of it is true and it mentions "
            f"every shape. Questions are answered after tuning prompts on {100 * min(fractions):g} % of the answers."
        )
        parts.append(Part("What the runs say about images", [note], figure=image_figure(images), name="images"))
    summary = summarize(results, fractions)
    pages.write_pages(folder / "uniperceiver", TITLE, parts, notes=NOTES, summary=summary, credit=CREDIT)


def summarize(results: Results, fractions: Sequence[float]) -> str:
    """Return the accuracy on open questions of easy-VQA of each model in a few sentences."""
    lines = []
    for fraction in fractions:
        question = question_name(EASY_VQA, fraction)
        models = [model for model in MODELS[EASY_VQA] if model in results.models(question)]
        found = {model: results.estimate(model, question, "accuracy: open") for model in models}
        rates = [f"{model} {100 * item.value:.1f}" for model, item in found.items() if item is not None]
        lines.append(f"With {100 * fraction:g} % of the answers: {'; '.join(rates)}.")
    return " ".join(["Accuracy on open questions of easy-VQA in percent.", *lines])


def title_of(data: str, fraction: float) -> str:
    """Return the title of the table of models that are tuned on a fraction of some downstream data."""
    if data == LETTERS:
        return "Letters of unknown speakers"
    return f"{data} with {100 * fraction:g} % of its training examples"


def novel_table(results: Results, data: str, fraction: float) -> Table:
    """Return the results of all models that have a fraction of some downstream data, in percent."""
    return model_table(results, data, fraction, MODELS[data], COLUMNS[data])


def answer_curves(results: Results, fractions: Sequence[float]) -> Figure:
    """Draw the accuracy of each model on easy-VQA, on all and on two kinds of questions, by the fraction of answers.

    With none, models that start from the pre-trained run are that run, and others have no accuracy.
    """
    places = sorted({0, *fractions})

    def line(model: str, measure: str) -> list[Estimate | None]:
        is_pretrained = model in TUNINGS and TUNINGS[model].start == PRETRAINED
        asked = [
            (ZERO_SHOT if is_pretrained and not place else model, question_name(EASY_VQA, place)) for place in places
        ]
        return [
            results.estimate(name, question, measure) if name in results.models(question) else None
            for name, question in asked
        ]

    panels = {"all questions": "accuracy", "open": "accuracy: open", "yes-no": "accuracy: yes-no"}
    return estimate_curves(
        {
            title: Curves(
                [f"{100 * place:g} %" for place in places],
                {model: line(model, measure) for model in MODELS[EASY_VQA]},
            )
            for title, measure in panels.items()
        },
        x="fraction of the training answers",
        y="accuracy",
        controls=[*BLIND_ANSWERS, *(model for model, tuning in TUNINGS.items() if tuning.start == NEVER)],
    )


def _parts(results: Results, fractions: Sequence[float], others: Mapping[str, float]) -> list[Part]:
    """Return the sections with tables, and the curves."""
    questions = list(MEASURED)
    seeds = [result.seed for result in results.seeds(PRETRAINED, questions[0])]
    averaged = (
        f"Seed {seeds[0]} alone, with 95% intervals over items."
        if len(seeds) == 1
        else f"Means over the seeds {', '.join(map(str, seeds))}, with 95% intervals over seeds and items."
    )
    parts = [Part("Tasks of pre-training", [averaged], pretraining_table(results, questions))]
    for data, fraction in [*((EASY_VQA, fraction) for fraction in fractions), *others.items(), (LETTERS, 1)]:
        question = question_name(data, fraction)
        result = results.seeds(MODELS[data][0], question)[0]
        about = _ABOUT[data].format(count=result.num_examples, trained=result.num_trained)
        parts.append(Part(title_of(data, fraction), [averaged, about], novel_table(results, data, fraction)))
    curves = answer_curves(results, fractions)
    parts.insert(1, Part("easy-VQA by the fraction of answers", [averaged], figure=curves, name="curves"))
    tasks_alone = {name: run_alone(measure.task) for name, measure in MEASURED.items()}
    columns, rows = interference_table(results, tasks_alone)
    if rows:
        note = "The first seed. One task alone has its own batches as often as among all, and no others."
        parts.append(Part("Interference", [note], (columns, rows)))
    captions = results.seeds(PRETRAINED, "captions")[0].captions
    table = ["image", "caption"], [[*row] for row in captions.items()]
    return [*parts, Part("Captions", ["The first test images."], table)]


def pretraining_table(results: Results, questions: Sequence[str]) -> Table:
    """Return each metric of the pre-trained run beside its controls and chance, in percent."""
    columns = ["in %", PRETRAINED, "control", "chance", "examples"]
    rows = []
    for question in questions:
        first = results.seeds(PRETRAINED, question)[0]
        for measure in first.measures:
            controls = {name: results.estimate(PRETRAINED, question, measure, control=name) for name in first.controls}
            shown = [f"{name}: {100 * found.value:.1f}" for name, found in controls.items() if found is not None]
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
    """Return what models do with a fraction of some data, in percent; the first row has none of it, the last is chance.

    Models without results are left out.
    """
    rows: list[list[str]] = []
    chance: dict[str, float] = {}
    for question, model in [(question_name(data, 0), ZERO_SHOT), *((question_name(data, fraction), m) for m in models)]:
        if model in results.models(question):
            cells = [results.estimate(model, question, name, control=control) for _, name, control in columns]
            rows.append([model, *map(_percent, cells)])
            chance |= results.seeds(model, question)[0].chance
    values = [chance.get(name) if control is None else None for _, name, control in columns]
    if any(value is not None for value in values):
        rows.append(["chance", *("" if value is None else f"{100 * value:.1f}" for value in values)])
    return ["in %", *(title for title, _, _ in columns)], rows


def interference_table(results: Results, questions: Mapping[str, str]) -> Table:
    """Return each metric of the run of all tasks, beside that of the run of its own task alone, in percent.

    Args:
        questions: question -> model that was trained on its task alone; those without results are left out.
    """
    rows = []
    for question, alone in questions.items():
        if alone not in results.models(question):
            continue
        result = results.seeds(alone, question)[0]
        together = next(found for found in results.seeds(PRETRAINED, question) if found.seed == result.seed)
        for measure, values in result.measures.items():
            pair = [found.estimate() for found in (together.measures[measure], values)]
            rows.append([f"{question}: {measure}", *map(_percent, pair)])
    return ["in %", "all tasks together", "one task alone"], rows


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
