"""Views: those of the package, and functions of items and of an argument, such as the noise of `pipelines.avsr`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.encoders.views import open_view
from embedcache.errors import FingerprintError, SettingError
from embedcache.extract.extract import extract
from embedcache.extract.repair import verify_cache
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.sources import open_source
from embedcache.sources.images import decode_image
from embedcache.sources.media import Video
from embedcache.store.cache import Cache
from embedcache.store.layout import Axis
from embedcache.store.verify import verify
from pipelines.avsr.noise import VIEW
from tests.cli.run import succeed
from tests.extract.cases import run
from tests.images import write_images
from tests.media_files import cloud, encode_audio, encode_video, moving_square, npz, tone, wav
from tests.media_toy import MEDIA
from tests.sources.files import jpeg, write
from tests.toy import IMAGE


def gray(image: Image.Image) -> Image.Image:
    """A user's view."""
    return ImageOps.grayscale(image).convert("RGB")


def shout(text: str) -> str:
    """A user's view of texts."""
    return f"{text} loudly"


shout.modality = "text"  # type: ignore[attr-defined]


def test_view_is_a_feature_of_its_own(tmp_path: Path) -> None:
    source = write_images(tmp_path / "s", 6)
    views = ("crop:0.5", "flip", "tests.extract.test_own_views:gray", "tests.extract.test_own_views:shout")
    run(source, tmp_path / "c", views=views)
    cache, encoder = Cache(tmp_path / "c"), open_encoder(IMAGE, modality="image")
    folder = "open_toy@tests.extract.test_own_views-"
    assert [group.name for group in cache.encoders("image")] == [
        "open_toy", "open_toy@crop-0.5", "open_toy@flip", f"{folder}gray",
    ]  # fmt: skip
    assert [group.name for group in cache.encoders("text")] == ["open_toy", f"{folder}shout"]
    pil_image = decode_image((source / "00002.png").read_bytes())
    expected = {
        "open_toy": pil_image,
        "open_toy@crop-0.5": pil_image.crop((8, 8, 24, 24)),
        "open_toy@flip": ImageOps.mirror(pil_image),
        f"{folder}gray": gray(pil_image),
    }
    for name, image in expected.items():
        value = encoder.encode(encoder.prepare([image]), ["cls"])["cls"][0]
        np.testing.assert_array_equal(cache.feature("image", f"{name}/cls").load()[2], value.astype(np.float16))
    plain, loud = (cache.feature("text", f"{name}/mean").load() for name in ("open_toy", f"{folder}shout"))
    assert (plain != loud).any(axis=1).all()


def test_changed_view_function_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_images(tmp_path / "s", 4)
    run(source, tmp_path / "c", views=("tests.extract.test_own_views:gray",))
    monkeypatch.setattr("tests.extract.test_own_views.gray", shout)
    monkeypatch.delattr(shout, "modality")
    with pytest.raises(FingerprintError, match="view.code"):
        run(source, tmp_path / "c", views=("tests.extract.test_own_views:gray",))


@pytest.mark.parametrize("name", ["crop:0", "crop:1.5", "crop:", "crop:half", "flip:x"])
def test_invalid_argument_raises(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name.partition(':')[0]}"):
        open_view(name)


@pytest.mark.slow
def test_view_has_no_box(tmp_path: Path) -> None:
    source = write_images(tmp_path / "s", 2)
    encoder = "lite:efficientnet-lite0,fit=224x224"
    settings = ExtractSettings(features=("patches",), views=("crop:0.5",), encoder=EncoderSettings(backend="torch"))
    extract(open_source(source), tmp_path / "c", image_encoder=[encoder], settings=settings)
    plain, cropped = Cache(tmp_path / "c").features("image")
    assert plain.axis == Axis(kind="grid", rows=7, columns=7, box=(0.0, 0.0, 1.0, 1.0))
    assert cropped.axis == Axis(kind="grid", rows=7, columns=7)
    assert not verify(Cache(tmp_path / "c"))


