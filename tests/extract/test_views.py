from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.encoders.views import open_view
from embedcache.errors import FingerprintError, SettingError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.sources.images import decode_image
from embedcache.store.cache import Cache
from embedcache.store.layout import Axis
from embedcache.store.verify import verify
from tests.extract.cases import run
from tests.images import write_images
from tests.toy import IMAGE


def gray(image: Image.Image) -> Image.Image:
    """A user's view."""
    return ImageOps.grayscale(image).convert("RGB")


def shout(text: str) -> str:
    """A user's view of texts."""
    return f"{text} loudly"


shout.modality = "text"  # type: ignore[attr-defined]


def test_view_is_a_feature_of_its_own(tmp_path: Path) -> None:
    source = write_images(tmp_path / "s", 6)
    views = ("crop:0.5", "flip", "tests.extract.test_views:gray", "tests.extract.test_views:shout")
    run(source, tmp_path / "c", views=views)
    cache, encoder = Cache(tmp_path / "c"), open_encoder(IMAGE, modality="image")
    folder = "open_toy@tests.extract.test_views-"
    assert [group.name for group in cache.encoders("image")] == [
        "open_toy", "open_toy@crop-0.5", "open_toy@flip", f"{folder}gray",
    ]  # fmt: skip
    assert [group.name for group in cache.encoders("text")] == ["open_toy", f"{folder}shout"]
    pil_image = decode_image((source / "00002.png").read_bytes())
    expected = {
        "open_toy": pil_image,
        "open_toy@crop-0.5": pil_image.crop((8, 8, 24, 24)),
        "open_toy@flip": ImageOps.mirror(pil_image),
        f"{folder}gray": gray(pil_image),
    }
    for name, image in expected.items():
        value = encoder.encode(encoder.prepare([image]), ["cls"])["cls"][0]
        np.testing.assert_array_equal(cache.feature("image", f"{name}/cls").load()[2], value.astype(np.float16))
    plain, loud = (cache.feature("text", f"{name}/mean").load() for name in ("open_toy", f"{folder}shout"))
    assert (plain != loud).any(axis=1).all()


def test_changed_view_function_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_images(tmp_path / "s", 4)
    run(source, tmp_path / "c", views=("tests.extract.test_views:gray",))
    monkeypatch.setattr("tests.extract.test_views.gray", shout)
    monkeypatch.delattr(shout, "modality")
    with pytest.raises(FingerprintError, match="view.code"):
        run(source, tmp_path / "c", views=("tests.extract.test_views:gray",))


@pytest.mark.parametrize("name", ["crop:0", "crop:1.5", "crop:", "crop:half", "flip:x"])
def test_invalid_argument_raises(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name.partition(':')[0]}"):
        open_view(name)


@pytest.mark.slow
def test_view_has_no_box(tmp_path: Path) -> None:
    source = write_images(tmp_path / "s", 2)
    encoder = "lite:efficientnet-lite0,fit=224x224"
    settings = ExtractSettings(features=("patches",), views=("crop:0.5",), encoder=EncoderSettings(backend="torch"))
    extract(open_source(source), tmp_path / "c", image_encoder=[encoder], settings=settings)
    plain, cropped = Cache(tmp_path / "c").features("image")
    assert plain.axis == Axis(kind="grid", rows=7, columns=7, box=(0.0, 0.0, 1.0, 1.0))
    assert cropped.axis == Axis(kind="grid", rows=7, columns=7)
    assert not verify(Cache(tmp_path / "c"))
