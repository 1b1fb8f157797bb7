"""A folder of WAV, MP4 and NPZ files, extracted on the command line with encoders of each modality."""

from pathlib import Path

import pytest

from pipelines.summit.encoders import FIELDS, GEOMETRY
from tests.cli.run import embedcache, succeed
from tests.encoders.checkpoints import save_speech, save_timm, save_whisper
from tests.media_files import cloud, encode_video, moving_square, npz, tone, wav
from tests.sources.files import write

CLOUDS = {"a": cloud(90), "b": cloud(20, seed=1)}  # b has fewer points than geometry needs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `media` and two model folders."""
    pytest.importorskip("ctranslate2")
    folder = tmp_path_factory.mktemp("media")
    media: dict[str, bytes | str] = {
        "a.wav": wav(tone(1.0)),
        "b.wav": wav(tone(0.01)),  # shorter than a frame
        "c.mp4": encode_video(moving_square(30), rate_hz=30, samples=tone(1.0, 660)),
        "d.mp4": encode_video(moving_square(25), rate_hz=25),
        **{f"{name}.npz": npz(points) for name, points in CLOUDS.items()},
    }
    write(folder / "media", media)
    save_whisper(folder / "whisper", seed=0)
    save_speech(folder / "wav2vec2", "Wav2Vec2", seed=0)
    save_timm("test_vit", folder, seed=0)
    succeed(*command("media", "cache"), cwd=folder)
    return folder


def command(source: str, cache: str) -> list[str]:
    encoders = (
        "audio=whisper:./whisper/ctranslate2",
        "audio=hf:./wav2vec2",
        "video=frames:timm:test_vit,weights=test_vit.safetensors,rate=5",
        "video=frames:pipelines.avsr.pixels:open_pixels:8x6",
        f"points={GEOMETRY}",
        f"points={FIELDS}",
    )
    options = [word for encoder in encoders for word in ("--encoder", encoder)]
    return ["extract", source, cache, *options, "--feature", "mean,states,cls,pixels"]


@pytest.mark.slow
def test_encoding_again_gives_the_same(folder: Path) -> None:
    """Spec and fingerprint in the cache open every encoder again, from any folder."""
    done = embedcache("verify", "cache", "--reencode", "100%", cwd=folder)
    assert done.code == 0, done.stderr
    for name in (
        "ctranslate2/states",
        "wav2vec2/states",
        "test_vit/cls",
        "8x6/pixels",
        "eigen/points",
        "fields/xyz",
    ):
        assert name in done.stdout, name
    moved = embedcache("verify", folder / "cache", "--reencode", "100%", cwd=folder / "media")
    assert moved.code == 0, moved.stderr
