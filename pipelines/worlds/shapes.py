"""A world of colored shapes: images with classes and captions that are true by construction.

    open_source("seed=0,train=9000", kind="pipelines.worlds.shapes:ShapesSource")

A sample is an image of one to three shapes. Its scene and its bytes follow from the key and the seed, so nothing is
stored. The splits are `train`, `valid`, `test` and `unseen`. Each image of `unseen` has one of the six pairs of color
and shape in `UNSEEN`, which no other split has. Nothing in this world is a question or an answer.

Captions describe all shapes of an image by pair, count and order from left to right. `check_caption` parses a caption
without the code that wrote it, and returns whether it is true and complete.
"""

import io
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations, product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from embedcache.errors import ItemError
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.sources.open import SourceSettings
from pipelines.worlds.locations import parse_location

KIND = "pipelines.worlds.shapes:ShapesSource"
RGB: TypeAlias = tuple[int, int, int]

COLORS: Mapping[str, tuple[RGB, RGB]] = {
    "red": ((255, 0, 0), (205, 35, 45)),
    "green": ((0, 255, 0), (20, 120, 40)),
    "blue": ((0, 0, 255), (65, 115, 225)),
    "yellow": ((255, 255, 0), (240, 205, 30)),
    "gray": ((128, 128, 128), (165, 165, 170)),
    "teal": ((0, 128, 128), (45, 170, 165)),
    "black": ((0, 0, 0), (45, 45, 50)),
    "brown": ((165, 42, 42), (120, 72, 35)),
    "orange": ((255, 165, 0), (240, 120, 25)),
    "purple": ((128, 0, 128), (150, 75, 205)),
}
"""Color -> two of its shades, of which the first is the web color of that name or close to it. The color of a shape is
between them."""
SHAPES = ("circle", "rectangle", "triangle", "star")
UNSEEN = (
    ("red", "triangle"),
    ("yellow", "circle"),
    ("gray", "star"),
    ("teal", "circle"),
    ("brown", "triangle"),
    ("purple", "rectangle"),
)
"""Pairs of color and shape that only the split `unseen` has."""
SPLITS = ("train", "valid", "test", "unseen")
SIZE_PX = 64
_DEFAULTS: Mapping[str, int] = {"seed": 0, "train": 9000, "valid": 600, "test": 1000, "unseen": 800}
_COUNTS = (1, 1, 2, 2, 3)  # shapes of five consecutive images
_RADIUS_PX = {1: (5.0, 16.0), 2: (5.0, 13.0), 3: (5.0, 9.5)}
_APART_PX = 9.0  # between the centers of two shapes, from left to right
_SCALE = 4  # images are drawn at this multiple of their size
_SAME = 0.4  # probability that a shape equals the first one
_NUMBERS = {"one": 1, "two": 2, "three": 3}
_WORDS = {number: word for word, number in _NUMBERS.items()}
_STATEMENTS: Sequence[tuple[str, str, str]] = (
    ("there is _ {thing}", "{article}", "no"),
    ("the image _ {article} {thing}", "contains", "lacks"),
    ("{article} {thing} is _", "present", "absent"),
    ("that there is {article} {thing} is _", "true", "false"),
    ("that there is {article} {thing} in the image is _", "true", "false"),
    ("that the image does contain {article} {thing} is _", "true", "false"),
    ("that {article} {thing} is present is _", "true", "false"),
    ("that there is not {article} {thing} is _", "false", "true"),
    ("that there is no {thing} in the image is _", "false", "true"),
    ("that the image does not contain {article} {thing} is _", "false", "true"),
    ("that no {thing} is present is _", "false", "true"),
)
"""Statements with a missing word, the word if an image has the thing, and the word if it does not."""


class Shape(NamedTuple):
    """A shape: its pair, its center and bounding radius in pixels, and its drawing."""

    color: str
    shape: str
    x: float
    y: float
    radius: float
    rgb: RGB
    angle: float
    aspect: float

    @property
    def name(self) -> str:
        """Color and shape."""
        return f"{self.color} {self.shape}"


class Verdict(NamedTuple):
    """Whether a caption is true, and whether it mentions every shape."""

    is_true: bool
    is_complete: bool


