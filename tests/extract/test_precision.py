"""The precision and backend of stored features."""

from pathlib import Path

import pytest

from embedcache.encoders.base import EncoderSettings
from embedcache.errors import FingerprintError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.encoders.checkpoints import save_timm
from tests.images import write_images


@pytest.mark.slow
def test_stored_features_keep_precision_and_backend(tmp_path: Path) -> None:
    photos = open_source(write_images(tmp_path / "photos", 8))
    encoder = f"timm:test_vit,weights={save_timm('test_vit', tmp_path, seed=0)}"

    def run(**options: object) -> None:
        settings = ExtractSettings(devices=("cpu",), encoder=EncoderSettings(**options))  # type: ignore[arg-type]
        extract(photos, tmp_path / "c", image_encoder=[encoder], settings=settings)

    run(precision="bfloat16")
    run()
    fingerprint = Cache(tmp_path / "c").feature("image").fingerprint
    assert (fingerprint["precision"], fingerprint["backend"]) == ("bfloat16", "torch")
    with pytest.raises(FingerprintError, match="precision: stored 'bfloat16', requested 'float32'"):
        run(precision="float32")
