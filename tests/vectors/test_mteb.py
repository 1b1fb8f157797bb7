"""A run as a model of mteb."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from embedcache.vectors.benchmarks import MtebModel, load_mteb

if TYPE_CHECKING:
    from tests.vectors.mteb_task import Pairs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("mteb") is None, reason="needs mteb")]


class Counting(MtebModel):
    """A run that counts the items that it encodes."""

    count = 0

    def encode(self, inputs: Any, **options: Any) -> Any:
        self.count += len(inputs.dataset)
        return super().encode(inputs, **options)


@pytest.fixture
def task(image_folder: Path) -> "Pairs":
    from tests.vectors.mteb_task import Pairs

    task = Pairs()
    task.folder = image_folder
    return task


def score(model: Any, task: "Pairs") -> float:
    from mteb import evaluate

    found = evaluate(model, task, cache=None, show_progress_bar=False)
    value: float = found.task_results[0].scores["test"][0]["main_score"]
    return value


@pytest.mark.filterwarnings("ignore")
def test_run_is_a_model_of_mteb(run_path: Path, task: "Pairs", tmp_path: Path) -> None:
    from mteb.models.cache_wrappers import CachedEmbeddingWrapper
    from mteb.models.models_protocols import EncoderProtocol

    opened = load_mteb(run_path)
    assert isinstance(opened, EncoderProtocol)
    model = Counting(opened.model, opened.mteb_model_meta)
    plain = score(model, task)
    assert model.count == 2 * task.num_images
    assert plain > 0.12  # chance is 0.1
    for _ in range(2):
        cached = CachedEmbeddingWrapper(model, tmp_path / "out")
        assert score(cached, task) == pytest.approx(plain, abs=1e-6)
        cached.close()
    assert model.count <= 4 * task.num_images
