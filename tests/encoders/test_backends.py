"""Running a model on torch: out of memory, batch size, compilation; and its export to ONNX."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedcache.encoders.backends import OnnxExport, TorchGraph, export_graph
from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.errors import ArtifactError, SettingError


class LimitedMemory(torch.nn.Module):
    """A module that runs out of memory above `max_rows`."""

    def __init__(self, max_rows: int) -> None:
        super().__init__()
        self.max_rows = max_rows
        self.calls: list[int] = []

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls.append(len(images))
        if len(images) > self.max_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"double": images.float() * 2, "sum": images.float().sum(dim=1)}


@given(st.integers(1, 40), st.integers(1, 40))
def test_out_of_memory_splits_batch_in_order(max_rows: int, num_rows: int) -> None:
    graph = TorchGraph(LimitedMemory(max_rows), EncoderSettings())
    images = np.arange(num_rows * 3, dtype=np.uint8).reshape(num_rows, 3)
    for _ in range(2):
        found = graph({"images": images}, ["sum", "double"])
        assert list(found) == ["sum", "double"]
        np.testing.assert_array_equal(found["double"], images.astype(np.float32) * 2)
        np.testing.assert_array_equal(found["sum"], images.sum(axis=1, dtype=np.float32))


def test_smaller_batch_is_kept_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    module = LimitedMemory(max_rows=5)
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


def test_out_of_memory_for_one_item_raises() -> None:
    with pytest.raises(SettingError, match="memory of cpu is too small for one item; use precision bfloat16"):
        TorchGraph(LimitedMemory(max_rows=0), EncoderSettings())({"images": np.zeros((3, 3), np.uint8)}, ["sum"])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 7])
def test_batch_size_setting(batch_size: int | None, test_vit: Path, bert: Path) -> None:
    settings = EncoderSettings(batch_size=batch_size, backend="torch")
    image = open_encoder(f"timm:test_vit,weights={test_vit}", modality="image", settings=settings)
    text = open_encoder(f"hf:{bert}", modality="text", settings=settings)
    assert (image.batch_size, text.batch_size) == ((32, 64) if batch_size is None else (batch_size, batch_size))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # from modules that torch's compiler imports
def test_compile_does_not_change_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured is run as it is: to translate it to C++ as well, which torch tests, takes 20 seconds."""
    from torch._dynamo.testing import CompileCounterWithBackend  # imports for seconds

    compile_module, counter = torch.nn.Module.compile, CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=counter))
    images = np.random.default_rng(0).integers(0, 256, (4, 3), dtype=np.uint8)
    plain, compiled = (TorchGraph(LimitedMemory(8), EncoderSettings(compile=compile_)) for compile_ in (False, True))
    expected = plain({"images": images}, ["double", "sum"])
    assert counter.frame_count == 0
    found = compiled({"images": images}, ["double", "sum"])
    assert counter.frame_count == 1
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


class LogGamma(torch.nn.Module):
    """A module with an operator that ONNX lacks."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": torch.lgamma(x)}


def test_failed_onnx_export_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    example = {"x": np.ones((2, 3), np.float32)}
    export = OnnxExport(module=LogGamma(), example=example, outputs=["y"], dynamic_axes={})
    with pytest.raises(
        ArtifactError, match=r"cannot export the model to ONNX: .*'aten::lgamma'.* is not supported(\. Please .*)?$"
    ):
        export_graph(export, tmp_path / "graph.onnx")
    assert capfd.readouterr() == ("", "")
