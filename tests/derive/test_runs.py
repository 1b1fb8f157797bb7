"""Outputs of a trained run as features."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from embedcache.dataset.inputs import open_input
from embedcache.derive.derive import derive_from_run
from embedcache.derive.rules import Block, Output
from embedcache.encoders.base import ItemShape
from embedcache.errors import FingerprintError, PathError, SettingError, UnknownNameError
from embedcache.evaluate.runs import load_runs
from embedcache.export.base import check_plain
from embedcache.extract.extract import extract
from embedcache.extract.repair import measure_drift, verify_cache
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.inference import load
from embedcache.projectors.modules import ModuleConfig, ModuleInput, save_module
from embedcache.projectors.saved import config_path, read_config
from embedcache.registry import trust_files
from embedcache.search.vectors import Vectors
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.cli.run import embedcache, succeed
from tests.edits import edit_record
from tests.extract.cases import tree
from tests.images import COLORS
from tests.toy import TEXT
from tests.train.runs import run as train

NAMES = sorted(COLORS)


@pytest.fixture(scope="module")
def work(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on vectors, a run on tokens, and prompts. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    train(cache_path, folder / "vectors")
    train(cache_path, folder / "tokens", image="open_toy/patches", text="open_toy/tokens", projector="token")
    (folder / "names.txt").write_text("\n".join(NAMES))
    (folder / "templates.txt").write_text("bar left on {c}\nbar top on {c}\n")
    source = open_source(f"prompts:{folder / 'names.txt'}+{folder / 'templates.txt'}")
    extract(source, folder / "prompts", text_encoder=[TEXT], settings=ExtractSettings(features=("mean",)))
    return folder


@pytest.fixture
def cache(cache_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache_path, tmp_path / "c"))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["vectors", "tokens"])
def test_projected_vectors_are_those_of_the_run(cache: Path, work: Path, run: str) -> None:
    reports = derive_from_run(cache, work / run, dtype="float32")
    assert [report.line() for report in reports] == [
        f"{run}-projected (projected): derived 300 images, reused 0, failed 0",
        f"{run}-projected (projected): derived 300 texts, reused 0, failed 0",
    ]
    for modality in ("image", "text"):
        vectors = Vectors(cache, modality, run_path=work / run)
        found = Cache(cache).feature(modality, f"{run}-projected").load()
        np.testing.assert_allclose(found, vectors.read(np.arange(300)), atol=1e-6)
    assert not any(drift.is_bad for drift in measure_drift(Cache(cache), 0.1))


@pytest.mark.slow
def test_prob_is_zero_shot_classification(cache: Path, work: Path) -> None:
    (report,) = derive_from_run(cache, work / "vectors", "prob", prompts=work / "prompts", dtype="float32")
    feature = Cache(cache).feature("image", "vectors-prob/prob")
    assert report.features == ["prob"]
    assert feature.shape == (300, len(NAMES))
    assert feature.fingerprint["preprocessing"]["classes"] == NAMES
    found = feature.load()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    (run,), model = load_runs(work / "vectors"), load(work / "vectors")
    prompts = [f"bar {place} on {name}" for name in NAMES for place in ("left", "top")]
    classes = model.encode_text(prompts).reshape(len(NAMES), 2, -1).sum(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    scores = model.scale * Vectors(cache, "image", run_path=work / "vectors").read(np.arange(300)) @ classes.T
    exponents = np.exp(scores)
    np.testing.assert_allclose(found, exponents / exponents.sum(axis=1, keepdims=True), atol=1e-3)
    assert run.pair.scale.item() == model.scale


@pytest.mark.slow
def test_train_on_projected_features(cache: Path, work: Path, tmp_path: Path) -> None:
    derive_from_run(cache, work / "vectors")
    name = "vectors-projected/projected"
    report = train(cache, tmp_path / "second", image=name, text=name)
    assert report.best_epoch is not None
    with pytest.raises(SettingError, match="the onnx format .*run: the feature vectors-projected/projected is derived"):
        check_plain(read_config(tmp_path / "second").tower_input("image"), "onnx")
    with pytest.raises(SettingError, match="^features of derived:run are derived from other features, so"):
        load(tmp_path / "second").encode_image([])


@pytest.mark.slow
def test_damaged_prob_is_repaired(cache: Path, work: Path) -> None:
    derive_from_run(cache, work / "vectors", "prob", prompts=work / "prompts")
    whole = tree(cache)
    path = cache / "image/vectors-prob/prob/c/1/0"
    path.write_bytes(b"x" * path.stat().st_size)
    report = verify_cache(cache, VerifySettings(repair=True))
    (line,) = report.repaired
    assert line.startswith("vectors-prob (prob): derived ")
    assert tree(cache) == whole


@pytest.mark.slow
def test_repair_without_or_with_another_run_raises(cache: Path, work: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(work / "vectors", tmp_path / "run"))
    derive_from_run(cache, run, modality="image")
    path = cache / "image/run-projected/projected/c/1/0"
    path.write_bytes(b"x" * path.stat().st_size)
    shutil.rmtree(run)
    with pytest.raises(PathError, match="run"):
        verify_cache(cache, VerifySettings(repair=True))
    train(cache, run, seed=1)
    with pytest.raises(FingerprintError, match="derived feature 'run-projected'.*weights: stored"):
        verify_cache(cache, VerifySettings(repair=True))


@pytest.mark.parametrize(
    ("words", "options", "error", "word"),
    [
        (("projekted",), {}, UnknownNameError, "projected"),
        (("prob",), {}, SettingError, "--prompts"),
        ((), {"modality": "audio"}, UnknownNameError, "audio"),
    ],
)
def test_refusals(
    cache: Path, work: Path, words: tuple[str, ...], options: dict[str, Any], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        derive_from_run(cache, work / "vectors", *words, **options)


def test_run_on_another_encoder_is_refused(cache: Path, work: Path, tmp_path: Path) -> None:
    other = shutil.copytree(work / "vectors", tmp_path / "other")
    sides = json.loads(config_path(other).read_text())["sides"]
    sides["image"]["fingerprint"]["weights"] = "other"
    edit_record(config_path(other), sides=sides)
    with pytest.raises(FingerprintError, match="the cache's open_toy/cls comes from another encoder"):
        derive_from_run(cache, other)


class Doubler(nn.Module):
    """A module with two outputs, one for tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((width,), 2.0))

    def output_shapes(self, shapes: Sequence[ItemShape]) -> Mapping[str, ItemShape]:
        return {"states": shapes[0], "sum": shapes[0][-1:]}

    def compute_outputs(self, inputs: Sequence[Block], names: Sequence[str]) -> Mapping[str, Output]:
        states = inputs[0].with_rows((torch.from_numpy(inputs[0].rows()) * self.factor).numpy())
        sums = [item.sum(axis=0) for item in states.items()]
        return {"states": states, "sum": sums} if "sum" in names else {"states": states}


