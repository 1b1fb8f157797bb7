"""Extraction of recordings, videos and point clouds: real and broken files, resume, extend, retry, verify, repair."""

import sys
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import FingerprintError, MissingExtraError, SettingError
from embedcache.extract.extract import extract, plan
from embedcache.extract.repair import verify_cache
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.reports.summary import summarize
from embedcache.sources import open_source
from embedcache.sources.media import decode_audio
from embedcache.store.cache import Cache
from embedcache.store.layout import Axis
from embedcache.store.producer import FillReport
from embedcache.store.verify import verify
from pipelines.avsr.pixels import FAMILY as PIXELS
from tests.media_files import cloud, encode_audio, encode_video, moving_square, npz, tone, wav
from tests.media_toy import MEDIA
from tests.sources.files import jpeg, write
from tests.toy import IMAGE

ENCODERS = {"audio": [MEDIA], "video": [MEDIA], "points": [MEDIA]}
FEATURES = ("mean", "frames", "extent", "xyz", "uv", "label")


def write_media(folder: Path) -> Path:
    """Write seven samples: sound, a video with sound, points, an image with sound, and three broken files."""
    files: dict[str, bytes | str] = {
        "a.wav": wav(tone(0.5)),
        "b.mp4": encode_video(moving_square(25), samples=tone(1)),
        "c.npz": npz(cloud(30)),
        "d.jpg": jpeg(),
        "d.flac": encode_audio(tone(0.3, 880), "flac"),
        "x.wav": b"not sound",
        "y.mp4": encode_video(moving_square(25))[:500],
        "z.npz": npz({"label": np.arange(3)}),
    }
    return write(folder, files)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_media(tmp_path_factory.mktemp("media") / "source")


def run(source: Path, cache: Path, **settings: object) -> list[FillReport]:
    options = ExtractSettings(**{"features": FEATURES, "chunk_size": 2, **settings})  # type: ignore[arg-type]
    return extract(open_source(source), cache, encoder=ENCODERS, image_encoder=[IMAGE], settings=options)


