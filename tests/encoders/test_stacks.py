"""Whitened principal components of stacked frames, fitted to small H.264 videos and to a cache of their pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from embedcache.axis import Axis
from embedcache.derive.stacks import fit_stacks, fit_stacks_from_cache
from embedcache.encoders.frames import FrameEncoder, Pixels
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.encoders.stacks import StackWeights, gray_pixels, normalize_frames, stack_frames
from embedcache.errors import ArtifactError, CorruptError, DataError, PathError, SettingError, UnfinishedError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.sources.video import Video, decode_video
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from embedcache.testing.encoders import VideoEncoderContract, example_videos
from tests.cli.run import succeed
from tests.media_files import encode_video
from tests.sources.files import write

SIZE = (6, 4)
OPTIONS = {"width": 5, "stack": 3, "size": SIZE}


def waves(seed: int, num_frames: int = 40) -> np.ndarray:
    """Return frames of overlaid waves that move in random directions: (T, H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x, time = np.meshgrid(np.arange(32), np.arange(48), np.arange(num_frames), indexing="ij")
    parts = [rng.normal(0, 0.2, 2) @ np.stack([y, x]).reshape(2, -1) for _ in range(6)]
    sums = sum(np.sin(part.reshape(x.shape) + rng.uniform(-0.6, 0.6) * time) for part in parts)
    gray = np.clip(128 + 30 * np.asarray(sums), 0, 255).astype(np.uint8).transpose(2, 0, 1)
    return np.repeat(gray[..., None], 3, axis=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with six H.264 videos in `clips` and weights that were fitted to them."""
    folder = tmp_path_factory.mktemp("stacks")
    clips: dict[str, bytes | str] = {
        f"{seed}.mp4": encode_video(waves(seed), rate_hz=25 + seed % 2 * 5, codec="libx264") for seed in range(6)
    }
    write(folder / "clips", clips)
    fit_stacks(videos(folder), folder / "lips.safetensors", **OPTIONS)  # type: ignore[arg-type]
    return folder


def videos(folder: Path) -> list[Video]:
    return [decode_video(path.read_bytes()) for path in sorted((folder / "clips").iterdir())]


def pixels(video: Video, rate_hz: float = 25.0) -> np.ndarray:
    (frames,) = FrameEncoder(Pixels(SIZE, batch_size=1), rate_hz).prepare([video])
    return gray_pixels(frames)


class TestStacks(VideoEncoderContract):
    has_bfloat16 = False

    @pytest.fixture
    def spec(self, folder: Path) -> str:
        return f"stacks:{folder}/lips.safetensors"

    @pytest.fixture
    def other_spec(self, folder: Path, tmp_path: Path) -> str:
        weights = StackWeights.load(folder / "lips.safetensors")
        weights.components_KDE[0, 0, 0] += 1
        weights.save(tmp_path / "lips.safetensors")
        return f"stacks:{tmp_path}/lips.safetensors"


def test_states_are_projected_stacks(folder: Path) -> None:
    encoder = open_encoder(f"stacks:{folder}/lips.safetensors", modality="video")
    weights = StackWeights.load(folder / "lips.safetensors")
    assert encoder.axes == {"states": Axis(kind="time", rate_hz=25.0, start_s=0.02)}  # type: ignore[attr-defined]
    for video in videos(folder):
        found = encoder.encode(encoder.prepare([video]), ["states", "mean"])
        frames = pixels(video)
        frames = (frames - frames.mean(axis=0)) / (frames - frames.mean(axis=0)).std()
        padded = np.concatenate([frames[:1], frames, frames[-1:]])
        stacks = np.stack([padded[start : start + 3].ravel() for start in range(len(frames))])
        expected = (stacks - weights.mean_KD.ravel()) @ weights.components_KDE.reshape(-1, 5)
        np.testing.assert_allclose(found["states"][0], expected, atol=1e-4)
        np.testing.assert_allclose(found["mean"][0], expected.mean(axis=0), atol=1e-4)


def test_states_of_the_fitted_videos_are_white(folder: Path) -> None:
    encoder = open_encoder(f"stacks:{folder}/lips.safetensors", modality="video")
    states = np.concatenate(encoder.encode(encoder.prepare(videos(folder)), ["states"])["states"]).astype(np.float64)
    np.testing.assert_allclose(states.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(states.T, bias=True), np.eye(5), atol=1e-4)


def test_components_are_those_of_all_stacks_at_once(folder: Path) -> None:
    frames = [normalize_frames(pixels(video), "clip") for video in videos(folder)]
    stacks = np.concatenate([stack_frames(clip, 3, slice(None)) for clip in frames]).astype(np.float64)
    _, singular, axes = np.linalg.svd(stacks - stacks.mean(axis=0), full_matrices=False)
    found = StackWeights.load(folder / "lips.safetensors").components_KDE.reshape(-1, 5)
    expected = axes[:5].T / singular[:5] * np.sqrt(len(stacks))
    np.testing.assert_allclose(np.abs((found * expected).sum(axis=0)), (expected**2).sum(axis=0), rtol=1e-4)


def test_light_and_contrast_of_a_video_do_not_matter(folder: Path) -> None:
    encoder = open_encoder(f"stacks:{folder}/lips.safetensors", modality="video")
    video = videos(folder)[0]
    dark = Video(frames_THW3=(video.frames_THW3 // 2 + 9).astype(np.uint8), rate_hz=video.rate_hz)
    one, other = encoder.encode(encoder.prepare([video, dark]), ["states"])["states"]
    assert np.abs(one - other).mean() < 0.05


def test_still_video_has_the_states_of_the_mean_frame(folder: Path) -> None:
    encoder = open_encoder(f"stacks:{folder}/lips.safetensors", modality="video")
    still = [Video(frames_THW3=np.full((count, 8, 8, 3), 90, np.uint8), rate_hz=25.0) for count in (1, 7)]
    one, several = encoder.encode(encoder.prepare(still), ["states"])["states"]
    assert (one.shape, several.shape) == ((1, 5), (7, 5))
    np.testing.assert_allclose(several, np.repeat(one, 7, axis=0), atol=1e-6)


def test_unnormalized_frames_and_even_stacks(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    fit_stacks(videos(folder), path, width=3, stack=2, size=SIZE, rate_hz=12.5, normalize="none")
    encoder, weights = open_encoder(f"stacks:{path}", modality="video"), StackWeights.load(path)
    (found,) = encoder.encode(encoder.prepare(videos(folder)[:1]), ["states"])["states"]
    frames = pixels(videos(folder)[0], 12.5)
    stacks = np.concatenate([np.concatenate([frames[:1], frames[:-1]]), frames], axis=1)  # the frame before, the frame
    np.testing.assert_allclose(
        found, (stacks - weights.mean_KD.ravel()) @ weights.components_KDE.reshape(-1, 3), atol=1e-3
    )


@pytest.fixture(scope="module")
def cache(folder: Path) -> Path:
    settings = ExtractSettings(features=("pixels", "mean"), chunk_size=2, dtype="float32")
    encoders = {"video": ["frames:pixels,size=6x4"]}
    extract(open_source(folder / "clips"), folder / "cache", encoder=encoders, settings=settings)
    return folder / "cache"


def test_fit_to_a_cache_is_that_to_its_videos(folder: Path, cache: Path, tmp_path: Path) -> None:
    found = fit_stacks_from_cache(cache, tmp_path / "all.safetensors", width=5, stack=3)
    expected = StackWeights.load(folder / "lips.safetensors")
    assert (found.size, found.rate_hz, found.normalize) == (SIZE, 25.0, "clip")
    np.testing.assert_allclose(found.components_KDE, expected.components_KDE, atol=1e-4)
    half = fit_stacks_from_cache(cache, tmp_path / "half.safetensors", rows=np.array([1, 4]), width=5, stack=3)
    chosen = [videos(folder)[row] for row in (1, 4)]
    expected = fit_stacks(chosen, tmp_path / "chosen.safetensors", **OPTIONS)  # type: ignore[arg-type]
    np.testing.assert_allclose(half.components_KDE, expected.components_KDE, atol=1e-4)


@pytest.mark.slow
def test_extraction_on_the_command_line(folder: Path, cache: Path) -> None:
    words = ["extract", "clips", "encoded", "--encoder", "video=stacks:lips.safetensors", "--feature", "states,mean"]
    assert "lips (states, mean): encoded 6 videos" in succeed(*words, cwd=folder)
    encoded = Cache(folder / "encoded")
    feature = encoded.feature("video", "lips/states")
    assert (tuple(feature.item_shape), feature.axis) == ((-1, 5), Axis(kind="time", rate_hz=25.0, start_s=0.02))
    assert [len(states) for states in feature.gather_tokens(np.arange(2))] == [40, 33]  # at 25 and 30 per second
    assert not verify(encoded)
    succeed("verify", "encoded", "--reencode", "100%", cwd=folder)
    succeed("verify", folder / "encoded", "--reencode", "100%", cwd=cache)  # from another folder


def test_wrong_files_raise(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PathError, match="expected a weights file, got .*does not exist"):
        open_encoder(f"stacks:{tmp_path}/no.safetensors", modality="video")
    write(tmp_path, {"text.safetensors": b"no weights"})
    with pytest.raises(CorruptError, match="cannot read .* as weights"):
        open_encoder(f"stacks:{tmp_path}/text.safetensors", modality="video")
    tensors = load_file(folder / "lips.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(ArtifactError, match=r"expected a file of fit_stacks .* got other weights \(components, mean\)"):
        open_encoder(f"stacks:{tmp_path}/bare.safetensors", modality="video")
    with pytest.raises(SettingError, match="expected an encoder of images, got one of videos"):
        open_encoder(f"stacks:{folder}/lips.safetensors", modality="image")


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ("[]", ArtifactError, "expected a file of fit_stacks"),
        ({"format": 2}, ArtifactError, "has format 2; this version reads 1: upgrade"),
        ({"format": "2"}, CorruptError, "does not hold the fields of its format"),
        ({"size": 24}, CorruptError, "does not hold the fields of its format"),
        ({"size": [24]}, CorruptError, "does not hold the fields of its format"),
        ({"rate_hz": "25"}, CorruptError, "does not hold the fields of its format"),
        ({"rate_hz": 0}, ArtifactError, "expected normalize to be one of clip, none and a positive rate"),
    ],
)
def test_damaged_metadata_raises(
    metadata: str | dict[str, object], error: type[Exception], message: str, folder: Path, tmp_path: Path
) -> None:
    with safe_open(folder / "lips.safetensors", framework="numpy") as file:
        record = json.loads(file.metadata()["embedcache"])
    written = metadata if isinstance(metadata, str) else json.dumps({**record, **metadata})
    save_file(load_file(folder / "lips.safetensors"), tmp_path / "lips.safetensors", metadata={"embedcache": written})
    with pytest.raises(error, match=message):
        StackWeights.load(tmp_path / "lips.safetensors")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"width": 73}, SettingError, "expected 1 to 72 components of 3 frames of 6 x 4, got 73"),
        ({"stack": 0}, SettingError, "expected 1 to 0 components"),
        ({"size": (0, 4)}, SettingError, r"expected a size and a rate above 0, got \(0, 4\)"),
        ({"width": 72}, DataError, "whitening to 72 components: expected that many directions"),
        ({"normalize": "person"}, SettingError, "normalize: expected clip or none, got 'person'"),
    ],
)
def test_wrong_settings_raise(changed: dict[str, object], error: type[Exception], message: str, folder: Path) -> None:
    with pytest.raises(error, match=message):
        fit_stacks(videos(folder)[:1], folder / "no.safetensors", **{**OPTIONS, **changed})  # type: ignore[arg-type]
    assert not (folder / "no.safetensors").exists()


def test_nothing_to_fit_to_raises(folder: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected videos with at least 2 frames to fit stacks, got 0 frames"):
        fit_stacks([], tmp_path / "no.safetensors")
    with pytest.raises(SettingError, match="expected pixels of the encoder frames:pixels, got pixels/mean"):
        fit_stacks_from_cache(cache, tmp_path / "no.safetensors", feature="pixels/mean")
    commit = cache / "video" / "pixels" / "chunks" / "00001.parquet"
    data = commit.read_bytes()
    commit.unlink()
    with pytest.raises(UnfinishedError, match="pixels/pixels"):
        fit_stacks_from_cache(cache, tmp_path / "no.safetensors")
    commit.write_bytes(data)


def test_examples_of_the_contract_can_be_fitted_to(tmp_path: Path) -> None:
    weights = fit_stacks(example_videos(), tmp_path / "w.safetensors", width=4, stack=3, size=SIZE)
    assert weights.components_KDE.shape == (3, 24, 4)


def test_spec_names_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = EncoderSpec.parse("stacks:models/lips.v2.safetensors")
    assert (spec.folder, spec.model_name) == ("lips.v2", "lips.v2")
    assert spec.absolute.text == f"stacks:{tmp_path}/models/lips.v2.safetensors"
