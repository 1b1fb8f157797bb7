"""Export to ONNX graphs."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from embedcache.errors import SettingError
from embedcache.export.base import TOLERANCE
from embedcache.export.export import export_run
from embedcache.export.settings import ExportSettings
from tests.export.runs import make_run

pytestmark = pytest.mark.slow

VECTORS = (
    "linear+identity",
    "mlp",
    "glu",
    "fusemix",
    "linear+sharelock:hidden=64",
    "asif",
    "openclip-linear",
    "openclip-mlp",
)
TOKENS = ("token", "cls_token", "token_mlp")


@pytest.mark.parametrize("projector", [*VECTORS, *TOKENS])
def test_projectors_match_the_run(projector: str, tiny: dict[str, str], tmp_path: Path) -> None:
    image, text = ("cls+patches", "tokens") if projector in TOKENS else ("cls", "mean")
    width = 32 if "identity" in projector else 16
    run = make_run(tmp_path / "run", (tiny["vit"], image), (tiny["bert"], text), projector, width=width)
    report = export_run("onnx", run, tmp_path / "model")
    assert set(report.differences) == {"image", "text"}
    assert max(report.differences.values()) < TOLERANCE
    graph = onnx.load(tmp_path / "model" / "text_projector.onnx")
    assert graph.opset_import[0].version >= 17
    about = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(about["fingerprint"])["family"] == "hf"


class Unknown(torch.nn.Module):
    """A projector with an operator that ONNX lacks."""

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(input_width, output_width)

    def forward(self, vectors_BD: torch.Tensor) -> torch.Tensor:
        return torch.lgamma(self.linear(vectors_BD))


def test_unknown_operator_is_refused(tiny: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", (tiny["vit"], "cls"), (tiny["bert"], "mean"), f"linear+{__name__}:Unknown")
    capfd.readouterr()
    words = r"this run: text projector: cannot export .*'aten::lgamma'.*; embedcache.load applies it"
    with pytest.raises(SettingError, match=words):
        export_run("onnx", run, tmp_path / "model")
    assert "graph" not in "".join(capfd.readouterr())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("image", ["vit", "dino"])
def test_towers_match_the_run(image: str, tiny: dict[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (tiny[image], "cls"), (tiny["st"], "mean"))
    report = export_run("onnx", run, tmp_path / "model", ExportSettings(towers=True))
    assert max(report.differences.values()) < TOLERANCE
    session = onnxruntime.InferenceSession(tmp_path / "model" / "text.onnx")
    ids = np.array([[2, 5, 7, 3, 0], [2, 5, 3, 0, 0]])
    vectors = session.run(None, {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)})[0]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
