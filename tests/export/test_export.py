"""Properties of every export."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.arrays import Inputs
from embedcache.encoders.models import OnnxGraph
from embedcache.errors import ArtifactError, PathError, SettingError, UnknownNameError
from embedcache.export.base import ExportNotes, ExportRun, check_parity
from embedcache.export.card import _metrics, _weights_line, write_card
from embedcache.export.export import export_run
from embedcache.export.settings import ExportSettings
from embedcache.outputs import write_report_json
from embedcache.projectors.base import project
from embedcache.projectors.pair import AlignedPair
from embedcache.runs import PAIR, Run, RunInfo, RunInput
from embedcache.settings import replace_fields
from tests.crash import call_elsewhere
from tests.edits import edit_record
from tests.export.runs import make_run, tower_input
from tests.hub_server import serve_hub


@pytest.fixture(scope="module")
def run(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    return make_run(path, (tiny["whole"], "cls"), (tiny["bert"], "mean"), "openclip-mlp")


@pytest.mark.slow
def test_card_code_runs_without_embedcache(
    run: Path, tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported the libraries that it uses, but finds no module of embedcache."""
    for form in ("transformers", "sentence-transformers", "open-clip"):
        export_run(form, run, tmp_path / form)
    small = make_run(tmp_path / "small", (tiny["vit"], "cls"), (tiny["bert"], "mean"), "openclip-mlp")
    export_run("onnx", small, tmp_path / "onnx")
    export_run("onnx", small, tmp_path / "towers", ExportSettings(towers=True))
    tokens = make_run(tmp_path / "tokens", (tiny["vit"], "patches"), (tiny["bert"], "tokens"), "token")
    export_run("onnx", tokens, tmp_path / "token-onnx")
    names = sorted(path.parent.name for path in tmp_path.glob("*/README.md"))
    assert len(names) == 6
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


