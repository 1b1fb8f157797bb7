"""Runs of one likelihood on raw items: what is predicted equals what cached features give, and what is refused."""

import json
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import embedcache
from embedcache.derive.derive import Derivation, derive
from embedcache.errors import CorruptError, DataError, PathError, SettingError
from embedcache.evaluate.likelihood import evaluate_task, load_shared
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.likelihood.model import LikelihoodModel, _nearest
from embedcache.sources.base import FileItem
from embedcache.store.cache import Cache
from embedcache.train.examples import open_examples, open_media
from embedcache.train.likelihood import train_likelihood
from embedcache.train.likelihood_batches import encode_items, encode_texts
from embedcache.train.likelihood_tasks import predict
from tests.edits import edit_record
from tests.toy import IMAGE
from tests.train.likelihood_cases import Squares, SquaresSource, fit_settings, open_tones, recipe, tables

COUNT, FIRST = 30, 1000  # the validation images


@pytest.fixture(scope="module")
def run(squares: Squares, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a label head for answers, and an adapter of recordings besides that of images."""
    tones = open_tones(tmp_path_factory.mktemp("media") / "tones", squares.words.vocabulary)
    path = tmp_path_factory.mktemp("runs") / "all"
    tasks = [
        squares.task("classify", "classify"),
        squares.task("answer", "answer", has_head=True),
        squares.task("retrieve", "retrieve", "captions"),
        squares.task("caption", "caption", "captions"),
        squares.task("tones", "classify", "classify", train=tones, validation=tones),
    ]
    train_likelihood(tasks, squares.words, path, recipe(steps_per_epoch=20), fit_settings(lr=7e-3))
    return path


@pytest.fixture(scope="module")
def model(run: Path) -> LikelihoodModel:
    return embedcache.load(run, kind="likelihood")


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    source = SquaresSource(COUNT, first=FIRST)
    return [source.read(FileItem(path=f"{number}.png", length=0)) for number in range(FIRST, FIRST + COUNT)]


@pytest.mark.slow
def test_classes_and_answers_equal_those_of_cached_features(
    model: LikelihoodModel, squares: Squares, run: Path, images: list[bytes], squares_paths: tuple[Path, Path, Path]
) -> None:
    network, _ = load_shared(run)
    classes = squares.task("classify", "classify")
    found = predict(classes, network, squares.valid["classify"])
    expected = [classes.names[number] for number in found.predicted_M.tolist()]
    assert model.classify(images, classes.names).best == expected
    assert model.classify(images, task="classify").best == expected
    assert model.classify(Cache(squares_paths[1]), task="classify").best == expected
    answers = squares.task("answer", "answer", has_head=True)
    found = predict(answers, network, squares.valid["answer"])
    questions = tables(Cache(squares_paths[1]))["answer"]["text"].to_pylist()
    scores = model.answer(images, questions)
    assert scores.best == [answers.names[number] for number in found.predicted_M.tolist()]
    np.testing.assert_allclose(scores.probs_NC.sum(axis=1), 1, rtol=1e-5)
    without_head = model.answer(images, questions, scores.names)
    assert np.abs(without_head.probs_NC - scores.probs_NC).max() > 1e-3
    best = scores.top(2)[0]
    assert [name for name, _ in best] == [scores.names[number] for number in np.argsort(-scores.probs_NC[0])[:2]]


@pytest.mark.slow
def test_captions_equal_those_of_cached_features(
    model: LikelihoodModel, squares: Squares, run: Path, images: list[bytes]
) -> None:
    task = squares.task("caption", "caption", "captions")
    report = evaluate_task(run, task, squares.valid["captions"])
    words = sorted({word for text in task.train.targets.to_pylist() for word in text.split()})
    assert model.caption(images, words=words) == list(report.captions.values()) == model.caption(images)
    assert "is" in squares.words.vocabulary.words
    assert sorted(model.config.training["tasks"][3]["candidates"]) == words
    assert len(model.caption(images[0], max_length=2)[0].split()) <= 2


def test_neighbors_in_both_directions_equal_those_of_cached_features(
    model: LikelihoodModel, squares: Squares, run: Path, images: list[bytes], squares_paths: tuple[Path, Path, Path]
) -> None:
    network, _ = load_shared(run)
    examples = squares.valid["captions"]
    texts, media = examples.targets.to_pylist(), examples.media
    assert media is not None
    with torch.no_grad():
        items_NP = torch.cat(list(encode_items(network, media, np.arange(COUNT))))
        texts_QP = encode_texts(network, examples.target_words)
    cosines = torch.nn.functional.cosine_similarity(texts_QP[:, None], items_NP, dim=2).numpy()
    for found in (model.retrieve(texts, images, k=3), model.retrieve(texts, Cache(squares_paths[1]), k=3)):
        for hits, row in zip(found, cosines, strict=True):
            np.testing.assert_allclose([hit.score for hit in hits], -np.sort(-row)[:3], atol=1e-5)
            np.testing.assert_allclose([row[hit.position] for hit in hits], -np.sort(-row)[:3], atol=1e-5)
    assert found[0][0].name == str(FIRST + found[0][0].position)
    for hits, column in zip(model.retrieve_texts(images, texts, k=2), cosines.T, strict=True):
        np.testing.assert_allclose([column[texts.index(hit.name)] for hit in hits], -np.sort(-column)[:2], atol=1e-5)
    assert model.retrieve("red", [], k=3) == [[]]
    assert model.retrieve([], images) == []
    assert model.caption([]) == []


def test_the_first_of_equal_scores_are_found() -> None:
    vectors_NP = torch.ones(100, 4)
    vectors_NP[60] = torch.tensor([1.0, 1.0, 1.0, -1.0])
    for k, expected in ((3, [0, 1, 2]), (100, [*range(60), *range(61, 100), 60])):
        (hits,) = _nearest(torch.ones(1, 4), vectors_NP, k, str)
        assert [hit.position for hit in hits] == expected


def test_paths_bytes_and_open_images_are_the_same_item(
    model: LikelihoodModel, images: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "square.png"
    path.write_bytes(images[0])
    opened = Image.open(BytesIO(images[0]))
    items = [path, str(path), images[0], opened]
    alone = [model.classify([item], task="classify").probs_NC for item in items]
    for probs_1C in (*alone, model.classify(opened, task="classify").probs_NC):
        np.testing.assert_array_equal(probs_1C, alone[0])
    together = model.classify(items, task="classify").probs_NC  # whose last bits depend on the place, with AVX2
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5)
    assert model.retrieve("red", [path])[0][0].name == str(path)
    assert model.retrieve("red", [opened])[0][0].name == "image 0"


def test_images_may_be_arrays(model: LikelihoodModel, images: list[bytes]) -> None:
    arrays = [np.asarray(Image.open(BytesIO(data)).convert("RGB")) for data in images[:3]]
    found, expected = (model.classify(items, task="classify").probs_NC for items in (arrays, images[:3]))
    np.testing.assert_array_equal(found, expected)


def test_recordings_and_texts_alone_are_read(model: LikelihoodModel) -> None:
    silence = np.zeros(4000, np.float32)
    assert model.modalities == ("image", "audio")
    assert model.classify([silence, silence[:3000]], task="tones", modality="audio").probs_NC.shape[0] == 2
    assert len(model.answer(None, ["a red square _", "a blue square"], ["red", "blue"]).best) == 2


def test_wrong_items_names_and_tasks_are_refused(
    model: LikelihoodModel, run: Path, images: list[bytes], tmp_path: Path
) -> None:
    with pytest.raises(PathError, match=r"image nothing\.png does not exist"):
        model.classify("nothing.png", task="classify")
    with pytest.raises(DataError, match="items: expected an item, several, or a cache, got 3; pass a path"):
        model.classify(3)  # type: ignore[arg-type]
    for wrong in (lambda: model.classify(images, ["red", None]), lambda: model.retrieve(["red", None], images)):  # type: ignore[list-item]
        with pytest.raises(DataError, match="expected texts, got None at position 1; leave it out"):
            wrong()
    with pytest.raises(DataError, match="image 1: not an image"):
        model.caption([images[0], b"text"])
    with pytest.raises(DataError, match=r"image 1: image: expected RGB of shape \(H, W, 3\), got \(4, 4\)"):
        model.classify([images[0], np.zeros((4, 4), np.uint8)], task="classify")
    with pytest.raises(DataError, match="audio 0: expected a path, or mono float32 samples at 16000 Hz, got float64"):
        model.classify([np.zeros(4000)], task="tones", modality="audio")
    with pytest.raises(DataError, match="expected words of the list, got 'violet'"):
        model.classify(images, ["red", "violet"])
    for names, words in ((["red", "red"], "'red' twice"), ([], "none")):
        with pytest.raises(DataError, match=f"candidates: expected distinct texts, got {words}"):
            model.classify(images, names)
    with pytest.raises(DataError, match="candidates: expected texts that differ in their words, got 'red' and 'Red!'"):
        model.classify(images, ["red", "Red!"])
    with pytest.raises(DataError, match="got 'violet mauve', which has none"):
        model.retrieve(["red", "violet mauve"], images)
    with pytest.raises(DataError, match="one for each of 30 items, got 2"):
        model.answer(images, ["what color?", "what color?"], ["red"])
    with pytest.raises(SettingError, match="kind classify, classify, tones, got None; name one"):
        model.classify(images)
    with pytest.raises(SettingError, match="expected one of image, audio, got video"):
        model.classify(images, task="classify", modality="video")
    with pytest.raises(SettingError, match="k: expected at least 1"):
        model.retrieve("red", images, k=0)
    with pytest.raises(DataError, match="expected a run of kind speech, got one of kind likelihood"):
        embedcache.load(run, kind="speech")


@pytest.fixture(scope="module")
def derived(squares: Squares, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on the mean of principal components of tokens, and a cache with both."""
    folder = tmp_path_factory.mktemp("derived")
    settings = ExtractSettings(features=("patches",))
    extract(SquaresSource(8), folder / "cache", image_encoder=[IMAGE], settings=settings)
    for derivation in (
        Derivation(name="few", inputs=[("image", "open_toy/patches")], rule="pca", parameters={"width": 2}),
        Derivation(name="whole", inputs=[("image", "few/pca")], rule="mean"),
    ):
        derive(folder / "cache", derivation)
    cache = Cache(folder / "cache")
    media = open_media(cache, "image", "whole/mean")
    examples = open_examples(tables(cache)["captions"], squares.words.vocabulary, media=media)
    task = squares.task("retrieve", "retrieve", "captions", train=examples, validation=examples)
    train_likelihood([task], squares.words, folder / "run", recipe(steps_per_epoch=2), fit_settings())
    return folder


def test_a_run_on_derived_features_reads_raw_items(derived: Path) -> None:
    model = embedcache.load(derived / "run", kind="likelihood")
    source = SquaresSource(8)
    raw = [source.read(FileItem(path=f"{number}.png", length=0)) for number in range(8)]
    of_raw, of_cache = (model.retrieve(["red", "left"], items, k=8) for items in (raw, Cache(derived / "cache")))
    for hits, expected in zip(of_raw, of_cache, strict=True):
        places = [sorted(items, key=lambda hit: hit.position) for items in (hits, expected)]
        scores = [[hit.score for hit in items] for items in places]
        np.testing.assert_allclose(*scores, atol=2e-3)  # the cache has float16


def test_derived_features_without_their_origin_are_refused(derived: Path, tmp_path: Path) -> None:
    for name, message in (
        ("fit", "restore it, or train again"),
        ("inputs", "rule mean without a record of how; pass a"),
    ):
        run = Path(shutil.copytree(derived / "run", tmp_path / name))
        if name == "fit":
            next(run.glob("fit-*.safetensors")).unlink()
        else:
            sides = json.loads((run / "config.json").read_text())["sides"]
            del sides["image"]["inputs"]
            edit_record(run / "config.json", sides=sides)
        with pytest.raises((CorruptError, DataError), match=message):
            embedcache.load(run, kind="likelihood").retrieve("red", [b""])
