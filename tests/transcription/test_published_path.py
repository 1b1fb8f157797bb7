"""The way of published models and corpora with tiny ones: clips in the layout of LRS3, a wav2vec 2.0 and a ResNet of
their libraries, noise, three stages of training, and a transcript.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.settings import from_flat
from embedcache.sources.video import decode_video
from embedcache.store.cache import Cache
from embedcache.train.settings import FitSettings
from embedcache.train.speech import SpeechRecipe, train_speech
from embedcache.train.utterances import SpeechAugmentation, Utterances, open_utterances
from pipelines.speech.lrs import KIND
from tests.cli.run import embedcache, succeed
from tests.encoders.checkpoints import save_speech, save_timm
from tests.media_files import wav
from tests.transcription.runs import SIZES, write_clips

pytestmark = pytest.mark.slow

FEATURES = {"audio": "wav2vec2/states", "video": "test_resnet/patch_mean"}
BABBLE = "babble5dB"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `lrs3`, the models and a noise tape."""
    folder, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    write_clips(folder / "lrs3" / "trainval", 6)
    write_clips(folder / "lrs3" / "test", 3)
    (folder / "babble.wav").write_bytes(wav(rng.normal(0, 0.1, 32_000).astype(np.float32)))
    save_speech(folder / "wav2vec2", "Wav2Vec2", seed=0, feat_extract_norm="layer", do_stable_layer_norm=True)
    save_timm("test_resnet", folder, seed=0)
    for part in ("trainval", "test"):
        encoders = ("audio=hf:./wav2vec2", "video=frames:timm:test_resnet,weights=test_resnet.safetensors,rate=25")
        options = [word for encoder in encoders for word in ("--encoder", encoder)]
        options += ["--feature", "states,patch_mean", "--view", "noise:5,tape=babble.wav"]
        succeed("extract", f"lrs3/{part}", f"{part}-cache", "--source-type", KIND, *options, cwd=folder)
    return folder


def utterances(folder: Path, part: str, features: Mapping[str, str]) -> Utterances:
    views = {"audio": ["plain", BABBLE]} if "audio" in features else {}
    return open_utterances(Cache(folder / f"{part}-cache"), features, views=views)


def train(folder: Path, name: str, features: Mapping[str, str], *, states: Any = None, **options: Any) -> Path:
    augmentation = SpeechAugmentation(
        views={"audio": {"plain": 0.5, BABBLE: 0.5}} if "audio" in features else {},
        missing={"audio": 0.25, "video": 0.25} if len(features) > 1 else {},
    )
    model = {**SIZES, "fusion_layers": len(features) - 1}
    data = [utterances(folder, part, features) for part in ("trainval", "test")]
    settings = from_flat(FitSettings, {"epochs": 1, "batch_size": 3, "threads": 1, **options})
    train_speech(*data, folder / name, SpeechRecipe(model=model, augmentation=augmentation), settings, states=states)
    return folder / name


def test_every_stage_runs_on_models_and_clips_of_others(folder: Path) -> None:
    cache = Cache(folder / "trainval-cache")
    assert cache.feature("audio", FEATURES["audio"]).axis.rate_hz == 50  # type: ignore[union-attr]
    assert cache.feature("video", FEATURES["video"]).axis.rate_hz == 25  # type: ignore[union-attr]
    derived = {}
    for stream in ("audio", "video"):
        train(folder, f"run-{stream}", {stream: FEATURES[stream]})
        views = ["--view", "plain", "--view", BABBLE] if stream == "audio" else []
        for part in ("trainval", "test"):
            words = ["derive", f"{part}-cache", "--run", f"run-{stream}", "--run-output", f"{stream}-states", *views]
            succeed(*words, cwd=folder)
        derived[stream] = f"run-{stream}-{stream}-states/{stream}-states"
    states = tuple(utterances(folder, part, derived) for part in ("trainval", "test"))
    starts = tuple(f"{stream}={folder / f'run-{stream}'}" for stream in FEATURES)
    train(folder, "run", FEATURES, states=states, init_from=starts, trainable="fusion+ctc+attention")
    clip = "lrs3/test/anna/00002.mp4"
    seconds = len(decode_video((folder / clip).read_bytes()).frames_THW3) / 25
    for options, used in (
        ((), ["audio", "video"]),
        (["--streams", "audio"], ["audio"]),
        (["--streams", "video"], ["video"]),
    ):
        words = ["transcribe", "run", clip, "--mouth", "all", *options, "--json", "--decoder", "attention"]
        (record,) = json.loads(succeed(*words, cwd=folder))
        assert record["streams"] == used
        assert record["duration_s"] == pytest.approx(seconds, abs=0.1)


def test_the_longest_utterance_is_recorded(folder: Path) -> None:
    """The network has positions for these lengths, so that longer recordings are cut."""
    config = json.loads((train(folder, "run-long", {"video": FEATURES["video"]}) / "config.json").read_text())
    clips = (folder / "lrs3" / "trainval").glob("*/*.mp4")
    longest = max(len(decode_video(clip.read_bytes()).frames_THW3) for clip in clips)
    assert config["training"]["longest_s"] == longest / 25


def test_changed_weights_are_refused(folder: Path) -> None:
    run = train(folder, "run-lips", {"video": FEATURES["video"]})
    weights = folder / "test_resnet.safetensors"
    kept = weights.read_bytes()
    save_timm("test_resnet", folder, seed=1)
    done = embedcache("transcribe", run.name, "lrs3/test/anna/00001.mp4", "--mouth", "all", cwd=folder)
    weights.write_bytes(kept)
    assert done.code == 1
    assert "feature test_resnet/patch_mean was made with other settings: weights: stored" in done.stderr
