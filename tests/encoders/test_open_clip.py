"""open_clip's towers against its own encode_image and encode_text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.encoders.open import open_encoder
from embedcache.errors import ArtifactError, CorruptError, PathError
from tests.encoders.checkpoints import write_clip_config
from tests.encoders.contract import TEXTS, ImageEncoderContract, TextEncoderContract, pictures

open_clip = pytest.importorskip("open_clip")


class TestOpenClipImage(ImageEncoderContract):
    @pytest.fixture
    def spec(self, weights: Path) -> str:
        return f"open_clip:tiny-clip,pretrained={weights}"

    @pytest.fixture
    def other_spec(self, weights: Path) -> str:
        return _other(weights)


class TestOpenClipText(TextEncoderContract):
    max_tokens = 16

    @pytest.fixture
    def spec(self, weights: Path) -> str:
        return f"open_clip:tiny-clip,pretrained={weights}"

    @pytest.fixture
    def other_spec(self, weights: Path) -> str:
        return _other(weights)


def test_values_are_those_of_open_clip(weights: Path) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", pretrained=str(weights))
    spec = f"open_clip:tiny-clip,pretrained={weights}"
    image, text = (open_encoder(spec, modality="image"), open_encoder(spec, modality="text"))
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([preprocess(picture) for picture in pictures()])).numpy()
        texts = model.encode_text(open_clip.get_tokenizer("tiny-clip")(TEXTS)).numpy()
    np.testing.assert_allclose(_pooled(image, pictures()), images, atol=1e-4)
    np.testing.assert_allclose(_pooled(text, TEXTS), texts, atol=1e-4)


def test_weights_of_another_model_are_refused(weights: Path) -> None:
    with pytest.raises(ArtifactError, match="do not fit RN50"):
        open_encoder(f"open_clip:RN50,pretrained={weights}", modality="image")


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_a_file_that_holds_no_weights_is_refused(name: str, tmp_path: Path, weights: Path) -> None:
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(CorruptError, match=name.replace(".", r"\.")):
        open_encoder(f"open_clip:tiny-clip,pretrained={tmp_path / name}", modality="image")


def test_published_weights_without_the_hub_ask_for_a_file() -> None:
    with pytest.raises(PathError, match="give the path of a file as pretrained="):
        open_encoder("open_clip:ViT-B-32,pretrained=laion2b_s34b_b79k", modality="text")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open-clip")
    open_clip.add_model_config(write_clip_config(folder))
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


def _other(weights: Path) -> str:
    state = torch.load(weights, weights_only=True)
    state["logit_scale"] += 1
    path = weights.with_name("other.pt")
    torch.save(state, path)
    return f"open_clip:tiny-clip,pretrained={path}"


def _pooled(encoder: Any, items: Any) -> np.ndarray:
    return np.stack(encoder.encode(encoder.prepare(items), ["pooled"])["pooled"])
