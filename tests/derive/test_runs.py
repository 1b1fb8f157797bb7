"""Outputs of a trained run as features."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.dataset.vectors import Vectors
from embedcache.derive.derive import derive_from_run
from embedcache.errors import FingerprintError, PathError, UnknownNameError
from embedcache.extract.repair import measure_drift, verify_cache
from embedcache.extract.settings import VerifySettings
from embedcache.provenance import read_json
from embedcache.store.cache import Cache
from tests.cli.run import embedcache, succeed
from tests.edits import edit_record
from tests.train.runs import run as train


@pytest.fixture(scope="module")
def work(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on vectors and a run on tokens. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    train(cache_path, folder / "vectors")
    train(cache_path, folder / "tokens", image="open_toy/patches", text="open_toy/tokens", projector="token")
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
    inputs = read_json(other / "run.json")["inputs"]
    inputs["image"]["fingerprint"]["weights"] = "other"
    edit_record(other / "run.json", inputs=inputs)
    with pytest.raises(FingerprintError, match="the cache's open_toy/cls comes from another encoder"):
        derive_from_run(cache, other)


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
        (("--run", "r", "--input", "image=a"), "--input: expected with --rule only"),
        (("--rule", "mean", "--input", "image"), "--input: expected MODALITY=NAME, such as image=dinov2/cls"),
    ):
        refused = embedcache("derive", cache, *more, cwd=tmp_path)
        assert refused.code == 1
        assert message in refused.stderr
