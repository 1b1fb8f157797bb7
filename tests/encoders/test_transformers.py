"""transformers encoders, compared with its processors and forward passes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.open import open_encoder, reopen_encoder
from embedcache.errors import ArtifactError, CorruptError, PathError, SettingError
from embedcache.testing.encoders import TEXTS, ImageEncoderContract, TextEncoderContract, example_images
from tests.encoders.checkpoints import MAX_TOKENS, WORDS, copy_changed, save_dinov2

NUM_REGISTERS = 3


class TestTransformersImage(ImageEncoderContract):
    @pytest.fixture
    def spec(self, dinov2: Path) -> str:
        return f"hf:{dinov2}"

    @pytest.fixture
    def other_spec(self, dinov2: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
        return f"hf:{copy_changed(dinov2, tmp_path_factory.mktemp('changed') / 'dinov2')}"


class TestTransformersText(TextEncoderContract):
    max_tokens = MAX_TOKENS

    @pytest.fixture
    def spec(self, bert: Path) -> str:
        return f"hf:{bert}"

    @pytest.fixture
    def other_spec(self, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
        return f"hf:{copy_changed(bert, tmp_path_factory.mktemp('changed') / 'bert')}"


def test_nondeterministic_model_raises(tmp_path: Path) -> None:
    import transformers

    save_dinov2(tmp_path, num_registers=0)  # for its image processor
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    transformers.ViTMAEModel(transformers.ViTMAEConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(SettingError, match="differs between two runs"):
        open_encoder(f"hf:{tmp_path}", modality="image")


@pytest.mark.slow
@pytest.mark.parametrize("num_registers", [0, NUM_REGISTERS])
def test_images_match_transformers(num_registers: int, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel

    folder = save_dinov2(tmp_path / "dinov2", num_registers=num_registers)
    encoder = open_encoder(f"hf:{folder}", modality="image")
    assert encoder.features == {"cls": (32,), "patch_mean": (32,), "patches": (16, 32)}
    found = encoder.encode(encoder.prepare(example_images()), list(encoder.features))
    pixels = AutoImageProcessor.from_pretrained(folder)(images=example_images(), return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(**pixels).last_hidden_state.numpy()
    np.testing.assert_allclose(np.stack(found["cls"]), states[:, 0], atol=1e-4)
    np.testing.assert_allclose(np.stack(found["patches"]), states[:, 1 + num_registers :], atol=1e-4)
    np.testing.assert_allclose(np.stack(found["patch_mean"]), states[:, 1 + num_registers :].mean(1), atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_texts_match_transformers(backend: Any, bert: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    encoder = open_encoder(f"hf:{bert}", modality="text", settings=EncoderSettings(backend=backend))
    assert encoder.features == {"mean": (32,), "cls": (32,), "tokens": (-1, 32)}
    found = encoder.encode(encoder.prepare(TEXTS), list(encoder.features))
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        np.testing.assert_allclose(found["tokens"][row], states, atol=1e-4)
        np.testing.assert_allclose(found["mean"][row], states.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(found["cls"][row], states[0], atol=1e-4)


def test_two_tokenizers_of_the_same_weights_are_told_apart(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fingerprint does not cover the tokenizer: each text encoder is then opened from its own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    folder = Path(shutil.copytree(bert, tmp_path / bert.name))
    words = [word for word in WORDS if word.isalpha()][:2]
    swapped = dict(zip(words, reversed(words), strict=True))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{swapped.get(word, word)}\n" for word in WORDS))

    settings = EncoderSettings(backend="onnxruntime")
    for _ in range(2):
        for model in (bert, folder):
            encoder = open_encoder(f"hf:{model}", modality="text", settings=settings)
            expected = encoder.prepare(words)
            fingerprint = encoder.fingerprint.to_json()
            reopened = reopen_encoder(f"hf:{model}", modality="text", feature="bert/mean", fingerprint=fingerprint)
            assert [row.tolist() for row in reopened.prepare(words)] == [row.tolist() for row in expected]
    first = reopen_encoder(f"hf:{bert}", modality="text", feature="bert/mean", fingerprint=fingerprint)
    assert [row.tolist() for row in first.prepare(words)] == [row.tolist() for row in expected[::-1]]


def test_missing_weights_raise(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bert, tmp_path / "bert")
    state = load_file(folder / "model.safetensors")
    del state["encoder.layer.0.output.dense.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"1 are missing, such as encoder\.layer\.0\.output\.dense\.weight"):
        open_encoder(f"hf:{folder}", modality="text")


def test_truncated_weights_raise(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CorruptError, match="download the folder again"):
        open_encoder(f"hf:{folder}", modality="text")


@pytest.mark.slow
def test_missing_pooler_is_allowed(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bert, tmp_path / "bert")
    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    assert len(kept) < len(state)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    one, other = (open_encoder(f"hf:{folder}", modality="text") for _ in range(2))
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_missing_file_raises(missing: str, dinov2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dinov2, tmp_path / "dinov2")
    (folder / missing).unlink()
    with pytest.raises(PathError, match="no (model|weights|image processor)"):
        open_encoder(f"hf:{folder}", modality="image")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("hf") / "tiny-dinov2", num_registers=NUM_REGISTERS)
