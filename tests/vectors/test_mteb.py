"""A run as a model of mteb."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedcache.errors import DataError
from embedcache.vectors.benchmarks import load_mteb
from tests.vectors.runs import cached_vectors

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("mteb") is None, reason="needs mteb")]


@pytest.mark.filterwarnings("ignore")
def test_run_is_a_model_of_mteb(run_path: Path, cache_path: Path, image_folder: Path) -> None:
    from mteb.models.models_protocols import EncoderProtocol

    model = load_mteb(run_path)
    assert isinstance(model, EncoderProtocol)
    images = [Image.open(path) for path in sorted(image_folder.glob("*.png"))[:6]]
    vectors = model.encode([{"image": images[:4]}, {"image": images[4:]}])
    expected = cached_vectors(cache_path, run_path, "image")[:6]
    np.testing.assert_allclose(vectors, expected, atol=2e-3)
    np.testing.assert_allclose(model.similarity(vectors, expected).diagonal(), 1, atol=1e-4)
    np.testing.assert_allclose(model.similarity_pairwise(vectors, 2 * expected), 1, atol=1e-4)
    for batch in ({"image": images, "text": ["a"] * 6}, {"audio": []}):
        with pytest.raises(DataError, match="mteb"):
            model.encode([batch])
