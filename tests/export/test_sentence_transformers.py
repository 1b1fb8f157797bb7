"""Export of the text tower for sentence-transformers."""

from pathlib import Path

import numpy as np
import pytest

from embedcache.export.base import TEXTS, TOLERANCE, embed_examples
from embedcache.export.export import export_run
from embedcache.runs import Run
from tests.export.runs import make_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("text", "feature", "projector", "kinds"),
    [
        ("st", "mean", "linear", "TPNDN"),
        ("bert", "cls", "linear+identity", "TPNDN"),
        ("dense", "dense", "linear+sharelock:hidden=64", "TPDNDDDDN"),
        ("dense", "cls", "linear", "TPNDN"),
        ("bert", "mean", "openclip-mlp", "TPDDN"),
        ("bert", "mean", "openclip-linear", "TPDN"),
    ],
)
def test_matches_the_run(
    text: str,
    feature: str,
    projector: str,
    kinds: str,
    tiny: dict[str, str],
    tmp_path: Path,
) -> None:
    from sentence_transformers import SentenceTransformer

    width = 32 if "identity" in projector else 16
    run = make_run(tmp_path / "run", (tiny["vit"], "cls"), (tiny[text], feature), projector, width=width)
    report = export_run("sentence-transformers", run, tmp_path / "model")
    assert report.differences["text"] < TOLERANCE
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert "".join(type(module).__name__[0] for module in model) == kinds
    np.testing.assert_allclose(model.encode(list(TEXTS)), embed_examples(Run.open(run), "text"), atol=TOLERANCE)