class ShapesSource:
    """Images of shapes with captions. The location is `name=value,…`: `seed`, and number of images of each split.

    Columns are `split`; `label`, such as `a red circle`, or None for images of several shapes; and `objects`, the names
    of all shapes from left to right, joined by commas.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("shapes")
        self._values = parse_location("shapes", location, _DEFAULTS)

    def describe(self) -> Mapping[str, Any]:
        path = ",".join(f"{name}={value}" for name, value in self._values.items())
        return {"type": KIND, "path": path, "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the images, split by split."""
        for split in SPLITS:
            for number in range(self._values[split]):
                key = f"{split}/{number:05d}"
                names = [shape.name for shape in self.scene(key)]
                yield Sample(
                    key=key,
                    images=(FileItem(path=f"{key}.png"),),
                    texts=tuple(TextItem(text=text, language="en") for text in write_captions(names)),
                    columns={
                        "split": split,
                        "label": class_name(names[0]) if len(names) == 1 else None,
                        "objects": ",".join(names),
                    },
                )

    def read(self, item: FileItem) -> bytes:
        """Draw an image as a PNG of 64 x 64 pixels."""
        key, _, suffix = item.path.rpartition(".")
        split, _, number = key.partition("/")
        if suffix != "png" or split not in SPLITS or not number.isdecimal():
            raise ItemError(f"expected SPLIT/NUMBER.png with a split of {', '.join(SPLITS)}, got {item.path}")

        buffer = io.BytesIO()
        draw_scene(self.scene(key), self._rng(key, "paint")).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def scene(self, key: str) -> list[Shape]:
        """Return the shapes of an image, from left to right."""
        split, _, number = key.partition("/")
        return build_scene(self._rng(key, "scene"), _COUNTS[int(number) % len(_COUNTS)], is_unseen=split == "unseen")

    def _rng(self, key: str, what: str) -> np.random.Generator:
        return np.random.default_rng([self._values["seed"], zlib.crc32(key.encode()), zlib.crc32(what.encode())])


def class_name(name: str) -> str:
    """Return a name such as `orange star` with its article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def class_names() -> list[str]:
    """Return the 40 classes, by color and shape."""
    return [class_name(f"{color} {shape}") for color in COLORS for shape in SHAPES]


def unseen_class_names() -> list[str]:
    """Return the six classes that are never in training."""
    return [class_name(f"{color} {shape}") for color, shape in UNSEEN]


def build_scene(rng: np.random.Generator, count: int, *, is_unseen: bool) -> list[Shape]:
    """Draw `count` shapes that do not overlap, from left to right; with `is_unseen`, one has a pair of `UNSEEN`."""
    pairs = [pair for pair in product(COLORS, SHAPES) if pair not in UNSEEN]
    first = UNSEEN[rng.integers(len(UNSEEN))] if is_unseen else pairs[rng.integers(len(pairs))]
    shape_pairs = [first]
    shape_pairs += [first if rng.random() < _SAME else pairs[rng.integers(len(pairs))] for _ in range(1, count)]

    places = _place(rng, count)
    shapes = [_paint(rng, pair, place) for pair, place in zip(shape_pairs, places, strict=True)]
    return sorted(shapes, key=lambda shape: shape.x)


class _Place(NamedTuple):
    """Center and bounding radius of a shape in pixels."""

    x: float
    y: float
    radius: float


def _place(rng: np.random.Generator, count: int) -> list[_Place]:
    """Draw the place of each shape until none overlap and their order from left to right is clear."""
    low, high = _RADIUS_PX[count]
    while True:
        radii = rng.uniform(low, high, count)
        centers = rng.uniform(radii[:, None] + 1, SIZE_PX - 1 - radii[:, None], (count, 2))
        is_apart = [
            abs(centers[a, 0] - centers[b, 0]) >= _APART_PX
            and math.dist(centers[a], centers[b]) > radii[a] + radii[b] + 2
            for a, b in combinations(range(count), 2)
        ]
        if all(is_apart):
            return [_Place(float(x), float(y), float(r)) for (x, y), r in zip(centers, radii, strict=True)]


def _paint(rng: np.random.Generator, pair: tuple[str, str], place: _Place) -> Shape:
    """Draw the shade, angle and aspect ratio of a shape of a color and a form."""
    color, shape = pair
    first_shade, second_shade = (np.array(shade, float) for shade in COLORS[color])
    rgb = first_shade + rng.random() * (second_shade - first_shade)
    red, green, blue = (round(float(value)) for value in rgb)

    # Only stars may point anywhere; other shapes are upright or turned a little.
    turn = 180.0 if shape == "star" else 15.0 * (rng.random() < 0.5)
    return Shape(
        color,
        shape,
        *place,
        rgb=(red, green, blue),
        angle=math.radians(rng.uniform(-turn, turn)),
        aspect=math.exp(rng.uniform(-0.8, 0.8)),
    )


def draw_scene(scene: Sequence[Shape], rng: np.random.Generator) -> Image.Image:
    """Draw shapes on a light background with a soft gradient."""
    corner, far = rng.uniform(222, 255, (2, 3))
    ramp = np.linspace(0, rng.random(), SIZE_PX)[:, None, None]
    rows = np.broadcast_to(np.round(corner + (far - corner) * ramp), (SIZE_PX, SIZE_PX, 3))

    # Larger first, as ImageDraw draws without antialiasing.
    image = Image.fromarray(rows.astype(np.uint8)).resize((SIZE_PX * _SCALE,) * 2, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)

    for shape in scene:
        x, y, radius = (_SCALE * value for value in (shape.x, shape.y, shape.radius))
        if shape.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape.rgb)
        else:
            draw.polygon([(x + radius * a, y + radius * b) for a, b in _corners(shape)], fill=shape.rgb)

    return image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)


def _corners(shape: Shape) -> list[tuple[float, float]]:
    """Return the corners of a polygon whose bounding radius is 1."""
    if shape.shape == "rectangle":
        corner = math.atan2(1, shape.aspect)
        angles = [corner, math.pi - corner, math.pi + corner, -corner]
        radii = [1.0] * 4
    elif shape.shape == "triangle":
        angles = [-math.pi / 2 + turn * math.tau / 3 for turn in range(3)]
        radii = [1.0] * 3
    else:
        angles = [-math.pi / 2 + turn * math.tau / 10 for turn in range(10)]
        radii = [1.0, 0.42] * 5
    return [
        (radius * math.cos(angle + shape.angle), radius * math.sin(angle + shape.angle))
        for angle, radius in zip(angles, radii, strict=True)
    ]


def write_captions(objects: Sequence[str]) -> list[str]:
    """Return the captions of an image from the names of its objects, from left to right. Each mentions all of them."""
    groups = Counter(objects)
    phrases = [_phrase(count, name) for name, count in groups.items()]
    phrase_list = " and ".join(phrases)
    captions = [phrase_list, f"there {'is' if groups[objects[0]] == 1 else 'are'} {phrase_list}"]

    # An order of the groups exists only if the objects of each group are neighbors.
    order = list(groups)
    is_sorted = list(objects) == [name for name in order for _ in range(groups[name])]
    if len(order) > 1 and is_sorted:
        captions += [" left of ".join(phrases), " right of ".join(reversed(phrases))]
    return captions


def write_statements(objects: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return statements about an image, each with a missing word, and the missing words.

    There is one about each color and shape in the image, and as many about others.
    """
    object_words = set(" ".join(objects).split())
    things = {word: f"{word} shape" if word in COLORS else word for word in (*COLORS, *SHAPES)}

    present = [thing for word, thing in things.items() if word in object_words]
    absent = [thing for word, thing in things.items() if word not in object_words]
    negatives = [absent[number] for number in rng.permutation(len(absent))[: len(present)]]

    statements = []
    for thing, is_present in [*((thing, True) for thing in present), *((thing, False) for thing in negatives)]:
        text, *words = _STATEMENTS[int(rng.integers(len(_STATEMENTS)))]
        names = {"thing": thing, "article": class_name(thing).split()[0]}
        statements.append((text.format(**names), words[0 if is_present else 1].format(**names)))
    return statements


