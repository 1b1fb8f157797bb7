"""Audio models of transformers, compared with its feature extractors and forward passes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.errors import SettingError
from embedcache.testing.encoders import TOLERANCE, AudioEncoderContract, example_audio
from tests.encoders.checkpoints import copy_changed, save_speech, save_whisper


class TestWav2Vec2(AudioEncoderContract):
    @pytest.fixture
    def spec(self, wav2vec2: Path) -> str:
        return f"hf:{wav2vec2}"

    @pytest.fixture
    def other_spec(self, wav2vec2: Path, tmp_path: Path) -> str:
        return f"hf:{copy_changed(wav2vec2, tmp_path / 'changed')}"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Wav2Vec2", {}),  # as wav2vec2-base: a group norm over time
        ("Wav2Vec2", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),  # as wav2vec2-large
        ("Hubert", {}),
        ("WavLM", {}),
    ],
)
def test_states_match_transformers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, AutoModel

    folder = save_speech(tmp_path / name, name, seed=0, **options)
    encoder = open_encoder(f"hf:{folder}", modality="audio", settings=EncoderSettings(features=("layer1.states",)))
    assert encoder.features == {"mean": (16,), "states": (-1, 16), "layer1.mean": (16,), "layer1.states": (-1, 16)}
    axis = encoder.axes["states"]  # type: ignore[attr-defined]
    assert (axis.kind, axis.rate_hz, axis.start_s) == ("time", 50.0, 0.0125)
    audio = example_audio()
    found = encoder.encode(encoder.prepare(audio), list(encoder.features))
    extractor, model = AutoFeatureExtractor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for number, item in enumerate(audio):
        inputs = extractor(item, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True)
        expected = states.last_hidden_state[0].numpy()
        np.testing.assert_allclose(found["states"][number], expected, atol=1e-4)
        np.testing.assert_allclose(found["mean"][number], expected.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(found["layer1.states"][number], states.hidden_states[1][0].numpy(), atol=1e-4)


@pytest.mark.slow
def test_windows_have_the_frames_of_the_whole(tmp_path: Path) -> None:
    """Convolutions that are cut into windows see the same samples, so the number of frames is that of the whole."""
    from transformers import AutoModel

    folder = save_speech(tmp_path / "model", "Wav2Vec2", seed=0, feat_extract_norm="layer")
    encoder = open_encoder(f"hf:{folder}", modality="audio")
    model = AutoModel.from_pretrained(folder).eval()
    for num_samples in (480_000, 480_080, 480_399, 480_400, 960_000 + 7):
        audio = np.random.default_rng(0).standard_normal(num_samples).astype(np.float32)
        windows = encoder._split(audio)  # type: ignore[attr-defined]
        lengths = [int(model._get_feat_extract_output_lengths(len(window))) for window in windows]
        assert sum(lengths) == int(model._get_feat_extract_output_lengths(num_samples))
        assert lengths[0] in {1500, 1499}
    convolved = model.feature_extractor(torch.from_numpy(audio[None]))[0].T.detach().numpy()
    parts = [model.feature_extractor(torch.from_numpy(window[None]))[0].T.detach().numpy() for window in windows]
    np.testing.assert_allclose(np.concatenate(parts), convolved, atol=TOLERANCE)


@pytest.mark.slow
def test_wrong_models_raise(wav2vec2: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="texts"):
        open_encoder(f"hf:{bert}", modality="audio")
    with pytest.raises(SettingError, match="recordings"):
        open_encoder(f"hf:{wav2vec2}", modality="image")
    pytest.importorskip("ctranslate2")
    whisper = save_whisper(tmp_path / "whisper", seed=0)
    with pytest.raises(SettingError, match="family whisper"):
        open_encoder(f"hf:{whisper}", modality="audio")


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speech(tmp_path_factory.mktemp("speech") / "tiny", "Wav2Vec2", seed=0)
