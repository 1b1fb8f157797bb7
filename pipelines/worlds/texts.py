"""Texts with labels, and the words of all texts: descriptions of things from the PyPI package `clip-benchmark`.

The texts are CuPL's (Pratt et al., ICCV 2023; MIT license): sentences that a language model wrote to describe the
classes of ImageNet. No set of texts that people labeled was found in a package that this project depends on, so this
one is derived: the name of the class is taken out of each sentence, and is what has to be found.
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
"""The labels: 48 of ImageNet's names of one word, of things that are unlike each other."""
_MIN_WORDS, _MAX_WORDS = 6, 24
_PARTS = (("test", 0.1), ("valid", 0.2), ("train", 1.0))  # up to which place among the texts of a class


def load_descriptions(*, max_per_class: int | None = None) -> pa.Table:
    """Load descriptions as examples: words as `text`, the name that was taken out as `target`, the column `split`.

    Descriptions have 6 to 24 words. Each is there once; one that fits two classes is left out. A tenth of each class is
    for testing and a tenth for validation, by a checksum of the text.

    Args:
        max_per_class: keep the first descriptions of each class in the order of their checksums, before the split.

    Raises:
        MissingExtraError: the package clip-benchmark is not installed.
    """
    prompts = clip_benchmark_file("cupl_prompts.json")["imagenet1k"]
    found = {
        name: dict.fromkeys(_without(name, words) for words in split_words(prompts[name]).to_pylist())
        for name in CLASSES
    }
    times = Counter(text for texts in found.values() for text in texts)
    rows = []
    for name, distinct in found.items():
        kept = [text for text in distinct if times[text] == 1 and _MIN_WORDS <= len(text.split()) <= _MAX_WORDS]
        kept.sort(key=lambda text: zlib.crc32(text.encode()))
        kept = kept[:max_per_class]
        rows += [(text, name, _part((number + 0.5) / len(kept))) for number, text in enumerate(kept)]
    texts, targets, splits = zip(*rows, strict=True)
    return make_examples(texts=texts, targets=targets, columns={"split": splits})


def collect_words(texts: Sequence[str], *, num_words: int = 0) -> list[str]:
    """Return all words of some texts, then frequent words of all descriptions up to `num_words` in all, if above 0."""
    words = list_words(texts)
    if not num_words:
        return words
    known = set(words)
    words += [word for word in frequent_words() if word not in known]
    return words[:num_words]


def frequent_words() -> list[str]:
    """Return the words of the descriptions of all 998 classes, the most frequent first."""
    prompts = clip_benchmark_file("cupl_prompts.json")["imagenet1k"]
    words = list_words([prompt for texts in prompts.values() for prompt in texts])
    return [word for word in words if word[0].isalpha()]


def _without(name: str, words: Sequence[str]) -> str:
    """Return words without those that contain the name, and without their articles."""
    kept: list[str] = []
    for word in words:
        if name not in word:
            kept.append(word)
        elif kept and kept[-1] in {"a", "an", "the"}:
            kept.pop()
    return " ".join(kept)


def _part(place: float) -> str:
    return next(part for part, bound in _PARTS if place < bound)
