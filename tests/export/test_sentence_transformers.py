"""Export of the text tower for sentence-transformers."""

from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import SettingError
from embedcache.export.base import TEXTS, TOLERANCE, ExportRun
from embedcache.export.export import export_run
from embedcache.provenance import read_json
from tests.export.runs import follow_error, make_run

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
    np.testing.assert_allclose(model.encode(list(TEXTS)), ExportRun.open(run).embed_examples("text"), atol=TOLERANCE)


def test_is_written_as_versions_before_5_4_read_it(tiny: dict[str, str], tmp_path: Path) -> None:
    """They have no `sentence_transformers.base`, and modules of theirs take no other settings."""
    run = make_run(tmp_path / "run", (tiny["vit"], "cls"), (tiny["dense"], "cls"), "linear")
    export_run("sentence-transformers", run, tmp_path / "model")
    modules = read_json(tmp_path / "model" / "modules.json")
    kinds = ["Transformer", "Pooling", "Normalize", "Dense", "Normalize"]
    assert [module["type"] for module in modules] == [f"sentence_transformers.models.{kind}" for kind in kinds]
    pooling, dense = (read_json(tmp_path / "model" / module["path"] / "config.json") for module in modules[1:4:2])
    assert pooling.pop("word_embedding_dimension") == 32
    assert [name for name, value in pooling.items() if value] == ["pooling_mode_cls_token", "include_prompt"]
    assert sorted(dense) == ["activation_function", "bias", "in_features", "out_features"]
    limits = read_json(tmp_path / "model" / "sentence_bert_config.json")
    assert limits == {"max_seq_length": 20, "do_lower_case": False}


@pytest.mark.parametrize(
    ("feature", "projector", "words"),
    [
        ("mean", "mlp", "MlpProjector adds a linear branch to a branch with layer normalization"),
        ("mean", "glu", "GluProjector multiplies two branches"),
        ("mean", "fusemix", "FuseMixProjector has residual blocks"),
        ("mean", "asif", "AsifProjector keeps the largest of its cosines"),
        ("mean", "linear+token", "TokenProjector maps every token"),
        ("tokens", "linear+token", "its text feature is encoder/tokens"),
        ("layer1.mean", "linear", "its text feature is encoder/layer1.mean"),
    ],
)
def test_unsupported_run_raises(feature: str, projector: str, words: str, tiny: dict[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (tiny["vit"], "cls"), (tiny["bert"], feature), projector)
    with pytest.raises(SettingError, match=words):
        export_run("sentence-transformers", run, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("format_name", ["transformers", "sentence-transformers"])
def test_errors_name_a_format_that_supports_the_run(format_name: str, tiny: dict[str, str], tmp_path: Path) -> None:
    """Neither format holds a prompt, and no other projector helps."""
    text = f"{tiny['st']},prompt=query"
    run = make_run(tmp_path / "run", (tiny["vit"], "cls"), (text, "mean"), "mlp")
    assert "prompt" in follow_error(format_name, run, tmp_path / "model")


def test_error_names_projectors_that_help(tiny: dict[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (tiny["vit"], "cls"), (tiny["bert"], "mean"), "mlp")
    error = follow_error("sentence-transformers", run, tmp_path / "model")
    assert "train with --projector linear, identity, sharelock, openclip-linear or openclip-mlp on a vector" in error
