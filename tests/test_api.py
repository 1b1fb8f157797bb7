"""The public API: types, and a model whose embeddings equal those in the cache."""

import os
import subprocess
import sys
from collections.abc import Callable
from inspect import isclass, isfunction, signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel

import embedcache
from embedcache.dataset.inputs import open_input
from embedcache.errors import DataError, FingerprintError, PathError, SettingError, SourceError, UnknownNameError
from tests.edits import edit_record
from tests.options import STUB, write_stub
from tests.toy import IMAGE, TEXT
from tests.vectors.runs import SIDES, cached_vectors, train_run

ROOT = Path(__file__).parents[1]


def test_import_is_light() -> None:
    code = (
        "import sys, time; start = time.process_time(); import embedcache; took = time.process_time() - start;"
        "print(took, *sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'pyarrow', 'zarr', "
        "'faiss', 'timm', 'transformers', 'PIL', 'matplotlib'}), *(n for n in sys.modules if n[:11] == 'embedcache.'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    took, *loaded = done.stdout.split()
    assert loaded == []
    assert float(took) < 0.2


def test_options_have_the_types_of_their_settings() -> None:
    assert STUB.read_text() == write_stub(), "run: just options"
    functions = [getattr(embedcache, name) for name in embedcache.__all__]
    parameters = [part for each in functions if isfunction(each) for part in signature(each).parameters.values()]
    assert {str(part) for part in parameters if part.kind is part.VAR_KEYWORD and "Options" not in str(part)} == set()


def test_reports_print_as_their_summary() -> None:
    """Check that no report has the `repr` of a dataclass or a model, which lists all of its arrays."""
    functions = [getattr(embedcache, name) for name in embedcache.__all__]
    results = {each.__annotations__["return"] for each in functions if isfunction(each)}
    reports = [each for each in results if isclass(each) and each.__name__.endswith("Report")]
    assert len(reports) > 10
    # `dataclass` wraps the method that it makes
    assert [
        each for each in reports if hasattr(each.__repr__, "__wrapped__") or each.__repr__ is BaseModel.__repr__
    ] == []


@pytest.fixture(scope="module")
def exact_cache(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in float32, so that values are exact."""
    path = tmp_path_factory.mktemp("api") / "cache"
    settings = embedcache.ExtractSettings(features=("cls", "patches", "mean", "tokens"), dtype="float32")
    embedcache.extract_features(
        embedcache.open_source(image_folder), path, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings
    )
    return path


@pytest.fixture(scope="module", params=SIDES)
def run_path(request: pytest.FixtureRequest, exact_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(exact_cache, tmp_path_factory.mktemp("runs") / request.param, *SIDES[request.param])


def test_model_matches_the_cache(exact_cache: Path, image_folder: Path, run_path: Path) -> None:
    model, paths = embedcache.load(run_path), sorted(image_folder.glob("*.png"))[:20]
    texts = embedcache.Cache(exact_cache).items("text")["text"].to_pylist()[:20]
    images_NP = cached_vectors(exact_cache, run_path, "image")[:20]
    texts_MP = cached_vectors(exact_cache, run_path, "text")[:20]
    np.testing.assert_allclose(model.encode_image(paths), images_NP, atol=1e-4)
    np.testing.assert_allclose(model.encode_image([Image.open(path) for path in paths]), images_NP, atol=1e-4)
    np.testing.assert_allclose(model.encode_text(texts), texts_MP, atol=1e-4)
    np.testing.assert_allclose(model.similarity(paths[:3], texts), images_NP[:3] @ texts_MP.T, atol=1e-4)


def test_texts_are_encoded_and_vectors_are_compared(image_folder: Path, run_path: Path) -> None:
    model, paths, texts = embedcache.load(run_path), sorted(image_folder.glob("*.png"))[:3], ["a red box", "a boat"]
    images_NP, texts_QP = model.encode(paths, "image"), model.encode(texts)
    np.testing.assert_array_equal(texts_QP, model.encode_text(texts))
    expected_NQ = images_NP @ texts_QP.T
    for items, others in (
        (images_NP, texts_QP),
        (torch.from_numpy(images_NP), 2 * texts_QP),
        (paths, texts_QP),
        (images_NP, texts),
        (images_NP, np.array(texts)),
    ):
        np.testing.assert_allclose(model.similarity(items, others), expected_NQ, atol=1e-5)
    assert model.similarity(texts_QP, texts_QP).diagonal() == pytest.approx(1)
    with pytest.raises(DataError, match="NaN"):
        model.similarity(images_NP, texts_QP * np.nan)


def test_classes_without_training(image_folder: Path, run_path: Path) -> None:
    model, paths = embedcache.load(run_path), sorted(image_folder.glob("*.png"))[:3]
    names = ("red bar", "green bar", "blue bar")
    scores = model.classify(paths, names)
    logits_NC = model.scale * model.similarity(paths, names)
    expected_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores.probs_NC, expected_NC, atol=1e-5)
    assert scores.best == [names[number] for number in logits_NC.argmax(axis=1)]
    prompts_TP = model.encode_text(["a red bar", "the red bar"])
    one = model.classify(paths[0], "red bar", template=["a {}", "the {}"])
    assert one.probs_NC.tolist() == [[1.0]]
    assert one.top() == [[("red bar", 1.0)]]
    two = model.classify(paths, ["red bar", "sky"], template=["a {}", "the {}"])
    mean_P = prompts_TP.mean(axis=0) / np.linalg.norm(prompts_TP.mean(axis=0))
    cosines_N = model.encode_image(paths) @ mean_P
    others_P = model.encode_text(["a sky", "the sky"]).mean(axis=0)
    others_N = model.encode_image(paths) @ (others_P / np.linalg.norm(others_P))
    expected_N = 1 / (1 + np.exp(model.scale * (others_N - cosines_N)))
    np.testing.assert_allclose(two.probs_NC[:, 0], expected_N, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "word"),
    [
        ("missing.png", "exist"),
        (ROOT, "not a file"),
        (__file__, "not an image"),
        (torch.zeros(3, 8, 8), "Tensor"),
        ([None], "None"),
        (b"bytes", "not an image"),
    ],
)
def test_invalid_images_raise(run_path: Path, image: Any, word: str) -> None:
    with pytest.raises((PathError, DataError), match=word):
        embedcache.load(run_path).encode_image(image)


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        (["a", " "], "empty"),
        (["a", float("nan")], "nan at position 1"),
        (None, "None"),
        (np.array("a"), "array"),
        ("a \ud800", "Unicode"),
    ],
)
def test_invalid_texts_raise(run_path: Path, texts: Any, word: str) -> None:
    with pytest.raises(DataError, match=word):
        embedcache.load(run_path).encode_text(texts)


@pytest.mark.parametrize(
    ("names", "template", "error", "word"),
    [
        (["a", "a"], "a {}", DataError, "twice"),
        ([], "a {}", DataError, "none"),
        ([1], "a {}", DataError, "texts"),
        (["a"], "a photo", SettingError, "template"),
    ],
)
def test_invalid_classes_raise(run_path: Path, names: Any, template: str, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        embedcache.load(run_path).classify(np.zeros((8, 8, 3), np.uint8), names, template=template)


def test_stored_features_are_projected(run_path: Path, exact_cache: Path) -> None:
    model = embedcache.load(run_path)
    feature = model.run.info.inputs["image"].feature
    stored = open_input(embedcache.Cache(exact_cache), "image", feature).read(np.arange(3)).values
    projected = model.project(stored.astype(np.float64), "image")
    np.testing.assert_allclose(projected, cached_vectors(exact_cache, run_path, "image")[:3], atol=1e-5)
    assert projected.dtype == np.float32
    assert model.project(stored[:0], "image").shape == (0, model.width)
    width = stored.shape[-1]
    assert model.project(stored.reshape(-1, width)[0], "image").shape == (1, model.width)
    for wrong, word in ((stored[..., 1:], "shape"), (stored * np.nan, "NaN"), (["a"], "numbers")):
        with pytest.raises(DataError, match=word):
            model.project(wrong, "image")


def test_changed_encoder_raises_on_first_use(run_path: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    copied.mkdir()
    for file in run_path.iterdir():
        if file.is_file():
            (copied / file.name).write_bytes(file.read_bytes())
    edit_record(copied / "run.json", {f'"spec": "{IMAGE}"': f'"spec": "{IMAGE},scale=2"'})
    model = embedcache.load(copied)  # opens no encoder
    with pytest.raises(FingerprintError, match="weights"):
        model.encode_text("red")


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (
            lambda path: embedcache.extract_features(path / "a.txt", path, encoder=["whisper:tiny.en"]),
            SettingError,
            "audio",
        ),
        (lambda path: embedcache.extract_features(path / "a.txt", path, image_encoder=[5]), SettingError, "5"),
        (lambda path: embedcache.import_vectors("vectors.npy", path), SettingError, "open_vectors"),
        (lambda path: embedcache.open_source(["a dog", "a cat"]), SourceError, ".txt"),
        (lambda path: embedcache.open_source(path, kind=5), UnknownNameError, "5"),
        (lambda path: embedcache.train_projectors([], path), SettingError, "none"),
        (lambda path: embedcache.merge_caches([], path), DataError, "two"),
        (lambda path: embedcache.export_run(None, path, path), UnknownNameError, "None"),
        (lambda path: embedcache.compare_retrieval(path, []), SettingError, "none"),
        (lambda path: embedcache.compare_zero_shot(path, [], "prompts"), SettingError, "none"),
    ],
)
def test_arguments_of_another_type_are_named(
    tmp_path: Path, call: Callable[[Path], object], error: type[Exception], word: str
) -> None:
    (tmp_path / "a.txt").write_text("a dog\n")
    with pytest.raises(error, match=word):
        call(tmp_path)
