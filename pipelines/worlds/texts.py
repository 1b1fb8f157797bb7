"""Descriptions of things with labels, and the words of all texts, from the PyPI package `clip-benchmark`.

The texts are CuPL's (Pratt et al., ICCV 2023; MIT license): sentences that a language model wrote to describe the
classes of ImageNet. No set of texts with human labels was found in a package that this project depends on. So the label
of a sentence is the name of its class, which is removed from the sentence.
"""

import zlib
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from embedcache.sources.texts import clip_benchmark_file
from pipelines.uniperceiver.words import list_words, split_words
from pipelines.worlds.examples import make_examples

CLASSES = (
    "accordion", "ambulance", "backpack", "baguette", "barn", "basketball", "bee", "binoculars", "broccoli",
    "candle", "castle", "cello", "cucumber", "desk", "dragonfly", "drum", "flamingo", "fountain", "goldfish",
    "gorilla", "hammer", "harp", "jellyfish", "kimono", "koala", "lighthouse", "lipstick", "microphone",
    "mosque", "ostrich", "parachute", "pillow", "refrigerator", "sandal", "scorpion", "snail", "snowmobile",
    "sock", "stethoscope", "submarine", "teapot", "tractor", "trombone", "umbrella", "violin", "wallet",
    "wombat", "zebra",
)  # fmt: skip
"""The labels: 48 names of ImageNet with one word, of dissimilar things."""
_MIN_WORDS = 6
_MAX_WORDS = 24
_PARTS = (("test", 0.1), ("valid", 0.2), ("train", 1.0))  # part -> its end among the texts of a class


def load_descriptions(*, max_per_class: int | None = None) -> pa.Table:
    """Load descriptions as examples: words as `text`, the removed name as `target`, and the column `split`.

    Descriptions have 6 to 24 words. Duplicates are removed, and descriptions of two classes are left out. By a checksum
    of the text, a tenth of each class is for testing and a tenth for validation.

    Args:
        max_per_class: keep the first descriptions of each class in the order of their checksums, before the split.

    Raises:
        MissingExtraError: the package clip-benchmark is not installed.
    """
    prompts = clip_benchmark_file("cupl_prompts.json")["imagenet1k"]

    descriptions: dict[str, list[str]] = {}
    for name in CLASSES:
        sentences = [_without(name, words) for words in split_words(prompts[name]).to_pylist()]
        descriptions[name] = list(dict.fromkeys(sentences))
    counts = Counter(text for class_texts in descriptions.values() for text in class_texts)

    rows = []
    for name, class_texts in descriptions.items():
        unique = [text for text in class_texts if counts[text] == 1 and _MIN_WORDS <= len(text.split()) <= _MAX_WORDS]

        # A checksum spreads similar descriptions over the parts, the same way on every machine.
        unique.sort(key=lambda text: zlib.crc32(text.encode()))
        unique = unique[:max_per_class]
        rows += [(text, name, _part((number + 0.5) / len(unique))) for number, text in enumerate(unique)]

    texts, targets, splits = zip(*rows, strict=True)
    return make_examples(texts=texts, targets=targets, columns={"split": splits})


def collect_words(texts: Sequence[str], *, num_words: int = 0) -> list[str]:
    """Return all words of some texts, then frequent words of descriptions up to `num_words` in total, if above 0."""
    words = list_words(texts)
    if not num_words:
        return words
    included = set(words)
    words += [word for word in frequent_words() if word not in included]
    return words[:num_words]


def frequent_words() -> list[str]:
    """Return the words of the descriptions of all 998 classes, the most frequent first."""
    prompts = clip_benchmark_file("cupl_prompts.json")["imagenet1k"]
    words = list_words([prompt for texts in prompts.values() for prompt in texts])
    return [word for word in words if word[0].isalpha()]


def _without(name: str, words: Sequence[str]) -> str:
    """Return a text without the words that contain the name, and without their articles."""
    text_words: list[str] = []
    for word in words:
        if name not in word:
            text_words.append(word)
        elif text_words and text_words[-1] in {"a", "an", "the"}:
            text_words.pop()
    return " ".join(text_words)


def _part(place: float) -> str:
    return next(part for part, bound in _PARTS if place < bound)
