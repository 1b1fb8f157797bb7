"""Write the golden cache of all modalities, and its source files: `python -m tests.golden.make_modalities`.

It is never made again: all later versions must open it, verify it and resume it.
"""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
from PIL import Image

from embedcache.extract.extract import EncoderReport, extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.layout import write_info
from tests.media_files import cloud, moving_square, npz, tone, wav
from tests.media_toy import MEDIA
from tests.toy import IMAGE, TEXT

FOLDER = Path(__file__).parent
CACHE, SOURCE = FOLDER / "cache-1-modalities", FOLDER / "source-1-modalities"
FEATURES = ("cls", "patches", "tokens", "mean", "frames", "extent", "xyz", "uv", "label")
_ROWS = """\
key,image,audio,video,points_path,caption,start_s,stop_s
a,a.png,long.wav,square.mkv,a.npz,a growing tone,0.02,0.1
b,,long.wav,,b.npz,,0.1,
c,b.png,short.wav,,,a short tone,,
d,,broken.wav,square.mkv,no-coordinates.npz,no sound,,
e,empty.png,,cut.mkv,c.npz,three points,,
"""


def make() -> Path:
    """Write the source, the cache and its values; return the path of the cache."""
    shutil.rmtree(CACHE, ignore_errors=True)
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir()
    for name, data in _files().items():
        (SOURCE / name).write_bytes(data)
    run(SOURCE, CACHE)
    shutil.rmtree(CACHE / "records")
    info = Cache(CACHE).info
    write_info(CACHE, replace(info, source={**info.source, "path": "golden/table.csv"}))
    np.savez_compressed(CACHE.with_suffix(".npz"), **expected(Cache(CACHE)))  # type: ignore[arg-type]
    return CACHE


def run(source: Path, cache: Path) -> list[EncoderReport]:
    """Extract every modality."""
    return extract(
        open_source(source / "table.csv"),
        cache,
        image_encoder=[IMAGE],
        text_encoder=[TEXT],
        encoder={"audio": [MEDIA], "video": [MEDIA], "points": [MEDIA]},
        settings=ExtractSettings(features=FEATURES, chunk_size=2),
    )


def expected(cache: Cache) -> dict[str, np.ndarray]:
    """Return the valid rows of every feature, tokens of all items in sequence, with their lengths."""
    arrays = {}
    for modality in cache.info.num_items:
        for feature in cache.features(modality):
            items = [np.atleast_2d(item) for item in feature.gather_tokens(np.flatnonzero(feature.valid))]
            arrays[f"{modality} {feature.feature}"] = np.concatenate(items)
            arrays[f"{modality} {feature.feature} lengths"] = np.array([len(item) for item in items])
            arrays[f"{modality} {feature.feature} valid"] = feature.valid
    return arrays


def _files() -> dict[str, bytes]:
    video = _lossless(moving_square(5, width=16, height=12))
    return {
        "table.csv": _ROWS.encode(),
        **{name: _png(color) for name, color in (("a.png", "red"), ("b.png", "navy"))},
        "empty.png": b"",
        "long.wav": wav(tone(0.15)),
        "short.wav": wav(tone(0.01)),  # shorter than a frame of the encoder
        "broken.wav": b"RIFF, but no sound",
        "square.mkv": video,
        "cut.mkv": video[:200],
        "a.npz": npz(cloud(9)),
        "b.npz": npz(cloud(4, seed=1)),
        "c.npz": npz(cloud(3, seed=2)),
        "no-coordinates.npz": npz({"label": np.arange(3)}),
    }


def _png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, "PNG")
    return file.getvalue()


def _lossless(frames: np.ndarray) -> bytes:
    """Return a video whose decoded frames are the same in every version of FFmpeg."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream = out.add_stream("ffv1", rate=25, width=frames.shape[2], height=frames.shape[1], pix_fmt="bgr0")
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


if __name__ == "__main__":
    make()
