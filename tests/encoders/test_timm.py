"""timm encoders, compared with timm's transform and forward pass."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.encoders.weights import read_weights
from embedcache.errors import SettingError
from embedcache.testing.encoders import ImageEncoderContract, example_images
from tests.encoders.checkpoints import save_timm

pytestmark = pytest.mark.slow

TORCH = EncoderSettings(backend="torch")  # without the seconds of an ONNX export


class TestTimm(ImageEncoderContract):
    @pytest.fixture
    def spec(self, test_vit: Path) -> str:
        return f"timm:test_vit,weights={test_vit}"

    @pytest.fixture
    def other_spec(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return f"timm:test_vit,weights={save_timm('test_vit', tmp_path_factory.mktemp('timm'), seed=1)}"


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("test_vit", ["cls", "patch_mean", "patches"]),
        ("test_vit3", ["pooled", "patch_mean", "patches"]),
        ("test_resnet", ["patch_mean", "patches"]),
        ("test_convnext", ["pooled", "patch_mean", "patches"]),
    ],
)
def test_matches_timm(name: str, features: Sequence[str], tmp_path: Path) -> None:
    path = save_timm(name, tmp_path, seed=0)
    encoder = open_encoder(f"timm:{name},weights={path}", modality="image", settings=TORCH)
    assert list(encoder.features) == features
    found = encoder.encode(encoder.prepare(example_images()), features)
    for feature, expected in _by_timm(name, path, example_images()).items():
        if feature in features:
            np.testing.assert_allclose(np.stack(found[feature]), expected, atol=1e-4)


def _by_timm(name: str, path: Path, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    import timm
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model(name, pretrained=False, checkpoint_path=str(path)).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    with torch.no_grad():
        states = model.forward_features(torch.stack([transform(image) for image in images]))
        pooled = model.forward_head(states, pre_logits=True)
    is_map = states.ndim == 4
    tokens = states.flatten(2).transpose(1, 2) if is_map else states[:, model.num_prefix_tokens :]
    return {
        "pooled": pooled.numpy(),
        "cls": pooled.numpy(),
        "patch_mean": tokens.mean(dim=1).numpy(),
        "patches": tokens.numpy(),
    }


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_onnxruntime_agrees_with_torch(name: str, tmp_path: Path) -> None:
    spec = f"timm:{name},weights={save_timm(name, tmp_path, seed=0)}"
    features = ("layer2.patch_mean", "grid:2")
    chosen, torch_one = (
        open_encoder(spec, modality="image", settings=EncoderSettings(device="cpu", backend=backend, features=features))
        for backend in ("auto", "torch")
    )
    assert (chosen.fingerprint.backend, torch_one.fingerprint.backend) == ("onnxruntime", "torch")
    assert chosen.features == torch_one.features
    prepared = torch_one.prepare(example_images())
    found, expected = (encoder.encode(prepared, list(chosen.features)) for encoder in (chosen, torch_one))
    for feature in chosen.features:
        np.testing.assert_allclose(np.stack(found[feature]), np.stack(expected[feature]), atol=1e-4)


@pytest.mark.parametrize(("name", "num_tokens"), [("test_vit", 36), ("test_resnet", 9)])
def test_image_size_option(name: str, num_tokens: int, tmp_path: Path) -> None:
    import timm
    from timm.data import create_transform, resolve_data_config

    path = save_timm(name, tmp_path, seed=0)
    encoder = open_encoder(f"timm:{name},weights={path},image_size=96", modality="image", settings=TORCH)
    assert encoder.fingerprint.preprocessing["input_size"] == [3, 96, 96]
    assert encoder.features["patches"][0] == num_tokens
    found = encoder.encode(encoder.prepare(example_images()), ["patches"])["patches"]
    size = {"img_size": 96} if name == "test_vit" else {}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **size).eval()
    transform = create_transform(**resolve_data_config({"img_size": 96}, model=model))
    with torch.no_grad():
        states = model.forward_features(torch.stack([transform(image) for image in example_images()]))
    expected = states[:, 1:] if states.ndim == 3 else states.flatten(2).transpose(1, 2)
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-4)


def test_patches_without_grid_are_left_out(tmp_path: Path) -> None:
    spec = f"timm:pit_ti_224,weights={save_timm('pit_ti_224', tmp_path, seed=0)}"
    encoder = open_encoder(spec, modality="image", settings=TORCH)
    assert encoder.features == {"cls": (256,)}, "no patch comes out of this one"


def test_model_with_several_maps_raises(tmp_path: Path) -> None:
    path = save_timm("crossvit_tiny_240", tmp_path, seed=0)
    with pytest.raises(SettingError, match="CrossVit"):
        open_encoder(f"timm:crossvit_tiny_240,weights={path}", modality="image")


@pytest.mark.parametrize(("name", "feature"), [("test_vit", "cls"), ("test_resnet", "patch_mean")])
def test_head_of_a_classifier_belongs_to_a_feature(name: str, feature: str, tmp_path: Path) -> None:
    path = save_timm(name, tmp_path, seed=0)
    encoder = open_encoder(f"timm:{name},weights={path}", modality="image", settings=TORCH)
    head = encoder.read_head()  # type: ignore[attr-defined]
    weights = read_weights(path)
    rows_CD = weights.get("head.weight", weights.get("fc.weight"))
    np.testing.assert_array_equal(head.rows_CD, rows_CD)
    assert feature in head.features
    assert (head.names[0], len(head.names), head.origin) == ("tench, Tinca tinca", 1000, "imagenet-1k")
