"""Extraction of OpenMoji with the packaged encoders, beside its floors.

Images: the floor is the encoder alone on batches that are prepared already; rendering and decoding alone is the other
part of the work. Texts: the floor is the encoder alone on prepared texts, longest first.
"""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.table import show
from embedcache.cache.cache import Cache
from embedcache.cache.spine import index
from embedcache.encoders.contract import Encoder
from embedcache.encoders.open import open_encoder
from embedcache.extract.extract import extract
from embedcache.extract.load import load_image, load_texts
from embedcache.sources import ImageItem, open_source

IMAGE, TEXT = "lite:efficientnet-lite0", "st:all-MiniLM-L6-v2"


def main() -> None:
    """Print items a second."""
    source = open_source("openmoji:en")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as executor:
        index(source, Path(folder) / "c")
        cache = Cache(Path(folder) / "c")
        image, text = open_encoder(IMAGE, modality="image"), open_encoder(TEXT, modality="text")
        items = [ImageItem(**row) for row in cache.items("image").drop_columns("sample").to_pylist()]
        started = time.perf_counter()
        loaded = list(executor.map(lambda item: load_image(source, item, [image]), items))
        decoding = len(items) / (time.perf_counter() - started)
        encoding = _encoder_rate(image, [item.inputs[0] for item in loaded])
        whole = _extract_rate(Path(folder) / "images", image=[IMAGE])
        show("images", "images/s", [("encoder alone", encoding), ("decode alone", decoding), ("extract", whole)])
        prepared = [item.inputs[0] for item in load_texts(cache.items("text")["text"].to_pylist(), [text])]
        encoding = _encoder_rate(text, sorted(prepared, key=len, reverse=True))
        show(
            "texts",
            "texts/s",
            [("encoder alone", encoding), ("extract", _extract_rate(Path(folder) / "t", text=[TEXT]))],
        )


def _encoder_rate(encoder: Encoder, prepared: list) -> float:  # type: ignore[type-arg]
    name = next(iter(encoder.features))
    started = time.perf_counter()
    for start in range(0, len(prepared), encoder.batch_size):
        encoder.encode(prepared[start : start + encoder.batch_size], [name])
    return len(prepared) / (time.perf_counter() - started)


class _Clock:
    """Times the work that is reported as progress, without start-up."""

    def start(self, what: str, total: int, unit: str) -> None:
        self.total, self.started = total, time.perf_counter()

    def advance(self, count: int) -> None:
        pass

    def finish(self) -> None:
        self.rate = self.total / (time.perf_counter() - self.started)

    def note(self, line: str) -> None:
        pass


def _extract_rate(cache_path: Path, **encoders: list[str]) -> float:
    clock = _Clock()
    extract(open_source("openmoji:en"), cache_path, progress=clock, **encoders)  # type: ignore[arg-type]
    return clock.rate
