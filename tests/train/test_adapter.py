"""Adapters: the queries of a new encoder find in an old index what they find among vectors encoded again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emoji import EMOJI_DATA
from PIL import Image
from safetensors.torch import load_file

from embedcache.arrays import Array
from embedcache.derive.derive import derive_from_run
from embedcache.encoders.base import Encoder, EncoderSettings, ItemShape, Modality
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import DataError, EmbedcacheError, FingerprintError, SettingError, UnknownNameError
from embedcache.evaluate.adapter import evaluate_adapter
from embedcache.evaluate.retrieval import rank
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.inference import load
from embedcache.runs import WEIGHTS, Run
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import search
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.adapter import fit_adapter
from tests.evaluate.test_retrieval import train_run
from tests.images import write_images
from tests.toy import IMAGE, TEXT, ToyImages

NEW, OLD = "open_rotated/cls", "open_toy/cls"
ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(48, 48)))[0].astype(np.float32)


class RotatedImages(ToyImages):
    """The vectors of the toy encoder in other coordinates, and half of them."""

    features: Mapping[str, ItemShape] = {**ToyImages.features, "half": (24,)}

    def __init__(self) -> None:
        super().__init__(1.0, 0.0, Path("/"))
        self.fingerprint = replace(self.fingerprint, family="tests.train.test_adapter:open_rotated")

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        rotated = [vector @ ROTATION for vector in super().encode(prepared, ["cls"])["cls"]]
        outputs = {"cls": rotated, "half": [vector[:24] for vector in rotated]}
        return {name: outputs[name] for name in names}


def open_rotated(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    return RotatedImages()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two image encoders and a text encoder, and a run of the old image encoder."""
    path = tmp_path_factory.mktemp("adapter")
    write_images(path / "photos", 200)
    encoders = [IMAGE, "tests.train.test_adapter:open_rotated"]
    settings = ExtractSettings(features=("cls", "half", "mean"), chunk_size=64)
    extract(
        open_source(path / "photos"), path / "cache", image_encoder=encoders, text_encoder=[TEXT], settings=settings
    )
    train_run(path / "cache", path / "run")
    return path


def fit(folder: Path, path: Path, **options: Any) -> Path:
    fit_adapter(folder / "cache", path, **{"feature": NEW, "target": OLD, "split": "key", **options})
    return path


def test_queries_of_a_rotated_encoder_find_what_reencoding_finds(folder: Path, tmp_path: Path) -> None:
    adapter, control = fit(folder, tmp_path / "adapter"), fit(folder, tmp_path / "control", shuffle_pairs=True)
    assert Run.open(adapter, kind="adapter").info.report["score"] > 0.9
    report = evaluate_adapter(folder / "cache", adapter, control=control)
    assert report.num_queries == 50
    assert report.reencoded["adapter"].value > 0.97  # of float16 vectors
    assert report.own["adapter"].value > 0.97
    assert report.reencoded["old encoder"].value > 0.97
    assert report.reencoded["shuffled rows"].value < 0.3

    build_index(folder / "cache", tmp_path / "index", feature=OLD)
    (photo,) = (folder / "photos").glob("00007.png")
    (hits,) = search(tmp_path / "index", Queries(images=photo), adapter=adapter, k=1)
    assert hits[0].key == "00007"
    assert hits[0].score > 0.99
    vectors = load(adapter).encode([photo], "image")
    assert search(tmp_path / "index", Queries(vectors=vectors), k=1)[0][0].key == "00007"


