"""Vectors for mteb, found by its own wrapper in an evaluation of its own, and a run as one of its models."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from embedcache.errors import DataError, PathError, UnknownNameError
from embedcache.interop.mteb import MtebModel, load_mteb, write_mteb
from embedcache.search.vectors import Vectors
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from tests.interop.mteb_task import Pairs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("mteb") is None, reason="needs mteb")]


class Counting(MtebModel):
    """A run that counts the items that it encodes."""

    count = 0

    def encode(self, inputs: Any, **options: Any) -> Any:
        self.count += len(inputs.dataset)
        return super().encode(inputs, **options)


@pytest.fixture
def task(image_folder: Path) -> "Pairs":
    from tests.interop.mteb_task import Pairs

    task = Pairs()
    task.folder = image_folder
    return task


def score(model: Any, task: "Pairs") -> float:
    from mteb import evaluate

    found = evaluate(model, task, cache=None, show_progress_bar=False)
    value: float = found.task_results[0].scores["test"][0]["main_score"]
    return value


@pytest.mark.filterwarnings("ignore")
def test_cached_vectors_are_found(cache_path: Path, run_path: Path, task: "Pairs", tmp_path: Path) -> None:
    """Check that mteb encodes nothing that the cache has, and gets the run's own score."""
    from datasets import Dataset, Features, Image
    from mteb.models.cache_wrappers import CachedEmbeddingWrapper
    from mteb.models.models_protocols import EncoderProtocol

    opened = load_mteb(run_path)
    assert isinstance(opened, EncoderProtocol)
    model = Counting(opened.model, opened.mteb_model_meta)
    plain = score(model, task)
    assert model.count == 2 * task.num_images
    captions = set(Cache(cache_path).items("text")["text"].to_pylist())
    assert write_mteb(cache_path, tmp_path / "out", [task], run=run_path) == 300 + len(captions)
    assert {path.name for path in (tmp_path / "out" / "EmbedcachePairs").iterdir()} == {"query", "document"}
    cached = CachedEmbeddingWrapper(model, tmp_path / "out")
    model.count = 0
    assert score(cached, task) == pytest.approx(plain, abs=1e-6)
    assert model.count == 0
    cached.close()

    images = Dataset.from_dict({"image": [str(min(task.folder.glob("*.png")))]}, features=Features({"image": Image()}))
    backend = cached.cache_backend(tmp_path / "out" / "EmbedcachePairs" / "document")
    backend.load()
    expected = Vectors(cache_path, "image", run_path=run_path).read(np.array([0]))[0]
    np.testing.assert_allclose(backend.get_vector(images[0]), expected, atol=1e-6)
    backend.close()


@pytest.mark.filterwarnings("ignore")
def test_missing_items_are_encoded(labeled: Path, run_path: Path, task: "Pairs", tmp_path: Path) -> None:
    """Check a cache of the first captions only: mteb asks the run for the images."""
    from mteb.models.cache_wrappers import CachedEmbeddingWrapper

    write_mteb(labeled, tmp_path / "out", [task], modality="text", run=run_path)
    opened = load_mteb(run_path)
    model = Counting(opened.model, opened.mteb_model_meta)
    cached = CachedEmbeddingWrapper(model, tmp_path / "out")
    score(cached, task)
    assert model.count == task.num_images
    cached.close()


def test_wrong_requests_raise(cache_path: Path, task: "Pairs", tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown task of mteb 'Flickr30kI2TRetrieva'"):
        write_mteb(cache_path, tmp_path / "out", ["Flickr30kI2TRetrieva"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(PathError, match="expected a new or empty folder"):
        write_mteb(cache_path, tmp_path / "full", [task])
    about = {"name": "Pics", "category": "i2i", "modalities": ["image"]}
    task.metadata = task.metadata.model_copy(update=about)
    with pytest.raises(DataError, match="expected a task with items of text, got Pics"):
        write_mteb(cache_path, tmp_path / "out", [task], modality="text", text_feature="open_toy/mean")
    assert not (tmp_path / "out").exists()
