"""Images with what runs say about them, as a user asks: their classes, a caption, and answers to questions."""

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import embedcache
from embedcache.arrays import Array
from embedcache.likelihood.model import LikelihoodModel
from embedcache.reports.base import BAD, COLORS, INK, SOFT, open_axes
from embedcache.sources import FileItem, open_source
from pipelines.perceiver.results import PRETRAINED
from pipelines.perceiver.runs import Runs, tuned_run
from pipelines.perceiver.tasks import EASY_VQA
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

    Classes and captions are those of the pre-trained run. Both runs are loaded as a user loads them, and read files.
    """
    model = embedcache.load(runs.path(PRETRAINED), kind="likelihood")
    tuned_model = embedcache.load(runs.path(tuned_run("prompts", EASY_VQA, fraction)), kind="likelihood")
    world, photos = open_source(runs.size.data.shapes, kind=shapes.KIND), open_source("all", kind=easy_vqa.KIND)
    num_shapes, num_photos = runs.size.num_shown
    objects = {key: names for key, names in runs.tables.objects().items() if key.startswith("test/")}
    files = {key: world.read(FileItem(path=f"{key}.png")) for key in list(objects)[:num_shapes]}
    shown = _describe(model, files, objects)
    asked = _questions(runs)
    objects = {
        key: [f"{found['color'].expected} {found['shape'].expected}"]
        for key, found in asked.items()
        if {"color", "shape"} <= found.keys()
    }
    items = {sample.key: sample.images[0] for sample in photos.samples()}
    files = {key: photos.read(items[key]) for key in list(objects)[:num_photos]}
    return shown + [
        replace(image, answers=_answer(tuned_model, files[image.title], asked[image.title]))
        for image in _describe(model, files, objects)
    ]


def _describe(
    model: LikelihoodModel, files: Mapping[str, bytes], objects: Mapping[str, Sequence[str]]
) -> list[ShownImage]:
    """Return images with their classes and captions, given the bytes and the objects of each by its key."""
    scores, captions = model.classify([*files.values()], shapes.class_names()), model.caption([*files.values()])
    shown = []
    for (key, data), top, caption in zip(files.items(), scores.top(_NUM_CLASSES), captions, strict=True):
        verdict = shapes.check_caption(caption, objects[key])
        shown.append(
            ShownImage(
                title=key,
                pixels_HW3=np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
                classes=dict(top),
                labels={shapes.class_name(name) for name in objects[key]},
                caption=caption,
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


def _answer(model: LikelihoodModel, data: bytes, asked: Mapping[str, Answer]) -> list[Answer]:
    """Answer a question of each kind about an image, as the task of the run."""
    found = [asked[kind] for kind in easy_vqa.KINDS if kind in asked]
    answers = model.answer([data] * len(found), [item.question for item in found]).best
    return [item._replace(answer=answer) for item, answer in zip(found, answers, strict=True)]


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
