"""open_clip encoders, compared with its `encode_image` and `encode_text`."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.encoders.open import open_encoder
from embedcache.errors import ArtifactError, CorruptError
from embedcache.testing.encoders import TEXTS, ImageEncoderContract, TextEncoderContract, example_images
from tests.encoders.checkpoints import save_clip, write_clip_config

pytestmark = pytest.mark.skipif(not find_spec("open_clip"), reason="needs open_clip")


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


@pytest.mark.slow
def test_matches_open_clip(weights: Path) -> None:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", pretrained=str(weights))
    spec = f"open_clip:tiny-clip,pretrained={weights}"
    image, text = (open_encoder(spec, modality="image"), open_encoder(spec, modality="text"))
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([preprocess(image) for image in example_images()])).numpy()
        texts = model.encode_text(open_clip.get_tokenizer("tiny-clip")(TEXTS)).numpy()
    np.testing.assert_allclose(_pooled(image, example_images()), images, atol=1e-4)
    np.testing.assert_allclose(_pooled(text, TEXTS), texts, atol=1e-4)


TOWERS: dict[str, dict[str, Any]] = {
    "causal": {},
    "causal in a tower of its own": {"custom_text": True},
    "causal, pooled at the end token": {"text": {"pool_type": "eos", "eos_id": 49407}},
    "bidirectional as SigLIP's": {"custom_text": True, "text": {"no_causal_mask": True, "pool_type": "last"}},
    "bidirectional": {"text": {"no_causal_mask": True}},
    "with a class token as CoCa's": {"custom_text": True, "text": {"embed_cls": True}},
}


@pytest.mark.slow
@pytest.mark.parametrize("tower", TOWERS)
def test_texts_match_open_clip(tower: str, tmp_path: Path) -> None:
    import open_clip

    config = json.loads(write_clip_config(tmp_path).read_text())
    changes = dict(TOWERS[tower])
    config["text_cfg"] |= changes.pop("text", {})
    name = f"tower-{list(TOWERS).index(tower)}"
    (tmp_path / f"{name}.json").write_text(json.dumps({**config, **changes}))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    torch.save(model.state_dict(), tmp_path / "tower.pt")
    texts = [*TEXTS, "a red cat " * 50, ""]
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(name)(texts)).numpy()
    encoder = open_encoder(f"open_clip:{name},pretrained={tmp_path / 'tower.pt'}", modality="text")
    np.testing.assert_allclose(_pooled(encoder, texts), expected, atol=1e-5)
    np.testing.assert_allclose(_pooled(encoder, texts[:1]), expected[:1], atol=1e-5)


@pytest.mark.slow
def test_towers_share_one_model_until_file_changes(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "shared.pt"
    shutil.copy(weights, path)
    spec = f"open_clip:tiny-clip,pretrained={path}"
    image, text = (open_encoder(spec, modality="image"), open_encoder(spec, modality="text"))
    assert _parameters(image) & _parameters(text)
    os.utime(path, ns=(0, 0))
    assert not _parameters(open_encoder(spec, modality="text")) & _parameters(text)


def test_weights_of_another_model_raise(weights: Path, tmp_path: Path) -> None:
    import open_clip

    config = json.loads(write_clip_config(tmp_path).read_text())
    (tmp_path / "wide-clip.json").write_text(json.dumps({**config, "embed_dim": 40}))
    open_clip.add_model_config(tmp_path / "wide-clip.json")
    with pytest.raises(ArtifactError, match="do not fit wide-clip"):
        open_encoder(f"open_clip:wide-clip,pretrained={weights}", modality="image")


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_invalid_weights_file_raises(name: str, tmp_path: Path, weights: Path) -> None:
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(CorruptError, match=name.replace(".", r"\.")):
        open_encoder(f"open_clip:tiny-clip,pretrained={tmp_path / name}", modality="image")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("open-clip") / "tiny.pt")


def _other(weights: Path) -> str:
    state = torch.load(weights, weights_only=True)
    state["logit_scale"] += 1
    path = weights.with_name("other.pt")
    torch.save(state, path)
    return f"open_clip:tiny-clip,pretrained={path}"


def _parameters(encoder: Any) -> set[int]:
    return {parameter.data_ptr() for parameter in encoder.graph._module.parameters()}


def _pooled(encoder: Any, items: Any) -> np.ndarray:
    return np.stack(encoder.encode(encoder.prepare(items), ["pooled"])["pooled"])
