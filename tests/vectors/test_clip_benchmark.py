from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from clip_benchmark.models import TYPE2FUNC
from PIL import Image
from torch.utils.data import default_collate

from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.metrics import best_ranks, recall_at
from embedcache.modeling.images import rgb_image
from embedcache.sources import open_source
from embedcache.vectors.benchmarks import load_clip_benchmark as load
from embedcache.vectors.benchmarks import register
from tests.conftest import FEATURES
from tests.toy import IMAGE, TEXT
from tests.vectors.runs import SIDES, cached_vectors, train_run

CLOSE = 1e-5  # features of float32; sums over batches of other sizes differ in their last bits


@pytest.fixture(scope="module")
def exact_cache(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the images that keeps every bit of the encoder's float32."""
    path = tmp_path_factory.mktemp("exact") / "cache"
    settings = ExtractSettings(features=FEATURES, dtype="float32")
    extract(open_source(image_folder), path, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return path


@pytest.fixture(scope="module")
def runs(exact_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: train_run(exact_cache, folder / name, *sides) for name, sides in SIDES.items()}


@pytest.mark.parametrize("name", SIDES)
def test_vectors_equal_cache(name: str, exact_cache: Path, image_folder: Path, runs: dict[str, Path]) -> None:
    model, transform, tokenizer = load("embedcache", str(runs[name]))
    images = [transform(Image.open(path)) for path in sorted(image_folder.glob("*.png"))[:20]]
    texts = [path.read_text().strip() for path in sorted(image_folder.glob("*.txt"))[:20]] + ["bar"]
    with torch.no_grad():
        image_vectors = model.eval().encode_image(default_collate(images).to("cpu"))
        text_vectors = model.encode_text(tokenizer(texts).to("cpu"))
    for vectors, modality in ((image_vectors, "image"), (text_vectors[:-1], "text")):
        expected = cached_vectors(exact_cache, runs[name], modality)[:20]
        assert vectors.dtype == torch.float32
        np.testing.assert_allclose(vectors.numpy(), expected, atol=CLOSE)
    alone = model.encode_text(tokenizer(["bar"]))[0]  # its padding beside longer texts is no part of it
    np.testing.assert_allclose(text_vectors[-1], alone, atol=CLOSE)


def test_autocast_changes_no_vector(image_folder: Path, runs: dict[str, Path]) -> None:
    model, transform, tokenizer = load("embedcache", runs["vectors"])
    image, tokens = transform(Image.open(image_folder / "00000.png"))[None], tokenizer(["red bar", "blue"])
    plain = (model.encode_image(image), model.encode_text(tokens))
    with torch.no_grad(), torch.autocast("cpu", enabled=True):
        mixed = (model.encode_image(image), model.encode_text(tokens))
    for one, other in zip(plain, mixed, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)


def test_images_are_prepared_as_in_extraction(runs: dict[str, Path]) -> None:
    """Here a transparent one; `rgb_image` converts all modes."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8))
    _, transform, _ = load("embedcache", runs["vectors"])
    assert torch.equal(transform(image), transform(rgb_image(image)))


def pairs_of(
    image_folder: Path, transform: object, count: int
) -> Iterator[tuple[torch.Tensor, Sequence[Sequence[str]]]]:
    """Batches of images with one to three captions each, all different."""
    for start in range(0, count, 16):
        numbers = range(start, min(start + 16, count))
        images = [transform(Image.open(image_folder / f"{number:05d}.png")) for number in numbers]
        captions = [(image_folder / f"{number:05d}.txt").read_text().strip() for number in numbers]
        yield (
            default_collate(images),
            [
                [f"{text} {number} {copy}" for copy in range(1 + number % 3)]
                for text, number in zip(captions, numbers, strict=True)
            ],
        )


def test_retrieval_equals_clip_benchmark(image_folder: Path, runs: dict[str, Path]) -> None:
    register()
    model, transform, tokenizer = TYPE2FUNC["embedcache"]("embedcache", runs["vectors"])
    batches = list(pairs_of(image_folder, transform, 100))
    theirs = zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    captions = [texts for _, batch in batches for texts in batch]
    images = torch.cat([model.encode_image(batch) for batch, _ in batches]).numpy()
    texts = model.encode_text(tokenizer([text for texts in captions for text in texts])).numpy()
    owner = np.repeat(np.arange(100), [len(texts) for texts in captions])
    own = np.arange(len(texts))
    for k in (1, 5, 10):
        t2i, i2t = best_ranks(texts, images, (own, owner)), best_ranks(images, texts, (owner, own))
        assert recall_at(t2i, k) == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert recall_at(i2t, k) == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
    assert recall_at(t2i, 10) > 0.12  # chance is 0.1: the runs know something, so the figures can differ