def _phrase(count: int, name: str) -> str:
    return class_name(name) if count == 1 else f"{_WORDS[count]} {name}s"


_THING = rf"(?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join((*SHAPES, 'shape'))})"
_PHRASE = re.compile(rf"(?P<number>a|an|one|two|three) (?P<name>{_THING})(?P<plural>s?)")


def check_caption(caption: str, objects: Sequence[str]) -> Verdict:
    """Check a caption against the objects of an image, from left to right.

    `a` and `an` mean at least one, number words an exact count. `left of` and `right of` are true for some choice of
    the named objects. A text that is not a caption of this world is neither true nor complete.
    """
    parts = re.split(r" (and|left of|right of) ", re.sub(r"^there (is|are) ", "", caption))
    choices = [_choices(phrase, objects) for phrase in parts[::2]]
    links = parts[1::2]
    if len(set(links)) > 1:
        return Verdict(is_true=False, is_complete=False)

    ordered = [reading for reading in product(*choices) if _is_ordered(reading, links)]
    readings = [sorted(chain.from_iterable(reading)) for reading in ordered]

    # A true caption counts no object twice; a complete one names each exactly once.
    is_true = any(len(set(rows)) == len(rows) for rows in readings)
    return Verdict(is_true, list(range(len(objects))) in readings)


def _choices(phrase: str, objects: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the sets of objects that a phrase such as `two red circles` may mean, or none if it is false."""
    match = _PHRASE.fullmatch(phrase)
    if match is None or bool(match["plural"]) != (match["number"] in {"two", "three"}):
        return []

    rows = _matching(match["name"], objects)
    if match["number"] in {"a", "an"}:
        return [(row,) for row in rows]
    return [tuple(rows)] if len(rows) == _NUMBERS[match["number"]] else []


def _matching(what: str, objects: Sequence[str]) -> list[int]:
    words = [word for word in what.split() if word != "shape"]
    return [row for row, name in enumerate(objects) if set(words) <= set(name.split())]


def _is_ordered(reading: Sequence[tuple[int, ...]], links: Sequence[str]) -> bool:
    for first, second, link in zip(reading[:-1], reading[1:], links, strict=True):
        if link == "left of" and max(first) >= min(second):
            return False
        if link == "right of" and min(first) <= max(second):
            return False
    return True
