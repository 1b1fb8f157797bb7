"""Items a second of an extraction and of its parts."""

import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from embedcache.arrays import Array
from embedcache.encoders.base import Encoder
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import ImageItem, Source
from embedcache.sources.images import decode_image


def decode_rate(source: Source, items: Sequence[ImageItem], encoders: Sequence[Encoder]) -> float:
    """Images a second read, decoded and prepared for all encoders, by one thread a core and nothing else."""
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        deque(executor.map(lambda item: _drop(prepare(source, item, encoders)), items), maxlen=0)
    return len(items) / (time.perf_counter() - started)


def prepare(source: Source, item: ImageItem, encoders: Sequence[Encoder]) -> list[Array]:
    """Turn one stored image into one input an encoder."""
    image = decode_image(source.read(item))
    return [encoder.prepare([image])[0] for encoder in encoders]


def encode_rate(encoder: Encoder, prepared: Sequence[Array]) -> float:
    """Items a second that the model alone makes of inputs that lie in memory, in whole batches of its choice."""
    name, size = next(iter(encoder.features)), encoder.batch_size
    started = time.perf_counter()
    for start in range(0, len(prepared), size):
        encoder.encode(prepared[start : start + size], [name])
    return len(prepared) / (time.perf_counter() - started)


def extract_rate(
    source: Source, *, image: Sequence[str] = (), text: Sequence[str] = (), settings: ExtractSettings | None = None
) -> float:
    """Items a second of the package's own extraction into a new cache, commits included, start-up not."""
    clock = _Clock()
    with TemporaryDirectory() as folder:
        extract(
            source, Path(folder) / "cache", image_encoders=image, text_encoders=text, settings=settings, progress=clock
        )
    return clock.rate


def floor(*rates: float) -> float:
    """Items a second of stages that share the same cores and waste nothing: 1 / (1/a + 1/b + …).

    Each rate is of one stage with all cores to itself. No order of the work and no overlap can beat it while all
    stages are bound by the cores; a device of its own for the model would give the smallest of the rates instead.
    """
    return 1 / sum(1 / rate for rate in rates)


def _drop(prepared: Sequence[Array]) -> None:
    del prepared


class _Clock:
    """Times the last piece of work that is reported as progress: the encoding."""

    def start(self, what: str, total: int, unit: str) -> None:
        self._total, self._started = total, time.perf_counter()

    def advance(self, count: int) -> None:
        pass

    def finish(self) -> None:
        self.rate = self._total / (time.perf_counter() - self._started)

    def note(self, line: str) -> None:
        pass
