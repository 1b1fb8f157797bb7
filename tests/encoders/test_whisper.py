"""Whisper on CTranslate2, compared with transformers on a tiny model, and the packaged tiny.en."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch

from embedcache.arrays import Array, Floats
from embedcache.encoders.audio import INPUT, AudioEncoder
from embedcache.encoders.base import Backend, EncoderSettings, Fingerprint, Modality
from embedcache.encoders.open import open_encoder
from embedcache.encoders.whisper import log_mel
from embedcache.errors import CorruptError, PathError, SettingError
from embedcache.store.layout import Axis
from embedcache.testing.encoders import TOLERANCE, AudioEncoderContract, example_audio
from tests.encoders.checkpoints import save_whisper


class TestWhisper(AudioEncoderContract):
    has_bfloat16 = False  # of CTranslate2 on this CPU

    @pytest.fixture
    def spec(self, whisper: Path) -> str:
        return f"whisper:{whisper / 'ctranslate2'}"

    @pytest.fixture
    def other_spec(self, whisper: Path, tmp_path: Path) -> str:
        return f"whisper:{save_whisper(tmp_path / 'other', seed=1) / 'ctranslate2'}"

    @pytest.fixture(autouse=True)
    def _only_float32(self) -> None:
        ctranslate2 = pytest.importorskip("ctranslate2")
        self.has_bfloat16 = "bfloat16" in ctranslate2.get_supported_compute_types("cpu")


class TestPaddedWhisper(TestWhisper):
    @pytest.fixture
    def spec(self, whisper: Path) -> str:
        return f"whisper:{whisper / 'ctranslate2'},padding=30s"


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("num_samples", [400, 16_000, 25_637, 700_123])
def test_log_mel_matches_transformers(num_mels: int, num_samples: int) -> None:
    from transformers import WhisperFeatureExtractor

    audio = (0.1 * np.random.default_rng(0).standard_normal(num_samples)).astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=num_mels)
    expected = extractor(audio, sampling_rate=16_000, padding=False, truncation=False, return_tensors="np")
    found = log_mel(audio, num_mels)
    assert found.shape == (num_mels, num_samples // 160)
    np.testing.assert_allclose(found, expected["input_features"][0][:, : found.shape[1]], atol=3e-5)


@pytest.mark.slow
def test_padded_states_match_transformers(whisper: Path) -> None:
    from transformers import WhisperFeatureExtractor, WhisperModel

    encoder = open_encoder(f"whisper:{whisper / 'ctranslate2'},padding=30s", modality="audio")
    assert encoder.fingerprint.preprocessing["padding"] == "30s"
    audio = example_audio()
    found = encoder.encode(encoder.prepare(audio), ["mean", "states"])
    inputs = WhisperFeatureExtractor()(audio, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        expected = WhisperModel.from_pretrained(whisper).eval().encoder(inputs).last_hidden_state.numpy()
    for number, item in enumerate(audio):
        num_states = -(-(len(item) // 160) // 2)
        assert found["states"][number].shape == (num_states, 16)
        np.testing.assert_allclose(found["states"][number], expected[number, :num_states], atol=2e-4)
        np.testing.assert_allclose(found["mean"][number], found["states"][number].mean(axis=0), atol=1e-6)


def test_opening_leaves_the_threads_of_torch(whisper: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        open_encoder(f"whisper:{whisper / 'ctranslate2'}", modality="audio")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_long_recording_is_cut_into_windows(whisper: Path) -> None:
    encoder = open_encoder(f"whisper:{whisper / 'ctranslate2'}", modality="audio")
    audio = np.tile(example_audio()[3], 25)[: 31 * 16_000 + 17]
    (found,) = encoder.encode(encoder.prepare([audio]), ["states"])["states"]
    assert found.shape == (1550, 16)
    mel = log_mel(audio)
    parts = [encoder.encode([part], ["states"])["states"][0] for part in (mel[:, :3000], mel[:, 3000:])]
    np.testing.assert_allclose(found, np.concatenate(parts), atol=TOLERANCE)


class PairedGraph:
    """A graph whose batches each wait until a second one runs."""

    backend: Backend = "ctranslate2"

    def __init__(self) -> None:
        self._second = Barrier(2)

    def __call__(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Floats]:
        self._second.wait(timeout=20)
        return dict.fromkeys(names, inputs[INPUT][:, :, None])


@pytest.mark.parametrize("lengths", [[7, 3, 5, 4], [4, 4, 4, 4]])
def test_windows_of_any_lengths_run_at_once(lengths: Sequence[int]) -> None:
    encoder = AudioEncoder(
        PairedGraph(),
        prepare=np.asarray,
        split=lambda audio_N: [audio_N],
        states=["states"],
        width=1,
        min_samples=1,
        long_window=100,
        axis=Axis(kind="time", rate_hz=16_000.0, start_s=0.0),
        num_parallel=2,
        num_tokens=len,
        fingerprint=Fingerprint(family="own", model="paired", weights="", preprocessing={}, pooling={}),
        settings=EncoderSettings(),
    )
    items = [np.arange(length, dtype=np.float32) + 10 * number for number, length in enumerate(lengths)]
    found = encoder.encode(encoder.prepare(items), ["states"])["states"]
    for states, item in zip(found, items, strict=True):
        np.testing.assert_array_equal(states[:, 0], item)


@pytest.mark.parametrize(
    ("options", "modality", "word"),
    [(",padding=10s", "audio", "30s"), ("", "image", "images"), ("/missing", "audio", "folder")],
)
def test_wrong_specs_raise(whisper: Path, options: str, modality: Modality, word: str) -> None:
    with pytest.raises((SettingError, PathError), match=word):
        open_encoder(f"whisper:{whisper / 'ctranslate2'}{options}", modality=modality)


def test_truncated_weights_raise(whisper: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whisper / "ctranslate2", tmp_path / "broken")
    weights = folder / "model.bin"
    weights.write_bytes(weights.read_bytes()[:-2000])
    with pytest.raises(CorruptError, match="cannot load the Whisper model"):
        open_encoder(f"whisper:{folder}", modality="audio")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ctranslate2")
    return save_whisper(tmp_path_factory.mktemp("whisper") / "tiny", seed=0)
