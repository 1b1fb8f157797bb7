"""Fixtures of the encoder tests: no network, a separate ONNX cache, tiny checkpoints."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.encoders.checkpoints import save_bert, save_timm


@pytest.fixture(scope="session", autouse=True)
def onnx_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "embedcache" / "onnx"


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a word-piece tokenizer, as `save_pretrained` writes it."""
    return save_bert(tmp_path_factory.mktemp("bert") / "tiny-bert", seed=0)


@pytest.fixture(scope="session")
def test_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of timm's `test_vit`."""
    return save_timm("test_vit", tmp_path_factory.mktemp("timm"), seed=0)
