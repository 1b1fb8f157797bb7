"""Features of each modality by the encoders of the tests, compared with values that an earlier version wrote."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from embedcache.axis import Axis
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from tests.media_files import cloud, moving_square, npz, tone, wav
from tests.media_toy import MEDIA
from tests.toy import IMAGE, TEXT

VALUES = Path(__file__).with_name("modalities.npz")
FEATURES = ("cls", "patches", "tokens", "mean", "frames", "extent", "xyz", "uv", "label")
ROWS = """\
key,image,audio,video,points_path,caption,start_s,stop_s
a,a.png,long.wav,square.mkv,a.npz,a growing tone,0.02,0.1
b,,long.wav,,b.npz,,0.1,
c,b.png,short.wav,,,a short tone,,
d,,broken.wav,square.mkv,no-coordinates.npz,no sound,,
e,empty.png,,cut.mkv,c.npz,three points,,
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of all modalities, in chunks of two; some items of each are broken."""
    folder = tmp_path_factory.mktemp("values")
    video = _lossless(moving_square(5, width=16, height=12))
    files = {
        "table.csv": ROWS.encode(),
        "a.png": _png("red"),
        "b.png": _png("navy"),
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
    for name, data in files.items():
        (folder / name).write_bytes(data)
    extract(
        open_source(folder / "table.csv"),
        folder / "cache",
        image_encoder=[IMAGE],
        text_encoder=[TEXT],
        encoder={"audio": [MEDIA], "video": [MEDIA], "points": [MEDIA]},
        settings=ExtractSettings(features=FEATURES, chunk_size=2),
    )
    return Cache(folder / "cache")


def test_features_have_the_same_values(cache: Cache) -> None:
    arrays = {}
    for modality in cache.info.num_items:
        for feature in cache.features(modality):
            items = [np.atleast_2d(item) for item in feature.gather_tokens(np.flatnonzero(feature.valid))]
            arrays[f"{modality} {feature.feature}"] = np.concatenate(items)
            arrays[f"{modality} {feature.feature} lengths"] = np.array([len(item) for item in items])
            arrays[f"{modality} {feature.feature} valid"] = feature.valid
    with np.load(VALUES) as expected:
        assert set(arrays) == set(expected.files)
        for name in expected.files:
            np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)
    assert not verify(cache)


def test_intervals_failures_and_axes(cache: Cache) -> None:
    assert cache.items("audio").select(["sample", "path", "start_s", "stop_s"]).to_pylist() == [
        {"sample": 0, "path": "long.wav", "start_s": 0.02, "stop_s": 0.1},
        {"sample": 1, "path": "long.wav", "start_s": 0.1, "stop_s": None},
        {"sample": 2, "path": "short.wav", "start_s": None, "stop_s": None},
        {"sample": 3, "path": "broken.wav", "start_s": None, "stop_s": None},
    ]
    failures = {modality: set(cache.features(modality)[0].failures) for modality in cache.info.num_items}
    assert failures == {"image": {2}, "text": {1}, "audio": {2, 3}, "video": {2}, "points": {2}}
    frames = cache.feature("audio", "open_media/frames")
    assert (frames.dtype, frames.axis) == ("float16", Axis(kind="time", rate_hz=50.0, start_s=0.0))
    label = cache.feature("points", "open_media/label")
    assert (label.dtype, label.axis) == ("int16", Axis(kind="points"))
    assert cache.feature("points", "open_media/uv").dtype == "float32"


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
