"""A pair of recordings and texts, from files to retrieval, search and export's refusal."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.errors import DataError, EmbedcacheError, PathError
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.inference import load
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.runs import PAIR, Run
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import OpenIndex, search
from embedcache.search.settings import IndexSettings
from embedcache.serve.service import info_tables
from embedcache.sources.media import decode_audio
from embedcache.store.cache import Cache
from embedcache.train.settings import train_settings
from embedcache.train.train import TrainReport, train
from tests.media_files import tone, wav
from tests.media_toy import MEDIA
from tests.toy import TEXT
from tests.train.runs import log_lines

FEATURES = {"audio": "open_media/mean", "text": "open_toy/mean"}
PITCHES = {"low": 200, "middle": 700, "high": 1900, "shrill": 4000}
VOLUMES = {"quiet": 0.05, "soft": 0.15, "loud": 0.45, "deafening": 1.0}


class Sounds:
    """A source of 160 tones, made from their number when they are read."""

    def describe(self) -> Mapping[str, Any]:
        return {"type": "tests.train.test_modalities:Sounds", "path": "tones", "settings": {}}

    def samples(self) -> Iterator[Sample]:
        rng = np.random.default_rng(0)
        for number in range(160):
            pitch, volume = rng.choice(list(PITCHES)), rng.choice(list(VOLUMES))
            item = FileItem(path=f"{number:03d} {volume} {pitch}.wav")
            text = TextItem(text=f"a {volume} {pitch} tone")
            yield Sample(key=f"{number:03d}", texts=(text,), files={"audio": (item,)})

    def read(self, item: FileItem) -> bytes:
        number, volume, pitch = item.path.removesuffix(".wav").split()
        rng = np.random.default_rng(int(number))
        samples = VOLUMES[volume] * tone(0.1, PITCHES[pitch] * rng.uniform(0.9, 1.1)) * rng.uniform(0.9, 1.1)
        return wav(np.clip(samples, -1, 1))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 160 recordings, each with a caption of its pitch and its volume. Not to be changed."""
    path = tmp_path_factory.mktemp("sounds") / "cache"
    settings = ExtractSettings(chunk_size=64)
    extract(Sounds(), path, text_encoder=[TEXT], encoder={"audio": [MEDIA]}, settings=settings)
    return path


def run(
    cache_path: Path, run_path: Path, *, feature: Mapping[str, str] | None = FEATURES, **options: Any
) -> TrainReport:
    defaults = {"shared_width": 8, "epochs": 10, "batch_size": 32, "split": "key", "lr": 0.01}
    return train(cache_path, run_path, feature=feature, settings=train_settings({**defaults, **options}))


@pytest.fixture(scope="module")
def finished(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the recordings. Not to be changed."""
    path = tmp_path_factory.mktemp("sound") / "run"
    run(sounds, path)
    return path


@pytest.mark.slow
def test_retrieval_of_recordings_beats_chance_and_control(sounds: Path, finished: Path, tmp_path: Path) -> None:
    report = evaluate_retrieval(sounds, finished)
    assert list(report.recalls) == ["a2t", "t2a"]
    assert report.num_items == {"audio": [40], "text": [40]}
    assert "40 recordings, 40 captions per run" in report.line()
    run(sounds, tmp_path / "control", shuffle_pairs=True)
    control = evaluate_retrieval(sounds, tmp_path / "control", is_control=True)
    for direction in ("a2t", "t2a"):
        chance = report.chance[direction]["r@5"].high
        assert report.recalls[direction]["r@5"].value > chance + 0.1
        assert control.recalls[direction]["r@5"].value < report.recalls[direction]["r@5"].value - 0.1


def test_run_has_sides_by_modality(sounds: Path, finished: Path) -> None:
    opened = Run.open(finished, kind=PAIR)
    assert opened.modalities == ("audio", "text")
    assert opened.input("audio").feature == FEATURES["audio"]
    assert {name.partition(".")[0] for name in opened.pair.state_dict()} == {"audio", "text", "log_scale"}
    assert run(sounds, finished).reused
    assert run(sounds, finished, feature=None).reused  # the two modalities of the cache
    validation = log_lines(finished)[0]["validation"]
    assert {name.partition(" ")[0] for name in validation} == {"a2t", "t2a"}


def test_index_of_recordings_is_searched_with_texts(sounds: Path, finished: Path, tmp_path: Path) -> None:
    build_index(sounds, tmp_path / "index", IndexSettings(modality="audio", run=finished, min_recall=0.5))
    (hits,) = search(tmp_path / "index", Queries(texts=["a deafening shrill tone"]))
    assert sum("deafening" in hit.captions[0] for hit in hits) > sum("quiet" in hit.captions[0] for hit in hits)
    with pytest.raises(DataError, match="image query"):
        search(tmp_path / "index", Queries(images=[np.zeros((4, 4, 3), np.uint8)]))  # type: ignore[list-item]
    _, of_run, _ = info_tables(OpenIndex(tmp_path / "index"))
    assert {"audio feature", "text feature"} < {name for name, _ in of_run["rows"]}


def test_model_encodes_recordings(sounds: Path, finished: Path, tmp_path: Path) -> None:
    model, source = load(finished), Sounds()
    files = [source.read(sample.files["audio"][0]) for _, sample in zip(range(6), source.samples(), strict=False)]
    expected = model.project(Cache(sounds).feature("audio").load()[:6], "audio")
    np.testing.assert_allclose(model.encode(files, "audio"), expected, atol=1e-3)  # features are float16
    (tmp_path / "0.wav").write_bytes(files[0])
    for one in (files[0], tmp_path / "0.wav", str(tmp_path / "0.wav"), decode_audio(files[0])):
        np.testing.assert_allclose(model.encode(one, "audio"), expected[:1], atol=1e-3)
    assert model.encode([], "audio").shape == (0, model.width)
    np.testing.assert_array_equal(model.encode("a tone", "text"), model.encode_text("a tone"))


def test_invalid_recordings_are_named(finished: Path, tmp_path: Path) -> None:
    model = load(finished)
    (tmp_path / "0.wav").write_bytes(wav(tone(0.1, 200))[:99])
    os.mkfifo(tmp_path / "pipe")
    wrong: list[tuple[Any, type[EmbedcacheError], str]] = [
        ("missing.wav", PathError, "missing"),
        (tmp_path, PathError, "not a file"),
        (tmp_path / "pipe", PathError, "pipe"),
        (tmp_path / "0.wav", DataError, "truncated"),
        ([tone(0.1, 200), b""], DataError, "audio 1"),
        (tone(0.01, 200), DataError, "short"),
        (np.zeros((2, 1600), np.float32), DataError, "mono"),
        (np.zeros(1600), DataError, "float64"),
        (np.full(1600, np.nan, np.float32), DataError, "NaN"),
        (None, DataError, "None"),
    ]
    for item, error, word in wrong:
        with pytest.raises(error, match=word):
            model.encode(item, "audio")
    with pytest.raises(DataError, match="image"):
        model.encode(np.zeros((8, 8, 3), np.uint8), "image")