def test_invalid_input_raises(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for path in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(PathError, match="expected a new or empty folder"):
            export_run("onnx", run, path)
    with pytest.raises(PathError, match=r"does not exist; make one with: embedcache train"):
        export_run("onnx", tmp_path / "none", tmp_path / "out")
    with pytest.raises(PathError, match=r"metrics.json does not exist"):
        export_run("onnx", run, tmp_path / "out", ExportSettings(metrics=tmp_path / "metrics.json"))
    with pytest.raises(SettingError, match="push_to_hub: expected OWNER/NAME"):
        ExportSettings(push_to_hub="name")
    with pytest.raises(SettingError, match="towers: expected false for the open-clip format"):
        export_run("open-clip", run, tmp_path / "out", ExportSettings(towers=True))
    with pytest.raises(UnknownNameError, match="unknown export format 'tflite'"):
        export_run("tflite", run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_failed_parity_writes_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ones = np.ones((2, 4), np.float32) / 2
    assert check_parity("x", ones + 5e-5, ones) == pytest.approx(5e-5, rel=0.1)
    for found in (ones + 2e-4, ones * np.nan):
        with pytest.raises(ArtifactError, match="x: expected vectors that differ"):
            check_parity("x", found, ones)
    from embedcache.export import onnx

    monkeypatch.setattr(onnx, "project", lambda *_: np.zeros((1, 16), np.float32))
    with pytest.raises(ArtifactError, match="nothing was written"):
        export_run("onnx", run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_card_content(run: Path, tmp_path: Path) -> None:
    chance = {"r@1": 0.01, "intervals": {"r@1": [0.1, 0.2]}}
    metrics = {
        "dataset": "birds", "task": "zeroshot_retrieval", "metrics": {"image_retrieval_recall@5": 0.5},
        "details": {"i2t": {**chance, "r@1": 0.15}, "chance": {"i2t": chance}},
    }  # fmt: skip
    write_report_json(tmp_path / "metrics.json", metrics)
    export_run("onnx", run, tmp_path / "out", ExportSettings(metrics=tmp_path / "metrics.json"))
    card = (tmp_path / "out" / "README.md").read_text()
    from huggingface_hub import ModelCard  # here: it reads the environment, which the uploading process changes

    data = ModelCard(card).data
    assert (data.library_name, data.license, data.tags) == ("onnx", "other", ["embedcache", "image-text-retrieval"])
    for words in (
        "| i2t r@1 | 0.15 | [0.1, 0.2] |",
        "| chance i2t r@1 | 0.01 | [0.1, 0.2] |",
        "| image_retrieval_recall@5 | 0.5 | |",
        "| text | `hf:bert` | `mean` | unknown: ask its authors | no |",
        "`zeroshot_retrieval` on `birds`",
        "selection: none, all samples of the training part",
    ):
        assert words in card
    weights = tmp_path / "out" / "image_projector.onnx"
    assert weights.stat().st_mode == (tmp_path / "out" / "README.md").stat().st_mode


@pytest.mark.parametrize(
    ("epochs", "best_epoch", "expected"),
    [
        (3, 2, "- loss `siglip`, 3 epochs; weights of epoch 2; seed 5"),
        (
            3,
            0,
            "- weights: the initialization (`cca`); loss `siglip`, 3 epochs, none of which was better",
        ),
        (0, 0, "- weights: the initialization (`cca`), without training; seed 5"),
    ],
)
def test_card_states_where_the_weights_come_from(
    run: Path, epochs: int, best_epoch: int, expected: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    training = {
        "model": {"initialization": "cca"},
        "loss": {"name": "siglip"},
        "optimizer": {"epochs": epochs},
        "seed": 5,
        "split": {},
    }
    edit_record(copy / "run.json", settings=training, report={"best_epoch": best_epoch})
    export_run("onnx", copy, tmp_path / "out")
    assert expected in (tmp_path / "out" / "README.md").read_text()


def test_card_states_the_split_without_folders(run: Path, tmp_path: Path) -> None:
    """A card may become public: it counts what was held out, and names files without their folders."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    split = {"kind": "/home/me/study/split.parquet", "val_fraction": 0.1, "test_fraction": 0.25}
    training = {"split": split, "selection": "/home/me/chosen.parquet", "optimizer": {"epochs": 3}, "seed": 0}
    report = {"num_samples": {"train": 4110, "val": 58, "test": 1310}}
    edit_record(copy / "run.json", settings=training, report=report)
    export_run("onnx", copy, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- held out: split of the file `split.parquet`, 58 for validation, 1,310 for test\n" in card
    assert "- selection: `chosen.parquet`\n" in card
    assert "/home/me" not in card


@pytest.fixture
def sounds(tiny: dict[str, str], tmp_path: Path) -> Path:
    """A run of recordings, whose vectors were imported, and texts."""
    text, path = tower_input("text", tiny["bert"], "mean"), tmp_path / "sounds"
    fingerprint = {**text.fingerprint, "family": "imported", "model": "unknown"}
    audio = RunInput(modality="audio", feature="audio/vector", spec="imported:audio", fingerprint=fingerprint, width=4)
    arguments = {"projector": "linear", "widths": {"audio": 4, "text": text.width}, "shared_width": 2}
    info = RunInfo(kind=PAIR, arguments=arguments, inputs={"audio": audio, "text": text}, index_digest="rows")
    pair = AlignedPair(**arguments)
    with torch.no_grad():
        pair.tower("audio").mean.fill_(0.1)
    return Run.create(path, info).finish(pair, {}).path


def test_run_of_other_modalities(sounds: Path, tmp_path: Path) -> None:
    for form in ("open-clip", "transformers"):
        with pytest.raises(SettingError, match="expected a run of image and text, got one of audio and text; use"):
            export_run(form, sounds, tmp_path / "out")
    with pytest.raises(SettingError, match="onnx format does not support this run: expected a run of image and text"):
        export_run("onnx", sounds, tmp_path / "out", towers=True)
    features = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = project(ExportRun.open(sounds).pair.tower("audio"), Inputs(features))
    export_run("onnx", sounds, tmp_path / "onnx")
    graph = OnnxGraph(tmp_path / "onnx/audio_projector.onnx")
    np.testing.assert_allclose(graph({"features": features}, ["embeds"])["embeds"], expected, atol=1e-6)
    card = (tmp_path / "onnx/README.md").read_text()
    assert "- audio-text-retrieval\n" in card
    assert "| audio | `imported:unknown` | `vector` |" in card
    assert "for modality in ('audio', 'text'):" in card


@pytest.mark.slow
def test_texts_of_recordings_for_sentence_transformers(sounds: Path, tmp_path: Path) -> None:
    report = export_run("sentence-transformers", sounds, tmp_path / "model")
    assert report.differences["text"] < 1e-5


@pytest.mark.parametrize("shorten", ["encode(…, truncate_dim={width})", None])
def test_card_states_widths(shorten: str | None, run: Path, tmp_path: Path) -> None:
    opened, path = ExportRun.open(run), tmp_path / "README.md"
    notes = ExportNotes(library="x", task=None, code="", requirements=(), shorten=shorten)
    write_card(path, opened, notes, "x", None)
    assert "Matryoshka" not in path.read_text()
    settings = {**opened.trained.info.settings, "loss": {"name": "info_nce", "widths": [16, 8, 4]}}
    trained = replace(opened.trained, info=replace_fields(opened.trained.info, settings=settings))
    write_card(path, replace(opened, trained=trained), notes, "x", None)
    assert "trained at the widths 4, 8 as well" in path.read_text()
    code = ": `encode(…, truncate_dim=4)`" if shorten else ""
    assert f"are vectors of that width{code}.\n" in path.read_text()


@pytest.mark.slow
def test_card_names_the_default_initialization(tiny: dict[str, str], tmp_path: Path) -> None:
    """A config has no name where none was given."""
    glu = make_run(tmp_path / "glu", (tiny["vit"], "cls"), (tiny["bert"], "mean"), "glu")
    mlp = make_run(tmp_path / "mlp", (tiny["vit"], "cls"), (tiny["bert"], "mean"), "mlp")
    for path, name in ((glu, "random"), (mlp, "cca")):
        training = {"model": {"initialization": None}, "optimizer": {"epochs": 3}, "split": {}, "seed": 0}
        edit_record(path / "run.json", settings=training)
        assert _weights_line(ExportRun.open(path), 0).startswith(f"weights: the initialization (`{name}`); ")


def test_card_has_metrics_of_its_own_recipe_only(run: Path) -> None:
    def report(runs: str, value: float, seeds: list[int]) -> dict[str, Any]:
        by_seed = [value + seed / 100 for seed in seeds]
        return {
            "dataset": "birds", "task": "zeroshot_retrieval", "pretrained": runs,
            "metrics": {"image_retrieval_recall@5": value}, "details": {"seeds": seeds, "recall_by_seed": by_seed},
        }  # fmt: skip

    opened = ExportRun.open(run)
    own, other = report(f"x/{run.name},x/seed-1", 0.5, [0, 1]), report("x/other", 0.7, [0])
    first = {**other, "details": {**other["details"], "others": {"mine": own}}}
    for metrics in ([other, own], first):
        text = _metrics(metrics, opened)
        assert "0.5" in text
        assert "0.7" not in text
        assert (
            "Means over the seeds 0, 1 of one recipe; this is seed 0, whose own mean recall or accuracy is 0.5." in text
        )
    assert "contains no metrics of this run" in _metrics(other, opened)


@pytest.mark.parametrize(
    "report",
    [
        {"task": "mine"}, {"details": None}, {"details": {"others": [1]}}, {"details": {"seeds": None}},
        {"details": {"seeds": [0, 1], "recall_by_seed": 0.5}}, {"details": {"seeds": [0, 1], "recall_by_seed": [0.5]}},
        {"details": {"intervals": {"recall": 0.5}, "recall": 0.5}},
    ],
    ids=str,
)  # fmt: skip
def test_card_of_other_json(report: dict[str, Any], run: Path) -> None:
    """A file of metrics that embedcache did not write may have any values under the names that embedcache reads."""
    text = _metrics({**report, "metrics": {"recall@5": 0.25}}, ExportRun.open(run))
    assert "| recall@5 | 0.25 | |" in text
    assert "whose own mean" not in text


def push_both(run: Path, folder: Path) -> tuple[str | None, str]:
    """Upload an export to a repository that takes it and to one that refuses; return the URL and the error."""
    url = export_run("onnx", run, folder / "pair", ExportSettings(push_to_hub="me/pair")).url
    with pytest.raises(PathError) as refused:
        export_run("onnx", run, folder / "closed", ExportSettings(push_to_hub="me/closed"))
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
    assert f"`hf upload me/closed {tmp_path / 'closed'}`" in refused
    assert (tmp_path / "closed" / "image_projector.onnx").is_file()
