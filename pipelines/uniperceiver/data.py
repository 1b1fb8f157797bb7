"""Data for every task: worlds, caches and examples.

Every step leaves files that a second call reuses.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.cli.console import open_progress
from embedcache.dataset.inputs import open_input
from embedcache.dataset.pairs import pair_items
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import Split, make_split, read_split, write_split
from embedcache.derive.derive import derive
from embedcache.derive.rules import Block, Derivation, Output, Rule
from embedcache.encoders.base import ItemShape
from embedcache.errors import SettingError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.files import write_atomic
from embedcache.modalities import Source
from embedcache.progress import Progress
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from pipelines.worlds import easy_vqa, label_sets, shapes, texts
from pipelines.worlds.examples import caption_examples, label_examples, make_examples, write_examples

IMAGE_ENCODER = "lite:efficientnet-lite0,fit=64x64"
BLOCKS = ("layer5.patches", "layer11.patches")
IMAGE_TOKENS = "tokens/tokens"
AUDIO_TOKENS = "tiny.en/states"
WORD_VECTORS = "all-MiniLM-L6-v2/mean"
"""Features that the shared module reads: 4 x 4 tokens of 272 numbers per image, 50 tokens of 384 numbers per second of
audio, and a vector of 384 numbers per word."""
TEXT_ENCODER = "st:all-MiniLM-L6-v2"


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Sizes of the data.

    Args:
        shapes: images of each split of the shapes world.
        vqa: `all`, or images of each part of easy-VQA.
        fashion: images of Fashion-MNIST for training and testing, joined by `+`.
        emoji: `all`, or the number of emoji.
        speakers: speakers of letters, joined by `+`.
        audio_encoder: encoder of the letters. It pads them, because they are shorter than a second.
        descriptions: texts per class. If None, all are used.
        num_words: words of the word table; if 0, only words of the examples.
    """

    shapes: str = "seed=0,train=9000,valid=600,test=1000,unseen=800"
    vqa: str = "all"
    fashion: str = "6000+2000"
    emoji: str = "all"
    speakers: str = "allison+klettres-us+klettres-gb"
    audio_encoder: str = "whisper:tiny.en,padding=30s"
    descriptions: int | None = None
    num_words: int = 6000


TINY_DATA = DataSize(
    shapes="seed=0,train=40,valid=20,test=20,unseen=20",
    vqa="8",
    fashion="20+10",
    emoji="20",
    speakers="klettres-us+klettres-gb",
    audio_encoder="whisper:tiny.en",
    descriptions=10,
    num_words=0,
)
"""For tests: everything runs, nothing is learned."""


def make_data(folder: Path, size: DataSize, *, caches: Sequence[str] | None = None) -> "Data":
    """Extract caches and write all examples into a folder, except for existing ones.

    Args:
        folder: folder of the caches and examples.
        size: sizes of the data.
        caches: caches of items to extract, see `Data.cache`. If None, all. `words` is always extracted.

    Raises:
        MissingExtraError: a package of data or weights is not installed. The message names it.
    """
    data = Data(folder)
    progress = open_progress()
    sources = {
        "shapes": open_source(size.shapes, kind=shapes.KIND),
        "vqa": open_source(size.vqa, kind=easy_vqa.KIND),
        "emoji": open_source(size.emoji, kind=label_sets.EMOJI_KIND),
        "fashion": open_source(size.fashion, kind=label_sets.FASHION_KIND),
        "letters": open_source(size.speakers, kind=label_sets.LETTERS_KIND),
    }
    _write_tables(data, sources, size)

    for name in sources if caches is None else caches:
        source = sources[name]
        if name == "letters":
            settings = ExtractSettings(features=("states",))
            extract(
                source, data.cache(name), encoder={"audio": [size.audio_encoder]}, settings=settings, progress=progress
            )
        else:
            # Emoji are also retrieved and split by their captions, so that they need text features.
            text_encoders = [TEXT_ENCODER] if name == "emoji" else []
            extract_tokens(source, data.cache(name), text_encoders, progress)

    if data.cache("emoji").is_dir() and not data.split_path.is_file():
        emoji = Cache(data.cache("emoji"))
        write_split(data.split_path, [emoji], split_emoji(emoji))

    extract(open_source(data.words_path), data.cache("words"), text_encoder=[TEXT_ENCODER], progress=progress)
    return data


def extract_tokens(source: Source, cache: Path, text_encoders: Sequence[str], progress: Progress) -> None:
    """Extract two blocks of the image encoder and derive 16 tokens per image that join both."""
    settings = ExtractSettings(features=BLOCKS)
    encoders = {"image": [IMAGE_ENCODER], "text": text_encoders}
    extract(source, cache, encoder=encoders, settings=settings, progress=progress)

    inputs = [("image", f"efficientnet-lite0/{block}") for block in BLOCKS]
    derive(cache, Derivation(name="tokens", inputs=inputs, rule=JOIN_GRIDS), progress=progress)


def split_emoji(cache: Cache) -> Split:
    """Split emoji so that captions with a cosine similarity above 0.7 are in the same part.

    `woman juggling` says almost the same as `man juggling`. Only equal images decide the split, because the mean tokens
    of two drawings are similar whatever they show.
    """
    images = open_input(cache, "image", IMAGE_TOKENS)
    captions = open_input(cache, "text", WORD_VECTORS)
    pairs = pair_items([cache], [images], [captions])
    readers = {"image": images.read, "text": captions.read}
    return make_split([cache], pairs, SplitSettings(cosines={"image": 1.0}), readers)


