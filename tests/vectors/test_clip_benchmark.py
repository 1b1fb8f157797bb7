import io
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_benchmark.cli import main as run_clip_benchmark
from clip_benchmark.metrics import zeroshot_retrieval
from PIL import Image
from torch.utils.data import default_collate

from embedcache.cli.main import app
from embedcache.dataset.labels import class_vectors, read_prompts
from embedcache.errors import FingerprintError, SettingError
from embedcache.evaluate.runs import load_runs, run_input
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.metrics.ranking import best_ranks, recall_at
from embedcache.sources import open_source
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache
from embedcache.vectors.benchmarks import load_clip_benchmark as load
from embedcache.vectors.benchmarks import register
from tests.conftest import FEATURES
from tests.edits import edit_record
from tests.toy import IMAGE, TEXT
from tests.vectors.layout import write_layout
from tests.vectors.runs import SIDES, cached_vectors, train_run

PHOTOS = Path(str(distribution("foolbox").locate_file("foolbox/data")))
CLOSE = 1e-5  # features of float32; sums over batches of other sizes differ in their last bits
HALF = 2e-3  # features of float16, which has 11 bits


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


@pytest.mark.parametrize("kind", ["transparent", "palette", "gray", "16 bit", "turned"])
def test_image_modes_are_prepared_as_in_extraction(kind: str, runs: dict[str, Path]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    image = Image.fromarray(pixels)
    options: dict[str, object] = {"format": "PNG"}
    if kind == "palette":
        image = image.convert("RGB").quantize(16)
    elif kind == "gray":
        image = image.convert("L")
    elif kind == "16 bit":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        image, options["exif"] = image.convert("RGB"), exif
    file = io.BytesIO()
    image.save(file, **options)
    _, transform, _ = load("embedcache", runs["vectors"])
    expected = transform(Image.fromarray(np.asarray(decode_image(file.getvalue()))))
    assert torch.equal(transform(Image.open(io.BytesIO(file.getvalue()))), expected)


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
    model, transform, tokenizer = load("embedcache", runs["vectors"])
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


def edited(run_path: Path, folder: Path, modality: str, **fields: object) -> Path:
    """Copy a run, and change what its config says of one side."""
    copy = shutil.copytree(run_path, folder / "edited")
    path = copy / "run.json"
    inputs = json.loads(path.read_text())["inputs"]
    edit_record(path, inputs={**inputs, modality: {**inputs[modality], **fields}})
    return copy


@pytest.mark.parametrize("modality", ["image", "text"])
def test_changed_encoder_raises(modality: str, runs: dict[str, Path], tmp_path: Path) -> None:
    run = edited(runs["vectors"], tmp_path, modality, spec=f"{IMAGE},scale=2")
    with pytest.raises(FingerprintError, match=r"feature open_toy/\w+ .* other settings: weights: stored '.*'"):
        load("embedcache", run)


def test_model_stays_on_its_device(runs: dict[str, Path]) -> None:
    model, _, _ = load("embedcache", runs["vectors"])
    assert model.to("cpu") is model
    with pytest.raises(SettingError, match="device"):
        model.to("meta")


def write_emoji(folder: Path, every: int) -> Path:
    """Write some of OpenMoji's images with their English names beside them."""
    folder.mkdir()
    source = open_source("openmoji:en")
    for number, sample in enumerate(source.samples()):
        if number % every == 0:
            (folder / f"{number:05d}.png").write_bytes(source.read(sample.images[0]))
            (folder / f"{number:05d}.txt").write_text(sample.texts[0].text)
    return folder


def write_photos(folder: Path) -> Path:
    """Write foolbox's photographs of ImageNet and the names of their classes as CLIP_benchmark reads them."""
    photos = sorted(PHOTOS.glob("imagenet_*.jpg"))
    classes = [int(path.stem.rpartition("_")[2]) for path in photos]
    numbers = sorted(set(classes))
    names = [str(sample.columns["class"]) for sample in open_source("prompts:imagenet1k").samples()]
    return write_layout(
        folder,
        {
            path.stem: {"jpg": path.read_bytes(), "cls": str(numbers.index(number)).encode()}
            for path, number in zip(photos, classes, strict=True)
        },
        classnames=[names[number] for number in numbers],
        zeroshot_classification_templates=["a photo of a {c}.", "{c}", "the {c} emoji"],
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of CLIP_benchmark
def test_photo_accuracy_equals_clip_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = "lite:efficientnet-lite0", "st:all-MiniLM-L6-v2"
    extract(
        open_source(write_emoji(tmp_path / "emoji", 48)),
        tmp_path / "cache",
        image_encoder=[image],
        text_encoder=[text],
    )
    run, photos = tmp_path / "run", write_photos(tmp_path / "photos")
    train_run(tmp_path / "cache", run, "efficientnet-lite0/patch_mean", "all-MiniLM-L6-v2/mean", "linear")
    extract(open_source(photos), tmp_path / "images", image_encoder=[image])
    extract(open_source(f"prompts:{photos}"), tmp_path / "prompts", text_encoder=[text])

    data = ["--dataset", "wds/photos", "--dataset_root", "photos", "--task", "zeroshot_classification"]
    options = [*data, "--num_workers", 0, "--quiet", "--save_clf", "classes.pt"]
    words = ["--model_type", "embedcache", "--model", "embedcache", "--pretrained", "run", "--no_amp"]
    words += ["--output", "theirs.json", *map(str, options)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "eval", *words])
    register()
    run_clip_benchmark()
    app(
        ["evaluate", "zero-shot", "images", "run", "--prompts", "prompts", "--output", "ours.json"],
        standalone_mode=False,
    )
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    ours = json.loads((tmp_path / "ours.json").read_text())
    assert theirs["metrics"] == pytest.approx(ours["metrics"], abs=1e-3)
    for field in ("model", "pretrained", "task", "language"):
        assert theirs[field] == ours[field]
    assert 0 < ours["metrics"]["acc5"] < 1
    [loaded] = load_runs([run])
    prompts = Cache(tmp_path / "prompts")
    classes = class_vectors(read_prompts(prompts, run_input(prompts, loaded, "text")), loaded.pair.tower("text"))
    found = torch.load(tmp_path / "classes.pt", weights_only=True).T
    np.testing.assert_allclose(found, classes, atol=HALF)
