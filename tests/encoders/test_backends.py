"""Running a model on torch: out of memory, batch size, compilation; and its export to ONNX."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.models import OnnxExport, TorchGraph, export_graph
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
    first, *others = graph._module.calls
    assert first == num_rows
    assert others.count(num_rows) <= 1, "the smaller size is kept"


def test_out_of_memory_for_one_item_raises() -> None:
    with pytest.raises(SettingError, match="memory of cpu is too small for one item; use precision bfloat16"):
        TorchGraph(LimitedMemory(max_rows=0), EncoderSettings())({"images": np.zeros((3, 3), np.uint8)}, ["sum"])


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
