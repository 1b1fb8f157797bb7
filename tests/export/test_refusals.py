"""Runs that a form of export cannot express: each is refused in one line, and nothing is written."""

from pathlib import Path

import pytest
import torch

from embedcache.errors import ArtifactError, SettingError
from embedcache.export.export import export_run
from pipelines.icons.encoders import WORDLLAMA
from tests.export.runs import make_run

pytestmark = pytest.mark.slow


class Unknown(torch.nn.Module):
    """A projector of a plug-in, with an operator that ONNX lacks."""

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(input_width, output_width)

    def forward(self, vectors_BD: torch.Tensor) -> torch.Tensor:
        return torch.lgamma(self.linear(vectors_BD))


OWN = f"linear+{__name__}:Unknown"
WHOLE = ("whole", "patch_mean")
BERT = ("bert", "mean")
REFUSED = [
    ("onnx", ("vit", "cls"), BERT, OWN, "aten::lgamma"),
    ("sentence-transformers", ("vit", "cls"), BERT, "mlp", "MlpProjector"),
    ("sentence-transformers", ("vit", "cls"), BERT, "linear+token", "TokenProjector"),
    ("sentence-transformers", ("vit", "cls"), ("bert", "tokens"), "linear+token", "encoder/tokens"),
    ("sentence-transformers", ("vit", "cls"), ("bert", "layer1.mean"), "linear", "layer1.mean"),
    ("open-clip", WHOLE, BERT, "linear", "its image projector is linear"),
    ("open-clip", WHOLE, BERT, "openclip-linear+openclip-mlp-image", "its text projector is open"),
    ("open-clip", ("dino", "cls"), BERT, "openclip-linear", "expected timm"),
    ("open-clip", WHOLE, ("dense", "dense"), "openclip-linear", "its text feature is dense"),
    ("open-clip", ("mamba", "patch_mean"), BERT, "openclip-linear", "cannot run its encoders"),
    ("open-clip", ("whole", "layer1.patch_mean"), BERT, "openclip-linear", "layer1.patch_mean"),
    ("open-clip", ("vit", "cls"), BERT, "openclip-linear", "nothing was written"),  # crop_pct 0.95
    ("transformers", ("vit", "cls"), ("wordllama", "mean"), "linear", "expected hf or st"),
    ("transformers", ("vit", "cls"), BERT, OWN, "plug-in"),
    ("transformers", ("vit", "cls"), ("prompted", "mean"), "mlp", "prompt"),
]


@pytest.mark.parametrize(("form", "image", "text", "projector", "word"), REFUSED)
def test_unsupported_run_writes_nothing(
    form: str,
    image: tuple[str, str],
    text: tuple[str, str],
    projector: str,
    word: str,
    tiny: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    specs = {**tiny, "prompted": f"{tiny['st']},prompt=query", "wordllama": WORDLLAMA}
    run = make_run(tmp_path / "run", (specs[image[0]], image[1]), (specs[text[0]], text[1]), projector)
    capfd.readouterr()
    with pytest.raises((SettingError, ArtifactError), match=word):
        export_run(form, run, tmp_path / "model")
    assert "graph" not in "".join(capfd.readouterr())  # torch's exporter is quiet
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