def test_text_tower_of_a_run_serves_another_image_encoder(folder: Path, tmp_path: Path) -> None:
    adapted = fit(folder, tmp_path / "adapted", target=folder / "run", split=str(folder / "run/split.parquet"))
    weights, old_weights = load_file(adapted / WEIGHTS), load_file(folder / "run" / WEIGHTS)
    assert all(torch.equal(weights[name], old_weights[name]) for name in weights if not name.startswith("image."))

    ranking = rank(Cache(folder / "cache"), Run.open(adapted))
    expected = rank(Cache(folder / "cache"), Run.open(folder / "run"))
    assert np.mean(np.einsum("ip,ip->i", ranking.first, expected.first)) > 0.9
    assert np.mean(ranking.ranks["t2i"] <= 10) == pytest.approx(np.mean(expected.ranks["t2i"] <= 10), abs=0.1)

    # The index of the old run answers images of the new encoder, and texts.
    build_index(folder / "cache", tmp_path / "index", run=folder / "run")
    queries = Queries(texts="red bar", images=Image.open(folder / "photos/00003.png"))
    texts, images = search(tmp_path / "index", queries, adapter=adapted, k=3)
    assert images[0].key == "00003"
    assert [hit.key for hit in texts] == [hit.key for hit in search(tmp_path / "index", "red bar", k=3)[0]]
    (report,) = derive_from_run(folder / "cache", adapted, modality="image", name="mapped")
    assert report.computed == 200

    # Of another width too.
    options = {"feature": "open_rotated/half", "target": folder / "run", "split": "key"}
    assert "with the text tower of the run; " in fit_adapter(folder / "cache", tmp_path / "half", **options).line()
    weights = load_file(tmp_path / "half" / WEIGHTS)
    assert all(torch.equal(weights[name], old_weights[name]) for name in weights if not name.startswith("image."))


def test_adapter_is_reused_and_the_same_again(folder: Path, tmp_path: Path) -> None:
    first = fit(folder, tmp_path / "first")
    assert fit_adapter(folder / "cache", first, feature=NEW, target=OLD, split="key").reused
    few = fit_adapter(folder / "cache", tmp_path / "few", feature=NEW, target=OLD, split="key", val_fraction=0.02)
    assert few.num_samples["val"] < 10
    second = fit(folder, tmp_path / "second")
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    with pytest.raises(FingerprintError, match="target"):
        fit(folder, first, target=folder / "run")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target": "open_toy/mean"}, SettingError, "two modalities"),
        ({"target": NEW}, SettingError, "another encoder"),
        ({"target": "nothing/cls"}, UnknownNameError, "nothing/cls"),
        ({"feature": "text=open_toy/mean", "target": "open_toy/cls"}, SettingError, "images"),
        ({"val_fraction": 0.5, "test_fraction": 0.45}, DataError, "at least 20 training samples"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, options: dict[str, Any], error: type[EmbedcacheError], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        fit(folder, tmp_path / "adapter", **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "adapter").exists()


def test_other_encoders_are_refused(folder: Path, cache_path: Path, tmp_path: Path) -> None:
    adapter, adapted = fit(folder, tmp_path / "adapter"), fit(folder, tmp_path / "adapted", target=folder / "run")
    build_index(folder / "cache", tmp_path / "plain", feature=OLD)
    build_index(folder / "cache", tmp_path / "projected", run=folder / "run")
    queries = Queries(images=folder / "photos/00003.png")
    for index, run, words in (
        ("plain", adapted, "onto a run"),
        ("projected", adapter, "onto a feature"),
        ("plain", folder / "run", "a run of train"),
    ):
        with pytest.raises(FingerprintError, match=words):
            search(tmp_path / index, queries, adapter=run)
    with pytest.raises(UnknownNameError, match="open_rotated"):
        evaluate_adapter(cache_path, adapter)
    with pytest.raises(DataError, match="aligned pair"):
        rank(Cache(folder / "cache"), Run.open(adapter, kind="pair"))


def test_static_text_vectors_search_an_index_of_a_transformer(tmp_path: Path) -> None:
    """Two real text encoders, a transformer and averaged token vectors, on the names of emoji."""
    pytest.importorskip("wordllama")
    names = sorted({str(entry["en"]).strip(":").replace("_", " ") for entry in EMOJI_DATA.values()})[::10]
    (tmp_path / "names.txt").write_text("\n".join(names))
    encoders = ["st:all-MiniLM-L6-v2", "pipelines.icons.encoders:open_wordllama:l2_supercat_256"]
    cache = tmp_path / "cache"
    extract(open_source(tmp_path / "names.txt"), cache, text_encoder=encoders)
    features = {"feature": "l2_supercat_256/mean", "target": "all-MiniLM-L6-v2/mean"}
    fit_adapter(cache, tmp_path / "adapter", **features)
    fit_adapter(cache, tmp_path / "control", **features, shuffle_pairs=True)

    report = evaluate_adapter(cache, tmp_path / "adapter", control=tmp_path / "control")
    assert report.reencoded["adapter"].low > 2 * report.reencoded["shuffled rows"].high
    assert report.reencoded["adapter"].low > 10 * report.reencoded["chance"].value