def write_module_run(cache: Path, run: Path, kind: str = "tests.derive.test_runs:Doubler") -> Path:
    """Write a run of a module on the tokens of a cache."""
    feature = open_input(Cache(cache), "text", "open_toy/tokens")
    side = ModuleInput(
        modality="text", feature=feature.name, spec=feature.spec, fingerprint=feature.fingerprint, width=feature.width
    )
    run.mkdir()
    module = Doubler(feature.width)
    save_module(run, module, ModuleConfig(kind=kind, arguments={"width": feature.width}, sides={"text": side}))
    return run


@pytest.mark.slow
def test_outputs_of_a_module(cache: Path, tmp_path: Path) -> None:
    run = write_module_run(cache, tmp_path / "run")
    for output in ("states", "sum"):
        (report,) = derive_from_run(cache, run, output)
        assert report.line() == f"run-{output} ({output}): derived 300 texts, reused 0, failed 0"
    rows = np.arange(300)
    tokens = Cache(cache).feature("text", "open_toy/tokens").gather_tokens(rows)
    states = Cache(cache).feature("text", "run-states").gather_tokens(rows)
    np.testing.assert_allclose(np.concatenate(states), 2 * np.concatenate(tokens), rtol=1e-3)
    sums = Cache(cache).feature("text", "run-sum").gather(rows)
    np.testing.assert_allclose(sums, [2 * item.sum(axis=0, dtype=np.float32) for item in tokens], rtol=2e-3)
    whole = tree(cache)
    path = cache / "text/run-sum/sum/c/1/0"
    path.write_bytes(b"x" * path.stat().st_size)
    assert verify_cache(cache, VerifySettings(repair=True)).is_sound
    assert tree(cache) == whole


def test_module_refusals(cache: Path, tmp_path: Path) -> None:
    run = write_module_run(cache, tmp_path / "run")
    with pytest.raises(UnknownNameError, match="unknown output 'prob' of the run .*; known: states, sum"):
        derive_from_run(cache, run, "prob")
    with pytest.raises(SettingError, match="modality: expected none for a run of .*Doubler, got image"):
        derive_from_run(cache, run, "sum", modality="image")
    other = write_module_run(cache, tmp_path / "other", kind="torch.nn:Identity")
    edit_record(config_path(other), kind="no_such_module:Kind")
    with trust_files(), pytest.raises(UnknownNameError, match="no_such_module"):
        derive_from_run(cache, other, "sum")


@pytest.mark.slow
def test_command_line(cache: Path, work: Path, tmp_path: Path) -> None:
    out = succeed("derive", cache, "--run", work / "vectors", "--modality", "image", "--name", "one", cwd=tmp_path)
    assert out == "one (projected): derived 300 images, reused 0, failed 0\n"
    words = ("derive", cache, "--rule", "pca", "--input", "image=one/projected", "--parameter", "width=3")
    (report,) = json.loads(succeed(*words, "--json", cwd=tmp_path))
    assert (report["encoder"], report["features"], report["computed"]) == ("pca", ["pca"], 300)
    assert "reused 300" in succeed(*words, cwd=tmp_path)
    refused = embedcache(*words, "--parameter", "whiten=true", cwd=tmp_path)
    assert refused.code == 1
    assert "preprocessing.whiten: stored False, requested True" in refused.stderr
    for more, message in (
        ((), "--rule: expected either --run or --rule, got neither"),
        (("--rule", "mean", "--run-output", "prob"), "--run-output: expected with --run only; omit it"),
        (("--rule", "mean", "--prompts", "p"), "--prompts: expected with --run only"),
        (("--run", "r", "--input", "image=a"), "--input: expected with --rule only"),
        (("--rule", "mean", "--input", "image"), "--input: expected MODALITY=NAME, such as image=dinov2/cls"),
    ):
        refused = embedcache("derive", cache, *more, cwd=tmp_path)
        assert refused.code == 1
        assert message in refused.stderr
