"""Images with what runs say about them: their classes, a caption, and answers to questions."""

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
    """An answer to a question, and the right one."""

    question: str
    answer: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image and what was found in it.

    Args:
        title: its key.
        pixels_HW3: uint8.
        classes: the most probable classes -> probability, in this order.
        labels: the classes that are right.
        caption: a caption.
        is_true: whether all that it says is true, and it mentions every shape.
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
    """Return test images of shapes, and of easy-VQA with answers of the prompts that a fraction of its answers tuned.

    Classes and captions are those of the pre-trained run.
    """
    network, _ = load_shared(runs.path(PRETRAINED))
    num_shapes, num_photos = runs.size.num_shown

    world = open_source(runs.size.data.shapes, kind=shapes.KIND)
    objects = {key: names for key, names in runs.tables.objects().items() if key.startswith("test/")}
    files = {key: world.read(FileItem(path=f"{key}.png")) for key in list(objects)[:num_shapes]}
    shown = _describe(runs, network, "shapes", files, objects)

    photos = open_source("all", kind=easy_vqa.KIND)
    asked = _questions(runs)
    objects = {
        key: [f"{found['color'].expected} {found['shape'].expected}"]
        for key, found in asked.items()
        if {"color", "shape"} <= found.keys()
    }
    items = {sample.key: sample.images[0] for sample in photos.samples()}
    files = {key: photos.read(items[key]) for key in list(objects)[:num_photos]}
    described = _describe(runs, network, "vqa", files, objects)

    tuned_network, tuned = load_shared(runs.path(tuned_run("prompts", EASY_VQA, fraction)))
    (task,) = tuned.info.settings["tasks"]
    answers = {key: _answer(runs, tuned_network, task["candidates"], key, asked[key]) for key in files}
    return shown + [replace(image, answers=answers[image.title]) for image in described]


def _describe(
    runs: Runs,
    network: SharedNetwork,
    cache_name: str,
    files: Mapping[str, bytes],
    objects: Mapping[str, Sequence[str]],
) -> list[ShownImage]:
    """Return images of a cache with their classes and captions, given the bytes and the objects of each by its key."""
    media, device = runs.tables.media(cache_name), str(network.task_token.device)
    rows_I = media.find_rows(pa.chunked_array([list(files)]))
    tokens = read_tokens(media, rows_I, device=device)
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
    """Return key of a test image of easy-VQA -> kind of a question -> the first one about it, not answered."""
    table = in_split(runs.data.examples("vqa"), "test").select(["key", "kind", "text", "target"])
    found: dict[str, dict[str, Answer]] = {}
    for key, kind, question, expected in zip(*table.to_pydict().values(), strict=True):
        found.setdefault(key, {}).setdefault(kind, Answer(question, "", expected))
    return found


def _answer(
    runs: Runs, network: SharedNetwork, names: Sequence[str], key: str, asked: Mapping[str, Answer]
) -> list[Answer]:
    """Answer a question of each kind about an image of easy-VQA."""
    questions = [asked[kind] for kind in easy_vqa.KINDS if kind in asked]
    media = runs.tables.media("vqa")
    rows_N = media.find_rows(pa.chunked_array([[key] * len(questions)]))
    tokens = read_tokens(media, rows_N, device=str(network.task_token.device))

    texts = [item.question for item in questions]
    best_N = compute_probabilities(network, tokens, names, kind="answer", questions=texts).argmax(axis=1)
    return [item._replace(answer=names[number]) for item, number in zip(questions, best_N.tolist(), strict=True)]


def image_figure(images: Sequence[ShownImage]) -> Figure:
    """Draw each image beside its classes as bars, its caption and its answers; what is wrong is red."""
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
        best = [COLORS[1] if name in image.labels else BAD if not place else SOFT for place, name in enumerate(names)]
        drawn = bars.barh(range(len(names)), list(image.classes.values()), color=best, height=0.7)
        bars.bar_label(drawn, fmt="{:.0%}", padding=3, fontsize=7, color=INK)
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
