"""Training and encoding on a CUDA device."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import embedcache
from embedcache.arrays import dot_products
from embedcache.dataset.settings import SplitSettings
from embedcache.encoders.base import Encoder, EncoderSettings, Modality
from embedcache.encoders.models import TorchGraph
from embedcache.encoders.open import open_encoder
from embedcache.evaluate.classifiers import Examples, Fit, fit_knn, fit_ridge
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.processes import products_on
from embedcache.progress import NullProgress
from embedcache.runs import Run
from embedcache.search.faiss_index import make_index, num_gpus, spherical_kmeans
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.testing.encoders import TEXTS, example_images
from embedcache.train.settings import MachineSettings, ModelSettings, OptimizerSettings, TrainSettings
from embedcache.train.train import train
from tests.encoders.checkpoints import save_bert, save_timm
from tests.images import write_images

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_training_recall_matches_cpu(cache_path: Path, tmp_path: Path, precision: str) -> None:
    recalls = {}
    for device in ("cpu", "cuda"):
        settings = TrainSettings(
            model=ModelSettings(shared_width=16),
            optimizer=OptimizerSettings(epochs=5, batch_size=64),
            split=SplitSettings(kind="key"),
            machine=MachineSettings(device=device, precision=precision),  # type: ignore[arg-type]
        )
        train(
            cache_path, tmp_path / device, feature={"image": "open_toy/cls", "text": "open_toy/mean"}, settings=settings
        )
        recalls[device] = evaluate_retrieval(cache_path, [tmp_path / device]).recalls["i2t"]["r@10"].value
    assert recalls["cuda"] == pytest.approx(recalls["cpu"], abs=0.1)


REQUESTED = ("grid:4", "layer2.cls", "layer2.tokens")


@pytest.mark.parametrize("modality", ["image", "text"])
def test_features_match_cpu(specs: dict[Modality, str], modality: Modality) -> None:
    _check_close(specs[modality], modality, EncoderSettings(device="cuda", features=REQUESTED), relative=2e-3)  # TF32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("modality", ["image", "text"])
def test_compile_does_not_change_values(specs: dict[Modality, str], modality: Modality) -> None:
    settings = EncoderSettings(device="cuda", compile=True, features=REQUESTED)
    _check_close(specs[modality], modality, settings, relative=2e-3)


def test_out_of_memory_splits_batch(caplog: pytest.LogCaptureFixture) -> None:
    class Wide(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            _, total_bytes = torch.cuda.mem_get_info()
            buffer = torch.empty((len(images), total_bytes // 20), dtype=torch.uint8, device=images.device)
            buffer[:, 0] = images[:, 0]
            return {"first": buffer[:, :1]}

    images = np.arange(100, dtype=np.uint8).reshape(50, 2)
    found = TorchGraph(Wide(), EncoderSettings(device="cuda"))({"images": images}, ["first"])
    np.testing.assert_array_equal(found["first"], images[:, :1])
    assert "cuda is out of memory at batch size 50; continuing with 25" in caplog.text


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[Modality, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "image": f"timm:test_vit,weights={save_timm('test_vit', folder, seed=0)}",
        "text": f"hf:{save_bert(folder / 'bert', seed=0)}",
    }


def _check_close(spec: str, modality: Modality, settings: EncoderSettings, *, relative: float) -> None:
    reference = EncoderSettings(device="cpu", backend="torch", features=REQUESTED)
    on_cpu = open_encoder(spec, modality=modality, settings=reference)
    on_gpu = open_encoder(spec, modality=modality, settings=settings)
    assert on_gpu.features == on_cpu.features
    expected, found = _encode(on_cpu, modality), _encode(on_gpu, modality)
    for name in on_cpu.features:
        for one, other in zip(expected[name], found[name], strict=True):
            assert np.linalg.norm(one - other) < relative * np.linalg.norm(one)


def _encode(encoder: Encoder, modality: Modality) -> dict[str, list[np.ndarray]]:
    prepared = encoder.prepare(example_images() if modality == "image" else TEXTS)
    return encoder.encode(prepared, list(encoder.features))


def test_auto_uses_the_gpu(specs: dict[Modality, str], image_folder: Path, tmp_path: Path) -> None:
    """Extraction, training, evaluation and loading without a device; a second extraction changes nothing."""
    for _ in range(2):
        reports = extract(
            open_source(image_folder),
            tmp_path / "cache",
            image_encoder=[specs["image"]],
            text_encoder=[specs["text"]],
            settings=ExtractSettings(chunk_size=64),
        )
    assert not any(report.computed for report in reports)
    cache = Cache(tmp_path / "cache")
    fingerprints = [cache.feature(modality).fingerprint for modality in ("image", "text")]
    assert {fingerprint["backend"] for fingerprint in fingerprints} == {"torch"}
    assert {fingerprint["precision"] for fingerprint in fingerprints} <= {"bfloat16", "float32"}
    settings = TrainSettings(optimizer=OptimizerSettings(epochs=1, batch_size=64), split=SplitSettings(kind="key"))
    train(tmp_path / "cache", tmp_path / "run", settings=settings)
    assert Run.open(tmp_path / "run").info.settings["machine"]["device"] == "cuda"
    assert train(tmp_path / "cache", tmp_path / "run", settings=settings).reused
    assert evaluate_retrieval(tmp_path / "cache", tmp_path / "run").num_items["image"][0] > 0
    model = embedcache.load(tmp_path / "run")
    assert next(model.run.pair.parameters()).device.type == "cuda"
    assert np.isfinite(model.encode_image(example_images())).all()


def test_features_of_a_cpu_continue_there(specs: dict[Modality, str], tmp_path: Path) -> None:
    """What onnxruntime has computed on a CPU is not computed otherwise where there is a GPU."""
    pytest.importorskip("onnxruntime")
    for name, devices in (("first", ("cpu",)), ("more", ())):
        write_images(tmp_path / "images", 8 if name == "first" else 12)
        extract(
            open_source(tmp_path / "images"),
            tmp_path / "cache",
            image_encoder=[specs["image"]],
            settings=ExtractSettings(devices=devices, extend=name == "more"),
        )
    assert Cache(tmp_path / "cache").feature("image").fingerprint["backend"] == "onnxruntime"
    assert Cache(tmp_path / "cache").feature("image").valid.sum() == 12


@pytest.mark.parametrize("fit", [fit_knn, fit_ridge])
def test_classifiers_match_cpu(fit: Fit) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 5
    vectors = (rng.normal(size=(5, 64))[labels] + rng.normal(size=(600, 64))).astype(np.float32)
    examples = Examples(vectors=vectors, labels=labels, products=products_on("cuda"))
    train, val = examples.take(np.arange(400)), examples.take(np.arange(400, 500))
    found = fit(train, val, 5).scores(vectors[500:])
    expected = fit(replace(train, products=dot_products), val, 5).scores(vectors[500:])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_faiss_clusters_on_the_gpu() -> None:
    if not num_gpus():
        pytest.skip("needs faiss-gpu")
    assert num_gpus("cpu") == 0
    vectors = np.random.default_rng(0).normal(size=(2000, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = {}
    for device in ("cpu", "cuda"):
        centroids = spherical_kmeans(
            vectors, 16, seed=0, iterations=10, max_per_cluster=256, progress=NullProgress(), device=device
        )
        scores[device] = (vectors @ centroids.T).max(axis=1).mean()
    assert scores["cuda"] == pytest.approx(scores["cpu"], rel=0.02)


@pytest.mark.parametrize(
    "factory",
    [
        "Flat",
        *(f"IVF32,{codes}" for codes in ("Flat", "SQ4", "SQ6", "SQ8", "SQfp16", "PQ32", "PQ96")),
        "IVF32_HNSW32,SQfp16",
        "HNSW32",
    ],
)
def test_index_of_a_gpu_agrees_with_the_cpu(factory: str) -> None:
    """A large batch finds the same neighbors on a copy, but for rounding; a graph is searched on the CPU."""
    if not num_gpus():
        pytest.skip("needs faiss-gpu")
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(64, 192))[rng.integers(0, 64, 20_000)] + rng.normal(size=(20_000, 192))).astype("f")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    on_cpu = make_index(factory, 192, device="cpu")
    on_gpu = make_index(factory, 192, device="cuda")
    for index in (on_cpu, on_gpu):
        if not index.is_trained:
            index.train(vectors)
        index.add(np.arange(20_000), vectors)

    expected = on_gpu.search(vectors[:50], 10, {"nprobe": 8})  # a small batch, which the CPU searches
    scores, rows = on_gpu.search(vectors[:500], 10, {"nprobe": 8})
    assert (on_gpu._on_gpu is None) == (factory == "HNSW32")
    np.testing.assert_allclose(scores[:50], expected[0], atol=2e-3 if "PQ" in factory else 1e-4)
    assert (rows[:50] == expected[1]).mean() > (0.9 if "PQ" in factory else 0.98)
