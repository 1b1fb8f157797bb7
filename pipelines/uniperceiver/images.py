"""Images with predictions of the runs: their classes, a caption, and answers to questions."""

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from PIL import Image

from embedcache.arrays import Array
from embedcache.reports.figures import BAD, COLORS, INK, SOFT, open_axes
from embedcache.sources import FileItem, open_source
from pipelines.uniperceiver.answer import compute_probabilities
from pipelines.uniperceiver.evaluation import load_shared, write_item_captions
from pipelines.uniperceiver.network import SharedNetwork
from pipelines.uniperceiver.runs import PRETRAINED, Runs, tuned_run
from pipelines.uniperceiver.tables import EASY_VQA
from pipelines.uniperceiver.tasks import read_tokens
from pipelines.worlds import easy_vqa, shapes
from pipelines.worlds.examples import in_split

_NUM_CLASSES = 5
_ROW_IN = 1.35


class Answer(NamedTuple):
    """An answer to a question, and the expected answer."""

    question: str
    answer: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image with the predictions about it.

    Args:
        title: its key.
        pixels_HW3: uint8.
        classes: the most probable classes -> probability, in this order.
        labels: the correct classes.
        caption: a caption.
        is_true: whether the caption is true and mentions every shape.
        answers: answers to questions.
    """

    title: str
    pixels_HW3: Array
    classes: Mapping[str, float]
    labels: Collection[str]
    caption: str
    is_true: bool
    answers: Sequence[Answer] = ()


def show_images(runs: Runs, fraction: float) -> list[ShownImage]:
    """Return test images of shapes and of easy-VQA with predictions.

    Classes and captions come from the pre-trained run. The answers about easy-VQA come from prompts that were tuned on
    a fraction of its answers.
    """
    network, _ = load_shared(runs.path(PRETRAINED))
    num_shapes, num_photos = runs.size.num_shown

    world = open_source(runs.size.data.shapes, kind=shapes.KIND)
    objects = {key: names for key, names in runs.tables.objects().items() if key.startswith("test/")}
    files = {key: world.read(FileItem(path=f"{key}.png")) for key in list(objects)[:num_shapes]}
    shown = _describe(runs, network, "shapes", files, objects)

    photos = open_source("all", kind=easy_vqa.KIND)
    questions = _questions(runs)
    # The color and the shape, which two questions ask for, are the objects of a photo.
    objects = {}
    for key, answers in questions.items():
        if {"color", "shape"} <= answers.keys():
            objects[key] = [f"{answers['color'].expected} {answers['shape'].expected}"]
    items = {sample.key: sample.images[0] for sample in photos.samples()}
    files = {key: photos.read(items[key]) for key in list(objects)[:num_photos]}
    photos_shown = _describe(runs, network, "vqa", files, objects)

    tuned_network, tuned = load_shared(runs.path(tuned_run("prompts", EASY_VQA, fraction)))
    (task,) = tuned.info.settings["tasks"]
    tuned_answers = {key: _answer(runs, tuned_network, task["candidates"], key, questions[key]) for key in files}
    return shown + [replace(image, answers=tuned_answers[image.title]) for image in photos_shown]


def _describe(
    runs: Runs,
    network: SharedNetwork,
    cache_name: str,
    files: Mapping[str, bytes],
    objects: Mapping[str, Sequence[str]],
) -> list[ShownImage]:
    """Return images of a cache with their classes and captions, given key -> bytes and key -> objects."""
    media = runs.tables.media(cache_name)
    device = str(network.task_token.device)
    rows_I = media.find_rows(pa.chunked_array([list(files)]))
    tokens = read_tokens(media, rows_I, device=device)

    # The few images are one batch.
    names = shapes.class_names()
    probs_IC = compute_probabilities(network, tokens, names, kind="classify")

    (task,) = (task for task in runs.tables.pretraining() if task.kind == "caption")
    captions = write_item_captions(network, task, media, rows_I, device=device)

    shown = []
    for (key, data), probs_C in zip(files.items(), probs_IC, strict=True):
        verdict = shapes.check_caption(captions[key], objects[key])
        best = np.argsort(-probs_C, kind="stable")[:_NUM_CLASSES]
        shown.append(
            ShownImage(
                title=key,
                pixels_HW3=np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
                classes={names[number]: float(probs_C[number]) for number in best},
                labels={shapes.class_name(name) for name in objects[key]},
                caption=captions[key],
                is_true=verdict.is_true and verdict.is_complete,
            )
        )
    return shown


def _questions(runs: Runs) -> dict[str, dict[str, Answer]]:
    """Return key of a test image of easy-VQA -> kind of question -> its first question, without an answer."""
    table = in_split(runs.data.examples("vqa"), "test").select(["key", "kind", "text", "target"])
    questions: dict[str, dict[str, Answer]] = {}
    for key, kind, question, expected in zip(*table.to_pydict().values(), strict=True):
        questions.setdefault(key, {}).setdefault(kind, Answer(question, "", expected))
    return questions


def _answer(
    runs: Runs, network: SharedNetwork, names: Sequence[str], key: str, image_questions: Mapping[str, Answer]
) -> list[Answer]:
    """Answer a question of each kind about an image of easy-VQA."""
    questions = [image_questions[kind] for kind in easy_vqa.KINDS if kind in image_questions]
    media = runs.tables.media("vqa")

    # One row per question, all of the same image.
    rows_N = media.find_rows(pa.chunked_array([[key] * len(questions)]))
    tokens = read_tokens(media, rows_N, device=str(network.task_token.device))

    texts = [item.question for item in questions]
    best_N = compute_probabilities(network, tokens, names, kind="answer", questions=texts).argmax(axis=1)
    return [item._replace(answer=names[number]) for item, number in zip(questions, best_N.tolist(), strict=True)]


def image_figure(images: Sequence[ShownImage]) -> Figure:
    """Draw each image, its classes as bars, its caption and its answers. Wrong predictions are red."""
    axes = open_axes(
        _ROW_IN * len(images),
        width=11,
        nrows=len(images),
        ncols=3,
        squeeze=False,
        gridspec_kw={"width_ratios": (1.2, 2.2, 4.6)},
    )
    for (picture, bars, texts), image in zip(axes, images, strict=True):
        picture.imshow(image.pixels_HW3, interpolation="nearest")
        picture.set_axis_off()
        picture.set_title(image.title, fontsize=7, color=INK, pad=2)

        names = list(image.classes)
        colors = []
        for place, name in enumerate(names):
            wrong_color = SOFT if place else BAD  # only the best class counts as wrong
            colors.append(COLORS[1] if name in image.labels else wrong_color)
        rectangles = bars.barh(range(len(names)), list(image.classes.values()), color=colors, height=0.7)
        bars.bar_label(rectangles, fmt="{:.0%}", padding=3, fontsize=7, color=INK)
        bars.set(xlim=(0, 1.15), xticks=[])
        bars.set_yticks(range(len(names)), names, fontsize=7, color=INK)
        bars.invert_yaxis()
        for side in ("top", "right", "bottom"):
            bars.spines[side].set_visible(False)

        texts.set_axis_off()

        lines = [(f"“{image.caption}”", image.is_true)]
        for question, answer, expected in image.answers:
            wrong = "" if answer == expected else f", not {expected}"
            lines.append((f"{question}  {answer}{wrong}", not wrong))

        for place, (text, is_right) in enumerate(lines):
            style = {"transform": texts.transAxes, "va": "top", "fontsize": 9, "color": INK if is_right else BAD}
            texts.text(0, 0.95 - 0.2 * place, "✓" if is_right else "✗", **style)
            texts.text(0.035, 0.95 - 0.2 * place, text, **style)
    figure: Figure = axes[0, 0].figure
    return figure
