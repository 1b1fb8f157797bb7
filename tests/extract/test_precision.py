"""Precisions and backends of new and of stored features. The CPU stands for a GPU with fast lower precisions."""

from pathlib import Path

import pytest

from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import DataError, FingerprintError
from embedcache.extract import precision
from embedcache.extract.extract import extract
from embedcache.extract.plan import plan
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.cli.run import embedcache
from tests.encoders.checkpoints import save_timm
from tests.images import write_images
from tests.recorded import RecordedProgress

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("precision") / "photos", 8)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"timm:test_vit,weights={save_timm('test_vit', tmp_path_factory.mktemp('weights'), seed=0)}"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that computes bfloat16 and float16 faster than float32."""
    monkeypatch.setattr(precision, "fast_precisions", lambda device: ("bfloat16", "float16"))


def settings_of(**options: object) -> ExtractSettings:
    return ExtractSettings(devices=("cpu",), encoder=EncoderSettings(**{"backend": "torch", **options}))  # type: ignore[arg-type]


def stored(cache: Path) -> tuple[str, str]:
    fingerprint = Cache(cache).feature("image").fingerprint
    return fingerprint["precision"], fingerprint["backend"]


def test_new_features_get_the_first_precision_that_agrees(
    fast: None, photos: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(open_source(photos), tmp_path / "c", image_encoder=[encoder], settings=settings_of())
    assert stored(tmp_path / "c") == ("bfloat16", "torch")
    planned = plan(open_source(photos), tmp_path / "new", image_encoder=[encoder], settings=settings_of())
    assert [found.precision for found in planned.precisions] == ["bfloat16", "float16"]
    assert all(0.999 <= found.cosines.min() < 1 for found in planned.precisions)
    assert "test_vit: bfloat16 is " in planned.precisions[0].line()
    monkeypatch.setattr(precision, "AGREEMENT_COSINE", float(planned.precisions[0].cosines.min()) + 1e-6)
    extract(open_source(photos), tmp_path / "strict", image_encoder=[encoder], settings=settings_of())
    assert stored(tmp_path / "strict")[0] == "float16"
    monkeypatch.setattr(precision, "AGREEMENT_COSINE", 1.1)
    extract(open_source(photos), tmp_path / "none", image_encoder=[encoder], settings=settings_of())
    assert stored(tmp_path / "none")[0] == "float32"


def test_stored_features_keep_precision_and_backend(fast: None, photos: Path, encoder: str, tmp_path: Path) -> None:
    made = settings_of(precision="fp32")
    extract(open_source(photos), tmp_path / "c", image_encoder=[encoder], settings=made)
    extract(open_source(photos), tmp_path / "c", image_encoder=[encoder], settings=settings_of(backend="auto"))
    assert stored(tmp_path / "c") == ("float32", "torch")
    with pytest.raises(FingerprintError, match="precision: stored 'float32', requested 'bfloat16'"):
        extract(open_source(photos), tmp_path / "c", image_encoder=[encoder], settings=settings_of(precision="bf16"))


def test_named_precision_is_compared_with_float32(
    photos: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, settings = RecordedProgress(), settings_of(precision="bf16")
    extract(open_source(photos), tmp_path / "c", image_encoder=[encoder], settings=settings, progress=progress)
    assert stored(tmp_path / "c")[0] == "bfloat16"
    assert [note for note in progress.notes if "test_vit: bfloat16 is " in note]
    monkeypatch.setattr(precision, "FAULT_COSINE", 1.1)
    with pytest.raises(DataError, match=r"test_vit: expected .*16 .*at least 1.1.*got 0.99.*--precision float32"):
        extract(open_source(photos), tmp_path / "wrong", image_encoder=[encoder], settings=settings)
    assert not Cache(tmp_path / "wrong").features("image")
    extract(open_source(photos), tmp_path / "c", image_encoder=[encoder], settings=settings)  # stored features


def test_plan_states_the_drift(photos: Path, encoder: str, tmp_path: Path) -> None:
    options = ("--image-encoder", encoder, "--device", "cpu")
    done = embedcache("extract", photos, "c", *options, "--precision", "bf16", "--plan", cwd=tmp_path)
    assert "test_vit: bfloat16 is " in done.stdout
    assert "cosine to it on the first images: mean 0.99" in done.stdout
    assert "device: cpu" in done.stderr
    assert "float32" not in embedcache("extract", photos, "d", *options, "--plan", cwd=tmp_path).stdout