NOISE = (0.2 * np.random.default_rng(0).standard_normal(20_000)).clip(-1, 1).astype(np.float32)


@pytest.fixture
def tape(tmp_path: Path) -> Path:
    write(tmp_path / "tapes", {"babble.wav": wav(NOISE)})
    return tmp_path / "tapes" / "babble.wav"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    files: dict[str, bytes | str] = {
        "a.wav": wav(tone(0.5)),
        "b.flac": encode_audio(tone(2, 660), "flac"),
        "c.mp4": encode_video(moving_square(25), samples=tone(1)),
        "silent.wav": wav(np.zeros(8_000, np.float32)),
    }
    return write(tmp_path / "recordings", files)


@pytest.mark.slow
def test_command_line_takes_several_levels(source: Path, tape: Path, tmp_path: Path) -> None:
    words = ["extract", source, "c", "--encoder", f"audio={MEDIA}", "--encoder", f"video={MEDIA}"]
    words += ["--view", f"{VIEW}:-5,tape=tapes/babble.wav,{VIEW}:10,tape=tapes/babble.wav"]
    output = succeed(*words, "--view", "tests.extract.test_own_views:backwards", cwd=tmp_path)
    assert "open_media@babble-5dB (mean)" in output
    assert "open_media@babble10dB (mean)" in output
    assert [group.name for group in Cache(tmp_path / "c").encoders("video")] == [
        "open_media",
        "open_media@tests.extract.test_own_views-backwards",
    ]
    assert "@babble10dB" in succeed("inspect", "c", cwd=tmp_path)
    succeed("verify", "c", "--reencode", "100%", cwd=tmp_path)  # in another folder than the tape's


def backwards(video: Video) -> Video:
    """A user's view of videos."""
    return Video(frames_THW3=video.frames_THW3[::-1], rate_hz=video.rate_hz)


backwards.modality = "video"  # type: ignore[attr-defined]


def mirrored(points: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A user's view of points."""
    return {**points, "xyz": points["xyz"] * np.float32(-1)}


mirrored.modality = "points"  # type: ignore[attr-defined]


def lost(item: object) -> object:
    return item


lost.modality = "sound"  # type: ignore[attr-defined]


@pytest.mark.slow
def test_views_apply_to_their_modality_only(tmp_path: Path, tape: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.mp4": encode_video(moving_square(25), samples=tone(1)),
        "a.npz": npz(cloud(4)),
        "a.jpg": jpeg(),
    }
    own = ("tests.extract.test_own_views:backwards", "tests.extract.test_own_views:mirrored")
    settings = ExtractSettings(features=("frames", "xyz"), views=(*own, f"{VIEW}:5,tape={tape}", "flip"))
    encoders = {modality: [MEDIA] for modality in ("audio", "video", "points")}
    source = open_source(write(tmp_path / "f", files))
    extract(source, tmp_path / "c", image_encoder=[IMAGE], encoder=encoders, settings=settings)
    cache = Cache(tmp_path / "c")
    suffixes = {"image": "flip", "audio": "babble5dB", "video": "tests.extract.test_own_views-backwards"}
    suffixes["points"] = "tests.extract.test_own_views-mirrored"
    for modality, suffix in suffixes.items():
        assert [group.name.partition("@")[2] for group in cache.encoders(modality)] == ["", suffix]
    plain, view = (cache.feature("video", f"open_media{suffix}/frames") for suffix in ("", f"@{suffixes['video']}"))
    np.testing.assert_array_equal(plain.gather_tokens(np.array([0]))[0], view.gather_tokens(np.array([0]))[0][::-1])
    assert verify_cache(tmp_path / "c", VerifySettings(reencode=1)).is_sound


@pytest.mark.parametrize(("name", "word"), [("lost", "modality"), ("lost:5", "View")])
def test_function_that_is_no_view_raises(name: str, word: str) -> None:
    with pytest.raises(SettingError, match=word):
        open_view(f"tests.extract.test_own_views:{name}")
