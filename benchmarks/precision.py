"""bfloat16 beside float32 on this device: items a second of the models alone, and how far the vectors move.

A CPU without bfloat16 instructions (avx512_bf16, amx_bf16) runs it by detours, slower than float32.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.cosines import check_cosines
from benchmarks.data import save_vit, write_captions, write_pictures
from benchmarks.rates import encode_rate, prepare
from benchmarks.table import median_rates, show
from embedcache.arrays import Array
from embedcache.cli.console import print_line
from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.open import open_encoder
from embedcache.encoders.settings import EncoderSettings
from embedcache.sources import open_source

_ANY_DRIFT = 2.0


def main(*, quick: bool) -> None:
    """Print items a second of each model in each precision."""
    num_images, num_texts, repeats = (64, 512, 1) if quick else (512, 4096, 3)
    with TemporaryDirectory() as folder:
        source = open_source(write_pictures(Path(folder) / "pictures.tar", num_images))
        images = _open(save_vit(Path(folder) / "vit.pt"), "image")
        items = [item for sample in source.samples() for item in sample.images]
        prepared = [prepare(source, item, [images["float32"]])[0] for item in items]
        _show("ViT-B/32", "images/s", images, prepared, repeats)
    texts = _open("st:all-MiniLM-L6-v2", "text")
    ids = texts["float32"].prepare(write_captions(num_texts))
    _show("MiniLM", "texts/s", texts, sorted(ids, key=len, reverse=True), repeats)


def _open(spec: str, modality: Modality) -> dict[str, Encoder]:
    settings = {"float32": EncoderSettings(precision="float32"), "bfloat16": EncoderSettings(precision="bfloat16")}
    return {name: open_encoder(spec, modality=modality, settings=each) for name, each in settings.items()}


def _show(title: str, unit: str, encoders: dict[str, Encoder], prepared: Sequence[Array], repeats: int) -> None:
    calls = {name: partial(encode_rate, encoder, prepared) for name, encoder in encoders.items()}
    show(title, unit, list(median_rates(calls, repeats=repeats).items()))
    plain, half = (_encode(encoder, prepared) for encoder in encoders.values())
    print_line(f"{title}: {check_cosines(plain, half, _ANY_DRIFT)}")


def _encode(encoder: Encoder, prepared: Sequence[Array]) -> Array:
    name, size = next(iter(encoder.features)), encoder.batch_size
    batches = [encoder.encode(prepared[start : start + size], [name]) for start in range(0, len(prepared), size)]
    return np.stack([item for batch in batches for item in batch[name]])
