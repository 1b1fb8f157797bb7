"""Properties of every export."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.arrays import Inputs
from embedcache.encoders.models import OnnxGraph
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import ArtifactError, PathError, SettingError, UnknownNameError
from embedcache.export.base import check_parity
from embedcache.export.export import export_run
from embedcache.export.settings import ExportSettings
from embedcache.export.towers import _check_exportable
from embedcache.projectors.base import project
from embedcache.projectors.pair import AlignedPair
from embedcache.provenance import write_report_json
from embedcache.runs import PAIR, Run, RunInfo, RunInput
from pipelines.icons.encoders import WORDLLAMA
from tests.crash import call_elsewhere
from tests.edits import edit_record
from tests.export.runs import make_run, make_run_of, tower_input
from tests.hub_server import serve_hub


@pytest.fixture(scope="module")
def run(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    return make_run(path, (tiny["whole"], "cls"), (tiny["bert"], "mean"), "openclip-mlp")


@pytest.fixture
def sounds(tiny: dict[str, str], tmp_path: Path) -> Path:
    """A run of recordings, whose vectors were imported, and texts."""
    text = tower_input("text", tiny["bert"], "mean")
    fingerprint = {**text.fingerprint, "family": "imported", "model": "unknown"}
    audio = RunInput(modality="audio", feature="audio/vector", spec="imported:audio", fingerprint=fingerprint, width=4)
    arguments = {"projector": "linear", "widths": {"audio": 4, "text": text.width}, "shared_width": 2}
    inputs = {"audio": audio, "text": text}
    settings = {"optimizer": {"epochs": 0}, "split": {"kind": "key"}, "seed": 0}
    info = RunInfo(kind=PAIR, arguments=arguments, inputs=inputs, settings=settings, index_digest="rows")
    pair = AlignedPair(**arguments)
    with torch.no_grad():
        pair.tower("audio").mean.fill_(0.1)
    return Run.create(tmp_path / "sounds", info).finish(pair, {}).path


@pytest.mark.slow
def test_card_code_runs_without_embedcache(
    run: Path, tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported the libraries that it uses, but finds no module of embedcache."""
    for form in ("transformers", "sentence-transformers", "open-clip"):
        export_run(form, run, tmp_path / form)
    small = make_run(tmp_path / "small", (tiny["vit"], "cls"), (tiny["bert"], "mean"), "openclip-mlp")
    export_run("onnx", small, tmp_path / "onnx")
    export_run("onnx", small, tmp_path / "towers", towers=True)
    tokens = make_run(tmp_path / "tokens", (tiny["vit"], "patches"), (tiny["bert"], "tokens"), "token")
    export_run("onnx", tokens, tmp_path / "token-onnx")
    names = sorted(path.parent.name for path in tmp_path.glob("*/README.md"))
    assert len(names) == 6
    assert not list(tmp_path.rglob("__pycache__"))

    for module in [name for name in sys.modules if name.partition(".")[0] == "embedcache"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "embedcache", None)
    monkeypatch.chdir(tmp_path)
    for name in names:
        card = (tmp_path / name / "README.md").read_text()
        code = re.search(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
        assert code
        exec(compile(code[1], name, "exec"), {})  # noqa: S102
    assert not [name for name in sys.modules if name.startswith("embedcache.")]


def test_export_is_reproducible(run: Path, tmp_path: Path) -> None:
    for name in ("first", "again"):
        export_run("onnx", run, tmp_path / name)
    for path in (tmp_path / "first").glob("*.onnx"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


WRONG: dict[str, tuple[Callable[[Path, Path], Any], type[Exception], str]] = {
    "full": (lambda run, out: export_run("onnx", run, out.parent), PathError, "empty"),
    "no run": (lambda run, out: export_run("onnx", out.with_name("none"), out), PathError, "train"),
    "no metrics": (lambda run, out: export_run("onnx", run, out, metrics=out / "no.json"), PathError, "no.json"),
    "other metrics": (
        lambda run, out: export_run("onnx", run, out, metrics=out.with_name("other.json")),
        SettingError,
        "metrics",
    ),
    "repository": (lambda run, out: ExportSettings(push_to_hub="name"), SettingError, "OWNER/NAME"),
    "towers": (lambda run, out: export_run("open-clip", run, out, towers=True), SettingError, "towers"),
    "format": (lambda run, out: export_run("tflite", run, out), UnknownNameError, "tflite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_write_nothing(case: str, run: Path, tmp_path: Path) -> None:
    call, error, word = WRONG[case]
    write_report_json(tmp_path / "other.json", {"pretrained": "x/other", "details": {}})
    with pytest.raises(error, match=word):
        call(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.parametrize(
    ("spec", "modality", "preprocessing", "layers", "word"),
    [
        ("open_clip:a", "image", {}, [], "family|open_clip"),
        ("lite:a,fit=448x224", "image", {}, [], "crops"),
        ("lite:a", "image", {"background": "black"}, [], "white"),
        ("lite:a", "image", {}, [1], "layerN"),
        ("st:a", "text", {"prefix": "query: "}, [], "prompt"),
        ("st:a", "text", {"lower": True}, [], "lowercases"),
    ],
)
def test_encoders_that_no_processor_prepares_for_are_refused(
    spec: str, modality: Any, preprocessing: dict[str, Any], layers: list[int], word: str
) -> None:
    with pytest.raises(SettingError, match=word):
        _check_exportable(EncoderSpec.parse(spec), modality, preprocessing, layers, "transformers")


class Own(torch.nn.Module):
    """A projector that is a plug-in."""

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(input_width, output_width)

    def forward(self, vectors_BD: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.linear(vectors_BD)
        return projected


WHOLE, VIT, BERT = "whole/patch_mean", "vit/cls", "bert/mean"
CLIP, ST, TF = "open-clip", "sentence-transformers", "transformers"
UNSUPPORTED: list[tuple[str, str, str, str, type[Exception], str]] = [
    (CLIP, WHOLE, BERT, "linear", SettingError, "its image projector is linear"),
    (CLIP, WHOLE, BERT, "openclip-linear+openclip-mlp-image", SettingError, "its text projector is open"),
    (CLIP, "dino/cls", BERT, "openclip-linear", SettingError, "its image encoder's family is hf: expected timm"),
    (CLIP, WHOLE, "dense/dense", "openclip-linear", SettingError, "its text feature is dense"),
    (CLIP, "mamba/patch_mean", BERT, "openclip-linear", SettingError, "open_clip cannot run its encoders"),
    (CLIP, "whole/layer1.patch_mean", BERT, "openclip-linear", SettingError, "its image feature is layer1.patch_mean"),
    (CLIP, VIT, BERT, "openclip-linear", ArtifactError, "nothing was written"),  # crop_pct 0.95
    (ST, VIT, BERT, "mlp", SettingError, "MlpProjector .* train with --projector linear, identity"),
    (ST, VIT, BERT, "linear+token", SettingError, "TokenProjector"),
    (ST, VIT, "bert/tokens", "linear+token", SettingError, "its text feature is encoder/tokens"),
    (ST, VIT, "bert/layer1.mean", "linear", SettingError, "its text feature is encoder/layer1.mean"),
    (TF, VIT, "wordllama/mean", "linear", SettingError, "expected hf or st"),
    (TF, VIT, "st/mean", f"{__name__}:Own", SettingError, "is a plug-in; use embedcache export onnx"),
    (TF, VIT, "prompted/mean", "mlp", SettingError, "prompt.*use embedcache export onnx"),
]
"""Format, encoder and feature of images and of texts, projector, error and a word of it."""


@pytest.mark.slow
@pytest.mark.parametrize(("form", "image", "text", "projector", "error", "word"), UNSUPPORTED)
def test_unsupported_run_raises(
    form: str,
    image: str,
    text: str,
    projector: str,
    error: type[Exception],
    word: str,
    tiny: dict[str, str],
    tmp_path: Path,
) -> None:
    specs = {**tiny, "wordllama": WORDLLAMA, "prompted": f"{tiny['st']},prompt=query"}
    run = make_run_of(tmp_path / "run", specs, image, text, projector)
    with pytest.raises(error, match=word):
        export_run(form, run, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_failed_parity_writes_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ones = np.ones((2, 4), np.float32) / 2
    assert check_parity("x", ones + 5e-5, ones) == pytest.approx(5e-5, rel=0.1)
    for vectors in (ones + 2e-4, ones * np.nan):
        with pytest.raises(ArtifactError, match="differ"):
            check_parity("x", vectors, ones)
    from embedcache.export import onnx

    monkeypatch.setattr(onnx, "project", lambda *_: np.zeros((1, 16), np.float32))
    with pytest.raises(ArtifactError, match="nothing was written"):
        export_run("onnx", run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_card_content(run: Path, tiny: dict[str, str], tmp_path: Path) -> None:
    """A card may become public: it names files without their folders."""
    chance = {"r@1": 0.01, "intervals": {"r@1": [0.1, 0.2]}}
    own = {
        "dataset": "birds", "task": "zeroshot_retrieval", "pretrained": "x/copy,x/seed-1",
        "details": {"i2t": {**chance, "r@1": 0.15}, "chance": {"i2t": chance}, "seeds": [5, 6]},
    }  # fmt: skip
    other = {**own, "pretrained": "x/other", "details": {"i2t": {**chance, "r@1": 0.75}}}
    write_report_json(tmp_path / "metrics.json", [other, own])
    training = {
        "loss": {"name": "siglip", "widths": [16, 8, 4]}, "optimizer": {"epochs": 3}, "seed": 5,
        "split": {"kind": "/home/me/study/split.parquet"}, "selection": "/home/me/chosen.parquet",
    }  # fmt: skip
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    report = {"best_epoch": 2, "num_samples": {"train": 4110, "val": 58, "test": 1310}}
    encoder = shutil.copytree(tiny["bert"].removeprefix("hf:"), tmp_path / "bert")
    (Path(encoder) / "README.md").write_text("---\nlicense: mit\n---\n")
    inputs = json.loads((copy / "run.json").read_text())["inputs"]
    inputs["text"]["spec"] = f"hf:{encoder}"
    edit_record(copy / "run.json", settings=training, report=report, inputs=inputs)
    export_run("sentence-transformers", copy, tmp_path / "out", metrics=tmp_path / "metrics.json")
    card = (tmp_path / "out" / "README.md").read_text()
    from huggingface_hub import ModelCard  # here: it reads the environment, which the uploading process changes

    data = ModelCard(card).data
    assert (data.library_name, data.license) == ("sentence-transformers", "mit")
    assert data.tags == ["embedcache", "image-text-retrieval"]
    for words in (
        "| i2t r@1 | 0.15 | [0.1, 0.2] |",
        "| text | `hf:bert` | `mean` | mit | yes |",
        "`split.parquet`",
        "`chosen.parquet`",
        "truncate_dim=4",
    ):
        assert words in card
    assert "0.75" not in card
    assert "/home/me" not in card
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.stat().st_mode == (tmp_path / "out" / "README.md").stat().st_mode


@pytest.mark.slow
def test_run_of_other_modalities(sounds: Path, tmp_path: Path) -> None:
    for form, towers in (("open-clip", False), ("transformers", False), ("onnx", True)):
        with pytest.raises(SettingError, match="expected a run of image and text, got one of audio and text; use"):
            export_run(form, sounds, tmp_path / "out", towers=towers)
    features = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = project(Run.open(sounds).pair.tower("audio"), Inputs(features))
    export_run("onnx", sounds, tmp_path / "onnx")
    graph = OnnxGraph(tmp_path / "onnx/audio_projector.onnx")
    np.testing.assert_allclose(graph({"features": features}, ["embeds"])["embeds"], expected, atol=1e-6)
    assert export_run("sentence-transformers", sounds, tmp_path / "model").differences["text"] < 1e-5


def push_both(run: Path, folder: Path) -> tuple[str | None, str]:
    """Upload an export to a repository that takes it and to one that refuses; return the URL and the error."""
    url = export_run("onnx", run, folder / "pair", push_to_hub="me/pair").url
    with pytest.raises(PathError) as refused:
        export_run("onnx", run, folder / "closed", push_to_hub="me/closed")
    return url, str(refused.value)


@pytest.mark.slow
def test_push_to_hub(run: Path, tmp_path: Path) -> None:
    with serve_hub() as hub:
        pushed, refused = call_elsewhere(push_both, run, tmp_path, environment=hub.environment())
    assert pushed is not None
    assert pushed.endswith("/me/pair")
    assert hub.created[0]["name"] == "pair"
    assert hub.created[0].get("private") is True or hub.created[0]["visibility"] == "private"
    assert [repository for repository, _ in hub.commits] == ["me/pair"]
    assert {"README.md", "image_projector.onnx", "text_projector.onnx"} <= set(hub.repositories["me/pair"])
    assert re.search(r"cannot upload to me/closed: .*the export is in .*closed: run `hf auth login`", refused)
    assert (tmp_path / "closed" / "image_projector.onnx").is_file()