def _write_tables(data: "Data", sources: Mapping[str, Source], size: DataSize) -> None:
    """Write the tables of examples and the list of their words."""
    tables: dict[str, Callable[[], pa.Table]] = {
        "shapes-classes": lambda: label_examples(sources["shapes"]),
        "shapes-captions": lambda: caption_examples(sources["shapes"]),
        "shapes-statements": lambda: _statements(sources["shapes"]),
        "vqa": lambda: easy_vqa.load_questions(max_images=None if size.vqa == "all" else int(size.vqa)),
        "emoji-captions": lambda: caption_examples(sources["emoji"]),
        "fashion-classes": lambda: label_examples(sources["fashion"]),
        "letters-classes": lambda: label_examples(sources["letters"]),
        "descriptions": lambda: texts.load_descriptions(max_per_class=size.descriptions),
    }

    # Tables are made only if they are missing: some take minutes to draw.
    for name, make in tables.items():
        if not data.examples_path(name).is_file():
            write_examples(data.examples_path(name), make())

    if not data.words_path.is_file():
        # Words of the tables come first, then frequent words up to the size of the table.
        strings = [text for name in tables for column in ("text", "target") for text in data.distinct(name, column)]
        words = texts.collect_words([*strings, *shapes.class_names()], num_words=size.num_words)
        write_atomic(data.words_path, ("\n".join(words) + "\n").encode())


def _statements(source: Source) -> pa.Table:
    """Return true and false statements about each image of one shape, with the words that complete them.

    Statements about one of several shapes take far longer to learn.
    """
    rng = np.random.default_rng(0)
    rows = []
    for sample in source.samples():
        if sample.columns["label"]:
            objects = str(sample.columns["objects"]).split(",")
            split = str(sample.columns["split"])
            rows += [(sample.key, text, word, split) for text, word in shapes.write_statements(objects, rng)]

    keys, statements, targets, splits = zip(*rows, strict=True)

    return make_examples(keys=keys, texts=statements, targets=targets, columns={"split": splits})


@dataclass(frozen=True)
class Data:
    """The caches and tables of examples in a folder."""

    folder: Path

    def cache(self, name: str) -> Path:
        """Return the path of a cache: `shapes`, `vqa`, `emoji`, `fashion`, `letters` or `words`."""
        return self.folder / "caches" / name

    def examples_path(self, name: str) -> Path:
        """Return the path of a table of examples."""
        return self.folder / "examples" / f"{name}.parquet"

    def examples(self, name: str) -> pa.Table:
        """Read a table of examples."""
        return pq.read_table(self.examples_path(name))

    def distinct(self, name: str, column: str = "target") -> list[str]:
        """Return the distinct texts of a column of a table in alphabetical order, such as the classes of a task."""
        return sorted(text for text in pc.unique(self.examples(name)[column]).to_pylist() if text is not None)

    def emoji_captions(self) -> pa.Table:
        """Read the captions of emoji with their part (`train`, `valid` or `test`) in the column `split`."""
        emoji = Cache(self.cache("emoji"))
        captions = self.examples("emoji-captions")
        split = read_split(self.split_path, [emoji])

        # The tables call the validation part `valid`.
        parts = pa.array(["valid" if part == "val" else part for part in split.parts])
        rows = pc.index_in(captions["key"], value_set=emoji.column("key"))
        return captions.set_column(captions.column_names.index("split"), "split", parts.take(rows))

    @property
    def split_path(self) -> Path:
        """Path of the split of the emoji."""
        return self.folder / "emoji-split.parquet"

    @property
    def words_path(self) -> Path:
        """Path of the words of the word table, one per line, in the order of the cache `words`."""
        return self.folder / "words.txt"


def _join_outputs(shapes: Sequence[ItemShape], _: Mapping[str, Any]) -> Mapping[str, ItemShape]:
    (fine, fine_width), (coarse, coarse_width) = shapes
    factor = math.isqrt(fine) // math.isqrt(coarse)
    if math.isqrt(fine) ** 2 != fine or coarse * factor**2 != fine:
        raise SettingError(f"expected a square grid and one of a fraction of its side, got {fine} and {coarse} cells")
    return {"tokens": (coarse, coarse_width + factor**2 * fine_width)}


def _join(inputs: Sequence[Block], _: Mapping[str, Any]) -> Mapping[str, Output]:
    fine_BTD, coarse_BTD = (block.values for block in inputs)
    num_items, num_fine, width = fine_BTD.shape

    side = math.isqrt(coarse_BTD.shape[1])
    factor = math.isqrt(num_fine) // side

    # Cut the fine grid into one square of cells for each coarse cell.
    cells = fine_BTD.reshape(num_items, side, factor, side, factor, width).swapaxes(2, 3)
    return {"tokens": np.concatenate([coarse_BTD, cells.reshape(num_items, side**2, -1)], axis=2)}


JOIN_GRIDS = Rule(
    name="pipelines.uniperceiver.data:JOIN_GRIDS",
    apply=_join,
    outputs=_join_outputs,
    parameters={},
    axis=lambda _, axes: axes[1],
)
"""Tokens of a fine and a coarse square grid: each coarse cell, joined with all fine cells that it covers."""
