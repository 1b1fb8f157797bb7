"""The packaged token table, compared with the package's code."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from embedcache.encoders.open import open_encoder
from embedcache.encoders.wordllama import MAX_TOKENS
from embedcache.errors import UnknownNameError
from embedcache.testing.encoders import TEXTS, TextEncoderContract
from tests.encoders.checkpoints import change_one_weight

SPEC = "wordllama:l2_supercat_256"
wordllama = pytest.importorskip("wordllama", reason="an extra of its own")
FOLDER = Path(wordllama.__file__).parent


@pytest.mark.slow
class TestWordLlama(TextEncoderContract):
    max_tokens = MAX_TOKENS

    @pytest.fixture
    def spec(self) -> str:
        return SPEC

    @pytest.fixture
    def other_spec(self, tmp_path: Path) -> str:
        path = tmp_path / "changed.safetensors"
        save_file(load_file(FOLDER / "weights" / "l2_supercat_256.safetensors"), path)
        change_one_weight(path)
        return f"{SPEC},weights={path}"


@pytest.mark.slow
def test_matches_package() -> None:
    encoder = open_encoder(SPEC, modality="text")
    texts = [*TEXTS, "Häuser & 猫, 42!"]
    found = encoder.encode(encoder.prepare(texts), ["mean"])["mean"]
    package = wordllama.WordLlama.load(cache_dir=FOLDER, disable_download=True)
    np.testing.assert_allclose(np.stack(found), package.embed(texts), atol=1e-6)


@pytest.mark.slow
def test_text_without_tokens() -> None:
    encoder = open_encoder(SPEC, modality="text")
    assert [ids.tolist() for ids in encoder.prepare([""])] == [[0]]


def test_unknown_model_raises() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown wordllama model 'l9_64'; .*known: l2_supercat_256"):
        open_encoder("wordllama:l9_64", modality="text")
