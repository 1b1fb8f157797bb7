"""A source of all modalities, some items of which fail, and its cache."""

import io
from pathlib import Path

import av
import numpy as np
from PIL import Image

from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from tests.media_files import cloud, moving_square, npz, tone, wav
from tests.media_toy import MEDIA
from tests.toy import IMAGE, TEXT

FEATURES = ("cls", "patches", "tokens", "mean", "frames", "extent", "xyz", "uv", "label")
_ROWS = """\
key,image,audio,video,points_path,caption,start_s,stop_s
a,a.png,long.wav,square.mkv,a.npz,a growing tone,0.02,0.1
b,,long.wav,,b.npz,,0.1,
c,b.png,short.wav,,,a short tone,,
d,,broken.wav,square.mkv,no-coordinates.npz,no sound,,
e,empty.png,,cut.mkv,c.npz,three points,,
"""


def make_modalities(folder: Path) -> Path:
    """Write the source below a folder and extract every modality; return the path of the cache."""
    source = folder / "modalities"
    source.mkdir()
    for name, data in _files().items():
        (source / name).write_bytes(data)
    extract(
        open_source(source / "table.csv"),
        folder / "modalities-cache",
        image_encoder=[IMAGE],
        text_encoder=[TEXT],
        encoder={"audio": [MEDIA], "video": [MEDIA], "points": [MEDIA]},
        settings=ExtractSettings(features=FEATURES, chunk_size=2),
    )
    return folder / "modalities-cache"


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
