"""Extraction of images with a light and a heavy encoder, and with both in one pass, beside the floor.

The floor is what the stages would give that share the cores and waste nothing, see `benchmarks.rates.floor`: reading,
decoding and preparing alone, and each encoder alone on inputs that are prepared already. Start-up is in none of them.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.data import save_vit, write_pictures
from benchmarks.rates import decode_rate, encode_rate, extract_rate, floor, prepare
from benchmarks.table import median_rates, show
from embedcache.encoders.open import open_encoder
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import Source, open_source

LIGHT = "lite:efficientnet-lite0"
_PREPARED = 512
_CHUNKS = 4
"""Of so many pictures, so that most chunks are committed while the next is encoded, as in longer runs."""


def main(*, quick: bool) -> None:
    """Print images a second."""
    count, repeats = (256, 1) if quick else (2048, 3)
    with TemporaryDirectory() as folder:
        source = open_source(write_pictures(Path(folder) / "pictures.tar", count))
        heavy = save_vit(Path(folder) / "vit.pt")
        for title, specs in (("light", [LIGHT]), ("heavy", [heavy]), ("both in one pass", [LIGHT, heavy])):
            _show(title, source, specs, repeats, ExtractSettings(chunk_size=count // _CHUNKS))


def _show(title: str, source: Source, specs: Sequence[str], repeats: int, settings: ExtractSettings) -> None:
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
