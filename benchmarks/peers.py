"""Extraction of a WebDataset tar of pictures with captions by OpenCLIP's ViT-B-32, beside clip-retrieval.

Both run as a user runs them: a new process each time, start-up, loading and writing included, the same checkpoint.
clip-retrieval 2.45.0 needs older packages, so it lives in an environment of its own, named by a variable:

    python -m venv clip-retrieval && clip-retrieval/bin/pip install "setuptools<81" clip-retrieval==2.45.0
    EMBEDCACHE_BENCH_CLIP_RETRIEVAL=clip-retrieval/bin/clip-retrieval python -m benchmarks peers

With pip's own torch on both sides or the CPU build on both: the same build, else the figures compare two torches.
"""

import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq

from benchmarks.cosines import MAX_DRIFT, check_cosines, vectors
from benchmarks.data import save_open_clip, write_pictures
from benchmarks.table import median_rates, show
from embedcache.cli.console import print_line
from embedcache.store.cache import Cache

VARIABLE = "EMBEDCACHE_BENCH_CLIP_RETRIEVAL"
_SHARDS = 4
"""One for each of clip-retrieval's four reading processes: one that finds none fails, and the rest wait for ever."""
_LIMIT_S = 3600


def main(*, quick: bool) -> None:
    """Print samples a second of whole processes: for few samples, where start-up is most of the time, and for many."""
    if VARIABLE not in os.environ:
        print_line(f"clip-retrieval left out: {VARIABLE} does not name its binary, see benchmarks/peers.py")
        return
    counts, repeats = ((64,), 1) if quick else ((64, 2000), 3)
    with TemporaryDirectory() as name:
        folder = Path(name)
        encoder = save_open_clip(folder / "clip.pt")
        for count in counts:
            tars = _write_shards(folder, count)
            calls = {
                "clip-retrieval": partial(_rate, count, folder / "theirs", _theirs(tars, folder / "theirs", encoder)),
                "embedcache extract": partial(_rate, count, folder / "ours", _ours(tars, folder / "ours", encoder)),
            }
            show(f"{count} samples", "samples/s", list(median_rates(calls, repeats=repeats).items()))
            for modality in ("image", "text"):
                print_line(f"{modality}s: {_compare(folder / 'ours', folder / 'theirs', modality)}")


def _write_shards(folder: Path, count: int) -> str:
    share = count // _SHARDS
    for number in range(_SHARDS):
        write_pictures(folder / f"{count}-{number}.tar", share, first=number * share)
    return f"{folder}/{count}-{{0..{_SHARDS - 1}}}.tar"


def _ours(tars: str, folder: Path, encoder: str) -> list[str]:
    program = [sys.executable, "-m", "embedcache", "extract", tars, str(folder)]
    return [*program, "--image-encoder", encoder, "--text-encoder", encoder]


def _theirs(tars: str, folder: Path, encoder: str) -> list[str]:
    program = [os.environ[VARIABLE], "inference", "--input_dataset", tars, "--output_folder", str(folder)]
    model = encoder.replace(",pretrained=", "/")
    return [*program, "--input_format", "webdataset", "--enable_wandb", "False", "--clip_model", model]


def _rate(count: int, output: Path, command: list[str]) -> float:
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