@pytest.fixture
def cache(source: Path, tmp_path: Path) -> Path:
    run(source, tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.slow
def test_report_and_reasons(source: Path, cache: Path) -> None:
    lines = [report.line() for report in run(source, cache)]
    assert lines == [
        "open_toy (cls): encoded 0 images, reused 1, failed 0",
        "open_media (mean, frames): encoded 0 recordings, reused 5, failed 2: 2 damaged recording",
        "open_media (mean, frames): encoded 0 videos, reused 2, failed 1: 1 damaged video",
        "open_media (extent, xyz, uv, label): encoded 0 point clouds, reused 2, failed 1: 1 no coordinates",
    ]
    opened = Cache(cache)
    assert opened.info.num_items == {"image": 1, "audio": 5, "video": 2, "points": 2}
    assert opened.feature("points", "open_media/xyz").failures == {
        1: "no coordinates: expected xyz of shape (N, 3), or x, y and z, got none"
    }
    assert not verify(opened)
    assert "5 recordings, 2 videos, 2 point clouds" in "\n".join(summarize(cache).lines)


@pytest.mark.slow
def test_stored_values_dtypes_and_axes(cache: Path) -> None:
    opened = Cache(cache)
    points = cloud(30)
    for name, dtype in (("xyz", "float32"), ("uv", "float32"), ("label", "int16")):
        feature = opened.feature("points", f"open_media/{name}")
        assert (feature.dtype, feature.axis) == (dtype, Axis(kind="points"))
        np.testing.assert_array_equal(feature.gather_tokens(np.array([0]))[0], points[name].reshape(30, -1))
    assert opened.feature("points", "open_media/extent").dtype == "float16"
    frames = opened.feature("audio", "open_media/frames")
    assert frames.axis == Axis(kind="time", rate_hz=50.0, start_s=0.0)
    assert [len(tokens) for tokens in frames.gather_tokens(np.array([0, 2]))] == [25, 15]
    assert opened.feature("audio", "open_media/mean").axis is None


def test_missing_decoder_is_named_before_the_source_is_indexed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"'av' is not installed; .*embedcache\[media\]"):
        run(source, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_extend_appends_new_modalities(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", {"a.jpg": jpeg()})
    extract(open_source(folder), tmp_path / "c", image_encoder=[IMAGE])
    assert not (tmp_path / "c" / "audio").exists()
    write(folder, {"b.jpg": jpeg("blue"), "b.wav": wav(tone(0.2)), "c.npz": npz(cloud(4))})
    encoders = {"audio": [MEDIA], "points": [MEDIA]}
    with pytest.raises(FingerprintError, match="it has 2 more; .*append them with --extend"):
        extract(open_source(folder), tmp_path / "c", image_encoder=[IMAGE], encoder=encoders)
    settings = ExtractSettings(extend=True)
    reports = extract(open_source(folder), tmp_path / "c", image_encoder=[IMAGE], encoder=encoders, settings=settings)
    assert [(report.modality, report.computed, report.reused) for report in reports] == [
        ("image", 1, 1),
        ("audio", 1, 0),
        ("points", 1, 0),
    ]
    cache = Cache(tmp_path / "c")
    assert cache.items("audio")["sample"].to_pylist() == [1]
    assert cache.items("points")["sample"].to_pylist() == [2]
    assert not verify(cache)


@pytest.mark.slow
def test_large_videos_are_streamed_by_frames_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 24, 32, 3), np.uint8)
    whole = encode_video(noise, kind="mkv")
    files = {"a.mkv": encode_video(noise[:50], kind="mkv"), "b.mkv": whole, "c.mkv": whole[: len(whole) * 6 // 10]}
    source, encoders = open_source(write(tmp_path / "f", files)), {"video": [MEDIA, f"frames:{PIXELS}:8x6,rate=5"]}
    settings = ExtractSettings(features=("pixels", "mean"), chunk_size=2)
    extract(source, tmp_path / "arrays", encoder=encoders, settings=settings)
    monkeypatch.setattr("embedcache.sources.media.MAX_VIDEO_PIXELS", 32 * 24 * 50)
    planned = plan(source, tmp_path / "streams", encoder=encoders, settings=settings)
    assert {feature.name: feature.num_items for feature in planned.features}["8x6/pixels"] == 3
    extract(source, tmp_path / "streams", encoder=encoders, settings=settings)
    arrays, streams = Cache(tmp_path / "arrays"), Cache(tmp_path / "streams")
    expected, found = (cache.feature("video", "8x6/pixels") for cache in (arrays, streams))
    assert [len(tokens) for tokens in found.gather_tokens(np.arange(2))] == [10, 20]
    for one, other in zip(found.gather_tokens(np.arange(2)), expected.gather_tokens(np.arange(2)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert found.failures == expected.failures
    assert found.failures[2].startswith("truncated: ")
    failures = streams.feature("video", "open_media/mean").failures
    assert {row: reason.partition(" in ")[0] for row, reason in failures.items()} == dict.fromkeys(
        (1, 2), "too many pixels: more than 38,400"
    )
    assert verify_cache(tmp_path / "streams", VerifySettings(reencode=1)).is_sound


def test_interval_that_moved_is_another_sample(tmp_path: Path) -> None:
    table = write_intervals(tmp_path, [(0.0, 0.5), (0.5, 1.0)])
    extract(open_source(table), tmp_path / "c", encoder={"audio": [MEDIA]})
    write_intervals(tmp_path, [(0.0, 0.5), (0.5, 0.9)])
    with pytest.raises(FingerprintError, match="sample 't/1' has other recordings"):
        extract(open_source(table), tmp_path / "c", encoder={"audio": [MEDIA]}, settings=ExtractSettings(extend=True))


def write_intervals(folder: Path, bounds: list[tuple[float, float | None]]) -> Path:
    (folder / "r.wav").write_bytes(wav(tone(2)))
    rows = [f"r.wav,{start:g},{'' if stop is None else f'{stop:g}'}" for start, stop in bounds]
    (folder / "t.csv").write_text("\n".join(["audio,start_s,stop_s", *rows]))
    return folder / "t.csv"


def test_intervals_of_one_recording(tmp_path: Path) -> None:
    table = write_intervals(tmp_path, [(0.0, 0.5), (0.5, 1.25), (1.0, None), (3.0, None)])
    settings = ExtractSettings(features=("frames",))
    extract(open_source(table), tmp_path / "c", encoder={"audio": [MEDIA]}, settings=settings)
    cache = Cache(tmp_path / "c")
    feature = cache.feature("audio", "open_media/frames")
    assert feature.failures == {3: "no such interval: expected 3 s to the end within its 2.00 s"}
    found = feature.gather_tokens(np.arange(3))
    assert [len(tokens) for tokens in found] == [25, 37, 50]
    loudness = np.abs(decode_audio((tmp_path / "r.wav").read_bytes())[8_000:8_320]).mean()
    assert found[1][0, 0] == pytest.approx(loudness, abs=1e-3)
    assert len(set(feature.hashes)) == 4
    assert "r.wav, 3 s to end" in "\n".join(summarize(tmp_path / "c").notes)
    report = verify_cache(tmp_path / "c", VerifySettings(reencode=1))
    assert report.is_sound
    assert len(report.drifts[0].cosines) == 3


def test_chunk_above_two_gibibytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.extract.encode._MAX_CHUNK_BYTES", 2_000)
    folder = write(tmp_path / "f", {f"{number}.npz": npz(cloud(30)) for number in range(8)})

    def encode(cache: str, **changed: object) -> list[FillReport]:
        chosen = ExtractSettings(features=("xyz",), **changed)  # type: ignore[arg-type]
        return extract(open_source(folder), tmp_path / cache, encoder={"points": [MEDIA]}, settings=chosen)

    with pytest.raises(SettingError, match=r"chunk_size: expected at most .* 8 items of .*--chunk-size 4"):
        encode("c", chunk_size=64)
    assert [report.computed for report in encode("d", chunk_size=4)] == [8]
