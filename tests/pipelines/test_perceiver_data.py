"""Caches and examples of one likelihood for every task."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from embedcache.axis import Axis
from embedcache.derive.rules import Block
from embedcache.errors import SettingError
from embedcache.networks.words import Vocabulary
from embedcache.store.cache import Cache
from pipelines.perceiver.steps import AUDIO_TOKENS, IMAGE_TOKENS, JOIN_GRIDS, TINY_DATA, WORD_VECTORS, make_data
from pipelines.worlds.label_sets import FASHION_FOLDER
from tests.pipelines.test_texts import HAS_LETTERS


def test_joined_tokens_hold_the_cells_that_they_cover() -> None:
    fine = np.arange(64, dtype=np.float32).reshape(1, 64, 1)  # cell number on an 8 x 8 grid
    coarse = -np.arange(16, dtype=np.float32).reshape(1, 16, 1)
    tokens = JOIN_GRIDS.apply([Block(fine), Block(coarse)], {})["tokens"]
    assert isinstance(tokens, np.ndarray)
    assert tokens.shape == (1, 16, 5)
    assert tokens[0, 0].tolist() == [0, 0, 1, 8, 9]
    assert tokens[0, 6].tolist() == [-6, 20, 21, 28, 29]
    assert JOIN_GRIDS.outputs is not None
    assert JOIN_GRIDS.outputs([(64, 40), (16, 112)], {}) == {"tokens": (16, 272)}
    with pytest.raises(SettingError, match="a fraction of its side, got 49 and 16 cells"):
        JOIN_GRIDS.outputs([(49, 40), (16, 112)], {})


@pytest.mark.slow
@pytest.mark.skipif(
    not (HAS_LETTERS and FASHION_FOLDER.is_dir() and importlib.util.find_spec("easy_vqa")),
    reason="needs easy-vqa and the packages of .ci/run",
)
def test_tiny_data_is_complete_and_resumes(tmp_path: Path) -> None:
    data = make_data(tmp_path, TINY_DATA)
    for name in ("shapes", "vqa", "emoji", "fashion"):
        feature = Cache(data.cache(name)).feature("image", IMAGE_TOKENS)
        assert feature.shape[1:] == (16, 272)
        assert feature.axis == Axis(kind="grid", rows=4, columns=4, box=(0.0, 0.0, 1.0, 1.0))
    assert Cache(data.cache("letters")).feature("audio", AUDIO_TOKENS).shape == (52, -1, 384)
    words = data.words_path.read_text().split()
    vocabulary = Vocabulary(words)
    cache = Cache(data.cache("words"))
    assert cache.feature("text", WORD_VECTORS).shape == (len(words), 384)
    caches = {"descriptions": None, "vqa": "vqa", "emoji-captions": "emoji", "letters-classes": "letters"}
    caches |= {f"shapes-{name}": "shapes" for name in ("classes", "captions", "statements")}
    caches["fashion-classes"] = "fashion"
    for name, home in caches.items():
        examples = data.examples(name)
        texts = [text for column in ("text", "target") for text in data.distinct(name, column)]
        assert vocabulary.require_known(texts, name).num_texts == len(texts)
        if home is not None:
            keys = pc.unique(examples["key"].combine_chunks())
            known = Cache(data.cache(home)).samples["key"].combine_chunks()
            assert pc.all(pc.is_in(keys, known)).as_py()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    make_data(tmp_path, TINY_DATA)
    changed = [path for path, time in made.items() if path.stat().st_mtime_ns != time]
    assert not [path for path in changed if path.suffix == ".parquet" or path.name == "words.txt"]
