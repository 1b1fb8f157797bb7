"""How a torch module is run: batches that do not fit, batch sizes, precision, compilation."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedcache.encoders.backends import TorchGraph
from embedcache.encoders.open import open_encoder
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import SettingError
from embedcache.testing.encoders import TEXTS


class Small(torch.nn.Module):
    """Has memory for so many rows only."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.calls: list[int] = []

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"double": images.float() * 2, "sum": images.float().sum(dim=1)}


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_batch_that_does_not_fit_is_run_in_parts_in_order(room: int, num_rows: int) -> None:
    graph = TorchGraph(Small(room), EncoderSettings())
    images = np.arange(num_rows * 3, dtype=np.uint8).reshape(num_rows, 3)
    for _ in range(2):
        found = graph({"images": images}, ["sum", "double"])
        assert list(found) == ["sum", "double"]
        np.testing.assert_array_equal(found["double"], images.astype(np.float32) * 2)
        np.testing.assert_array_equal(found["sum"], images.sum(axis=1, dtype=np.float32))


def test_the_smaller_batch_is_said_once_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    module = Small(room=5)
    graph = TorchGraph(module, EncoderSettings())
    images = np.zeros((16, 3), np.uint8)
    with caplog.at_level(logging.WARNING):
        graph({"images": images}, ["sum"])
        graph({"images": images}, ["sum"])
    assert module.calls == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "cpu is out of memory at batch size 16; continuing with 8",
        "cpu is out of memory at batch size 8; continuing with 4",
    ]


def test_one_item_that_does_not_fit_is_an_error_with_the_next_step() -> None:
    with pytest.raises(SettingError, match="memory of cpu is too small for one item; use precision bfloat16"):
        TorchGraph(Small(room=0), EncoderSettings())({"images": np.zeros((3, 3), np.uint8)}, ["sum"])


@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_every_family_takes_the_batch_size(batch_size: int | None, test_vit: Path, bert: Path) -> None:
    settings = EncoderSettings(batch_size=batch_size)
    image = open_encoder(f"timm:test_vit,weights={test_vit}", modality="image", settings=settings)
    text = open_encoder(f"hf:{bert}", modality="text", settings=settings)
    assert (image.batch_size, text.batch_size) == ((32, 64) if batch_size is None else (batch_size, batch_size))


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(SettingError, match="batch_size: expected a whole number of at least 1, got 0"):
        EncoderSettings(batch_size=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, of what its compiler imports
def test_a_compiled_model_gives_the_same(bert: Path) -> None:
    asked = ("layer1.cls", "layer2.tokens")
    plain, compiled = (
        open_encoder(
            f"hf:{bert}",
            modality="text",
            settings=EncoderSettings(backend="torch", compile=compiles, features=asked),
        )
        for compiles in (False, True)
    )
    assert compiled.fingerprint == plain.fingerprint
    prepared, names = plain.prepare(TEXTS), list(plain.features)
    expected, found = plain.encode(prepared, names), compiled.encode(prepared, names)
    for name in names:
        for one, other in zip(expected[name], found[name], strict=True):
            np.testing.assert_allclose(other, one, atol=1e-5)
