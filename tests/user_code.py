# ruff: noqa: T201
"""What users write with the public API. `just types` checks it and that it rejects mistakes; nothing runs it."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader

import embedcache
from embedcache.progress import Progress

if TYPE_CHECKING:
    from embedcache.options import TrainOptions


def extract(progress: Progress) -> None:
    """Paths, sources and objects; one name or several; options by name."""
    embedcache.extract_features(
        "photos", "cache", image_encoder="lite:efficientnet-lite0", key_column="id", dtype="float32"
    )
    source = embedcache.open_source(Path("photos"), settings=embedcache.SourceSettings(key_column="id"))
    cache = embedcache.Cache(Path("cache"))
    reports = embedcache.extract_features(source, cache, text_encoder=["st:a", "st:b"], progress=progress)
    lines: list[str] = [report.line() for report in reports]
    print(lines, embedcache.plan_extraction(source, cache, image_encoder="lite:efficientnet-lite0").num_bytes)
    is_sound: bool = embedcache.verify_cache(cache, progress=False).is_sound
    print(is_sound, len(cache), cache["label"], cache.feature("image").load().shape, cache.to_pandas("text"))
    keys: list[str] = [sample["key"] for sample in cache[2:4]] + [cache[0]["key"]] + [sample["key"] for sample in cache]
    print(keys)


def align(cache: embedcache.Cache) -> None:
    """Settings made once, or options; runs as paths or models."""
    settings = embedcache.TrainSettings(optimizer=embedcache.OptimizerSettings(epochs=3))
    line: str = embedcache.train_projectors(cache, "run", settings=settings, seed=1).line(Path("run"))
    embedcache.train_projectors(
        ["a", cache, Path("b")], Path("run"), feature={"audio": None, "text": None}, progress=True
    )
    model = embedcache.load("run", device="cpu")
    recall: float = embedcache.evaluate_retrieval(cache, model, part="test").recalls["i2t"]["r@10"].value
    options: TrainOptions = {"cosine": {"text": 0.9}, "widths": [64, 128], "memory": "4GB"}
    embedcache.train_projectors(cache, "run", **options)
    embedcache.train_projectors(cache, "run", lr=1, init_from=["image=a", Path("b")], views=None, selection=Path("a"))
    names: list[str] = list(embedcache.compare_retrieval(cache, ["run", model], control_run="shuffled"))
    print(line, recall, names, embedcache.evaluate_probe(cache, shots=(1, 2)).majority)
    print(
        embedcache.evaluate_pairs(cache).pairs, embedcache.sweep_projectors(cache, "study", "space.toml", trials=3).best
    )
    embedcache.export_run("onnx", model, "model", towers=True)
    embedcache.export_vectors("parquet", cache, "rows.parquet", run=model)
    embedcache.import_vectors(embedcache.open_vectors("parquet", "rows.parquet"), "imported", model="ViT-B-32")


def search(cache: embedcache.Cache, model: embedcache.Model) -> None:
    """Hits are lists of hits."""
    embedcache.build_index(cache, "index", run=model)
    index = embedcache.OpenIndex("index")
    for hits in embedcache.search_index(index, "a dog", k=3):
        key: str = hits[0].key
        print(key, hits.to_pandas(), hits.query)
    results = embedcache.search_index("index", ["a dog"], embedcache.SearchSettings(k=3))
    page: str = results.to_html()
    queries = embedcache.Queries(images="a.jpg", texts="a dog", vectors=torch.zeros(2, 8))
    print(page, index.search(queries, k=2), embedcache.select_samples(cache, "some.parquet", "random", budget=10))


def use(cache: embedcache.Cache) -> None:
    """Models of every kind, and a loss of one's own."""
    model = embedcache.load("run")
    vectors = model.encode(["a dog", "a cat"])
    rows: int = model.similarity(["a.jpg"], "a dog").shape[0] + model.similarity(vectors, torch.zeros(2, 8)).shape[0]
    images: np.ndarray = model.encode_image(["a.jpg", b"bytes"])
    best: list[str] = model.classify("a.jpg", ["cat", "dog"], template="a photo of a {}").best
    print(rows, images, best)
    for batch in DataLoader(embedcache.PairDataset(cache, part="train", split="key"), batch_size=2):
        print(batch["image"])


def mistake(cache: embedcache.Cache, model: embedcache.Model) -> None:
    """Each line with a comment is refused; a comment that ignores nothing is an error, too."""
    model.encode_text(3)  # type: ignore[arg-type]
    tensors: torch.Tensor = model.encode_text("a")  # type: ignore[assignment]
    model.classify(3, "a")  # type: ignore[arg-type]
    embedcache.train_projectors(3, "run")  # type: ignore[arg-type]
    embedcache.extract_features("photos", "cache", "lite:efficientnet-lite0")  # type: ignore[call-arg]
    embedcache.train_projectors(cache, "run", epoch=3)  # type: ignore[call-arg]
    embedcache.train_projectors(cache, "run", epochs="3")  # type: ignore[arg-type]
    embedcache.extract_features("photos", "cache", dtype="float64")  # type: ignore[arg-type]
    embedcache.open_vectors("npy", vectors={"image": "image.npy"})  # type: ignore[call-arg]
    key: int = embedcache.search_index("index", "a")[0][0].key  # type: ignore[assignment]
    print(tensors, key, cache[0.5])  # type: ignore[call-overload]
    embedcache.evaluate_retrieval(cache, model, progress="yes")  # type: ignore[arg-type]
    embedcache.PairDataset(cache, part="all")  # type: ignore[arg-type]
    model.transcribe()  # type: ignore[attr-defined]
    embedcache.load("run", "cpu")  # type: ignore[call-arg]
    embedcache.lod("run")  # type: ignore[attr-defined]
